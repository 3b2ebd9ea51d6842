"""Metrics a step late, the batch to blame, rates, console, profile, W&B; files whole or not."""

import itertools
import json
import logging
import math
import re
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mofi_jax import telemetry
from mofi_jax.common import console, files
from mofi_jax.common.errors import BadInput
from mofi_jax.telemetry import meter as meter_module
from mofi_jax.telemetry import progress as progress_module


class Clock:
    """Stands still until told otherwise."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def goodput(clock):
    goodput = telemetry.Goodput(clock=clock, wall=clock)
    yield goodput
    goodput.close()


def without_time(lines):
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def test_writes_one_push_late(tmp_path):
    metrics = telemetry.Metrics(tmp_path, resume_step=0)
    assert metrics.push(1, {"loss": jnp.float32(2.0)}) == {}
    assert telemetry.read_metrics(tmp_path) == []
    assert metrics.push(2, {"loss": jnp.float32(1.0)}) == {"loss": 2.0}
    metrics.close()
    lines = telemetry.read_metrics(tmp_path)
    assert without_time(lines) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert lines[0]["time"] <= lines[1]["time"]
    assert list((tmp_path / "tensorboard").iterdir())


def test_resuming_drops_later_and_broken_lines(tmp_path):
    lines = [json.dumps({"step": s, "loss": 1.0}) for s in (1, 2, 3)]
    (tmp_path / telemetry.METRICS_FILE).write_text("\n".join(lines) + '\n{"step": 4, "lo')
    assert len(telemetry.read_metrics(tmp_path)) == 3
    telemetry.Metrics(tmp_path, resume_step=2).close()
    assert [line["step"] for line in telemetry.read_metrics(tmp_path)] == [1, 2]


def test_a_line_torn_in_the_middle_of_a_resumed_run_leaves_whole_lines(tmp_path):
    """Killed while writing, resumed from the step of the torn line: what follows is read again."""
    (tmp_path / telemetry.METRICS_FILE).write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss"')
    metrics = telemetry.Metrics(tmp_path, resume_step=2)
    metrics.write(3, {"loss": 0.5})
    metrics.close()
    assert [line["step"] for line in telemetry.read_metrics(tmp_path)] == [1, 3]


def test_a_damaged_line_costs_no_other(tmp_path):
    path = tmp_path / telemetry.METRICS_FILE
    path.write_text('{"step": 1}\n{"st\n[]\n{"step": "2"}\n{"step": 3}\n')
    telemetry.Metrics(tmp_path, resume_step=3).close()
    assert [line["step"] for line in telemetry.read_metrics(tmp_path)] == [1, 3]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_written_and_stops(tmp_path, value):
    metrics = telemetry.Metrics(tmp_path, resume_step=0)
    metrics.push(7, {"loss": jnp.float32(value)})
    with pytest.raises(BadInput, match="at step 7"):
        metrics.flush()
    assert telemetry.read_metrics(tmp_path)[0]["step"] == 7


def test_the_first_batch_that_was_not_finite_is_named(tmp_path):
    """Logged at step 10, but the gradient was not finite at step 8 already."""
    metrics = telemetry.Metrics(
        tmp_path, resume_step=0, keys=lambda step: [f"s{step}-{i}" for i in range(16)]
    )
    for step in range(1, 11):
        values = {
            "loss": jnp.float32(math.nan if step > 8 else 1.0),
            "gradient_norm": jnp.float32(math.inf if step >= 8 else 1.0),
            "other": jnp.float32(math.nan),
        }
        metrics.watch(step, values)
        if step in (5, 10):
            metrics.push(step, values)
    sentence = r"gradient_norm is inf at step 8: .*the 16 examples of the batch \(s8-0, s8-1, s8-2,"
    with pytest.raises(BadInput, match=sentence):
        metrics.flush()
    lines = (tmp_path / telemetry.NAN_FILE).read_text().splitlines()
    assert lines == [f"8\ts8-{i}" for i in range(16)]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


# ------------------------------------------------------------------------------------------ meter


def test_rates_count_input_and_step_alone(clock, goodput):
    meter = telemetry.Meter(goodput, images_per_step=8, tokens_per_step=80, peak_flops=12e9)
    goodput.enter("step")
    clock.now += 5
    goodput.compiled(4.0)
    first = meter.read(steps=0)
    assert "speed/images_per_second" not in first
    clock.now += 2  # two seconds of step with the one before
    with goodput.phase("input"):
        clock.now += 1
    with goodput.phase("eval"):
        clock.now += 100
    values = meter.read(steps=2, flops=12e9)
    assert values["speed/images_per_second"] == pytest.approx(2 * 8 / 4)
    assert values["speed/tokens_per_second"] == pytest.approx(2 * 80 / 4)
    assert values["speed/step_seconds"] == pytest.approx(2)
    assert values["speed/data_wait"] == pytest.approx(1 / 4)
    assert values["speed/mfu"] == pytest.approx(2 * 6e9 / (4 * 12e9))
    assert values["goodput/eval"] == pytest.approx(100 / 108)
    assert 0.01 < values["memory/host_gib"] < 100


def test_what_is_not_known_is_not_logged(clock, goodput, monkeypatch):
    meter = telemetry.Meter(goodput, images_per_step=8, peak_flops=None)
    clock.now += 1
    values = meter.read(steps=1, flops=6e9)
    assert not {"speed/mfu", "speed/tokens_per_second", "memory/device_gib"} & values.keys()
    stats = [{"bytes_in_use": 1, "peak_bytes_in_use": n * 2**30} for n in (2, 3)] + [None]
    devices = [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
    monkeypatch.setattr(meter_module.jax, "local_devices", lambda: devices)
    assert meter.read(steps=2)["memory/device_gib"] == 3


# ---------------------------------------------------------------------------------------- console


@pytest.fixture
def progress(goodput, monkeypatch, clock):
    """Of a run of 2000 steps in two stages, the second of which takes twice as long a step."""
    monkeypatch.setattr(progress_module, "time", types.SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(console, "now", lambda *_, **__: None)

    def work(start, end):
        return sum(1e9 if step < 1000 else 2e9 for step in range(start, end))

    sizes = {"first": 0, "total": 2000, "batch_size": 10, "work": work}
    pauses = {"eval": [500], "checkpoint": [1000]}
    return telemetry.Progress(goodput, **sizes, pauses=pauses, peak_flops=1e12)


def messages(caplog):
    return [record.message for record in caplog.records]


def test_the_first_step_gives_the_first_estimate(progress, clock, goodput, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    goodput.enter("step")
    progress.at(0)
    clock.now += 0.5
    progress.at(1)
    # 999 steps of half a second and 1000 of one.
    assert messages(caplog) == [
        "the first step took 0.5 s (20.0 img/s, MFU 0.2 %): about 25 min to the end"
    ]


def test_the_estimate_is_corrected_by_steps_and_evaluations(progress, clock, goodput, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    with goodput.phase("eval"):
        clock.now += 100
    goodput.enter("step")
    for step in range(3):
        progress.at(step)
        clock.now += 9.0 if step == 0 else 0.5
    clock.now += 60
    values = {"loss": 5.25, "entity_accuracy": 0.125, "speed/images_per_second": 100.0}
    progress.show(3, values | {"speed/data_wait": 0.021, "speed/mfu": 0.432})
    # The first step is forgotten; four evaluations of 100 s are ahead.
    left = (997 * 0.5 + 1000 * 1.0 + 4 * 100) / 60
    assert messages(caplog)[-1] == (
        "step 3/2,000 (0.1 %)  loss 5.25  entity_accuracy 0.125  100.0 img/s  data wait 2.1 %  "
        f"MFU 43.2 %  {left:.0f} min left"
    )


def test_a_log_has_a_line_a_minute_and_the_last(progress, clock, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    for step in range(0, 2001, 10):
        clock.now += 10.0
        progress.show(step, {"loss": 1.0})
        progress.show(step, {})
    steps = [
        int(text.split("/")[0].removeprefix("step ").replace(",", "")) for text in messages(caplog)
    ]
    assert steps[:4] == [0, 10, 20, 30]  # ten seconds, while the run is young
    assert steps[-1] == 2000
    assert max(b - a for a, b in itertools.pairwise(steps)) == 60


# ---------------------------------------------------------------------------------------- profile


@pytest.fixture
def traces(monkeypatch):
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))
    return calls


@pytest.mark.parametrize(
    ("first", "expected"),
    [(0, {3: "start", 5: "stop"}), (4, {4: "start", 5: "stop"}), (5, {}), (8, {})],
)
def test_profile_covers_its_window_from_wherever_a_run_begins(tmp_path, traces, first, expected):
    profile = telemetry.Profile("3:5", tmp_path, total_steps=10)
    seen = {}
    for step in range(first, 11):
        before = len(traces)
        profile.at(step, in_flight=None)
        if len(traces) > before:
            [seen[step]] = traces[before:]
    profile.close()
    assert seen == expected


def test_a_run_cut_inside_the_window_ends_the_trace(tmp_path, traces):
    profile = telemetry.Profile("3:5", tmp_path, total_steps=10)
    profile.at(3, in_flight=jnp.ones(3))
    profile.close()
    profile.close()
    assert traces == ["start", "stop"]


@pytest.mark.parametrize(
    ("window", "sentence"),
    [
        ("5", "--profile=5 is no window of steps: write --profile=N:M"),
        ("5:5", "no window"),
        ("-1:4", "no window"),
        ("a:b", "no window"),
        ("5:11", "ends after the run's 10 steps"),
    ],
)
def test_bad_windows(tmp_path, window, sentence):
    with pytest.raises(BadInput, match=sentence):
        telemetry.Profile(window, tmp_path, total_steps=10)


# ------------------------------------------------------------------------------- Weights & Biases


class Tracker(types.ModuleType):
    """Stands in for the package wandb and records what it is asked to do."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.ended = [], [], []

    def init(self, **kwargs):
        self.begun.append(kwargs)
        return self

    def log(self, values, *, step):
        self.logged.append((step, values))

    def finish(self, *, exit_code):
        self.ended.append(exit_code)


@pytest.fixture
def tracker(monkeypatch):
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    return tracker


CONFIG = types.SimpleNamespace(to_dict=lambda: {"seed": 3})


def test_wandb_gets_every_value_and_the_same_run_again(tmp_path, tracker):
    for step in (1, 2):
        run = telemetry.open_wandb("mofi", tmp_path, CONFIG)
        metrics = telemetry.Metrics(tmp_path, resume_step=step, wandb=run)
        metrics.push(step, {"loss": jnp.float32(step), "gradient_norm": jnp.float32(0.5)})
        metrics.close()
        metrics.abandon()
    assert tracker.logged == [
        (1, {"loss": 1.0, "gradient_norm": 0.5}),
        (2, {"loss": 2.0, "gradient_norm": 0.5}),
    ]
    first, second = tracker.begun
    assert first == second
    assert (first["project"], first["resume"], first["config"]) == ("mofi", "allow", {"seed": 3})
    assert first["name"] == tmp_path.name
    assert re.fullmatch(r"[0-9a-f]{16}", first["id"])
    assert tracker.ended == [0, 0]
    telemetry.Metrics(tmp_path, resume_step=2, wandb=tracker).abandon()
    assert tracker.ended == [0, 0, 1]


def test_without_a_project_nothing_is_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert telemetry.open_wandb("", tmp_path, CONFIG) is None
    assert not list(epath.Path(tmp_path).iterdir())


def test_wandb_that_is_not_installed_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match="needs Weights & Biases: pip install wandb"):
        telemetry.require_wandb("mofi")


def test_wandb_on_host_0_alone(tmp_path, tracker, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert telemetry.open_wandb("mofi", tmp_path, CONFIG) is None
    assert not tracker.begun
