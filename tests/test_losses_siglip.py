"""SigLIP: dense against PyTorch, the ring against both, and the compiled program."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mofi_jax.distributed import global_batch
from mofi_jax.losses import siglip
from tests.entity_batch import relative
from tests.programs import collectives, shapes
from tests.test_losses_contrastive import (
    BATCH,
    DIM,
    LABELS,
    MODES,
    SCALES,
    VALID,
    B,
    D,
    bound,
    check_bad_input,
    check_invalid_rows,
    count_correct,
    make_batch,
    pair_cosines,
    program_of,
    related,
    value_and_grads,
)

BIAS = -10.0

# On eight batch shards, three texts travel together.
TILINGS = [
    ("dense", None),
    ("1x1x1", None),
    ("1x1x1", 7),
    ("1x8x1", 2),
    ("2x2x2", None),
    ("2x2x2", 4),
    ("8x1x1", None),
]

ring = functools.partial(bound, dense=siglip.siglip_dense, sharded=siglip.siglip)


@functools.cache
def reference(scale: float, mode: str):
    """(total, correct, gradients of the mean) in float64, one pair after the other."""
    leaves = [torch.tensor(np.asarray(a), dtype=torch.float64) for a in make_batch()]
    leaves += [torch.tensor(x, dtype=torch.float64) for x in (scale, BIAS)]
    image, text, s, bias = (a.requires_grad_() for a in leaves)
    cos, rows, total = image @ text.T, np.flatnonzero(VALID), 0.0
    for i in rows:
        for j in rows:
            if mode == "masked" and related(i, j) and i != j:
                continue
            positive = related(i, j) if mode == "positive" else i == j
            total = total - F.logsigmoid((1 if positive else -1) * (s * cos[i, j] + bias))
    (total / len(rows)).backward()
    correct = count_correct(cos.detach().numpy(), mode)
    return total.item(), correct, [a.grad.numpy() for a in leaves]


@pytest.mark.parametrize("scale", [10.0, *SCALES])
def test_plain_siglip_is_the_papers_pseudocode(scale):
    image, text = make_batch()
    loss = functools.partial(siglip.siglip_dense, valid=jnp.ones(BATCH))
    result, grads = value_and_grads(loss)(image, text, scale, BIAS)
    leaves = [torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in (image, text)]
    leaves += [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (scale, BIAS)]
    logits = leaves[0] @ leaves[1].T * leaves[2] + leaves[3]
    labels = 2 * torch.eye(BATCH) - torch.ones(BATCH)
    mean = -torch.sum(F.logsigmoid(labels * logits)) / BATCH
    mean.backward()
    assert float(result.total / result.count) == pytest.approx(mean.item(), rel=1e-6)
    for ours, theirs in zip(grads, leaves, strict=True):
        assert relative(ours, theirs.grad.numpy()) <= 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("mesh", "block_size"), TILINGS)
def test_against_float64(mesh_of, mesh, block_size, mode):
    loss = ring(
        mesh_of,
        mesh,
        block_size=block_size,
        valid=jnp.asarray(VALID),
        same_entity=mode,
        **LABELS,
    )
    run = value_and_grads(loss)
    for scale in SCALES:
        result, grads = run(*make_batch(), scale, BIAS)
        total, correct, expected = reference(scale, mode)
        assert float(result.total) == pytest.approx(total, rel=1e-6)
        assert (float(result.count), float(result.correct)) == (VALID.sum(), correct)
        assert 0 < correct < VALID.sum()
        assert float(result.cosine) == pytest.approx(pair_cosines(), rel=1e-6)
        for name, a, b in zip(("image", "text", "scale", "bias"), grads, expected, strict=True):
            assert relative(a, b) <= 1e-5, name
        assert not np.any(grads[0][~VALID])
        assert not np.any(grads[1][~VALID])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("mesh", "block_size"), [("1x8x1", None), ("2x2x2", 17), ("8x1x1", 6)])
def test_ring_is_dense(mesh_of, mesh, block_size, mode):
    """A batch in which everything is related to something."""
    rng = np.random.default_rng(1)
    masks = {
        "valid": jnp.asarray(rng.random(160) > 0.1),
        "image_entities": jnp.asarray(rng.integers(0, 50, size=(160, 4)).astype(np.int32)),
        "text_entity": jnp.asarray(rng.integers(0, 50, size=160).astype(np.int32)),
        "same_entity": mode,
    }
    run = value_and_grads(ring(mesh_of, mesh, block_size=block_size, **masks))
    dense = value_and_grads(ring(mesh_of, "dense", **masks))
    for scale in SCALES:
        result, grads = run(*make_batch(160), scale, BIAS)
        expected, expected_grads = dense(*make_batch(160), scale, BIAS)
        assert float(result.total) == pytest.approx(float(expected.total), rel=1e-6)
        assert (result.count, result.correct) == (expected.count, expected.correct)
        assert float(result.cosine) == pytest.approx(float(expected.cosine), rel=1e-6)
        for a, b in zip(grads, expected_grads, strict=True):
            assert relative(a, b) <= 1e-5


def test_without_labels_only_the_own_text_is_right(mesh_of):
    totals = {
        (mesh, mode): value_and_grads(ring(mesh_of, mesh, valid=jnp.ones(BATCH), same_entity=mode))(
            *make_batch(), 10.0, BIAS
        )[0].total
        for mesh in ("dense", "2x2x2")
        for mode in MODES
    }
    for mesh in ("dense", "2x2x2"):
        assert len({float(totals[mesh, mode]) for mode in MODES}) == 1


def test_invalid_rows_never_matter(mesh_of):
    check_invalid_rows(mesh_of, ring, 50.0, BIAS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mesh", ["dense", "1x8x1"])
def test_nothing_valid_certainty_and_no_length_stay_finite(mesh_of, mesh, mode):
    rng = np.random.default_rng(1)
    certain = jnp.asarray(np.linalg.qr(rng.normal(size=(BATCH, BATCH)))[0], jnp.float32)
    # Embeddings of zeros leave the bias: the own pair against it, all others with it.
    by_bias = BATCH * np.log1p(np.exp(10)) + BATCH * (BATCH - 1) * np.log1p(np.exp(-10))
    for valid, rows, scale, bias, total in (
        (jnp.zeros(BATCH), make_batch()[0], 100.0, BIAS, 0.0),
        (jnp.ones(BATCH), certain, 1e4, -5e3, 0.0),
        (jnp.ones(BATCH), jnp.zeros((BATCH, DIM)), 100.0, BIAS, by_bias),
    ):
        run = ring(mesh_of, mesh, block_size=2, valid=valid, same_entity=mode)
        result, grads = value_and_grads(run)(rows, rows, scale, bias)
        assert float(result.total) == pytest.approx(total, rel=1e-6, abs=1e-6)
        assert result.count == valid.sum()
        assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_embeddings(mesh_of, mode):
    """Gradients in bf16, those of the same numbers in fp32 up to their rounding."""
    half = [x.astype(jnp.bfloat16) for x in make_batch()]
    masks = {"valid": jnp.asarray(VALID), "same_entity": mode, **LABELS}
    run = value_and_grads(ring(mesh_of, "2x2x2", block_size=5, **masks))
    _, grads = run(*half, 50.0, BIAS)
    full = [x.astype(jnp.float32) for x in half]
    _, expected = value_and_grads(ring(mesh_of, "dense", **masks))(*full, 50.0, BIAS)
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 2 + [jnp.float32] * 2
    for a, b in zip(grads, expected, strict=True):
        assert relative(a, b) <= 5e-3


def test_bad_arguments_are_refused(mesh_of):
    check_bad_input(mesh_of, siglip.siglip, siglip.siglip_dense, 10.0, BIAS)


@pytest.mark.parametrize("block_size", [None, 5])
@pytest.mark.parametrize("mesh", ["1x8x1", "2x2x2"])
def test_nothing_travels_but_one_shard_of_texts(mesh_of, mesh, block_size):
    mine = B // global_batch.batch_shards(mesh_of[mesh])
    program = program_of(siglip.siglip, mesh_of[mesh], 2, block_size)
    found = collectives(program)
    assert set(found) == {"collective-permute", "all-reduce"}
    assert found["collective-permute"] == {(mine, D), (mine,)}
    assert found["all-reduce"] == {()}
    dims = shapes(program)
    assert not [s for s in dims if B in s], "something of the whole batch"
    assert ((mine, mine) in dims) == (block_size is None)
    assert (mine, 5) in dims or block_size is None


def test_one_device_needs_no_ring(mesh_of):
    assert set(collectives(program_of(siglip.siglip, mesh_of["1x1x1"], 2, 7))) <= {"all-reduce"}
