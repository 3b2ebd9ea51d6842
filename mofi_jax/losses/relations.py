"""What images and texts of a batch are to each other, and what both contrastive losses share.

When texts are entity names, or speak of entities, many images of a batch show what another image's
text says.  `SAME_ENTITY` names what becomes of such pairs::

    off       negatives, as in CLIP and SigLIP
    masked    in no denominator and no sum: neither pulled together nor pushed apart
    positive  targets like the own pair
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool

from mofi_jax.common.errors import BadInput
from mofi_jax.losses import blocks

SAME_ENTITY = ("off", "masked", "positive")

# valid, image_entities, text_entity: arguments of the losses.
Labels = tuple[Array, Array | None, Array | None]


class Side(NamedTuple):
    """Some images, or some texts; zeros in place of what invalid rows hold."""

    embeddings: Array  # [n d] in their own dtype: as bf16 they are half as long under way
    valid: Array  # bool [n]
    entities: Array | None  # int [n k] `image_entities` or int [n] `text_entity` of the losses


class Pairs(NamedTuple):
    """What some images [i] and some texts [j] are to each other; bool [i, j].

    A pair with an invalid side is none of these.
    """

    own: Bool[Array, "i j"]  # the text came with the image
    in_denominator: Bool[Array, "i j"]  # the pair has a logit in the loss
    positive: Bool[Array, "i j"]  # the pair is a target; own pairs always are
    # The text is not about anything the image shows (to "off": it is another image's).
    wrong: Bool[Array, "i j"]


def checked(
    valid: Array, image_entities: Array | None, text_entity: Array | None, same_entity: str
) -> Labels:
    """The labels; raises BadInput for those that no contrastive loss can take."""
    if same_entity not in SAME_ENTITY:
        raise BadInput(f"same_entity={same_entity!r}: choose from {', '.join(SAME_ENTITY)}.")
    if (image_entities is None) != (text_entity is None):
        names = ("image_entities", "text_entity")
        given, missing = names if text_entity is None else reversed(names)
        raise BadInput(f"{given} is given without {missing}: pass both or neither.")
    return valid > 0, image_entities, text_entity


def sides(image: Array, text: Array, labels: Labels) -> tuple[Side, Side]:
    """Images and texts of some rows."""
    valid, image_entities, text_entity = labels

    def side(rows: Array, entities: Array | None) -> Side:
        # 0 * inf would let through what invalid rows hold.
        return Side(jnp.where(valid[:, None], rows, jnp.zeros((), rows.dtype)), valid, entities)

    return side(image, image_entities), side(text, text_entity)


def tile(
    images: Side, texts: Side, start: Any, size: int, same_entity: str, first_own: Any
) -> tuple[Array, Pairs, Array]:
    """Images against the texts start, start + 1, ...: fp32 cosines [i, j], pairs, embeddings.

    `first_own` is the place of the first image's own text, the others' follow; None if they are not
    among these texts.
    """
    texts, count = blocks.slice_rows(texts, start, size), images.valid.shape[0]
    # In fp32: these losses are a per mille of a step's FLOPs, and logits of up to 100 leave bf16 a
    # resolution of 0.5.
    cos = blocks.dot("id,jd->ij", images.embeddings, texts.embeddings)
    both = images.valid[:, None] & texts.valid[None, :]
    own = jnp.zeros_like(both)
    if first_own is not None:
        own = both & (first_own + jnp.arange(count)[:, None] == start + jnp.arange(size))
    related = own
    if images.entities is not None and same_entity != "off":
        # One comparison per label, unrolled: XLA fuses these into the logits' own pass, whereas
        # an [i, j, k] comparison is materialised.
        for k in range(images.entities.shape[1]):
            related |= both & (images.entities[:, k, None] == texts.entities[None, :])
    wrong = both & ~related
    if same_entity == "positive":
        pairs = Pairs(own, in_denominator=both, positive=related, wrong=wrong)
    else:
        pairs = Pairs(own, in_denominator=wrong | own, positive=own, wrong=wrong)
    return cos, pairs, texts.embeddings


def loss_sum(total: Array, valid: Array, own_cosine: Array, best_wrong: Any) -> blocks.LossSum:
    """The sums of some rows; a row counts a half as correct for each of `best_wrong` it beats.

    Args:
      best_wrong: two fp32 [n], each image's and each text's largest cosine of a wrong pair.
    """
    hits = sum(0.5 * (own_cosine > wrong) for wrong in best_wrong)
    return blocks.LossSum(
        total=total,
        count=jnp.sum(valid, dtype=jnp.float32),
        correct=jnp.sum(jnp.where(valid, hits, 0.0)),
        cosine=jnp.sum(jnp.where(valid, own_cosine, 0.0)),
    )
