"""One measurement of attention by each implementation; `benchmarks.train_step` runs many.

    python -m benchmarks.attention_case '{"batch": 512, "length": 197, "heads": 12, ...}'

Prints one JSON object.  Measured are products with weights before and after attention too, as in
a block: how an implementation wants its inputs laid out and padded costs time there.
"""

import dataclasses
import json
import math
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mofi_jax.common.errors import BadInput
from mofi_jax.model import attention, layers, norms

LOOPS, TURNS = 10, 7


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    length: int
    heads: int
    head_dim: int
    causal: bool
    dtype: str


def measure(case: Case) -> dict[str, Any]:
    """Times forward and backward pass of `layers.Attention`, interleaved.

    Returns:
      implementations: name -> {seconds, error_of_gradients (relative, against float32 by xla)} or
      {error}; fastest; auto: what "auto" comes to here; platform, device (its kind), devices.
    """
    width = case.heads * case.head_dim
    module = layers.Attention(
        width, case.heads, std=width**-0.5, out_std=width**-0.5, rngs=nnx.Rngs(0)
    )
    graph, params = nnx.split((module, norms.LayerNorm(width, eps=1e-5)))
    shape = case.batch, case.length, width
    x, direction = jax.random.normal(jax.random.key(1), (2, *shape), jnp.dtype(case.dtype))

    device = jax.devices()[0]

    def gradients(implementation: str, dtype: Any) -> Any:
        @jax.jit
        def run(params: Any, x: jax.Array, direction: jax.Array) -> Any:
            def loss(params: Any, x: jax.Array) -> jax.Array:
                more = attention.padding(case.length, implementation)
                block, norm = nnx.merge(graph, params)
                padded = jnp.pad(x.astype(dtype), ((0, 0), (0, more), (0, 0)))
                y = jax.tree.map(lambda leaf: leaf.astype(dtype), block.fold(norm))(
                    padded.reshape(-1, width),
                    sequence=padded.shape[1],
                    heads=case.heads,
                    length=case.length,
                    causal=case.causal,
                    implementation=implementation,
                    mesh=None,
                    platform=device.platform,
                ).reshape(padded.shape)[:, : case.length]
                return jnp.vdot(y.astype(jnp.float32), direction.astype(jnp.float32))

            return jax.grad(loss, (0, 1))(params, x)

        return run

    few = min(case.batch, 8)
    some = params, x[:few], direction[:few]
    with jax.default_matmul_precision("highest"):
        exact = gradients("xla", jnp.float32)(*some)
    what = {
        "length": case.length,
        "causal": case.causal,
        "head_dim": case.head_dim,
        "dtype": jnp.dtype(case.dtype),
        "device": device,
    }
    results: dict[str, Any] = {}
    runs = {}
    for name in ("xla", "cudnn", "split", "pallas"):
        try:
            if attention.choose(name, **what) != name:  # there is nothing to split
                continue
            run = gradients(name, jnp.dtype(case.dtype))
            error = difference(run(*some), exact)
            jax.block_until_ready(run(params, x, direction))
        except (BadInput, jax.errors.JaxRuntimeError, NotImplementedError) as reason:
            results[name] = {"error": str(reason).splitlines()[0][:300]}
            continue
        runs[name], results[name] = run, {"error_of_gradients": error}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(LOOPS):
                result = run(params, x, direction)
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / LOOPS)
    for name in runs:
        results[name]["seconds"] = statistics.median(seconds[name])
    return {
        "implementations": results,
        "fastest": min(runs, key=lambda name: results[name]["seconds"]),
        "auto": attention.choose("auto", **what),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
    }


def difference(gradients: Any, exact: Any) -> float:
    """The largest |gradient - exact| / |exact| of a tree's leaves; infinite where one is no number.

    The gradient of the keys' bias is zero in exact arithmetic: measured against the queries'.
    """
    worst = 0.0
    pairs = zip(
        jax.tree_util.tree_flatten_with_path(gradients)[0], jax.tree.leaves(exact), strict=True
    )
    largest = max(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(exact[0]))
    for (path, leaf), reference in pairs:
        scale = float(jnp.linalg.norm(reference))
        if "key" in jax.tree_util.keystr(path) and "bias" in jax.tree_util.keystr(path):
            scale = largest
        error = float(jnp.linalg.norm(leaf.astype(jnp.float32) - reference)) / scale
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
