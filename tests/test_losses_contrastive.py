"""The CLIP loss: dense against PyTorch, sharded against dense, masks, and the compiled program."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mofi_jax import partition
from mofi_jax.errors import BadInput
from mofi_jax.losses import contrastive

BATCH = 24
DIM = 20


def make_batch(batch: int = BATCH, noise: float = 1.0):
    """Texts near their images, so that some rows are right and some are not."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(batch, DIM))
    text = image + noise * rng.normal(size=(batch, DIM)) * np.linspace(0, 3, batch)[:, None]
    return tuple(
        jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)
        for x in (image, text)
    )


VALID = np.ones(BATCH, bool)
VALID[[2, 9, 23]] = False
# Rows 0, 1, 20 share a text, 5 and 6 another; 2 is invalid and shares with 3.
GROUPS = np.arange(100, 100 + BATCH, dtype=np.int32)
GROUPS[[0, 1, 20]], GROUPS[[5, 6]], GROUPS[[2, 3]] = 7, 8, 9


def torch_loss(image, text, scale, valid, groups):
    """(total, correct, gradients of the mean) by PyTorch: invalid rows removed, row by row."""
    image, text = (torch.tensor(np.asarray(a), dtype=torch.float64) for a in (image, text))
    scale = torch.tensor(float(scale), dtype=torch.float64)
    leaves = [a.requires_grad_() for a in (image, text, scale)]
    keep = np.flatnonzero(valid)
    logits = scale * image[keep] @ text[keep].T
    groups = np.asarray(groups)[keep]
    total, correct = 0.0, 0.0
    for matrix in (logits, logits.T):
        for i in range(len(keep)):
            columns = [j for j in range(len(keep)) if j == i or groups[j] != groups[i]]
            row = matrix[i, columns]
            target = torch.tensor([columns.index(i)])
            total = total + 0.5 * F.cross_entropy(row[None], target)
            correct += 0.5 * (int(row.argmax()) == int(target))
    (total / len(keep)).backward()
    return total.item(), correct, [a.grad.numpy() for a in leaves]


def value_and_grads(loss, image, text, scale):
    """(LossSum, gradients of the mean by image, text and scale)."""

    def mean(image, text, scale):
        result = loss(image, text, scale)
        return result.total / jnp.maximum(result.count, 1), result

    step = jax.jit(jax.value_and_grad(mean, (0, 1, 2), has_aux=True))
    (_, result), grads = step(image, text, jnp.float32(scale))
    return result, grads


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("scale", [1 / 0.07, 100.0])
def test_plain_clip_is_torch_cross_entropy(scale):
    image, text = make_batch()
    loss = functools.partial(contrastive.clip_softmax_dense, valid=jnp.ones(BATCH))
    result, grads = value_and_grads(loss, image, text, scale)
    leaves = [torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in (image, text)]
    leaves.append(torch.tensor(scale, dtype=torch.float64, requires_grad=True))
    logits = leaves[2] * leaves[0] @ leaves[1].T
    labels = torch.arange(BATCH)
    mean = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    mean.backward()
    assert float(result.total / result.count) == pytest.approx(mean.item(), rel=1e-6)
    for ours, theirs in zip(grads, leaves, strict=True):
        assert relative(ours, theirs.grad.numpy()) <= 1e-5


@pytest.mark.parametrize("mesh", ["dense", "1x1x1", "1x8x1", "2x2x2", "8x1x1"])
@pytest.mark.parametrize("scale", [1 / 0.07, 100.0])
def test_masks_against_torch(meshes, mesh, scale):
    image, text = make_batch()
    total, correct, expected = torch_loss(image, text, scale, VALID, GROUPS)
    masks = {"valid": jnp.asarray(VALID), "groups": jnp.asarray(GROUPS)}
    if mesh == "dense":
        loss = functools.partial(contrastive.clip_softmax_dense, **masks)
    else:
        loss = functools.partial(contrastive.clip_softmax, mesh=meshes[mesh], **masks)
    result, grads = value_and_grads(loss, image, text, scale)
    assert float(result.total) == pytest.approx(total, rel=1e-6)
    assert (float(result.count), float(result.correct)) == (VALID.sum(), correct)
    assert 0 < correct < VALID.sum()
    for name, a, b in zip(("image", "text", "scale"), grads, expected, strict=True):
        assert relative(a, b) <= 1e-5, name
    assert not np.any(grads[0][~VALID])
    assert not np.any(grads[1][~VALID])


def test_same_text_is_no_negative(meshes):
    """Two pictures of one thing with one text: pulled to the text, not away from it."""
    image, text = make_batch()
    text = text.at[1].set(text[0])
    groups = jnp.asarray(np.arange(BATCH)).at[1].set(0)
    run = functools.partial(contrastive.clip_softmax, mesh=meshes["2x2x2"], valid=jnp.ones(BATCH))
    with_groups = jax.jit(lambda i, t: run(i, t, 100.0, groups=groups))(image, text)
    plain = jax.jit(lambda i, t: run(i, t, 100.0))(image, text)
    all_different = jax.jit(lambda i, t: run(i, t, 100.0, groups=jnp.arange(BATCH) + 5))(
        image, text
    )
    assert plain.total == all_different.total
    # As negatives the twins cost log 2 each in the direction image -> text, at least.
    assert float(plain.total - with_groups.total) >= 2 * 0.5 * np.log(2) - 1e-3


def test_invalid_rows_never_matter(meshes):
    image, text = make_batch()
    junk = jnp.where(VALID[:, None], text, -3.0)
    run = functools.partial(
        contrastive.clip_softmax, mesh=meshes["2x2x2"], valid=jnp.asarray(VALID, jnp.float32)
    )
    first = value_and_grads(run, image, text, 50.0)
    second = value_and_grads(run, image, junk, 50.0)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_valid_and_certainty_stay_finite(meshes):
    image, _ = make_batch()
    image = jnp.asarray(np.linalg.qr(np.random.default_rng(1).normal(size=(BATCH, BATCH)))[0])
    image = image.astype(jnp.float32)
    for valid, scale in ((jnp.zeros(BATCH), 100.0), (jnp.ones(BATCH), 1e4)):
        run = functools.partial(contrastive.clip_softmax, mesh=meshes["1x8x1"], valid=valid)
        result, grads = value_and_grads(run, image, image, scale)
        assert float(result.total) == pytest.approx(0.0, abs=1e-6)
        assert result.count == valid.sum()
        assert all(np.isfinite(g).all() for g in grads)


def test_bad_batch_is_told(meshes):
    image, text = make_batch()
    with pytest.raises(BadInput, match="batch of 23 does not divide over 8"):
        contrastive.clip_softmax(
            image[:23], text[:23], 1.0, mesh=meshes["1x8x1"], valid=jnp.ones(23)
        )


def test_only_the_named_collectives(meshes):
    b, d, mesh = 48, 20, meshes["2x2x2"]

    def total(image, text, scale, valid, groups):
        return contrastive.clip_softmax(
            image, text, scale, mesh=mesh, valid=valid, groups=groups
        ).total

    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
        for shape, dtype, spec in (
            ((b, d), jnp.float32, (partition.BATCH_AXES,)),
            ((b, d), jnp.float32, (partition.BATCH_AXES,)),
            ((), jnp.float32, ()),
            ((b,), jnp.bool_, (partition.BATCH_AXES,)),
            ((b,), jnp.int32, (partition.BATCH_AXES,)),
        )
    ]
    step = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
    program = step.lower(*arguments).compile().as_text()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = {}
    for match in re.finditer(rf"= (.*?) ({kinds})(?:-start)?\(", program):
        found.setdefault(match[2], set()).update(re.findall(r"\w+\[([\d,]*)\]", match[1]))
    assert set(found) == {"all-gather", "all-reduce", "reduce-scatter"}
    assert found["all-gather"] == {f"{b},{d}", f"{b}"}
    assert found["all-reduce"] == {f"{b}", ""}
    assert found["reduce-scatter"] == {f"{b // 4},{d}"}
    assert f"[{b},{b}]" not in program
    assert f"[{b // 4},{b}]" in program
