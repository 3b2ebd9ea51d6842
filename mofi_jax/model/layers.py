"""Building blocks of both towers: attention, MLP, pre-LN block, and the scanned stack of blocks.

Parameterised exactly as Hugging Face CLIPModel (q, k, v and out with bias, two-layer MLP, LayerNorm
before each), so that weights move in both directions without loss.  Matrix products run in the
compute dtype, LayerNorm statistics and the softmax in float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import layout
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mofi_jax.distributed import global_batch
from mofi_jax.model import activations, attention

# Stacks of up to so many layers run without a loop.  A few layers compile quickly anyway, and a
# loop makes a CPU copy each layer's activations (a step of three layers takes 1.25 times as long in
# one).  A GPU copies them too: the step of B/16 took 1.17 times as long in a loop on an H200, and
# compiled in 12 s instead of 17.  TPUs of a pod compile for minutes: there depth must not matter.
UNROLLED_LAYERS = {"cpu": 4, "gpu": 48, "tpu": 4}


def _matrix_products(primitive: Any, *avals: Any, **params: Any) -> bool:
    # The output of XLA's attention is a product of two batched arrays and so computed again: a few
    # percent of a block's arithmetic.  Saving it would not help, as its gradient needs the logits.
    # cuDNN's forward returns what its gradient needs.
    return primitive.name.startswith(
        "dot_product_attention_fwd"
    ) or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *avals, **params)


# What a block saves for its backward pass, beside the inputs of norms and activations: everything,
# for B/16 16 times the size of its input with cuDNN's attention and 25 with XLA's; the results of
# matrix products, 9 times (10 with cuDNN's); its input alone.
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": _matrix_products,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _moments(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Mean, and one over the standard deviation, float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    return mean, jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _standardise(x: jax.Array, eps: float, recompute_moments: bool) -> jax.Array:
    """x with mean 0 and variance 1 along its last axis; arithmetic in float32.

    Args:
      recompute_moments: the backward pass computes mean and variance again.  XLA for GPUs makes one
        pass over the array in either direction where nothing else comes out; TPUs need one for each
        mean.
    """
    return _standardise_forward(x, eps, recompute_moments)[0]


def _standardise_forward(x, eps, _):
    mean, factor = _moments(x, eps)
    return ((x.astype(jnp.float32) - mean) * factor).astype(x.dtype), (x, mean, factor)


def _standardise_backward(eps, recompute_moments, residuals, gradient):
    x, mean, factor = residuals
    if recompute_moments:
        x, gradient = jax.lax.optimization_barrier((x, gradient))
        mean, factor = _moments(x, eps)
    unit = (x.astype(jnp.float32) - mean) * factor
    g = gradient.astype(jnp.float32)
    along = (g * unit).mean(-1, keepdims=True)
    return ((factor * (g - g.mean(-1, keepdims=True) - unit * along)).astype(x.dtype),)


_standardise.defvjp(_standardise_forward, _standardise_backward)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis; statistics in float32 whatever the compute dtype."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b w"]) -> Float[Array, "*b w"]:
        unit = _standardise(x.astype(jnp.float32), self.eps, False)
        return (unit * self.scale[...] + self.bias[...]).astype(x.dtype)


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

    def after(self, norm: LayerNorm) -> tuple[Array, Array]:
        """Kernel and bias, float32, with scale and bias of the norm before them folded in.

        (unit * scale + bias) @ kernel is unit @ (scale * kernel) + bias @ kernel, so that the
        gradients of scale and bias are sums over the kernel and not over all rows of a batch.
        Parameters may have leading axes, all the same.
        """
        scale, bias, kernel = norm.scale[...], norm.bias[...], self.kernel[...]
        width_axis = scale.ndim - 1
        outputs = (1,) * (kernel.ndim - scale.ndim)
        scale, bias = (x.reshape(*x.shape, *outputs) for x in (scale, bias))
        return scale * kernel, self.bias[...] + (bias * kernel).sum(width_axis)


class AttentionWeights(NamedTuple):
    """Folded weights (`Attention.fold`); any leading axes."""

    query: Float[Array, "*l w h d"]
    query_bias: Float[Array, "*l h d"]
    key: Float[Array, "*l w h d"]
    value: Float[Array, "*l w h d"]
    out: Float[Array, "*l h d w"]
    out_bias: Float[Array, "*l w"]

    def __call__(self, unit: Float[Array, "b n w"], **options: Any) -> Float[Array, "b n w"]:
        """Attention of standardised inputs; options of `attention.attend`."""
        attended = attention.attend(
            jnp.tensordot(unit, self.query, 1) + self.query_bias,
            jnp.tensordot(unit, self.key, 1),
            jnp.tensordot(unit, self.value, 1),
            **options,
        )
        return jnp.tensordot(attended, self.out, 2) + self.out_bias


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, *, std: float, out_std: float, rngs: nnx.Rngs):
        shape = (heads, width // heads)
        make = functools.partial(Projection, use_bias=True, rngs=rngs)
        self.query = make((width,), shape, std=std)
        self.key = make((width,), shape, std=std)
        self.value = make((width,), shape, std=std)
        self.out = make(shape, (width,), std=out_std)

    def fold(self, norm: LayerNorm) -> AttentionWeights:
        """The weights with scale and bias of the norm before them folded in, float32.

        Two of the four biases need no pass over activations, forward or backward.  The key's adds
        the same to all logits of a query, which the softmax removes: it is never trained, and there
        for other implementations' sake alone.  The value's passes the weighted mean unchanged, so
        that the output's kernel takes it to the output's bias.
        """
        query, query_bias = self.query.after(norm)
        key, _ = self.key.after(norm)
        value, value_bias = self.value.after(norm)
        out = self.out.kernel[...]
        through = (value_bias[..., None] * out).sum((-3, -2))
        return AttentionWeights(query, query_bias, key, value, out, self.out.bias[...] + through)


class MlpWeights(NamedTuple):
    """As `Mlp.fold` returns them; any leading axes."""

    fc1: Float[Array, "*l w m"]
    fc1_bias: Float[Array, "*l m"]
    fc2: Float[Array, "*l m w"]
    fc2_bias: Float[Array, "*l w"]

    def __call__(self, unit: Float[Array, "b n w"], *, activation: str) -> Float[Array, "b n w"]:
        """The MLP of standardised inputs."""
        hidden = activations.ACTIVATIONS[activation](unit @ self.fc1 + self.fc1_bias)
        return hidden @ self.fc2 + self.fc2_bias


class Mlp(nnx.Module):
    """width -> 4 width -> width."""

    def __init__(self, width: int, *, std: float, out_std: float, rngs: nnx.Rngs):
        self.fc1 = Projection((width,), (4 * width,), std=std, use_bias=True, rngs=rngs)
        self.fc2 = Projection((4 * width,), (width,), std=out_std, use_bias=True, rngs=rngs)

    def fold(self, norm: LayerNorm) -> MlpWeights:
        """The weights with scale and bias of the norm before them folded in, float32."""
        return MlpWeights(*self.fc1.after(norm), self.fc2.kernel[...], self.fc2.bias[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _cast(stacked: Array, dtype: jnp.dtype) -> Array:
    """To the compute dtype, with a gradient that is materialised as one array.

    Without a loop over the layers, XLA would fuse the choice among all layers' gradients into the
    optimiser: 6 ms of L/14's step of 280 on an H200, whose memory would allow for 2.
    """
    return stacked.astype(dtype)


_cast.defvjp(
    lambda stacked, dtype: (stacked.astype(dtype), None),
    lambda dtype, _, gradient: (jax.lax.optimization_barrier(gradient).astype(jnp.float32),),
)


class Block(nnx.Module):
    """Pre-LN transformer block; initialisation as CLIP's (arXiv 2103.00020, code release).

    Or a stack of them, whose parameters have a leading layer axis (`make_stack`).
    """

    def __init__(self, tower: Any, config: Any, rngs: nnx.Rngs):
        width, eps = tower.width, config.layer_norm_eps
        std, out_std = width**-0.5, width**-0.5 * (2 * tower.layers) ** -0.5
        self.norm1 = LayerNorm(width, eps=eps)
        self.attention = Attention(width, tower.heads, std=std, out_std=out_std, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, std=(2 * width) ** -0.5, out_std=out_std, rngs=rngs)
        self.activation = config.activation

    def fold(self, dtype: jnp.dtype) -> tuple[AttentionWeights, MlpWeights]:
        """The folded weights, in the compute dtype."""
        weights = self.attention.fold(self.norm1), self.mlp.fold(self.norm2)
        return jax.tree.map(lambda leaf: _cast(leaf, dtype), weights)

    def run(
        self,
        x: Float[Array, "b n w"],
        weights: tuple[AttentionWeights, MlpWeights],
        *,
        recompute_moments: bool,
        **options: Any,
    ) -> Float[Array, "b n w"]:
        """One layer with its weights; options of `attention.attend`."""
        attend, mlp = weights
        x = x + attend(_standardise(x, self.norm1.eps, recompute_moments), **options)
        unit = _standardise(x, self.norm2.eps, recompute_moments)
        return x + mlp(unit, activation=self.activation)


def make_stack(tower: Any, config: Any, rngs: nnx.Rngs) -> Block:
    """A tower's blocks as one Block whose parameters carry a leading layer axis."""

    @nnx.split_rngs(splits=tower.layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: nnx.Rngs) -> Block:
        return Block(tower, config, rngs)

    return create(rngs)


def run_stack(
    blocks: Block, x: Float[Array, "b n w"], config: Any, *, causal: bool, mesh: Mesh | None = None
) -> Float[Array, "b n w"]:
    """Scans over the layer axis, so that compile time does not grow with depth.

    The rows of x are split over the batch axes of the mesh.
    """
    weights = blocks.fold(x.dtype)
    depth, *_, head_dim = weights[0].query.shape
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    on_gpu = device.platform == "gpu"
    chosen = attention.choose(config.attention, head_dim=head_dim, dtype=x.dtype, device=device)
    length = x.shape[1]
    # Once for all layers: padding in each of them would cost a copy of its input and its output.
    x = jnp.pad(x, ((0, 0), (0, attention.padding(length, chosen)), (0, 0)))

    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        # The weights are split over the same devices as the rows are.  Left to itself, the compiler
        # may split widths in place of rows, so that every device holds the whole batch.
        x = global_batch.over_batch(x, mesh)
        if on_gpu:
            # XLA chose to lay the batch out last for the residuals on an H200.  Matrix products
            # want their rows whole, so that each was preceded and followed by a transpose.
            x = layout.with_layout_constraint(x, layout.Layout(tuple(range(x.ndim))))
        options = {"length": length, "causal": causal, "implementation": chosen}
        return blocks.run(x, layer, recompute_moments=on_gpu, **options), None

    unrolled = depth <= UNROLLED_LAYERS.get(device.platform, 0)
    if policy := REMAT[config.remat]:
        # Forward and backward loop are apart; without loops XLA would find the same computation
        # twice and keep its result.
        body = jax.checkpoint(body, prevent_cse=unrolled, policy=policy)
    x = jax.lax.scan(body, x, weights, unroll=depth if unrolled else 1)[0]
    return x[:, :length]
