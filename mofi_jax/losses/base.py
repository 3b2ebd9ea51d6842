"""What every loss returns, and how it gets a hand-written backward pass over shards."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from mofi_jax.losses import blocks


class LossSum(NamedTuple):
    """Sums over the rows of the global batch that take part in a loss; all fp32 scalars.

    The mean loss is ``total / max(count, 1)``.  Sums of several batches or tasks add up, means of
    means do not.

    Attributes:
      total: sum of the rows' losses, the only member that carries a gradient.
      count: number of rows that take part.
      correct: number of those rows that rank the right answer strictly above every wrong one,
        margin aside.
      cosine: sum of those rows' cosines with the right answer, the closest where there are several.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]
    correct: Float[Array, ""]
    cosine: Float[Array, ""]


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
        run = blocks.shard_map(forward, mesh, specs, (P(), residual_specs))
        result, residuals = run(*inputs)
        return result, (inputs, residuals)

    def run_backward(saved: Any, cotangent: LossSum) -> tuple[Any, ...]:
        inputs, residuals = saved
        in_specs = *specs, residual_specs, P()
        run = blocks.shard_map(backward, mesh, in_specs, specs[:differentiable])
        gradients = run(*inputs, residuals, cotangent.total)
        return *gradients, *[None] * (len(inputs) - differentiable)

    loss.defvjp(run_forward, run_backward)
    return loss(*inputs)
