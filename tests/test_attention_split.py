"""Attention with the first position apart: values and gradients, and what cuDNN is given.

The kernels need a GPU.  In their place stand the equations that they are documented to compute.
"""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from mofi_jax.model import attention, attention_split, mofi
from tests import test_model

H100 = types.SimpleNamespace(platform="gpu", device_kind="H100", compute_capability="9.0")


def logits(query, key):
    product = jnp.einsum("bqhd,bkhd->bqhk", query, key, preferred_element_type=jnp.float32)
    return product * query.shape[-1] ** -0.5


def forward(query, key, value):
    log_sum = jax.nn.logsumexp(logits(query, key), -1)
    weights = jnp.exp(logits(query, key) - log_sum[..., None]).astype(value.dtype)
    return jnp.einsum("bqhk,bkhd->bqhd", weights, value), log_sum


def backward(query, key, value, result, log_sum, gradient):
    """FlashAttention-2, arXiv 2307.08691, algorithm 2, with everything in one tile."""
    weights = jnp.exp(logits(query, key) - log_sum[..., None])
    inner = (result.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(-1, keepdims=True)
    d_weights = jnp.einsum("bqhd,bkhd->bqhk", gradient, value, preferred_element_type=jnp.float32)
    d_logits = weights * (d_weights - inner) * query.shape[-1] ** -0.5
    weights, d_logits = (x.astype(query.dtype) for x in (weights, d_logits))
    return (
        jnp.einsum("bqhk,bkhd->bqhd", d_logits, key),
        jnp.einsum("bqhk,bqhd->bkhd", d_logits, query),
        jnp.einsum("bqhk,bqhd->bkhd", weights, gradient),
    )


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(attention_split, "_kernel", forward)
    monkeypatch.setattr(attention_split, "_kernel_gradient", backward)


def split(*arrays):
    first, others = attention_split.attend(
        tuple(x[:, 0] for x in arrays), tuple(x[:, 1:] for x in arrays)
    )
    return jnp.concatenate([first[:, None], others], 1)


def textbook(query, key, value):
    weights = jax.nn.softmax(logits(query, key), -1).astype(value.dtype)
    return jnp.einsum("bqhk,bkhd->bqhd", weights, value)


def value_and_gradients(attend, arrays, direction):
    with jax.default_matmul_precision("highest"):
        result, pull = jax.vjp(attend, *arrays)
        return [np.float32(x) for x in (result, *pull(direction.astype(result.dtype)))]


def errors(found, exact):
    return [
        float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, exact, strict=True)
    ]


@pytest.mark.parametrize("length", [129, 257])
@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0])  # of the logits, from flat to one-hot
def test_value_and_gradients_are_the_textbooks(stand_in, length, spread):
    *arrays, direction = jax.random.normal(jax.random.key(length), (4, 2, length, 3, 16))
    arrays = [spread**0.5 * x if i < 2 else x for i, x in enumerate(arrays)]
    exact = value_and_gradients(textbook, arrays, direction)
    assert max(errors(value_and_gradients(split, arrays, direction), exact)) < 1e-5
    halves = [x.astype(jnp.bfloat16) for x in arrays]
    of_textbook = errors(value_and_gradients(textbook, halves, direction), exact)
    found = errors(value_and_gradients(split, halves, direction), exact)
    # Gradients are rounded once more, where the first position's part is added.
    assert all(a < 1.3 * b for a, b in zip(found, of_textbook, strict=True))


def test_a_first_position_that_takes_all_the_weight(stand_in):
    query, key, value, direction = jax.random.normal(jax.random.key(0), (4, 1, 129, 2, 8))
    key = key.at[:, 0].set(50 * query.mean(1))
    exact = value_and_gradients(textbook, (query, key, value), direction)
    found = value_and_gradients(split, (query, key, value), direction)
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_the_image_tower_is_the_same(stand_in, monkeypatch, remat):
    monkeypatch.setattr(attention_split, "TILE", 4)  # 16 pixels in patches of 8, a class token
    config = dataclasses.replace(test_model.CONFIG, image_size=16, remat=remat)
    params = mofi.create(config, jax.random.key(0))
    images = test_model.IMAGES[:, :16, :16]
    chosen = []

    def loss(params, implementation):
        def choose(*_, **__):
            chosen.append(implementation)
            return implementation

        monkeypatch.setattr(attention, "choose", choose)
        embeddings = mofi.embed_images(config, params, images)
        return (embeddings * jnp.arange(12.0)).sum(), embeddings

    differentiate = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    expected, found = differentiate(params, "xla"), differentiate(params, "split")
    assert set(chosen) == {"xla", "split"}
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 + 2e-6 * jnp.abs(b).max())


@pytest.mark.parametrize(
    ("length", "causal", "found"),
    [
        (257, False, "split"),
        (129, False, "split"),
        (197, False, "cudnn"),
        (77, True, "cudnn"),
        (257, True, "cudnn"),  # it has no causal mask
        (1, False, "cudnn"),
    ],
)
def test_where_it_is_cudnn_as_a_whole(length, causal, found):
    what = {"length": length, "causal": causal, "head_dim": 64, "device": H100}
    assert attention.choose("split", **what, dtype=jnp.dtype("bfloat16")) == found


def test_a_text_tower_stays_causal(monkeypatch):
    """Of as many tokens as would be split, without the causal mask, in an image tower."""
    monkeypatch.setattr(attention_split, "TILE", 4)
    monkeypatch.setattr(attention, "_cudnn_runs", lambda *_: True)
    of_jax = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *arrays, implementation, **options: of_jax(*arrays, **options),
    )
    config = dataclasses.replace(test_model.CONFIG, context_length=5)
    params = mofi.create(config, jax.random.key(0))
    tokens = test_model.TOKENS[:, :5]
    expected, found = (
        mofi.embed_texts(dataclasses.replace(config, attention=name), params, tokens)
        for name in ("xla", "split")
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_cudnn_is_given(monkeypatch):
    """In the program for a GPU, in the order that XLA's operations have them."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_300)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)

    def operands(function, target, *inputs):
        program = jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
        [found] = re.findall(rf"custom_call @__cudnn\${target}\((.*?)\)", program)
        # What an operand was before it was transposed.
        before = dict(re.findall(r"(%\w+) = stablehlo.transpose (%\w+),", program))
        return [before.get(name, name) for name in found.split(", ")]

    x = jax.ShapeDtypeStruct((2, 256, 3, 64), jnp.bfloat16)
    log_sum = jax.ShapeDtypeStruct((2, 256, 3), jnp.float32)
    ahead = operands(attention_split._kernel, "fmhaSoftmax", x, x, x)
    assert ahead == ["%arg0", "%arg1", "%arg2"]
    # query, key, value, result, log_sum, gradient -> ..., log_sum, gradient, result
    inputs = (x, x, x, x, log_sum, x)
    back = operands(attention_split._kernel_gradient, "fmhaSoftmaxBackward", *inputs)
    assert back == ["%arg0", "%arg1", "%arg2", "%arg4", "%arg5", "%arg3"]
