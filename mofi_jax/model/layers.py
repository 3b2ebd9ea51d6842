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
from mofi_jax.model import activations, attention, attention_kernel, attention_split, norms

# Stacks of up to so many layers run without a loop.  A few layers compile quickly anyway, and a
# loop makes a CPU copy each layer's activations (a step of three layers takes 1.25 times as long in
# one).  A GPU copies them too: the step of B/16 took 1.17 times as long in a loop on an H200, and
# compiled in 12 s instead of 17.  By the compiler's clock B/16 on a v5e takes 1.5 times as long in
# one: it copies what the kernels of attention read.
UNROLLED_LAYERS = {"cpu": 4, "gpu": 48, "tpu": 48}


def _matrix_products(primitive: Any, *avals: Any, **params: Any) -> bool:
    # The output of XLA's attention is a product of two batched arrays and so computed again: a few
    # percent of a block's arithmetic.  Saving it would not help, as its gradient needs the logits.
    # The forward of cuDNN and our kernel return what their gradients need.
    return primitive.name.startswith(
        ("dot_product_attention_fwd", "pallas_call")
    ) or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *avals, **params)


# What a block saves for its backward pass, beside the inputs of norms and activations: everything,
# for B/16 16 times the size of its input with cuDNN's attention and 25 with XLA's; the results of
# matrix products, 9 times (10 with cuDNN's); its input alone.
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": _matrix_products,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _add_bias(x: Float[Array, "r w"], bias: Float[Array, "w"], platform: str) -> Array:
    """x + bias; on TPUs the bias's gradient is a product.

    As a sum over rows it would be a pass over the gradient of its own, half as long as a product
    with a square kernel; rows of ones cost the matrix units a fiftieth.
    """
    return x + bias


def _add_bias_backward(platform, _, gradient):
    if platform == "tpu":
        ones = jnp.ones((attention_kernel.ROWS, len(gradient)), gradient.dtype)
        return gradient, (ones @ gradient)[0]
    return gradient, gradient.sum(0)


_add_bias.defvjp(lambda x, bias, _: (x + bias, None), _add_bias_backward)


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

    def after(self, norm: norms.LayerNorm) -> tuple[Array, Array]:
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


@jax.custom_vjp
def _with_whole_gradient(weights: Array) -> Array:
    """The weights, with a gradient that is materialised as one array.

    Without a loop over the layers, XLA would fuse the choice among all layers' gradients into the
    optimiser: 6 ms of L/14's step of 280 on an H200, whose memory would allow for 2.  On TPUs it
    would pull the split into queries, keys and values before their product, and transpose all rows'
    gradients for that: 12 ms of B/16's step of 131 by the compiler's clock for 16 v5e.
    """
    return weights


_with_whole_gradient.defvjp(
    lambda weights: (weights, None),
    lambda _, gradient: (jax.lax.optimization_barrier(gradient),),
)


class AttentionWeights(NamedTuple):
    """Folded weights (`Attention.fold`); any leading axes; e are the dimensions of all heads."""

    query: Float[Array, "*l w e"]
    query_bias: Float[Array, "*l e"]
    key: Float[Array, "*l w e"]
    value: Float[Array, "*l w e"]
    out: Float[Array, "*l e w"]
    out_bias: Float[Array, "*l w"]

    def __call__(
        self,
        unit: Float[Array, "r w"],
        *,
        sequence: int,
        implementation: str,
        mesh: Mesh | None,
        platform: str,
        **options: Any,
    ) -> Float[Array, "r w"]:
        """Attention of standardised inputs, rows of sequences of as many positions each.

        options: of `attention.attend`.
        """
        if implementation == "pallas":
            heads, width = options["heads"], len(self.out)
            pieces = attention_kernel.pieces(heads, width // heads, mesh)
            kernels = self.query, self.key, self.value
            kernels = (kernel.reshape(len(kernel), pieces, -1) for kernel in kernels)
            kernel = jnp.concatenate(tuple(kernels), -1).reshape(unit.shape[1], -1)
            qkv = unit @ _with_whole_gradient(kernel)
            qkv = qkv.reshape(-1, sequence, qkv.shape[1])
            attended = attention_kernel.attend(qkv, self.query_bias, mesh=mesh, **options)
        elif implementation == "split":
            return self._split(unit.reshape(-1, sequence, unit.shape[1]), options["heads"])
        else:
            query = unit @ self.query + self.query_bias
            arrays = (
                x.reshape(-1, sequence, x.shape[1])
                for x in (query, unit @ self.key, unit @ self.value)
            )
            attended = attention.attend(*arrays, implementation=implementation, **options)
        return _add_bias(attended.reshape(unit.shape[0], -1) @ self.out, self.out_bias, platform)

    def _split(self, unit: Float[Array, "b n w"], heads: int) -> Float[Array, "r w"]:
        """By `attention_split`, for which the first position is apart in all products.

        Cut out of the results of one product for all, the others' would be copied.
        """

        def projected(rows: Array, *shape: int) -> tuple[Array, Array, Array]:
            arrays = rows @ self.query + self.query_bias, rows @ self.key, rows @ self.value
            return tuple(x.reshape(len(unit), *shape, heads, -1) for x in arrays)

        others = unit[:, 1:].reshape(-1, unit.shape[2])
        first, others = attention_split.attend(
            projected(unit[:, 0]), projected(others, unit.shape[1] - 1)
        )
        parts = (x.reshape(-1, len(self.out)) @ self.out for x in (first, others))
        parts = [x.reshape(len(unit), -1, x.shape[1]) for x in parts]
        return jnp.concatenate(parts, 1).reshape(-1, parts[0].shape[2]) + self.out_bias


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, *, std: float, out_std: float, rngs: nnx.Rngs):
        shape = (heads, width // heads)
        make = functools.partial(Projection, use_bias=True, rngs=rngs)
        self.query = make((width,), shape, std=std)
        self.key = make((width,), shape, std=std)
        self.value = make((width,), shape, std=std)
        self.out = make(shape, (width,), std=out_std)

    def fold(self, norm: norms.LayerNorm) -> AttentionWeights:
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
        *layers, _, heads, head_dim = query.shape
        query, key, value = (x.reshape(*layers, -1, heads * head_dim) for x in (query, key, value))
        out = out.reshape(*layers, heads * head_dim, -1)
        query_bias = query_bias.reshape(*layers, -1)
        return AttentionWeights(query, query_bias, key, value, out, self.out.bias[...] + through)


class MlpWeights(NamedTuple):
    """As `Mlp.fold` returns them; any leading axes."""

    fc1: Float[Array, "*l w m"]
    fc1_bias: Float[Array, "*l m"]
    fc2: Float[Array, "*l m w"]
    fc2_bias: Float[Array, "*l w"]

    def __call__(
        self, unit: Float[Array, "r w"], *, activation: str, platform: str
    ) -> Float[Array, "r w"]:
        """The MLP of standardised inputs."""
        activate = activations.choose(activation, dtype=unit.dtype, platform=platform)
        hidden = activate(unit @ self.fc1 + self.fc1_bias)
        return _add_bias(hidden @ self.fc2, self.fc2_bias, platform)


class Mlp(nnx.Module):
    """width -> hidden -> width."""

    def __init__(self, width: int, hidden: int, *, std: float, out_std: float, rngs: nnx.Rngs):
        self.fc1 = Projection((width,), (hidden,), std=std, use_bias=True, rngs=rngs)
        self.fc2 = Projection((hidden,), (width,), std=out_std, use_bias=True, rngs=rngs)

    def fold(self, norm: norms.LayerNorm) -> MlpWeights:
        """The weights with scale and bias of the norm before them folded in, float32."""
        return MlpWeights(*self.fc1.after(norm), self.fc2.kernel[...], self.fc2.bias[...])


# The dimensions of a layer's weights that the mesh's tensor axis splits.
_TENSOR = (
    AttentionWeights(query=1, query_bias=0, key=1, value=1, out=0, out_bias=None),
    MlpWeights(fc1=1, fc1_bias=0, fc2=0, fc2_bias=None),
)


def _gathered(layer: Any, mesh: Mesh | None) -> Any:
    axes = [axis for part in _TENSOR for axis in part]
    leaves, structure = jax.tree.flatten(layer)
    pairs = zip(leaves, axes, strict=True)
    return structure.unflatten([global_batch.gathered(x, mesh, axis) for x, axis in pairs])


class Block(nnx.Module):
    """Pre-LN transformer block; initialisation as CLIP's (arXiv 2103.00020, code release).

    Or a stack of them, whose parameters have a leading layer axis (`make_stack`).
    """

    def __init__(self, tower: Any, config: Any, rngs: nnx.Rngs):
        width, eps = tower.width, config.layer_norm_eps
        std, out_std = width**-0.5, width**-0.5 * (2 * tower.layers) ** -0.5
        self.norm1 = norms.LayerNorm(width, eps=eps)
        self.attention = Attention(width, tower.heads, std=std, out_std=out_std, rngs=rngs)
        self.norm2 = norms.LayerNorm(width, eps=eps)
        hidden = tower.hidden_width
        self.mlp = Mlp(width, hidden, std=(2 * width) ** -0.5, out_std=out_std, rngs=rngs)
        self.activation = config.activation

    def fold(self, dtype: jnp.dtype) -> tuple[AttentionWeights, MlpWeights]:
        """The folded weights, in the compute dtype."""
        weights = self.attention.fold(self.norm1), self.mlp.fold(self.norm2)
        return jax.tree.map(lambda leaf: _with_whole_gradient(leaf.astype(dtype)), weights)

    def run(
        self,
        x: Float[Array, "r w"],
        weights: tuple[AttentionWeights, MlpWeights],
        *,
        platform: str,
        **options: Any,
    ) -> Float[Array, "r w"]:
        """One layer with its weights on a platform of jax; options of `AttentionWeights`."""
        attend, mlp = weights
        with jax.named_scope("attention"):
            unit = norms.standardise(x, self.norm1.eps, platform)
            x = x + attend(unit, platform=platform, **options)
        with jax.named_scope("mlp"):
            unit = norms.standardise(x, self.norm2.eps, platform)
            return x + mlp(unit, activation=self.activation, platform=platform)


def make_stack(tower: Any, config: Any, rngs: nnx.Rngs) -> Block:
    """A tower's blocks as one Block whose parameters carry a leading layer axis."""

    @nnx.split_rngs(splits=tower.layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: nnx.Rngs) -> Block:
        return Block(tower, config, rngs)

    return create(rngs)


def run_stack(
    blocks: Block,
    x: Float[Array, "b n w"],
    config: Any,
    *,
    length: int,
    causal: bool,
    mesh: Mesh | None = None,
) -> Float[Array, "b n w"]:
    """All blocks, one after the other; see UNROLLED_LAYERS for when in a loop.

    The rows of x are split over the batch axes of the mesh.

    Args:
      length: positions of a sequence; those from there to n are padding (`padded_length`), and what
        they come out as means nothing.
    """
    weights = blocks.fold(x.dtype)
    device = _device(mesh)
    depth, _, heads, head_dim = blocks.attention.query.kernel.shape
    options = {
        "length": length,
        "causal": causal,
        "heads": heads,
        "sequence": x.shape[1],
        "implementation": _implementation(config, length, causal, head_dim, device),
        "mesh": mesh,
        "platform": device.platform,
    }

    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        # The weights are split over the same devices as the rows are.  Left to itself, the compiler
        # may split widths in place of rows, so that every device holds the whole batch.
        x = global_batch.over_batch(x, mesh)
        if device.platform == "gpu":
            # XLA chose to lay the batch out last for the residuals on an H200.  Matrix products
            # want their rows whole, so that each was preceded and followed by a transpose.
            x = layout.with_layout_constraint(x, layout.Layout(tuple(range(x.ndim))))
        layer = _gathered(layer, mesh)
        return blocks.run(x, layer, **options), None

    unrolled = depth <= UNROLLED_LAYERS.get(device.platform, 0)
    if device.platform == "tpu" and config.remat == "full":
        # A loop copies what a layer saves, here its input alone: H/14 takes 8 % longer in one on a
        # v6e, and its step compiles in half the time, for a v7x in less than a fourth.
        unrolled = False
    if policy := REMAT[config.remat]:
        # Forward and backward loop are apart; without loops XLA would find the same computation
        # twice and keep its result.
        body = jax.checkpoint(body, prevent_cse=unrolled, policy=policy)
    # As rows of one matrix: XLA for TPUs lays three dimensions out with the batch between tokens
    # and width, which no attention wants.
    rows = x.reshape(-1, x.shape[2])
    return jax.lax.scan(body, rows, weights, unroll=depth if unrolled else 1)[0].reshape(x.shape)


def padded_length(length: int, tower: Any, config: Any, *, causal: bool, mesh: Mesh | None) -> int:
    """Positions that `run_stack` wants of sequences of ``length`` for the device at hand.

    Once for all layers: padding in each of them would cost a copy of its input and its output.
    """
    head_dim = tower.width // tower.heads
    chosen = _implementation(config, length, causal, head_dim, _device(mesh))
    return length + attention.padding(length, chosen)


def _device(mesh: Mesh | None) -> Any:
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def _implementation(config: Any, length: int, causal: bool, head_dim: int, device: Any) -> str:
    what = {"length": length, "causal": causal, "head_dim": head_dim, "device": device}
    return attention.choose(config.attention, **what, dtype=jnp.dtype(config.dtype))
