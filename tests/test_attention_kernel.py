"""The Pallas kernels of attention against textbook attention, forward and backward.

They run interpreted here; `test_clock.py` compiles them for a TPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from mofi_jax.model import attention, attention_kernel, layers, mofi
from tests import test_model


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def textbook(query, key, value, *, heads, length, causal):
    """In float32, of arrays [b, n, e]."""
    batch, n, width = query.shape
    query, key, value = (x.reshape(batch, n, heads, -1) for x in (query, key, value))
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (width // heads) ** -0.5
    seen = jnp.arange(n)[None] < length
    if causal:
        seen &= jnp.tril(jnp.ones((n, n), bool))
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, n, width)


def by_kernel(query, key, value, bias, *, mesh=None, **options):
    heads, width = options["heads"], query.shape[2]
    pieces = attention_kernel.pieces(heads, width // heads, mesh)
    shape = (*query.shape[:2], pieces, -1)
    parts = (x.reshape(shape) for x in (query, key, value))
    qkv = jnp.concatenate(tuple(parts), -1).reshape(*query.shape[:2], -1)
    return attention_kernel.attend(qkv, bias, mesh=mesh, **options)


def arrays(batch, length, heads, head_dim, dtype, scale=1.0):
    """Queries, keys, values, bias and a gradient; a sequence's last rows are padding."""
    rows = -(-length // attention_kernel.ROWS) * attention_kernel.ROWS
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (batch, rows, heads * head_dim)
    inputs = [scale * jax.random.normal(key, shape) for key in keys[:3]]
    bias = jax.random.normal(keys[3], shape[2:])
    direction = jax.random.normal(keys[4], shape).at[:, length:].set(0)
    return [x.astype(dtype) for x in (*inputs, bias)], direction.astype(dtype)


def both(inputs, direction, run=by_kernel, **options):
    """Values of valid rows and gradients, of the kernel and of the textbook in float32."""

    def of_textbook(query, key, value, bias):
        return textbook(query + bias, key, value, **options)

    def differentiate(function, inputs, direction):
        attended, backward = jax.vjp(function, *inputs)
        return attended[:, : options["length"]], *backward(direction)

    ours = jax.jit(functools.partial(differentiate, functools.partial(run, **options)))
    wide = [x.astype(jnp.float32) for x in inputs]
    reference = differentiate(of_textbook, wide, direction.astype(jnp.float32))
    return ours(inputs, direction), reference


def off(ours, reference):
    """|ours - reference| / |reference| of each array."""
    pairs = zip(ours, reference, strict=True)
    return [
        float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) for a, b in pairs
    ]


@pytest.mark.parametrize(
    ("length", "heads", "head_dim", "causal"),
    [
        (197, 12, 64, False),  # B/16: heads share registers and steps of the grid
        (77, 8, 64, True),  # its text tower
        (257, 2, 80, False),  # heads of H/14, which have lanes of their own
        (50, 3, 88, True),
        (64, 5, 16, False),  # no padding; an odd number of heads that could share registers
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernel_is_textbook_attention(length, heads, head_dim, causal, dtype):
    inputs, direction = arrays(2, length, heads, head_dim, dtype)
    options = {"heads": heads, "length": length, "causal": causal}
    with jax.default_matmul_precision("highest"):
        errors = off(*both(inputs, direction, **options))
    forward, backward = {"float32": (1e-5, 1e-5), "bfloat16": (1e-2, 2e-2)}[dtype]
    assert errors[0] <= forward
    assert max(errors[1:]) <= backward


def test_large_logits_overflow_nowhere():
    """Logits of several thousand, and masked rows: no NaN, forward or backward."""
    inputs, direction = arrays(1, 9, 2, 64, "float32", scale=30.0)
    ours, reference = both(inputs, direction, heads=2, length=9, causal=True)
    for a, b in zip(ours, reference, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", ["1x1x1", "1x8x1", "2x2x2"])
def test_meshes_change_nothing(mesh_of, name):
    inputs, direction = arrays(8, 17, 4, 64, "float32")
    options = {"heads": 4, "length": 17, "causal": False}
    run = functools.partial(by_kernel, mesh=mesh_of[name])
    assert max(off(*both(inputs, direction, run=run, **options))) <= 1e-5


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_towers_by_the_kernel(monkeypatch, mesh_of, tower, remat):
    """Embeddings and gradients of a whole tower, padding of its sequences included."""
    monkeypatch.setattr(attention, "choose", lambda implementation, **_: implementation)
    mesh = mesh_of["1x8x1"]
    config = dataclasses.replace(test_model.CONFIG, context_length=7)
    params = mofi.create(config, jax.random.key(0))
    inputs = test_model.IMAGES if tower == "image" else test_model.TOKENS[:, :7]
    inputs = jnp.tile(inputs, (8, *[1] * (inputs.ndim - 1)))
    embed = mofi.embed_images if tower == "image" else mofi.embed_texts

    def loss(params, implementation):
        chosen = dataclasses.replace(config, attention=implementation, remat=remat)
        embeddings = embed(chosen, params, inputs, mesh)
        return (embeddings * jnp.arange(config.embed_dim)).sum(), embeddings

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (ours, embeddings), (expected, reference) = run(params, "pallas"), run(params, "xla")
    np.testing.assert_allclose(embeddings, reference, atol=1e-6)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 + 2e-6 * jnp.abs(b).max())


def test_pieces_are_whole_registers_of_a_few_heads():
    assert attention_kernel.pieces(12, 64, None) == 3
    assert attention_kernel.pieces(16, 64, None) == 4
    assert attention_kernel.pieces(16, 80, None) == 2
    assert attention_kernel.pieces(16, 88, None) == 1
    assert attention_kernel.pieces(3, 64, None) == 1


def test_activations_on_a_tpu_are_those_of_everywhere():
    """GELU by its logistic form: a third of bfloat16's rounding off, its derivative too."""
    x = jnp.linspace(-6, 6, 4001)
    on_tpu = functools.partial(layers.activations.choose, "gelu", dtype=jnp.dtype(jnp.bfloat16))
    low = x.astype(jnp.bfloat16)
    found, derivative = jax.vmap(jax.value_and_grad(on_tpu(platform="tpu")))(low)
    exact = functools.partial(jax.nn.gelu, approximate=False)
    wide = low.astype(jnp.float32)
    rounding = 2**-8
    np.testing.assert_allclose(np.float32(found), exact(wide), rtol=1.36 * rounding, atol=1e-6)
    slope = jax.vmap(jax.grad(exact))(wide)
    np.testing.assert_allclose(np.float32(derivative), slope, rtol=rounding, atol=5e-4)
    assert on_tpu(platform="gpu") is layers.activations.ACTIVATIONS["gelu"]
