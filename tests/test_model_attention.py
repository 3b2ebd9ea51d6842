"""Attention: which implementation runs where, and that padding for cuDNN changes no number."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mofi_jax.common.errors import BadInput
from mofi_jax.model import attention, mofi
from tests import test_model

H200 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
A100 = types.SimpleNamespace(platform="gpu", device_kind="A100-SXM4", compute_capability="8.0")
T4 = types.SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5")
AMD = types.SimpleNamespace(platform="gpu", device_kind="MI300X", compute_capability="gfx942")
TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")


@pytest.mark.parametrize(
    ("device", "head_dim", "dtype", "runs"),
    [
        (H200, 64, "bfloat16", True),  # B/16, L/14
        (H200, 80, "bfloat16", True),  # H/14
        (H200, 256, "bfloat16", True),
        (A100, 128, "bfloat16", True),
        (A100, 256, "bfloat16", False),
        (H200, 64, "float32", False),
        (H200, 60, "bfloat16", False),
        (T4, 64, "bfloat16", False),
        (AMD, 64, "bfloat16", False),
        (TPU, 64, "bfloat16", False),
    ],
)
def test_cudnn_where_it_runs(monkeypatch, device, head_dim, dtype, runs):
    monkeypatch.setitem(attention.AUTO, "gpu", "cudnn")
    what = {
        "length": 197,
        "causal": False,
        "head_dim": head_dim,
        "dtype": jnp.dtype(dtype),
        "device": device,
    }
    other = "pallas" if device is TPU else "xla"
    assert attention.choose("auto", **what) == ("cudnn" if runs else other)
    assert attention.choose("xla", **what) == "xla"
    if runs:
        assert attention.choose("cudnn", **what) == "cudnn"
    else:
        with pytest.raises(BadInput, match=f"{device.device_kind} with heads of {head_dim} dim"):
            attention.choose("cudnn", **what)


def test_cudnn_on_a_cpu_is_refused(monkeypatch):
    config = dataclasses.replace(test_model.CONFIG, attention="cudnn", dtype="bfloat16")
    params = mofi.create(config, jax.random.key(0))
    with pytest.raises(BadInput, match=r"config.model.attention='cudnn' does not run on cpu"):
        mofi.embed_images(config, params, test_model.IMAGES)


@pytest.fixture
def stand_in(monkeypatch):
    """In cuDNN's place jax's own attention, which takes the same arguments on a CPU.

    As cuDNN's, it refuses odd lengths; other than cuDNN's, it leaves NaN as the gradients of keys
    and values of padding.
    """
    calls = []
    original = jax.nn.dot_product_attention

    def attend(query, key, value, *, implementation, **options):
        assert implementation == "cudnn"
        assert query.shape[1] % 2 == 0
        calls.append(options)
        if "key_value_seq_lengths" in options:
            length = test_model.IMAGES.shape[1] ** 2 // 8**2 + 1
            key, value = (spoil(x, length) for x in (key, value))
        return original(query, key, value, implementation="xla", **options)

    @jax.custom_vjp
    def identity(x):
        return x

    def spoil(x, length):
        identity.defvjp(lambda x: (x, None), lambda _, dx: (dx.at[:, length:].set(jnp.nan),))
        return identity(x)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    monkeypatch.setattr(attention, "_cudnn_runs", lambda *_: True)
    return calls


@pytest.mark.parametrize("tower", ["image", "text"])
def test_padding_for_cudnn_changes_no_number(stand_in, tower):
    config = dataclasses.replace(test_model.CONFIG, context_length=7)
    params = mofi.create(config, jax.random.key(0))
    inputs = test_model.IMAGES if tower == "image" else test_model.TOKENS[:, :7]
    embed = mofi.embed_images if tower == "image" else mofi.embed_texts

    def loss(params, implementation):
        chosen = dataclasses.replace(config, attention=implementation, remat="dots")
        embeddings = embed(chosen, params, inputs)
        return (embeddings * jnp.arange(12.0)).sum(), embeddings

    differentiate = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    expected, expected_embeddings = differentiate(params, "xla")
    assert not stand_in
    found, embeddings = differentiate(params, "cudnn")
    assert stand_in
    np.testing.assert_allclose(embeddings, expected_embeddings, atol=1e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 + 2e-6 * jnp.abs(b).max())
