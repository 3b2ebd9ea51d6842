"""What losses share: their result, maps over shards, matrix products, walking an axis in blocks.

A loss over millions of classes, or over a batch of 32,768 pairs, is a matrix of logits that must
never exist.  Each device computes a tile of its part, uses it and forgets it.  How large a tile may
be is decided here, in one place, from the kind of device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import global_batch, meshes

# Specs of arrays inside the losses: rows over the batch axes, classes over all axes.
BATCH = P(meshes.BATCH_AXES)
CLASSES = P(meshes.ALL_AXES)

# The cosine or logit of what takes no part: finite, so that no inf - inf can arise, and its
# exponential is exactly 0.
MASKED = -1e30

# fp32 bytes of one tile of logits.  Two to four of them live at once.  CPU caches want small tiles;
# a GPU needs large ones to fill its matrix units and to hide the launches of a loop's kernels: the
# entity softmax ran at 375, 403 and 417 TFLOP/s on an H200 with 2**27, 2**28 and 2**29.
TILE_BYTES = {"cpu": 2**22, "tpu": 2**26, "gpu": 2**28}


class LossSum(NamedTuple):
    """Sums over the rows of the global batch that take part in a loss; all fp32 scalars.

    The mean loss is ``total / max(count, 1)``.  Sums of several batches or tasks add up, means of
    means do not.
    """

    total: Float[Array, ""]  # of the rows' losses, the only member that carries a gradient
    count: Float[Array, ""]  # rows that take part
    correct: Float[Array, ""]  # of these, whose right answer is strictly above every wrong one
    cosine: Float[Array, ""]  # of the rows with their right answer, the closest of several


def check_batch(batch: int, mesh: Mesh) -> None:
    """Raises BadInput unless the batch divides over the mesh's batch axes."""
    if batch % (shards := global_batch.batch_shards(mesh)):
        raise BadInput(
            f"a batch of {batch} does not divide over {shards} batch shards: choose a multiple of "
            "that number."
        )


def dot(subscripts: str, a: Array, b: Array, dtype: DTypeLike = jnp.float32) -> Array:
    """Matrix product of operands in `dtype`, accumulated and returned in fp32."""
    # fp32 means fp32: by default GPUs would round the operands to TF32 and TPUs to bf16.
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(
        subscripts,
        a.astype(dtype),
        b.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def shard_map(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Any:
    """`jax.shard_map` for functions that jax does not differentiate (`sharded`)."""
    # The replication check, which guards autodiff through collectives, takes gathered arrays for
    # different ones on each device.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def sharded(
    mesh: Mesh,
    forward: Callable[..., tuple[LossSum, Any]],
    backward: Callable[..., tuple[Any, ...]],
    inputs: tuple[Any, ...],
    specs: tuple[Any, ...],
    *,
    residual_specs: Any,
    differentiable: int,
) -> LossSum:
    """A loss whose two passes are functions of one device's shards.

    Args:
      forward: ``loss, residuals = forward(*inputs)``; the loss is that of the global batch.
      backward: ``gradients = backward(*inputs, residuals, gradient of loss.total)``.
      inputs: arrays, trees of arrays or None; the first ``differentiable`` have a gradient.
      specs: how each input, and its gradient, is split over the mesh.
    """

    @jax.custom_vjp
    def loss(*inputs: Any) -> LossSum:
        return run_forward(*inputs)[0]

    def run_forward(*inputs: Any) -> tuple[LossSum, Any]:
        run = shard_map(forward, mesh, specs, (P(), residual_specs))
        result, residuals = run(*inputs)
        return result, (inputs, residuals)

    def run_backward(saved: Any, cotangent: LossSum) -> tuple[Any, ...]:
        inputs, residuals = saved
        in_specs = *specs, residual_specs, P()
        run = shard_map(backward, mesh, in_specs, specs[:differentiable])
        gradients = run(*inputs, residuals, cotangent.total)
        return *gradients, *[None] * (len(inputs) - differentiable)

    loss.defvjp(run_forward, run_backward)
    return loss(*inputs)


def gather_batch(tree: Any) -> Any:
    """Inside a map: the rows of all batch shards, on every device, of every array."""
    return lax.all_gather(tree, meshes.BATCH_AXES, axis=0, tiled=True)


def slice_rows(tree: Any, start: Any, size: int) -> Any:
    """Rows start, start + 1, ... of every array."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), tree)


def update_rows(tree: Any, part: Any, start: Any) -> Any:
    """The arrays with the rows from start on replaced by those of part."""
    return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, 0), tree, part)


def over_blocks(size: int, block: int, body: Callable[[Any, Any, int], Any], carry: Any) -> Any:
    """``carry = body(carry, start, length)`` for the blocks of range(size); the last may be short.

    The tail is a block of its own: padding the axis would copy the array, and a clamped last slice
    would visit elements twice.
    """
    full, tail = divmod(size, block)
    if full == 1:
        carry = body(carry, 0, block)
    elif full:
        carry = lax.fori_loop(0, full, lambda i, c: body(c, i * block, block), carry)
    return body(carry, full * block, tail) if tail else carry


def tile_columns(
    mesh: Mesh, rows: int, columns: int, block_size: int | None, shortest: int = 0
) -> int:
    """Columns of a tile of `rows` rows: `block_size`, or what this kind of device has room for."""
    if block_size is not None:
        return min(block_size, columns)
    return even_length(columns, max(shortest, tile_logits(mesh) // rows), 128)


def tile_logits(mesh: Mesh) -> int:
    """Most fp32 logits of a tile on this mesh's kind of device."""
    return TILE_BYTES.get(mesh.devices.flat[0].platform, TILE_BYTES["gpu"]) // 4


def even_length(size: int, limit: int, multiple: int) -> int:
    """Length of the blocks that cut range(size) into the fewest, nearly equal, parts.

    A multiple of ``multiple``, unless one block does; at most ``limit``, unless that is smaller.
    """
    limit = limit // multiple * multiple
    parts = -(-size // max(limit, multiple))
    length = -(-size // parts)
    return size if parts == 1 else min(size, -(-length // multiple) * multiple)
