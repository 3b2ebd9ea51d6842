"""What images and texts of a batch are to each other, and what both contrastive losses share.

When texts are entity names, or speak of entities, many images of a batch show what another image's
text says.  `SAME_ENTITY` names what becomes of such pairs::

    off       negatives, as in CLIP and SigLIP
    masked    in no denominator and no sum: neither pulled together nor pushed apart
    positive  targets like the own pair
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import global_batch
from mofi_jax.losses import blocks

SAME_ENTITY = ("off", "masked", "positive")

# What a maximum over no pairs is: finite, so that no inf - inf can arise.
LOWEST = -1e30


class Pairs(NamedTuple):
    """What some images [i] and some texts [j] are to each other; bool [i, j].

    A pair with an invalid side is none of these.

    Attributes:
      own: the text came with the image.
      in_denominator: the pair has a logit in the loss.
      positive: the pair is a target; own pairs always are.
      wrong: the text is not about anything the image shows (to "off": it is another image's).
    """

    own: Bool[Array, "i j"]
    in_denominator: Bool[Array, "i j"]
    positive: Bool[Array, "i j"]
    wrong: Bool[Array, "i j"]


def pairs_of(
    own: Array,
    *,
    image_valid: Array,
    text_valid: Array,
    image_entities: Array | None,
    text_entity: Array | None,
    same_entity: str,
) -> Pairs:
    """Sorts pairs by their labels; the arguments are those of the losses, for these rows."""
    both = image_valid[:, None] & text_valid[None, :]
    own = own & both
    related = own
    if image_entities is not None and same_entity != "off":
        # One comparison per label, unrolled: XLA fuses these into the logits' own pass, whereas
        # an [i, j, k] comparison is materialised.
        for k in range(image_entities.shape[1]):
            related |= both & (image_entities[:, k, None] == text_entity[None, :])
    wrong = both & ~related
    if same_entity == "positive":
        return Pairs(own, in_denominator=both, positive=related, wrong=wrong)
    return Pairs(own, in_denominator=wrong | own, positive=own, wrong=wrong)


def dot(subscripts: str, a: Array, b: Array) -> Array:
    """Matrix product in fp32."""
    # fp32 means fp32 (no TF32, no bf16 passes): this loss is a per mille of a step's FLOPs, and
    # logits of up to 100 leave bf16 a resolution of 0.5.
    return jnp.einsum(
        subscripts,
        a.astype(jnp.float32),
        b.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )


def real_rows(rows: Array, valid: Array) -> Array:
    """The rows with zeros in place of invalid ones: 0 * inf would let their junk through."""
    return jnp.where(valid[:, None], rows, jnp.zeros((), rows.dtype))


def check(
    batch: int,
    image_entities: Array | None,
    text_entity: Array | None,
    same_entity: str,
    mesh: Mesh | None = None,
) -> None:
    """Raises BadInput for arguments no contrastive loss can take."""
    if same_entity not in SAME_ENTITY:
        raise BadInput(f"same_entity={same_entity!r}: choose from {', '.join(SAME_ENTITY)}.")
    if (image_entities is None) != (text_entity is None):
        given, missing = (
            ("image_entities", "text_entity")
            if text_entity is None
            else ("text_entity", "image_entities")
        )
        raise BadInput(f"{given} is given without {missing}: pass both or neither.")
    if mesh is not None and batch % (shards := global_batch.batch_shards(mesh)):
        raise BadInput(
            f"a batch of {batch} does not divide over {shards} batch shards: choose a multiple of "
            "that number."
        )


@dataclasses.dataclass(frozen=True)
class Static:
    """What is constant in the compiled program."""

    mesh: Mesh
    same_entity: str
    block_size: int | None

    def block(self, images: int, texts: int) -> int:
        """Texts in one tile of logits."""
        if self.block_size is not None:
            return min(self.block_size, texts)
        return blocks.even_length(texts, blocks.tile_bytes(self.mesh) // 4 // images, 128)
