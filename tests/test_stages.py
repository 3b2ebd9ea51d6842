"""Stages of a run: how long they are, what they train on, and a resume over their change."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from configs import mofi as mofi_config
from mofi_jax import telemetry, train
from mofi_jax.common.errors import BadInput
from mofi_jax.data import training_set
from mofi_jax.telemetry import flops
from mofi_jax.training import cadence, checkpoint, optim, run_folder, settings, setup
from tests import datasets, test_resume

CLOCK = cadence.Clock(batch_size=16, examples_per_epoch=48, total_steps=7)
HALF = {"length": "50 percent"}


def made(*wanted, image_size=32, patch_size=8):
    return cadence.make_stages(wanted, CLOCK, image_size=image_size, patch_size=patch_size)


def test_stages_follow_one_another_and_the_rest_is_the_model():
    small = {"length": "1 epoch", "image_size": 16, "patch_dropout": 0.5}
    first, rest = made(small)
    assert (first.first, first.end, first.image_size, first.patch_dropout) == (0, 3, 16, 0.5)
    assert rest == cadence.Stage(3, 7, 32)
    assert [(s.first, s.end) for s in made(HALF, HALF)] == [(0, 4), (4, 7)]  # 3.5 steps each
    assert made() == (cadence.Stage(0, 7, 32),)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ([HALF, HALF, HALF], r"config.stages\[2\] would be 4 steps from step 7 of 7"),
        ([{"length": "9 steps"}], "would be 9 steps from step 0 of 7"),
        ([{"length": "0 steps"}], "would be 0 steps"),
        ([{"length": "9 lines"}], r"config.stages\[0\].length='9 lines' is not a duration"),
        ([HALF | {"image_size": 20}], "image_size=20 is not a multiple of the patch, 8 pixels"),
    ],
)
def test_stages_that_cannot_be(wanted, sentence):
    with pytest.raises(BadInput, match=sentence):
        made(*wanted)


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        (3, "config.stages must be stages in brackets"),
        (({"image_size": 16},), "each with a length"),
        (({"length": "1 step", "size": 16},), "config.stages must be"),
        (({"length": "1 step", "patch_dropout": 1.0},), r"stages\[0\].patch_dropout must be"),
        (({"length": "1 step", "image_size": 1.5},), r"stages\[0\].image_size must be"),
        (({"length": 3},), r"stages\[0\].length must be"),
        (({"length": "1 step", "learning_rate_multiplier": 0},), "multiplier must be a number ab"),
    ],
)
def test_settings_name_the_stage(stages, sentence):
    config = mofi_config.get_config()
    with config.ignore_type():
        config.stages = stages
    with pytest.raises(BadInput, match=sentence):
        settings.validate(config)


def test_stages_in_the_text_behind_the_colon():
    config = mofi_config.get_config("stages=112@0.5@80 percent+168@0@1e6 examples")
    assert config.stages == (
        {"length": "80 percent", "image_size": 112, "patch_dropout": 0.5},
        {"length": "1e6 examples", "image_size": 168, "patch_dropout": 0.0},
    )
    settings.validate(config)
    with pytest.raises(BadInput, match="cannot be read at '112': write PIXELS@DROPOUT@LENGTH"):
        mofi_config.get_config("stages=112")


def test_learning_rates_of_stages():
    config = mofi_config.get_config().optimizer
    config.warmup = "2 steps"
    stages = made({"length": "3 steps", "learning_rate_multiplier": 0.5}, {"length": "2 steps"})
    plain, staged = optim.schedule(config, CLOCK), optim.schedule(config, CLOCK, stages)
    ratios = [float(staged(step) / plain(step)) for step in range(1, 7)]
    np.testing.assert_allclose(ratios, [0.5, 0.5, 1, 1, 1, 1])
    logged = optim.learning_rates(config, CLOCK, stages, entity_loss=True)(2)
    assert float(logged["learning_rate/class_table"]) == pytest.approx(0.5 * float(plain(2)))


# ---------------------------------------------------------------------------------------- training


def staged_config(data, steps=6):
    """Three steps of 16 pixels, half of the patches and a smaller rate; then as the model is."""
    config = datasets.tiny_config(data, steps=steps)
    config.model.image_size = 32
    config.stages = (
        {
            "length": "50 percent",
            "image_size": 16,
            "patch_dropout": 0.5,
            "learning_rate_multiplier": 0.5,
        },
    )
    return config


@pytest.fixture(autouse=True)
def one_device(monkeypatch, mesh_of):
    monkeypatch.setattr(train.meshes, "make_mesh", lambda **_: mesh_of["1x1x1"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    datasets.write(folder, name="i2e")
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, mesh_of):
    """An uninterrupted run; its batches, its compiled updates, and what its meter was told."""
    folder = tmp_path_factory.mktemp("whole")
    batches, updates, told = [], [], []
    draw, make, read = (
        train.prefetch.DeviceBatches.__next__,
        train.step_lib.make_train_step,
        telemetry.Meter.read,
    )

    def drawn(self):
        batch = draw(self)
        batches.append(jax.device_get(batch))
        return batch

    def compiled(*args):
        updates.append(make(*args))
        return updates[-1]

    def metered(self, steps, flops):
        told.append(flops)
        return read(self, steps, flops)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.meshes, "make_mesh", lambda **_: mesh_of["1x1x1"])
        patch.setattr(train.prefetch.DeviceBatches, "__next__", drawn)
        patch.setattr(train.step_lib, "make_train_step", compiled)
        patch.setattr(telemetry.Meter, "read", metered)
        train.main(staged_config(data), str(folder))
    return folder, batches, updates, told


def test_each_stage_is_compiled_once_and_sees_its_own_pixels(whole):
    _, batches, updates, _ = whole
    assert [batch["image"].shape[1] for batch in batches] == [16, 16, 16, 32, 32, 32]
    assert [update._cache_size() for update in updates] == [1, 1]


def test_the_order_of_the_data_is_that_without_stages(data, whole):
    config = staged_config(data)
    opened = training_set.open_training_set(config)
    keys = [
        train.pipeline.batch_keys(opened.parts, config.seed, 16 * step, 16, config.data.block)
        for step in range(6)
    ]
    records = {record["key"]: record for record in opened.parts[0].records(range(48))}
    for batch, names in zip(whole[1], keys, strict=True):
        first_labels = [records[name.partition(":")[2]]["entity_ids"][0] for name in names]
        np.testing.assert_array_equal(batch["entity_ids"][:, 0], first_labels)


def test_telemetry_counts_the_flops_of_each_stage(data, whole, mesh_of):
    config = staged_config(data)
    sizes = training_set.open_training_set(config).sizes
    built = setup.make(config, mesh_of["1x1x1"], **sizes)
    small, large = (
        sum(flops.of_step(built.context_of(stage), batch_size=16).values())
        for stage in built.stages
    )
    assert small < large
    np.testing.assert_allclose(np.diff(whole[3]), [small, small, small, large, large])


def test_the_run_is_of_the_models_size_from_the_start(whole):
    folder, *_ = whole
    assert run_folder.model_config(run_folder.read_model(folder)).image_size == 32
    assert checkpoint.saved_steps(folder)[-1] == 6
    params = checkpoint.restore_params(folder, str(checkpoint.saved_steps(folder)[0]))
    assert params["image"]["position_embedding"].shape == (17, 16)


@pytest.mark.parametrize(
    ("stage", "batches"), [(0, 2), pytest.param(1, 0, marks=pytest.mark.slow), (1, 2)]
)
def test_stopped_in_any_stage_and_resumed_equals_uninterrupted(
    data, whole, tmp_path, monkeypatch, stage, batches
):
    draw, begun = train.pipeline.training_stream, []

    def failing_stream(*args, **kwargs):
        begun.append(kwargs["start"])
        last = len(begun) == 1 + stage
        yield from itertools.islice(draw(*args, **kwargs), batches if last else None)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.pipeline, "training_stream", failing_stream)
        with pytest.raises(KeyboardInterrupt):
            train.main(staged_config(data), str(tmp_path))
    assert begun == [0, 48][: 1 + stage]
    train.main(staged_config(data), str(tmp_path))
    test_resume.assert_same_parameters(whole[0], tmp_path)
    assert test_resume.losses(tmp_path) == test_resume.losses(whole[0])


KILLED = """
    import os, signal, sys
    from absl import flags
    flags.FLAGS.mark_as_parsed()
    from mofi_jax import telemetry, train
    from tests import test_stages
    push = telemetry.Metrics.push
    def killed(self, step, metrics):
        if step == 25:
            os.kill(os.getpid(), signal.SIGKILL)
        push(self, step, metrics)
    telemetry.Metrics.push = killed
    train.main(test_stages.staged_config(sys.argv[1], steps=40), sys.argv[2])
"""


@pytest.mark.slow
def test_killed_in_the_second_stage_and_resumed_equals_uninterrupted(data, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(data), str(tmp_path / "killed")],
        cwd=test_resume.REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    for name in ("killed", "whole"):
        train.main(staged_config(data, steps=40), str(tmp_path / name))
    test_resume.assert_same_parameters(tmp_path / "whole", tmp_path / "killed")


def test_operations_of_one_size_alone_are_told(data, tmp_path):
    config = staged_config(data)
    config.data.train_ops = "decode|new_view(32)|flip"
    words = r"in the stage of 16 pixels, for which \{size\} may stand, gives \[32, 32, 3\]"
    with pytest.raises(BadInput, match=words):
        train.main(config, str(tmp_path))
