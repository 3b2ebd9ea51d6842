"""A model as functions: pixels, texts and embeddings in, numpy out.

`Towers` are a model's functions without its parameters, which is what evaluators and the training
loop share.  `RawPixels` is the baseline with the same interface.

In a multi-host job every host passes the same inputs and gets all results; the devices of each are
given only what lies on them.  Pictures that lie on the devices already stay there.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Float32, Int32, UInt8

from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops, records
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.distributed import global_batch, meshes, sharding
from mofi_jax.losses import class_order, entity_topk, mapped_table
from mofi_jax.model import image as image_lib
from mofi_jax.model import mofi


@dataclasses.dataclass(frozen=True)
class Towers:
    """The functions of a model; parameters are an argument."""

    config: mofi.MofiConfig
    tokenizer: tokenizer_lib.Tokenizer | None  # None for a model without a text tower
    entities: records.Entities | None  # the vocabulary of the class table, None without one
    preprocess: str  # picture operations (`data.ops`) from bytes to uint8 [s, s, 3]
    mesh: Mesh  # batches are split over it
    batch_size: int = 256  # of all devices together, rounded up to what the mesh can split evenly

    @property
    def image_size(self) -> int:
        return self.config.image_size

    def embed_images(
        self,
        params: mofi.Params,
        images: UInt8[np.ndarray | jax.Array, "n s s 3"] | Float32[np.ndarray, "n s s 3"],
    ) -> Float32[np.ndarray | jax.Array, "n d"]:
        """L2-normalised embeddings of RGB pictures as `decode` gives them, or normalised pixels.

        A jax array is one batch, split over all devices of the mesh, and so are its embeddings.
        """
        if isinstance(images, jax.Array):
            return self._split_step(params, images)
        return self._in_batches(self._image_step, params, images)

    def embed_image_batches(
        self, params: mofi.Params, batches: Iterable[UInt8[np.ndarray, "_ s s 3"]]
    ) -> Iterator[Float32[np.ndarray, "_ d"]]:
        """`embed_images` of a stream: while the devices work on a batch, the next one is fetched.

        Batches have `batch_size` pictures or fewer; yields the embeddings of each, in order.
        """
        return self._stream(self._image_step, params, batches, self._step_size)

    def embed_texts(self, params: mofi.Params, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        """L2-normalised embeddings of texts of any length; raises BadInput without a text tower."""
        if "text" not in params:
            raise BadInput(
                "The model has no text tower, so it cannot read text: use one trained with "
                "task=contrastive or task=multitask."
            )
        if self.tokenizer is None:
            raise BadInput(
                f"The model has no {records.TOKENIZER_FILE}, so it cannot read text: put the file "
                "it was trained with into its folder."
            )
        return self._in_batches(self._text_step, params, self.tokenizer(list(texts)))

    def decode(self, data: bytes | UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
        """Picture file or RGB -> the pixels that the image tower takes, by `ops.decode_to`."""
        return ops.decode_to(self.config.image_size, self.preprocess, data)

    def put(self, params: Any) -> mofi.Params:
        """Parameters onto the mesh by its path rules; the class table is padded to divide.

        One that lies in a file stays there for CPUs, which would but copy it.
        """
        table = params.get(sharding.ENTITY_TABLE)
        mapped = isinstance(table, mapped_table.MappedTable)
        if table is not None and not (mapped and _on_cpus(self.mesh)):
            missing = class_order.padded_rows(table.shape[0], self.mesh) - table.shape[0]
            table = np.pad(np.asarray(table), ((0, missing), (0, 0)))
            params = params | {sharding.ENTITY_TABLE: table}
        return sharding.put(self.mesh, params)

    def nearest_entities(
        self, params: mofi.Params, embeddings: Float32[np.ndarray, "n d"], k: int
    ) -> tuple[Int32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
        """Ids and cosines of the k nearest entities, best first.

        Raises BadInput for a model without class table, or k beyond the vocabulary.
        """
        table = self._entity_table(params)
        if isinstance(table, mapped_table.MappedTable):
            return table.nearest(unit(embeddings), k)
        step = functools.partial(self._entity_step, k)
        return self._in_batches(step, table, unit(embeddings))

    def entity_log_sum(
        self, params: mofi.Params, embeddings: Float32[np.ndarray, "n d"], scale: float
    ) -> Float32[np.ndarray, " n"]:
        """log sum exp(scale * cosine) over the vocabulary; BadInput as `nearest_entities`."""
        table = self._entity_table(params)
        if isinstance(table, mapped_table.MappedTable):
            return table.log_sum(unit(embeddings), scale)
        inputs = table, np.float32(scale)
        return self._in_batches(self._log_sum_step, inputs, unit(embeddings))

    def _entity_table(self, params: mofi.Params) -> jax.Array | mapped_table.MappedTable:
        table = params.get(sharding.ENTITY_TABLE)
        if self.entities is None or table is None:
            raise BadInput(
                "The model has no entity table, so it cannot name entities: train it with "
                "task=supervised or task=multitask."
            )
        return table

    # Compiled once per instance: evaluators call these every few hundred steps.

    @functools.cached_property
    def _image_step(self) -> Callable:
        return self._jit(functools.partial(mofi.embed_images, self.config, mesh=self.mesh))

    @functools.cached_property
    def _split_step(self) -> Callable:
        step = functools.partial(mofi.embed_images, self.config, mesh=self.mesh)
        split = NamedSharding(self.mesh, PartitionSpec(meshes.ALL_AXES))
        return jax.jit(step, out_shardings=split)

    @functools.cached_property
    def _text_step(self) -> Callable:
        return self._jit(functools.partial(mofi.embed_texts, self.config, mesh=self.mesh))

    @functools.cached_property
    def _entity_step(self) -> Callable:
        entities = len(self.entities)

        def nearest(k: int, table: jax.Array, embeddings: jax.Array) -> tuple[jax.Array, jax.Array]:
            rows, cosines = entity_topk.entity_topk(
                embeddings, table, num_entities=entities, k=k, mesh=self.mesh
            )
            return class_order.table_entities(rows, entities), cosines

        return self._jit(nearest, static_argnums=0)

    @functools.cached_property
    def _log_sum_step(self) -> Callable:
        def log_sum(inputs: tuple[jax.Array, jax.Array], embeddings: jax.Array) -> jax.Array:
            size = len(self.entities)
            return entity_topk.entity_log_sum(
                embeddings, *inputs, num_entities=size, mesh=self.mesh
            )

        return self._jit(log_sum)

    def _jit(self, function: Callable, **options: Any) -> Callable:
        return jax.jit(function, out_shardings=sharding.replicated(self.mesh), **options)

    @property
    def _step_size(self) -> int:
        shards = global_batch.batch_shards(self.mesh)
        return -(-self.batch_size // shards) * shards

    def _in_batches(self, step: Callable, params: Any, inputs: np.ndarray) -> Any:
        """Numpy results of step(params, batch) over all inputs, in batches of one size.

        Fewer inputs than a batch get a smaller program: one picture does not cost as many as 256.
        """
        shards = global_batch.batch_shards(self.mesh)
        each = -(-max(len(inputs), 1) // shards)
        size = min(self._step_size, shards << (each - 1).bit_length())
        # One step even for no input at all, so that its result has the right shape.
        starts = range(0, max(len(inputs), 1), size)
        batches = (inputs[start : start + size] for start in starts)
        results = self._stream(step, params, batches, size)
        return jax.tree.map(lambda *parts: np.concatenate(parts), *results)

    def _stream(
        self, step: Callable, params: Any, batches: Iterable[np.ndarray], size: int
    ) -> Iterator[Any]:
        """Yields step(params, batch) without the padding that gives all batches one size."""
        split = global_batch.batch_sharding(self.mesh)

        def fetch(result: Any, rows: int) -> Any:
            return jax.tree.map(lambda array: np.asarray(array)[:rows], result)

        waiting = None
        for part in batches:
            batch = np.zeros((size, *part.shape[1:]), part.dtype)
            batch[: len(part)] = part
            placed = jax.make_array_from_callback(batch.shape, split, batch.__getitem__)
            result = step(params, placed)
            # Fetched one batch late: the next one is prepared while the devices work.
            if waiting is not None:
                yield fetch(*waiting)
            waiting = result, len(part)
        if waiting is not None:
            yield fetch(*waiting)


@dataclasses.dataclass(frozen=True)
class RawPixels:
    """The baseline: a picture is its own pixels. As `Towers`, for pictures only; no parameters.

    The feature is what an image tower would be given, as one L2-normalised vector.  On the bundled
    sample at 40 pixels that gives a GPR1200 mAP (query counted) of 0.249 on unseen.tar and 0.529 on
    seen.tar; with each picture's own mean removed it would be 0.263 and 0.536.
    """

    image_size: int
    mesh: Mesh
    tokenizer: None = None
    entities: None = None

    @property
    def preprocess(self) -> str:
        return f"decode|resize_short({self.image_size})|center_crop({self.image_size})"

    def embed_images(
        self, params: Any, images: UInt8[np.ndarray | jax.Array, "n s s 3"]
    ) -> Float32[jax.Array, "n d"]:
        del params
        return _raw_features(images)

    def decode(self, data: bytes) -> UInt8[np.ndarray, "s s 3"]:
        return ops.decode_to(self.image_size, self.preprocess, data)


def _on_cpus(mesh: Mesh) -> bool:
    return all(device.platform == "cpu" for device in mesh.devices.flat)


def unit(embeddings: Float[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Rows of length one; zeros stay zeros."""
    embeddings = np.asarray(embeddings, np.float32)
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=-1, keepdims=True), 1e-12)


@jax.jit
def _raw_features(images: jax.Array) -> jax.Array:
    pixels = images.astype(jnp.float32) / 255
    mean, std = (jnp.float32(values) for values in image_lib.pixel_statistics("clip"))
    flat = ((pixels - mean) / std).reshape(len(pixels), -1)
    return flat / jnp.maximum(jnp.linalg.norm(flat, axis=-1, keepdims=True), 1e-12)
