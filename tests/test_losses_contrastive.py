"""The CLIP loss: dense against PyTorch, sharded against both, labels, and the compiled program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import global_batch
from mofi_jax.losses import blocks, contrastive, relations
from tests.entity_batch import relative
from tests.programs import BATCH_SPEC, collectives, compiled, shapes

BATCH = 24
DIM = 20
MODES = relations.SAME_ENTITY
FIRST_SCALE = 1 / 0.07  # CLIP's
SCALES = [FIRST_SCALE, 100.0]

# Sums that are to cancel or to be equal to the bit need the rounding of optimised code.
OPTIMISED = {"xla_backend_optimization_level": 1}

VALID = np.ones(BATCH, bool)
VALID[[2, 9, 23]] = False
# Images 0 and 1 and text 20 are of entity 7; image 0 shows entity 8 as well, of which texts 5 and 6
# speak, but not images 5 and 6 themselves.  Text 2, invalid, is about what image 3 shows.  Texts 11
# and 12 are the same words about no entity.  Rows are filled up by repeating.
TEXT_ENTITY = np.arange(100, 100 + BATCH, dtype=np.int32)
TEXT_ENTITY[[1, 20]], TEXT_ENTITY[[5, 6]], TEXT_ENTITY[[2, 3]], TEXT_ENTITY[[11, 12]] = 7, 8, 9, -4
IMAGE_ENTITIES = np.repeat(TEXT_ENTITY[:, None], 3, axis=1)
IMAGE_ENTITIES[0], IMAGE_ENTITIES[1], IMAGE_ENTITIES[4], IMAGE_ENTITIES[5], IMAGE_ENTITIES[6] = (
    [7, 8, 8],
    [7, 7, 110],
    [104, 100, 101],
    55,
    66,
)
LABELS = {"image_entities": jnp.asarray(IMAGE_ENTITIES), "text_entity": jnp.asarray(TEXT_ENTITY)}


def make_batch(batch: int = BATCH, noise: float = 1.0):
    """Texts near their images, so that some rows are right and some are not."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(batch, DIM))
    text = image + noise * rng.normal(size=(batch, DIM)) * np.linspace(0, 3, batch)[:, None]
    return tuple(
        jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)
        for x in (image, text)
    )


def related(i: int, j: int) -> bool:
    return i == j or int(TEXT_ENTITY[j]) in IMAGE_ENTITIES[i].tolist()


def count_correct(logits: np.ndarray, mode: str) -> float:
    """Half a point for each image, and each text, whose own logit beats every wrong one's."""
    rows, correct = np.flatnonzero(VALID), 0.0
    for i in rows:
        others = [j for j in rows if j != i]
        texts = [j for j in others if mode == "off" or not related(i, j)]
        images = [j for j in others if mode == "off" or not related(j, i)]
        correct += 0.5 * all(logits[i, i] > logits[i, j] for j in texts)
        correct += 0.5 * all(logits[i, i] > logits[j, i] for j in images)
    return correct


def pair_cosines() -> float:
    image, text = (np.asarray(a, np.float64)[VALID] for a in make_batch())
    return np.sum(image * text)


@functools.cache
def reference(scale: float, mode: str):
    """(total, correct, gradients of the mean) in float64, one row after the other."""
    leaves = [torch.tensor(np.asarray(a), dtype=torch.float64) for a in make_batch()]
    leaves.append(torch.tensor(scale, dtype=torch.float64))
    image, text, s = (a.requires_grad_() for a in leaves)
    logits, rows, losses = s * image @ text.T, np.flatnonzero(VALID), []
    for i in rows:
        for row, relation in (
            (logits[i], {j: related(i, j) for j in rows}),
            (logits[:, i], {j: related(j, i) for j in rows}),
        ):
            partners = [j for j in rows if relation[j]]
            targets = partners if mode == "positive" else [i]
            masked = set(partners) - {i} if mode == "masked" else set()
            log_sum = torch.logsumexp(row[[j for j in rows if j not in masked]], 0)
            losses.append(sum(log_sum - row[j] for j in targets) / len(targets))
    total = 0.5 * sum(losses)
    (total / len(rows)).backward()
    correct = count_correct(logits.detach().numpy(), mode)
    return total.item(), correct, [a.grad.numpy() for a in (image, text, s)]


def value_and_grads(loss):
    """A function of the loss's leaves: (LossSum, gradients of the mean by each of them)."""

    def mean(leaves):
        result = loss(*leaves)
        return result.total / jnp.maximum(result.count, 1), result

    step = jax.jit(jax.value_and_grad(mean, has_aux=True), compiler_options=OPTIMISED)

    def run(*leaves):
        (_, result), grads = step(tuple(x if np.ndim(x) else jnp.float32(x) for x in leaves))
        return result, grads

    return run


def bound(mesh_of, mesh: str, dense, sharded, block_size: int | None = None, **kwargs):
    """The dense loss, or the sharded one on a mesh, with its keywords."""
    if mesh == "dense":
        return functools.partial(dense, **kwargs)
    return functools.partial(sharded, mesh=mesh_of[mesh], block_size=block_size, **kwargs)


clip = functools.partial(
    bound, dense=contrastive.clip_softmax_dense, sharded=contrastive.clip_softmax
)


@pytest.mark.parametrize("scale", SCALES)
def test_plain_clip_is_torch_cross_entropy(scale):
    image, text = make_batch()
    loss = functools.partial(contrastive.clip_softmax_dense, valid=jnp.ones(BATCH))
    result, grads = value_and_grads(loss)(image, text, scale)
    leaves = [torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in (image, text)]
    leaves.append(torch.tensor(scale, dtype=torch.float64, requires_grad=True))
    logits = leaves[2] * leaves[0] @ leaves[1].T
    labels = torch.arange(BATCH)
    mean = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    mean.backward()
    assert float(result.total / result.count) == pytest.approx(mean.item(), rel=1e-6)
    for ours, theirs in zip(grads, leaves, strict=True):
        assert relative(ours, theirs.grad.numpy()) <= 1e-5


TILINGS = [
    ("dense", None),
    ("1x1x1", None),
    ("1x1x1", 7),
    ("1x8x1", 5),
    ("2x2x2", None),
    ("2x2x2", 10),
    ("8x1x1", 9),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("mesh", "block_size"), TILINGS)
def test_against_float64(mesh_of, mesh, block_size, mode):
    loss = clip(
        mesh_of,
        mesh,
        block_size=block_size,
        valid=jnp.asarray(VALID),
        same_entity=mode,
        **LABELS,
    )
    run = value_and_grads(loss)
    for scale in SCALES:
        result, grads = run(*make_batch(), scale)
        total, correct, expected = reference(scale, mode)
        assert float(result.total) == pytest.approx(total, rel=1e-6)
        assert (float(result.count), float(result.correct)) == (VALID.sum(), correct)
        assert 0 < correct < VALID.sum()
        assert float(result.cosine) == pytest.approx(pair_cosines(), rel=1e-6)
        for name, a, b in zip(("image", "text", "scale"), grads, expected, strict=True):
            assert relative(a, b) <= 1e-5, name
        assert not np.any(grads[0][~VALID])
        assert not np.any(grads[1][~VALID])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("mesh", "block_size"), [("1x8x1", None), ("2x2x2", 100), ("8x1x1", 33)])
def test_sharded_is_dense(mesh_of, mesh, block_size, mode):
    """A batch in which everything is related to something."""
    image, text = make_batch(160)
    rng = np.random.default_rng(1)
    masks = {
        "valid": jnp.asarray(rng.random(160) > 0.1),
        "image_entities": jnp.asarray(rng.integers(0, 50, size=(160, 4)).astype(np.int32)),
        "text_entity": jnp.asarray(rng.integers(0, 50, size=160).astype(np.int32)),
        "same_entity": mode,
    }
    run = value_and_grads(clip(mesh_of, mesh, block_size=block_size, **masks))
    dense = value_and_grads(clip(mesh_of, "dense", **masks))
    for scale in SCALES:
        result, grads = run(image, text, scale)
        expected, expected_grads = dense(image, text, scale)
        assert float(result.total) == pytest.approx(float(expected.total), rel=1e-6)
        assert (result.count, result.correct) == (expected.count, expected.correct)
        assert float(result.cosine) == pytest.approx(float(expected.cosine), rel=1e-6)
        for a, b in zip(grads, expected_grads, strict=True):
            assert relative(a, b) <= 1e-5


@pytest.mark.parametrize("mesh", ["dense", "2x2x2"])
def test_modes_differ_in_related_pairs_only(mesh_of, mesh):
    """Without related pairs all are plain CLIP; with a twin, "off" pays log 2 each way."""
    image, text = make_batch()
    text = text.at[1].set(text[0])

    def total(mode, **labels):
        loss = clip(mesh_of, mesh, valid=jnp.ones(BATCH), same_entity=mode, **labels)
        total = jax.jit(loss, compiler_options=OPTIMISED)
        return float(total(image, text, jnp.float32(100.0)).total)

    text_entity = jnp.arange(BATCH)
    plain = total("off", image_entities=text_entity[:, None], text_entity=text_entity.at[1].set(0))
    for mode in MODES:
        assert (
            total(mode)
            == total(mode, image_entities=text_entity[:, None], text_entity=text_entity)
            == plain
        )
    masked = total(
        "masked",
        image_entities=text_entity.at[1].set(0)[:, None],
        text_entity=text_entity.at[1].set(0),
    )
    # As negatives the twins cost log 2 each in the direction image -> text, at least.
    assert plain - masked >= 2 * 0.5 * np.log(2) - 1e-3


def check_invalid_rows(mesh_of, bind, *scalars):
    """Bit-equal for any content of invalid rows; shared with the tests of SigLIP."""
    batch = make_batch()
    junk_labels = {
        "image_entities": jnp.asarray(np.where(VALID[:, None], IMAGE_ENTITIES, 7)),
        "text_entity": jnp.asarray(np.where(VALID, TEXT_ENTITY, 7)),
    }
    for mesh in ("dense", "2x2x2"):
        valid = jnp.asarray(VALID, jnp.float32)
        run = value_and_grads(bind(mesh_of, mesh, valid=valid, **LABELS))
        relabelled = value_and_grads(bind(mesh_of, mesh, valid=valid, **junk_labels))
        expected = run(*batch, *scalars)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))
        for junk in (-3.0, 3e38, np.inf, np.nan):
            contents = [jnp.where(VALID[:, None], x, junk) for x in batch]
            for result in (run(*contents, *scalars), relabelled(*contents, *scalars)):
                for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
                    np.testing.assert_array_equal(a, b)


def test_invalid_rows_never_matter(mesh_of):
    check_invalid_rows(mesh_of, clip, 50.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mesh", ["dense", "1x8x1"])
def test_nothing_valid_certainty_and_no_length_stay_finite(mesh_of, mesh, mode):
    rng = np.random.default_rng(1)
    certain = jnp.asarray(np.linalg.qr(rng.normal(size=(BATCH, BATCH)))[0], jnp.float32)
    for valid, rows, scale, total in (
        (jnp.zeros(BATCH), make_batch()[0], 100.0, 0.0),
        (jnp.ones(BATCH), certain, 1e4, 0.0),
        (jnp.ones(BATCH), jnp.zeros((BATCH, DIM)), 100.0, BATCH * np.log(BATCH)),
    ):
        run = clip(mesh_of, mesh, block_size=7, valid=valid, same_entity=mode)
        result, grads = value_and_grads(run)(rows, rows, scale)
        assert float(result.total) == pytest.approx(total, rel=1e-6, abs=1e-6)
        assert result.count == valid.sum()
        assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_embeddings(mesh_of, mode):
    """Gradients in bf16, those of the same numbers in fp32 up to their rounding."""
    half = [x.astype(jnp.bfloat16) for x in make_batch()]
    masks = {"valid": jnp.asarray(VALID), "same_entity": mode, **LABELS}
    _, grads = value_and_grads(clip(mesh_of, "2x2x2", block_size=5, **masks))(*half, 50.0)
    full = [x.astype(jnp.float32) for x in half]
    _, expected = value_and_grads(clip(mesh_of, "dense", **masks))(*full, 50.0)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for a, b in zip(grads, expected, strict=True):
        assert relative(a, b) <= 5e-3


def check_bad_input(mesh_of, sharded, dense, *scalars):
    """Told in one sentence; shared with the tests of SigLIP."""
    image, text = make_batch()
    valid = jnp.ones(BATCH)
    with pytest.raises(BadInput, match="batch of 23 does not divide over 8"):
        sharded(image[:23], text[:23], *scalars, mesh=mesh_of["1x8x1"], valid=valid[:23])
    for loss in (dense, functools.partial(sharded, mesh=mesh_of["1x8x1"])):
        with pytest.raises(BadInput, match="'on': choose from off, masked, positive"):
            loss(image, text, *scalars, valid=valid, same_entity="on")
        with pytest.raises(BadInput, match="image_entities is given without text_entity"):
            loss(image, text, *scalars, valid=valid, image_entities=LABELS["image_entities"])
        with pytest.raises(BadInput, match="text_entity is given without image_entities"):
            loss(image, text, *scalars, valid=valid, text_entity=LABELS["text_entity"])


def test_bad_arguments_are_refused(mesh_of):
    check_bad_input(mesh_of, contrastive.clip_softmax, contrastive.clip_softmax_dense, 1.0)


# Sizes that occur nowhere else: 4 or 8 shards of 12 or 6 rows, embeddings of 20, 3 labels.
B, D, K, BLOCK = 48, 20, 3, 11


def program_of(sharded, mesh, scalars: int, block_size: int | None, dtype=jnp.float32) -> str:
    """The compiled value and gradient of a sharded loss of B rows; shared with SigLIP's tests."""

    def total(image, text, valid, image_entities, text_entity, *scalars):
        return sharded(
            image,
            text,
            *scalars,
            mesh=mesh,
            valid=valid,
            image_entities=image_entities,
            text_entity=text_entity,
            same_entity="positive",
            block_size=block_size,
        ).total

    # d_image, d_text and those of the scalars.
    step = jax.value_and_grad(total, (0, 1, *range(5, 5 + scalars)))
    return compiled(
        step,
        mesh,
        ((B, D), dtype, BATCH_SPEC),
        ((B, D), dtype, BATCH_SPEC),
        ((B,), jnp.bool_, BATCH_SPEC),
        ((B, K), jnp.int32, BATCH_SPEC),
        ((B,), jnp.int32, BATCH_SPEC),
        *[((), jnp.float32, jax.sharding.PartitionSpec())] * scalars,
    )


@pytest.mark.parametrize("block_size", [None, BLOCK])
@pytest.mark.parametrize("mesh", ["1x8x1", "2x2x2"])
def test_only_the_named_collectives(mesh_of, mesh, block_size):
    mine = B // global_batch.batch_shards(mesh_of[mesh])
    program = program_of(contrastive.clip_softmax, mesh_of[mesh], 1, block_size)
    found = collectives(program)
    assert set(found) == {"all-gather", "all-reduce", "reduce-scatter"}
    assert found["all-gather"] == {(B, D), (B,)}
    assert found["all-reduce"] == {(B,), ()}
    assert found["reduce-scatter"] == {(mine, D)}
    dims = shapes(program)
    assert not [s for s in dims if s.count(B) > 1], "all logits"
    # One shard of the logits, from the limit that the other program keeps.
    assert ((mine, B) in dims) == (block_size is None)
    assert (mine, BLOCK) in dims or block_size is None


def test_tile_fits_its_limit(mesh_of):
    limit = blocks.tile_logits(mesh_of["1x8x1"])
    for images, texts in ((4, 32), (4096, 32768), (1000, 7000), (8192, 65536)):
        block = blocks.tile_columns(mesh_of["1x8x1"], images, texts, None)
        assert images * block <= limit
        assert block == texts or images * (block + 128) > limit / 2
