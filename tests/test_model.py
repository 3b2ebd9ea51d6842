"""Both towers: published sizes, arithmetic that does not depend on scan, remat or padding."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import global_batch, sharding
from mofi_jax.model import activations, layers, mofi

CONFIG = mofi.MofiConfig(
    image_size=16,
    patch_size=8,
    image=mofi.TowerConfig(16, 3, 2),
    text=mofi.TowerConfig(16, 2, 4),
    vocab_size=50,
    context_length=8,
    eos_id=49,
    embed_dim=12,
    dtype="float32",
)
IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8))
TOKENS = jnp.array([[47, 3, 4, 49, 48, 48, 48, 48], [47, 49, 48, 48, 48, 48, 48, 48]], jnp.int32)


@pytest.fixture(scope="module")
def params():
    return mofi.create(CONFIG, jax.random.key(0))


# apple/ml-mofi README, millions of parameters without projections.
@pytest.mark.parametrize(
    ("variant", "image", "text"), [("B/16", 86, 64), ("L/14", 303, 124), ("H/14", 631, 354)]
)
def test_released_sizes(variant, image, text):
    config = mofi.MofiConfig(
        image_size=224,
        vocab_size=50_272,
        context_length=77,
        eos_id=50_271,
        **mofi.VARIANTS[variant],
    )
    for tower, millions in (("image", image), ("text", text)):
        count = mofi.parameter_count(config, tower)
        assert round(count / 1e6) == millions


def test_embeddings_are_unit_vectors_in_float32(params):
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(CONFIG, dtype=dtype)
        for embeddings in (
            mofi.embed_images(config, params, IMAGES),
            mofi.embed_texts(config, params, TOKENS),
        ):
            assert embeddings.dtype == jnp.float32
            np.testing.assert_allclose(jnp.linalg.norm(embeddings, axis=-1), 1, rtol=1e-5)


def test_bfloat16_stays_near_float32(params):
    low = mofi.embed_images(dataclasses.replace(CONFIG, dtype="bfloat16"), params, IMAGES)
    high = mofi.embed_images(CONFIG, params, IMAGES)
    assert (low * high).sum(-1).min() > 0.999


# Sequences of 5 positions for the 2 heads of a layer.
OF_LAYER = {
    **{"length": 5, "sequence": 5, "heads": 2, "causal": False},
    **{"implementation": "xla", "mesh": None},
}


def test_scan_equals_a_plain_loop(params):
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    stack = layers.make_stack(mofi.TowerConfig(16, 3, 2), CONFIG, nnx.Rngs(0))
    expected = x.reshape(10, 16)
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], stack.fold(x.dtype))
        expected = stack.run(expected, layer, platform="cpu", **OF_LAYER)
    result = layers.run_stack(stack, x, CONFIG, length=5, causal=False)
    np.testing.assert_allclose(result, expected.reshape(x.shape), atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_folded_block_is_the_textbook_block(platform):
    """Values and all gradients, scales and biases far from 1 and 0; a stack of one layer."""
    stack = layers.make_stack(mofi.TowerConfig(16, 1, 2), CONFIG, nnx.Rngs(0))
    graph, state = nnx.split(stack)
    keys = iter(jax.random.split(jax.random.key(2), 99))
    state = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape), state)
    x, direction = jax.random.normal(jax.random.key(1), (2, 2, 5, 16))

    def folded(state):
        block = nnx.merge(graph, state)
        layer = jax.tree.map(lambda leaf: leaf[0], block.fold(x.dtype))
        return block.run(x.reshape(10, 16), layer, platform=platform, **OF_LAYER).reshape(x.shape)

    def textbook(state):
        p = jax.tree.map(lambda leaf: leaf[0], nnx.to_pure_dict(state))

        def norm(x, p):
            unit = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
            return unit * p["scale"] + p["bias"]

        def dense(x, p, axes=1):
            return jnp.tensordot(x, p["kernel"], axes) + p["bias"]

        unit, heads = norm(x, p["norm1"]), p["attention"]
        query, key, value = (dense(unit, heads[name]) for name in ("query", "key", "value"))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) * 8**-0.5)
        y = x + dense(jnp.einsum("bhqk,bkhd->bqhd", weights, value), heads["out"], 2)
        hidden = dense(norm(y, p["norm2"]), p["mlp"]["fc1"])
        return y + dense(jax.nn.gelu(hidden, approximate=False), p["mlp"]["fc2"])

    np.testing.assert_allclose(folded(state), textbook(state), rtol=1e-5, atol=1e-5)
    ours, theirs = (
        jax.grad(lambda state, f=f: jnp.vdot(f(state), direction))(state)
        for f in (folded, textbook)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    assert not ours["attention"]["key"]["bias"][...].any()


def test_layers_of_a_stack_differ():
    stack = layers.make_stack(mofi.TowerConfig(16, 3, 2), CONFIG, nnx.Rngs(0))
    kernel = stack.mlp.fc1.kernel[...]
    assert kernel.shape == (3, 16, 64)
    assert jnp.abs(kernel[0] - kernel[1]).max() > 0.01


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_number(params, remat):
    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(params, remat):
        config = dataclasses.replace(CONFIG, remat=remat)
        return (mofi.embed_images(config, params, IMAGES) * jnp.arange(12.0)).sum()

    plain, other = gradient(params, "none"), gradient(params, remat)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_remat_saves_what_it_says():
    """Saved activations of a block, in multiples of its input: all, matrix products, the input."""
    width, tokens, depth = 32, 6, layers.UNROLLED_LAYERS["cpu"] + 1
    stack = nnx.eval_shape(
        lambda: layers.make_stack(mofi.TowerConfig(width, depth, 2), CONFIG, nnx.Rngs(0))
    )
    graph, shapes = nnx.split(stack)
    x = jax.ShapeDtypeStruct((3, tokens, width), jnp.bfloat16)

    def saved(remat):
        config = dataclasses.replace(CONFIG, remat=remat)

        def run(blocks, x):
            return layers.run_stack(
                nnx.merge(graph, blocks), x, config, length=tokens, causal=False
            )

        def activation(residual):  # of 3 sequences, or their rows
            return {3, 3 * tokens} & set(residual.shape)

        residuals = jax.eval_shape(lambda blocks, x: jax.vjp(run, blocks, x)[1], shapes, x)
        sizes = [r.size * r.dtype.itemsize for r in jax.tree.leaves(residuals) if activation(r)]
        return sum(sizes) / (depth * x.size * x.dtype.itemsize)

    # The input, query, key, value, what attention adds to it, and four widths of the MLP.
    assert saved("full") == 1
    assert saved("dots") == 9
    # With both norms' results, values after attention, the MLP's wide activation once more, and
    # logits and weights of attention, which are small at this length.
    assert 16 < saved("none") < 18


@pytest.mark.parametrize("named", [True, False])
def test_each_device_works_on_its_part_of_the_batch(mesh_of, named):
    """Forward and backward pass with sharded parameters; without the mesh none does."""
    mesh = mesh_of["1x8x1"]
    width, depth, batch = 64, layers.UNROLLED_LAYERS["cpu"] + 1, 40
    config = dataclasses.replace(CONFIG, image=mofi.TowerConfig(width, depth, 2))
    shapes = jax.eval_shape(
        lambda key: mofi.create(config, key, towers=("image",)), jax.random.key(0)
    )
    params = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
        shapes,
        sharding.tree_shardings(mesh, shapes),
    )
    where = global_batch.batch_sharding(mesh)
    images = jax.ShapeDtypeStruct((batch, 16, 16, 3), jnp.uint8, sharding=where)

    def loss(params, images):
        return mofi.embed_images(config, params, images, mesh if named else None)[:, 0].sum()

    text = jax.jit(jax.grad(loss)).lower(params, images).compile().as_text()
    rows = {int(size) for size in re.findall(rf"f32\[(\d+),{width}\]", text)}
    assert batch // 8 * 5 in rows
    assert (batch * 5 in rows) is not named


def test_exact_gelu():
    """Against the definition in float64; in bfloat16 within its rounding, tails included."""
    x = np.linspace(-6, 6, 2001)
    expected = np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x])
    gelu = activations.ACTIVATIONS["gelu"]
    np.testing.assert_allclose(gelu(jnp.float32(x)), expected, atol=1e-6)
    low = jnp.bfloat16(x)
    expected = [0.5 * v * math.erfc(-v / math.sqrt(2)) for v in np.float64(low)]
    np.testing.assert_allclose(np.float64(gelu(low)), expected, rtol=2**-8, atol=1e-6)


def test_what_follows_the_end_of_text_changes_nothing(params):
    other = TOKENS.at[0, 4:].set(7)
    np.testing.assert_allclose(
        mofi.embed_texts(CONFIG, params, TOKENS), mofi.embed_texts(CONFIG, params, other), atol=1e-6
    )
    other = other.at[0, 1].set(9)
    assert (
        jnp.abs(
            mofi.embed_texts(CONFIG, params, TOKENS)[0] - mofi.embed_texts(CONFIG, params, other)[0]
        ).max()
        > 1e-3
    )


def test_text_tower_is_causal(params):
    """Gradients of the pooled token reach no later position."""

    def first(embedding):
        changed = {**params["text"], "position_embedding": embedding}
        return mofi.embed_texts(CONFIG, {"text": changed}, TOKENS[:1])[0, 0]

    gradient = jax.grad(first)(params["text"]["position_embedding"])
    assert jnp.abs(gradient[:4]).min(-1).max() > 0
    np.testing.assert_array_equal(gradient[4:], 0)


def test_temperature_is_capped(params):
    assert mofi.capped_exp(params["logit_scale"]) == pytest.approx(1 / 0.07)
    assert mofi.capped_exp(jnp.float32(9.0)) == 100


def test_config_round_trip():
    assert mofi.MofiConfig.from_dict(CONFIG.to_dict()) == CONFIG


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image_size": 20}, "not a multiple of patch_size 8"),
        ({"activation": "relu"}, "config.model.activation='relu' is unknown"),
        ({"dtype": "float16"}, "config.model.dtype='float16'"),
        ({"remat": "some"}, "config.model.remat='some' is unknown: choose from none, dots, full"),
        ({"attention": "flash"}, "config.model.attention='flash'.*auto, xla, cudnn"),
        ({"image": mofi.TowerConfig(16, 2, 3)}, "does not divide into 3 heads"),
    ],
)
def test_impossible_configs(changes, sentence):
    with pytest.raises(BadInput, match=sentence):
        dataclasses.replace(CONFIG, **changes)


def test_missing_tower_is_refused(params):
    with pytest.raises(BadInput, match="has no text tower"):
        mofi.embed_texts(CONFIG, {"image": params["image"]}, TOKENS)
