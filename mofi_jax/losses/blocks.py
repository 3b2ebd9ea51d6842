"""What the losses share: mapping over shards, and walking a long axis in blocks.

A loss over millions of classes, or over a batch of 32,768 pairs, is a matrix of logits that must
never exist.  Each device computes a tile of its part, uses it and forgets it.  How large a tile may
be is decided here, in one place, from the kind of device.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from mofi_jax.distributed import meshes

# Specs of arrays inside the losses: rows over the batch axes, classes over all axes.
BATCH = P(meshes.BATCH_AXES)
CLASSES = P(meshes.ALL_AXES)

# fp32 bytes of one tile of logits.  Two to four of them live at once.  CPU caches want small tiles;
# a GPU needs large ones to fill its matrix units and to hide the launches of a loop's kernels.
TILE_BYTES = {"cpu": 2**22, "tpu": 2**26, "gpu": 2**27}


def tile_bytes(mesh: Mesh) -> int:
    """Largest tile of fp32 logits on this mesh's kind of device."""
    platform = mesh.devices.flat[0].platform
    return TILE_BYTES.get(platform, TILE_BYTES["gpu"])


def shard_map(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Any:
    """`jax.shard_map` for functions that write both of their passes themselves (custom_vjp)."""
    # The replication check takes gathered arrays for different ones on each device.  It guards
    # autodiff through collectives, which never happens here: custom_vjp is outside of every map.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def gather_batch(x: Array) -> Array:
    """Inside a map: the rows of all batch shards, on every device."""
    return lax.all_gather(x, meshes.BATCH_AXES, axis=0, tiled=True)


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


def even_length(size: int, limit: int, multiple: int) -> int:
    """Length of the blocks that cut range(size) into the fewest, nearly equal, parts.

    A multiple of ``multiple``, unless one block does; at most ``limit``, unless that is smaller.
    """
    limit = limit // multiple * multiple
    parts = -(-size // max(limit, multiple))
    length = -(-size // parts)
    return size if parts == 1 else min(size, -(-length // multiple) * multiple)
