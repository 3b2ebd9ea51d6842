"""State and position as one thing: exact, onto any mesh, mismatches named."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

from configs import quickstart
from mofi_jax.common import checksums, errors, files
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import sharding
from mofi_jax.losses import class_order
from mofi_jax.model import mofi
from mofi_jax.training import arrays, cadence, checkpoint, class_table, optim, state


def initialiser(width=8, rows=16, tx=None, ema=False):
    config = mofi.MofiConfig(
        image_size=16,
        patch_size=8,
        image=mofi.TowerConfig(width, 1, 2),
        text=mofi.TowerConfig(8, 1, 2),
        vocab_size=20,
        context_length=4,
        eos_id=19,
        embed_dim=8,
    )
    tx = tx or optax.adam(1e-3)
    losses = quickstart.get_config("task=multitask").losses
    return state.initialiser(config, tx, losses=losses.to_dict(), table_rows=rows, ema=ema)


POSITION = checkpoint.Position(
    320, {"seed": 3, "dataset": "i2e"}, {"step": 12.5, "lost": 3.0}, {"total": "2 epochs"}
)


@pytest.fixture(scope="module")
def on_eight(mesh_of):
    return state.create(initialiser(), 5, mesh_of["2x2x2"])[0]


@pytest.fixture
def saved(tmp_path, on_eight):
    train_state = on_eight
    checkpointer = checkpoint.Checkpointer(tmp_path, keep=2)
    checkpointer.save(20, train_state, POSITION)
    checkpointer.wait()
    yield checkpointer, train_state, tmp_path
    checkpointer.close()


@pytest.mark.parametrize("mesh", ["1x1x1", "1x8x1", "2x2x2"])
def test_restores_bit_for_bit_on_any_mesh(saved, mesh_of, mesh):
    _, train_state, folder = saved
    structs, shardings = state.abstract(initialiser(), mesh_of[mesh])
    restored = checkpoint.restore(folder, 20, structs)
    assert checkpoint.read_position(folder, 20) == POSITION
    assert jax.tree.structure(restored) == jax.tree.structure(train_state)
    jax.tree.map(np.testing.assert_array_equal, train_state, restored)
    placed = jax.tree.map(lambda array, sharding: array.sharding == sharding, restored, shardings)
    assert all(jax.tree.leaves(placed))


def test_padding_of_the_class_table_follows_the_mesh(saved, mesh_of):
    """16 rows were saved; 13 cut padding off, 24 add rows of zeros, the moments alike."""
    _, train_state, folder = saved
    for rows in (13, 24):
        structs, _ = state.abstract(initialiser(rows=rows), mesh_of["1x1x1"])
        restored = checkpoint.restore(folder, 20, structs)
        for table, whole in (
            (restored.params["entity_table"], train_state.params["entity_table"]),
            (restored.opt_state[0].mu["entity_table"], train_state.opt_state[0].mu["entity_table"]),
        ):
            assert table.shape == (rows, 8)
            np.testing.assert_array_equal(table[:16], whole[:rows])
            np.testing.assert_array_equal(table[16:], 0)


def test_params_alone(saved, caplog):
    _, train_state, folder = saved
    params = checkpoint.restore_params(folder)
    jax.tree.map(np.testing.assert_array_equal, params, train_state.params)
    assert not caplog.records  # nor is anything said of files that no item has


def test_latest_step_and_keep(saved):
    checkpointer, train_state, folder = saved
    for step in (30, 40):
        checkpointer.save(step, train_state, POSITION)
    checkpointer.wait()
    assert checkpoint.saved_steps(folder)[-1] == 40
    kept = [p.name for p in checkpointer.folder.iterdir() if p.name.isdigit()]
    assert sorted(kept) == ["30", "40"]


def test_a_save_asks_nothing_about_preemption(saved, monkeypatch):
    """The loop asks alone: the service compares the numbers of questions."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    checkpointer, train_state, _ = saved
    checkpointer.save(30, train_state, POSITION)
    checkpointer.wait()
    assert asked == []


def test_keeps_one_of_every_so_many_for_ever(tmp_path, mesh_of):
    train_state, _ = state.create(initialiser(), 5, mesh_of["1x1x1"])
    checkpointer = checkpoint.Checkpointer(tmp_path, keep=1, keep_every=20)
    for step in range(10, 70, 10):
        checkpointer.save(step, train_state, POSITION)
    checkpointer.close()
    assert checkpoint.saved_steps(tmp_path) == [20, 40, 60]


def test_the_best_step_is_kept_and_named_beside_the_last_ones(tmp_path, mesh_of):
    train_state, _ = state.create(initialiser(), 5, mesh_of["1x1x1"])
    checkpointer = checkpoint.Checkpointer(tmp_path, keep=1)
    best = None
    for step, score in ((10, 0.2), (20, 0.5), (30, 0.5), (40, 0.1), (50, np.nan)):
        best = checkpoint.find_best("mine/map", best, step, {"mine/map": score, "x/map": 1.0})
        checkpointer.save(step, train_state, dataclasses.replace(POSITION, best=best))
    checkpointer.close()
    assert checkpoint.saved_steps(tmp_path) == [20, 50]
    assert best == {"metric": "mine/map", "step": 20, "value": 0.5}
    assert checkpoint.read_position(tmp_path, 50).best == best
    assert json.loads((tmp_path / checkpoint.BEST_FILE).read_text()) == best
    steps = [checkpoint.chosen_step(tmp_path, step) for step in ("best", "50", "", "20")]
    assert steps == [20, 50, 50, 20]
    for step in ("30", "first"):
        with pytest.raises(BadInput, match=rf"no checkpoint of --step={step}: it has 20, 50, or"):
            checkpoint.chosen_step(tmp_path, step)
    (tmp_path / checkpoint.FOLDER / "20/params/_METADATA").unlink()
    with pytest.raises(BadInput, match=r"of --step=best is damaged \(.*_METADATA.*name another"):
        checkpoint.chosen_step(tmp_path, "best")
    (tmp_path / checkpoint.BEST_FILE).unlink()
    with pytest.raises(BadInput, match=r"best.json cannot be read .*keep_best in training"):
        checkpoint.chosen_step(tmp_path, "best")


def test_the_best_is_looked_for_by_one_metric():
    found = {"metric": "mine/map", "step": 20, "value": 0.5}
    assert checkpoint.find_best("", None, 30, {"mine/map": 1.0}) is None
    assert checkpoint.find_best("mine/map", found, 30, {"other/map": 1.0}) == found
    assert checkpoint.find_best("other/map", found, 30, {"mine/map": 1.0}) is None
    assert checkpoint.find_best("mine/map", None, 0, {"mine/map": 1.0}) is None
    with pytest.raises(BadInput, match=r"keep_best=mine/x is nothing .* from mine/map, mine/top1"):
        checkpoint.find_best("mine/x", None, 0, {"mine/map": 1.0, "mine/top1": 1.0, "a/b": 0.0})


def test_the_average_is_saved_and_is_what_others_read(tmp_path, mesh_of):
    train_state, shardings = state.create(initialiser(ema=True), 5, mesh_of["1x8x1"])
    double = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), out_shardings=shardings.ema)
    train_state = dataclasses.replace(train_state, ema=double(train_state.ema))
    checkpointer = checkpoint.Checkpointer(tmp_path, keep=1)
    checkpointer.save(20, train_state, POSITION)
    checkpointer.wait()
    structs, _ = state.abstract(initialiser(ema=True), mesh_of["2x2x2"])
    restored = checkpoint.restore(tmp_path, 20, structs)
    jax.tree.map(np.testing.assert_array_equal, train_state, restored)
    average = checkpoint.restore_params(tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), average, train_state.params)
    without, _ = state.abstract(initialiser(), mesh_of["1x1x1"])
    with pytest.raises(BadInput, match=r"an average of the parameters is in it \(config.ema"):
        checkpoint.restore(tmp_path, 20, without)
    checkpointer.close()


def test_something_else_in_place_of_a_file_or_a_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(BadInput, match="checkpoints is a file"):
        checkpoint.saved_steps(tmp_path)
    (tmp_path / "result.json").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        files.write_json(tmp_path / "result.json", {})
    assert errors.storage_problem(caught.value, tmp_path) == "is a directory"


def test_a_disk_that_is_full_is_told_by_the_system_s_own_words(tmp_path):
    """Orbax reports it as text in a ValueError; an OSError about another folder is not ours."""
    text = f'Error writing "a/0" in "{tmp_path}/checkpoints/2": No space left on device [28]'
    assert errors.storage_problem(ValueError(text), tmp_path) == "no space left on device"
    full = OSError(errno.ENOSPC, "No space left on device")
    assert errors.storage_problem(full, tmp_path) == "no space left on device"
    elsewhere = PermissionError(errno.EACCES, "Permission denied", "/data/i2e/1.0.0")
    assert errors.storage_problem(elsewhere, tmp_path) is None
    here = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".config.json"))
    assert errors.storage_problem(here, tmp_path) == "permission denied"
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = full
    assert errors.storage_problem(wrapped, tmp_path) == "no space left on device"
    assert errors.storage_problem(ValueError("no"), tmp_path) is None


def test_every_mismatch_is_named_at_once(saved, mesh_of):
    _, _, folder = saved
    structs, _ = state.abstract(initialiser(width=16), mesh_of["1x1x1"])
    with pytest.raises(BadInput) as caught:
        checkpoint.restore(folder, 20, structs)
    for name in ("image/class_embedding is (8,)", "image/blocks/mlp/fc1/bias is (1, 32)"):
        assert f"params/{name}" in str(caught.value)


def test_missing_and_left_over_arrays_are_named(saved, mesh_of):
    _, _, folder = saved
    structs, _ = state.abstract(initialiser(tx=optax.sgd(1e-3, momentum=0.9)), mesh_of["1x1x1"])
    with pytest.raises(
        BadInput, match=r"nu/.*is not in the model.*trace/.*is not in the checkpoint"
    ):
        checkpoint.restore(folder, 20, structs)


def test_no_checkpoint(tmp_path):
    with pytest.raises(BadInput, match="There is no checkpoint in"):
        checkpoint.restore_params(tmp_path)


@pytest.mark.parametrize("second_moment", ["full", "row"])
def test_class_table_from_eight_devices_on_four_two_and_one(tmp_path, mesh_of, second_moment):
    """1,003 rows, which divide over none of them: rows and moments move bit for bit."""
    entities = 1003
    settings = quickstart.get_config("task=multitask").optimizer
    settings.table.second_moment = second_moment
    settings.first_moment_dtype = "bfloat16"
    tx = optim.make(settings, cadence.Clock(16, 1000, 100))

    def make(mesh):
        return initialiser(rows=class_order.padded_rows(entities, mesh), tx=tx)

    eight, shardings = state.create(make(mesh_of["1x8x1"]), 5, mesh_of["1x8x1"])
    # Moments of a training under way: every value another.
    rng = np.random.default_rng(0)

    def fill(leaf, sharding):
        if leaf.ndim == 0:
            return leaf
        return jax.device_put((100 * rng.normal(size=leaf.shape)).astype(leaf.dtype), sharding)

    eight = jax.tree.map(fill, eight, shardings)
    checkpointer = checkpoint.Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, eight, POSITION)
    checkpointer.wait()
    for name in ("2x1x2", "1x2x1", "1x1x1"):
        structs, _ = state.abstract(make(mesh_of[name]), mesh_of[name])
        restored = checkpoint.restore(tmp_path, 1, structs)
        moved = 0
        for (path, a), b in zip(
            jax.tree_util.tree_flatten_with_path(eight)[0], jax.tree.leaves(restored), strict=True
        ):
            if class_table.is_table(path):
                moved += 1
                assert a.shape[0] == 1008
                assert b.shape[0] == class_order.padded_rows(entities, mesh_of[name])
                assert len(b.sharding.device_set) == mesh_of[name].size
                assert b.addressable_shards[0].data.shape[0] == b.shape[0] // mesh_of[name].size
                a, b = a[:entities], b[:entities]
            np.testing.assert_array_equal(a, b, err_msg=sharding.path_name(path))
            assert a.dtype == b.dtype
        assert moved == 4, "table, two moments, last step"
    checkpointer.close()


# ---------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def steps(tmp_path_factory, mesh_of):
    """A run with two saved steps, 20 and 40, to be copied before it is hurt."""
    folder = tmp_path_factory.mktemp("steps")
    checkpointer = checkpoint.Checkpointer(folder, keep=2)
    train_state, _ = state.create(initialiser(ema=True), 5, mesh_of["1x1x1"])
    for step in (20, 40):
        checkpointer.save(step, train_state, dataclasses.replace(POSITION, examples=step))
    checkpointer.close()
    return folder


@pytest.fixture
def run(steps, tmp_path):
    return shutil.copytree(steps, tmp_path / "run")


def files_of(step):
    return sorted(path for path in step.rglob("*") if path.is_file())


def test_sums_are_those_of_sha256sum(run):
    folder = run / checkpoint.FOLDER / "40"
    lines = (folder / checksums.FILE).read_text().splitlines()
    files = [path for path in files_of(folder) if path.name != checksums.FILE]
    assert lines == [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}"
        for path in files
    ]


def test_every_flipped_bit_is_noticed(run):
    """60 bits, anywhere in the files of a step: arrays, metadata and the sums themselves."""
    folder = run / checkpoint.FOLDER / "40"
    files = files_of(folder)
    rng = np.random.default_rng(0)
    assert checkpoint.damage(run, 40) is None
    for path in rng.choice(files, 60):
        whole = path.read_bytes()
        hurt = bytearray(whole)
        hurt[rng.integers(len(hurt))] ^= 1 << int(rng.integers(8))
        path.write_bytes(hurt)
        assert str(folder) in (checkpoint.damage(run, 40) or ""), path
        path.write_bytes(whole)
    assert checkpoint.damage(run, 40) is None


HURTS = {
    "missing file": (lambda f: (f / "params/_METADATA").unlink(), "params/_METADATA is missing"),
    "missing item": (lambda f: shutil.rmtree(f / "optimizer"), "optimizer/.* is missing"),
    "cut": (lambda f: cut(f / "params/_sharding"), "params/_sharding is not what was saved"),
    "empty": (lambda f: (f / "position/metadata").write_text(""), "position/metadata is not what"),
    "left over": (lambda f: (f / "params/new").write_text(""), "params/new is not in SHA256SUMS"),
    "cut sums": (lambda f: cut(f / checksums.FILE), "(SHA256SUMS|is missing)"),
    "odd position": (lambda f: odd_position(f), r"position cannot be read .*\['examples'\]"),
    "nothing left": (lambda f: (shutil.rmtree(f), f.mkdir()), "position cannot be read"),
}


def odd_position(folder):
    (folder / checksums.FILE).unlink()
    path = folder / "position/metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"examples": -5}))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("hurt", HURTS)
def test_a_damaged_step_is_named_and_the_one_before_it_offered(run, hurt):
    folder = run / checkpoint.FOLDER / "40"
    do, said = HURTS[hurt]
    do(folder)
    with pytest.raises(BadInput, match=f"{folder}.*{said}.* and step 20 is read"):
        checkpoint.restore_params(run)
    folder.rename(run / "aside")
    assert checkpoint.last_step(run) == 20
    (run / checkpoint.FOLDER / "20/params/_METADATA").unlink()
    with pytest.raises(BadInput, match=r"No checkpoint of .* is intact .*params/_METADATA"):
        checkpoint.restore_params(run)


@pytest.mark.parametrize(
    "name", ["params/_METADATA", "params/manifest.ocdbt", "params/array_metadatas/process_0"]
)
def test_a_step_without_sums_is_read_with_a_warning_and_fails_in_one_sentence(
    run, mesh_of, name, caplog
):
    folder = run / checkpoint.FOLDER / "40"
    (folder / checksums.FILE).unlink()
    checkpoint.restore_params(run)
    assert f"{folder} has no SHA256SUMS: damage to it may go unnoticed" in caplog.text
    (folder / name).write_text("{")
    structs, _ = state.abstract(initialiser(ema=True), mesh_of["1x1x1"])
    with pytest.raises(BadInput, match=f"{folder}/params cannot be read"):
        checkpoint.restore(run, 40, structs)


def test_a_run_goes_on_from_the_step_before_and_saves_the_damaged_one_anew(run, mesh_of, caplog):
    folder = run / checkpoint.FOLDER
    (folder / "40.damaged").mkdir()  # of an earlier time
    (folder / "40/params/_METADATA").unlink()
    step, damaged = checkpoint.latest_intact(run)
    assert step == 20
    checkpoint.set_aside(run, damaged, step)
    assert "step 40 is damaged" in caplog.text
    assert checkpoint.saved_steps(run) == [20]
    assert (folder / "40.damaged1/params").exists()
    structs, _ = state.abstract(initialiser(ema=True), mesh_of["1x1x1"])
    checkpointer = checkpoint.Checkpointer(run, keep=1)
    checkpointer.save(40, checkpoint.restore(run, 20, structs), POSITION)
    checkpointer.close()
    assert checkpoint.last_step(run) == 40
    assert (folder / "40.damaged1/params").exists()


def test_without_verify_nothing_is_summed_or_checked(run, mesh_of, monkeypatch):
    monkeypatch.delattr(checksums, "_sums")
    structs, _ = state.abstract(initialiser(ema=True), mesh_of["1x1x1"])
    checkpointer = checkpoint.Checkpointer(run, keep=1, verify=False)
    checkpointer.save(60, checkpoint.restore(run, 40, structs), POSITION)
    checkpointer.close()
    assert checkpoint.latest_intact(run, verify=False) == (60, [])
    assert not (run / checkpoint.FOLDER / "60" / checksums.FILE).exists()


def test_a_save_whose_sums_cannot_be_written_fails(tmp_path, mesh_of, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    monkeypatch.setattr(checksums, "write", full)
    train_state, _ = state.create(initialiser(), 5, mesh_of["1x1x1"])
    checkpointer = checkpoint.Checkpointer(tmp_path, keep=2)
    checkpointer.save(20, train_state, POSITION)
    with pytest.raises(OSError, match="No space left"):
        checkpointer.wait()
    # It is whole all the same.
    assert checkpoint.latest_intact(tmp_path, verify=False) == (20, [])


def test_a_failed_save_is_told_without_waiting_for_other_hosts(run, mesh_of, monkeypatch):
    """The barriers of Orbax are not entered while the save's own error is on its way."""
    entered = []
    barrier = lambda **_: entered.append(sys.exception())  # noqa: E731
    monkeypatch.setattr(ocp.multihost, "get_barrier_sync_fn", lambda **_: barrier)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    structs, _ = state.abstract(initialiser(ema=True), mesh_of["1x1x1"])
    train_state = checkpoint.restore(run, 40, structs)
    checkpointer = checkpoint.Checkpointer(run, keep=1)
    checkpointer.check()
    with monkeypatch.context() as patch:
        patch.setattr(checkpointer._manager._checkpointer.handler, "finalize", full)
        checkpointer.save(60, train_state, POSITION)
        for told in (checkpointer.wait, checkpointer.check, checkpointer.close):
            with pytest.raises(OSError, match="No space left"):
                told()
    assert set(entered) == {None}
    assert checkpoint.saved_steps(run)[-1] == 40


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(mesh_of, value):
    tree = {"image": {"kernel": np.ones((4, 2), np.float32)}, "logit_scale": np.float32(1)}
    placed = jax.device_put(tree, sharding.tree_shardings(mesh_of["2x2x2"], tree))
    for params in (tree, placed):
        arrays.check_finite(params, "run")
    tree["image"]["kernel"][1, 1] = value
    placed = jax.device_put(tree, sharding.tree_shardings(mesh_of["2x2x2"], tree))
    for params in (tree, placed):
        with pytest.raises(BadInput, match="run holds values that are not finite in image/kernel:"):
            arrays.check_finite(params, "run")
