"""Building blocks of both towers: attention, MLP, pre-LN block, and the scanned stack of blocks.

Parameterised exactly as Hugging Face CLIPModel (q, k, v and out with bias, two-layer MLP, LayerNorm
before each), so that weights move in both directions without loss.  Matrix products run in the
compute dtype, LayerNorm statistics and the softmax in float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import layout
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mofi_jax import partition
from mofi_jax.model import attention

# What is applied to each element by itself keeps its input for the backward pass, whatever a block
# keeps: the float32 values in between take several times the memory, and the backward pass reads
# the input anyway.
_keep_input = functools.partial(jax.checkpoint, prevent_cse=False)


@jax.custom_vjp
def _gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), in float32: 1 + erf in bfloat16 would lose the small values of negative x.

    The gradient is written out so that it needs the input alone, and not the value again.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * _normal(x32, x.dtype)[0]).astype(x.dtype)


def _normal(x: jax.Array, precision: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Distribution function and density of the normal distribution, float32.

    For what is rounded to bfloat16 anyway, Abramowitz and Stegun's 7.1.26, off by less than 3e-7:
    it has the density as a factor, so that both cost one exponential.  Otherwise erf, and not the
    erfc of `jax.nn.gelu(approximate=False)`, which XLA makes of two polynomials: four times as long
    on a CPU, forward and backward.
    """
    density = jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
    if precision == jnp.float32:
        return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5))), density
    t = 1 / (1 + (0.3275911 * math.sqrt(0.5)) * jnp.abs(x))
    terms = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
    series = jnp.zeros_like(x)
    for term in reversed(terms):
        series = t * (0.5 * (2 * math.pi) ** 0.5 * term + series)
    tail = series * density
    return jnp.where(x < 0, tail, 1 - tail), density


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _gelu(x), x


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    x32 = x.astype(jnp.float32)
    below, density = _normal(x32, x.dtype)
    return ((gradient.astype(jnp.float32) * (below + x32 * density)).astype(x.dtype),)


_gelu.defvjp(_gelu_forward, _gelu_backward)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_tanh": _keep_input(functools.partial(jax.nn.gelu, approximate=True)),
    "quick_gelu": _keep_input(lambda x: x * jax.nn.sigmoid(1.702 * x)),  # OpenAI CLIP
}

# Stacks of up to so many layers run without a loop.  A few layers compile quickly anyway, and a
# loop makes a CPU copy each layer's activations (a step of three layers takes 1.25 times as long in
# one).  A GPU copies them too: the step of B/16 took 1.17 times as long in a loop on an H200, and
# compiled in 12 s instead of 17.  TPUs of a pod compile for minutes: there depth must not matter.
UNROLLED_LAYERS = {"cpu": 4, "gpu": 48, "tpu": 4}


def _matrix_products(primitive: Any, *avals: Any, **params: Any) -> bool:
    # What XLA's attention gives is a product of two batched arrays, hence computed again: a few
    # percent of a block's arithmetic.  Keeping it would not help, as its gradient needs the logits.
    # cuDNN's gives what its gradient needs.
    return primitive.name.startswith(
        "dot_product_attention_fwd"
    ) or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *avals, **params)


# What a block keeps from its forward for its backward pass, beside the inputs of norms and
# activations: everything, for B/16 16 times the size of its input with cuDNN's attention and 25
# with XLA's; the results of matrix products, 9 times (10 with cuDNN's); its input alone.
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": _matrix_products,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis; statistics in float32 whatever the compute dtype."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b w"]) -> Float[Array, "*b w"]:
        return _normalise(x, self.scale[...], self.bias[...], self.eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    return _normalise_forward(x, scale, bias, eps)[0]


def _normalise_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    centred = x32 - mean
    factor = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return (centred * factor * scale + bias).astype(x.dtype), (x, scale, mean, factor)


def _normalise_backward(
    eps: float, kept: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    del eps
    x, scale, mean, factor = kept
    unit = (x.astype(jnp.float32) - mean) * factor
    g = gradient.astype(jnp.float32) * scale
    along = (g * unit).mean(-1, keepdims=True)
    d_x = factor * (g - g.mean(-1, keepdims=True) - unit * along)
    # From the arrays again: sharing g * unit with the sums along the rows, XLA would write it to
    # memory in float32 and read it back (11 ms of a step of 280 of B/16 on an H200).
    x, gradient = jax.lax.optimization_barrier((x, gradient))
    unit = (x.astype(jnp.float32) - mean) * factor
    g = gradient.astype(jnp.float32)
    rows = tuple(range(x.ndim - 1))
    return d_x.astype(x.dtype), (g * unit).sum(rows), g.sum(rows)


_normalise.defvjp(_normalise_forward, _normalise_backward)


class Projection(nnx.Module):
    """x @ kernel (+ bias) over the last ``len(inputs)`` axes of x; kernel [*inputs, *outputs]."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        std: float,
        use_bias: bool,
        rngs: nnx.Rngs,
    ):
        kernel = std * jax.random.normal(rngs.params(), inputs + outputs, jnp.float32)
        self.kernel = nnx.Param(kernel)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))
        self.contracted = len(inputs)
        self.use_bias = use_bias

    def __call__(self, x: Array) -> Array:
        y = jnp.tensordot(x, self.kernel[...].astype(x.dtype), axes=self.contracted)
        return y + self.bias[...].astype(x.dtype) if self.use_bias else y


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, *, std: float, out_std: float, rngs: nnx.Rngs):
        shape = (heads, width // heads)
        make = functools.partial(Projection, use_bias=True, rngs=rngs)
        self.query = make((width,), shape, std=std)
        self.key = make((width,), shape, std=std)
        self.value = make((width,), shape, std=std)
        self.out = make(shape, (width,), std=out_std)

    def __call__(
        self, x: Float[Array, "b n w"], *, length: int, causal: bool, implementation: str
    ) -> Float[Array, "b n w"]:
        """Arguments as of `attention.attend`."""
        attended = attention.attend(
            self.query(x),
            self.key(x),
            self.value(x),
            length=length,
            causal=causal,
            implementation=implementation,
        )
        return self.out(attended)


class Mlp(nnx.Module):
    """width -> 4 width -> width."""

    def __init__(self, width: int, *, activation: str, std: float, out_std: float, rngs: nnx.Rngs):
        self.fc1 = Projection((width,), (4 * width,), std=std, use_bias=True, rngs=rngs)
        self.fc2 = Projection((4 * width,), (width,), std=out_std, use_bias=True, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "b n w"]) -> Float[Array, "b n w"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nnx.Module):
    """Pre-LN transformer block; initialisation as CLIP's (arXiv 2103.00020, code release)."""

    def __init__(
        self, width: int, heads: int, *, layers: int, activation: str, eps: float, rngs: nnx.Rngs
    ):
        std, out_std = width**-0.5, width**-0.5 * (2 * layers) ** -0.5
        self.norm1 = LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, std=std, out_std=out_std, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = Mlp(
            width, activation=activation, std=(2 * width) ** -0.5, out_std=out_std, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "b n w"], *, length: int, causal: bool, implementation: str
    ) -> Float[Array, "b n w"]:
        x = x + self.attention(
            self.norm1(x), length=length, causal=causal, implementation=implementation
        )
        return x + self.mlp(self.norm2(x))


def make_stack(
    width: int,
    heads: int,
    layers: int,
    *,
    activation: str,
    eps: float,
    rngs: nnx.Rngs,
) -> Block:
    """``layers`` blocks as one Block whose parameters carry a leading layer axis."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: nnx.Rngs) -> Block:
        return Block(width, heads, layers=layers, activation=activation, eps=eps, rngs=rngs)

    return create(rngs)


def run_stack(
    blocks: Block,
    x: Float[Array, "b n w"],
    *,
    causal: bool,
    implementation: str,
    remat: str,
    mesh: Mesh | None = None,
) -> Float[Array, "b n w"]:
    """Scans over the layer axis, so that compile time does not grow with depth.

    Args:
      causal: whether a position sees only those before it.
      implementation: of attention, one of `attention.IMPLEMENTATIONS`.
      remat: one of REMAT.
      mesh: whose batch axes the rows of x are split over.
    """
    graph, params = nnx.split(blocks)
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    head_dim = blocks.attention.query.bias.shape[-1]
    chosen = attention.choose(implementation, head_dim=head_dim, dtype=x.dtype, device=device)
    length = x.shape[1]
    # Once for all layers: padding in each of them would cost a copy of its input and its output.
    x = jnp.pad(x, ((0, 0), (0, attention.padding(length, chosen)), (0, 0)))

    def body(x: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
        # The weights are split over the same devices as the rows are.  Left to itself, the compiler
        # may split widths in place of rows, so that every device holds the whole batch.
        x = partition.over_batch(x, mesh)
        if device.platform == "gpu":
            x = _row_major(x)
        x = nnx.merge(graph, layer)(x, length=length, causal=causal, implementation=chosen)
        return x, None

    depth = jax.tree.leaves(params)[0].shape[0]
    unrolled = depth <= UNROLLED_LAYERS.get(device.platform, 0)
    if policy := REMAT[remat]:
        # Forward and backward loop are apart; without loops XLA would find the same computation
        # twice and keep its result.
        body = jax.checkpoint(body, prevent_cse=unrolled, policy=policy)
    x = jax.lax.scan(body, x, params, unroll=depth if unrolled else 1)[0]
    return x[:, :length]


def _row_major(x: Array) -> Array:
    """Keeps XLA from laying the batch out last, which it chose for the residuals on an H200.

    Matrix products want their rows whole, so that each was preceded and followed by a transpose.
    """
    return layout.with_layout_constraint(x, layout.Layout(tuple(range(x.ndim))))
