"""A transformer block as textbooks write it, compiled for TPUs: what the tuned step is held to.

    python -m benchmarks.textbook_block B/16 v5e:2x2 128

Forward and backward of pre-LN blocks with XLA's attention, data parallel, nothing recomputed: the
difference of three blocks and two, by the TPU compiler's clock.  Prints one JSON object.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import common
from mofi_jax.plan import clock, hlo, tpu_topology
from mofi_jax.telemetry import accelerators


def norm(x, scale, bias):
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
    return (unit * scale + bias).astype(x.dtype)


def block(x, weights):
    attention, mlp = (jax.tree.map(lambda w: w.astype(x.dtype), weights[k]) for k in ("a", "m"))
    unit = norm(x, *weights["norm1"])
    query, key, value = (jnp.einsum("bnw,whd->bnhd", unit, attention[name]) for name in "qkv")
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    with jax.named_scope("softmax"):
        shares = jax.nn.softmax(logits.astype(jnp.float32)).astype(x.dtype)
    x += jnp.einsum("bnhd,hdw->bnw", jnp.einsum("bhqk,bkhd->bqhd", shares, value), attention["o"])
    return x + jax.nn.gelu(norm(x, *weights["norm2"]) @ mlp[0]) @ mlp[1]


def estimate(depth, width, heads, tokens, batch, devices):
    """Seconds by cause of forward and backward through `depth` blocks, `batch` rows a device."""
    mesh = Mesh(np.array(devices), ("batch",))
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))

    def struct(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    projection = struct(width, heads, width // heads)
    weights = {
        "norm1": (struct(width), struct(width)),
        "norm2": (struct(width), struct(width)),
        "a": dict.fromkeys("qkv", projection) | {"o": struct(heads, width // heads, width)},
        "m": (struct(width, 4 * width), struct(4 * width, width)),
    }

    def loss(stack, x):
        for weights in stack:
            x = block(x, weights)
        return jnp.square(x.astype(jnp.float32)).sum()

    x = struct(batch * len(devices), tokens, width, dtype=jnp.bfloat16)
    shardings = {"in_shardings": (whole, rows), "out_shardings": (whole, rows)}
    step = jax.jit(jax.grad(loss, (0, 1)), **shardings).lower([weights] * depth, x)
    program = hlo.Program(step.compile().as_text())
    chip = accelerators.chip_of(devices[0])
    # The gradients' sums over devices are left out: nothing else runs that could hide them.
    return clock.seconds(program, (), chip)[0]


def main(variant: str, topology: str, batch: str) -> None:
    devices = tpu_topology.devices(topology)
    chip = accelerators.chip_of(devices[0])
    model = common.model(variant, image_size=224, context_length=77)
    width, heads = model.image.width, model.image.heads
    tokens = (224 // model.patch_size) ** 2 + 1
    rows = int(batch) // chip.devices
    two, three = (estimate(n, width, heads, tokens, rows, devices) for n in (2, 3))
    causes = {cause: three[cause] - two.get(cause, 0) for cause in three}
    arithmetic = 3 * 2.0 * rows * tokens * (12 * width**2 + 2 * tokens * width)
    mfu = arithmetic / chip.device_flops / sum(causes.values())
    print(json.dumps({"estimate": causes, "mfu": mfu}))


if __name__ == "__main__":
    main(*sys.argv[1:])
