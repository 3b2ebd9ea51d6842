"""Sweeps: points are checked first, run once, resumed, and end in a ranked table."""

import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import ml_collections
import pytest
from etils import epath

from configs import quickstart
from configs.sweeps import learning_rate
from mofi_jax import sweep
from mofi_jax.common import config_files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.training import settings
from tests import datasets

REPOSITORY = pathlib.Path(__file__).parent.parent


def test_the_bundled_sweep_fits_its_config():
    config = learning_rate.get_config().lock()
    points = learning_rate.get_hyper()
    names = sweep.check(points, config, {})
    assert len(set(names)) == len(points) == 9
    assert names[4] == "004-optimizer.learning_rate=0.001,losses.entity.margin=0.1"
    # The quick start itself is one of them.
    base = quickstart.get_config("task=supervised")
    assert points[4] == {
        "optimizer.learning_rate": base.optimizer.learning_rate,
        "losses.entity.margin": base.losses.entity.margin,
    }
    assert learning_rate.METRIC.split("/")[0] in config.evaluators
    assert sweep.point_config(config, points[0]).optimizer.learning_rate == 3e-4
    assert config.optimizer.learning_rate == 1e-3  # the base is untouched
    assert learning_rate.get_config("short").total == "85 steps"


@pytest.mark.parametrize(
    ("points", "overrides", "sentence"),
    [
        ([], {}, "returns no points"),
        ([{"optimizer.rate": 1.0}], {}, r"no key --config.optimizer.rate in the config"),
        ([{"batch_size": 64}, {"batch_size": "many"}], {}, "Point 1 of get_hyper"),
        ([{"losses.entity.margin": 2.0}], {}, "config.losses.entity.margin must be"),
        ([{"seed": 1}, {"seed": 2}, {"seed": 1}], {}, "Points 0 and 2"),
        ([{"seed": 1}], {"seed": 3}, "--config.seed is swept"),
    ],
)
def test_points_are_refused_before_any_is_trained(points, overrides, sentence):
    config = quickstart.get_config("task=supervised").lock()
    with pytest.raises(BadInput, match=sentence):
        sweep.check(points, config, overrides)


def test_names_are_folders_names():
    config = quickstart.get_config("task=multitask").lock()
    points = [{"data.train_ops": "decode|flip(1, 'x')", "seed": 3}, {"data.dir": "x" * 500}]
    first, second = sweep.check(points, config, {})
    assert first == "000-data.train_ops=decode_flip_1,_x_,seed=3"
    assert len(second) == len("001-") + sweep.NAME_LENGTH


# ------------------------------------------------------------------------- the trainings

CONFIG = ml_collections.ConfigDict({"total": "4 steps"})
# Ends as its first argument says, and leaves what a training leaves.
STAND_IN = """
    import json, os, pathlib, signal, sys, time
    action, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    folder.mkdir(exist_ok=True)
    with open(folder / "started", "a") as file:
        file.write("x")
    (folder / "config.json").write_text('{"total": "4 steps"}')
    if action == "diverges":
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\\n')
        sys.exit(2)
    if action == "asks":  # the parent is told to leave, as by SLURM
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(20)
    if action == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if action.isdigit():
        sys.exit(int(action))
    (folder / "result.json").write_text(json.dumps(
        {"scores": {"a/map": float(action)}, "steps": 4, "seconds": 1.0}
    ))
"""


def trainings(folder, *actions, config=CONFIG):
    code = textwrap.dedent(STAND_IN)
    return [
        (f"p{i}", (sys.executable, "-IS", "-c", code, action, str(folder / f"p{i}")), config)
        for i, action in enumerate(actions)
    ]


def starts(folder):
    return [
        len((folder / f"p{i}" / "started").read_text()) for i in range(len(list(folder.iterdir())))
    ]


def test_each_point_runs_once_and_a_diverged_one_is_a_result(tmp_path):
    folder = epath.Path(tmp_path)
    plan = trainings(folder, "0.25", "diverges", "0.75")
    assert sweep.run(plan, folder, lead=True) == 0
    assert sweep.run(plan, folder, lead=True) == 0
    assert starts(folder) == [1, 1, 1]
    # Another config is another training: train itself knows what is left to do.
    longer = ml_collections.ConfigDict({"total": "8 steps"})
    sweep.run(trainings(folder, "0.25", "diverges", "0.75", config=longer), folder, lead=True)
    assert starts(folder) == [2, 2, 2]


def test_crash_and_bad_input_are_told_and_tried_again(tmp_path):
    folder = epath.Path(tmp_path)
    assert sweep.run(trainings(folder, "2", "0.5"), folder, lead=True) == 2
    assert sweep.run(trainings(folder, "killed", "0.5"), folder, lead=True) == 1
    assert json.loads((folder / "p0/failed.json").read_text())["exit_code"] == 137
    assert starts(folder) == [2, 1]
    assert sweep.run(trainings(folder, "0.5", "0.5"), folder, lead=True) == 0
    assert not (folder / "p0/failed.json").exists()


def test_preempted_point_ends_the_sweep_and_goes_on_later(tmp_path):
    folder = epath.Path(tmp_path)
    assert sweep.run(trainings(folder, "0.5", "75", "0.5"), folder, lead=True) == os.EX_TEMPFAIL
    assert not (folder / "p2").exists()
    assert not (folder / "p1/failed.json").exists()
    assert sweep.run(trainings(folder, "0.5", "0.5", "0.5"), folder, lead=True) == 0
    assert starts(folder) == [1, 2, 1]


def test_sigterm_reaches_the_training_that_runs(tmp_path):
    folder = epath.Path(tmp_path)
    assert sweep.run(trainings(folder, "asks", "0.5"), folder, lead=True) == os.EX_TEMPFAIL
    assert not (folder / "p1").exists()


# ------------------------------------------------------------------------- the table


def finished(folder, score):
    folder.mkdir(parents=True)
    result = {"scores": {"a/map": score}, "steps": 4, "seconds": 1.0}
    (folder / "result.json").write_text(json.dumps(result))


def test_table_ranks_by_the_metric(tmp_path):
    folder = epath.Path(tmp_path)
    points = [{"optimizer.learning_rate": 10.0**-i, "seed": s} for i in (4, 3, 2) for s in (0, 1)]
    names = [str(i) for i in range(6)]
    for name, score in zip(names[:4], (0.2, 0.4, 0.1, 0.3), strict=True):
        finished(folder / name, score)
    (folder / "4").mkdir()
    (folder / "4" / "failed.json").write_text("{}")
    table = sweep.write_table(folder, names, points, "a/map").splitlines()
    assert table[0] == "| optimizer.learning_rate | seed | a/map | state | folder |"
    assert len({line.count("|") for line in table}) == 1
    assert table[2] == "| 0.0001 | 1 | 0.4000 | finished | 1 |"
    assert [line.split(" | ")[3] for line in table[2:]] == ["finished"] * 4 + ["failed", "waiting"]
    written = json.loads((folder / "sweep.json").read_text())
    assert written["best"] == "1"
    assert [p["name"] for p in written["points"]] == ["1", "3", "0", "2", "4", "5"]
    page = (folder / "index.html").read_text()
    assert page.count('class="soft" cx=') == 2 * 4  # a dot for each score by each key
    ticks = re.findall(r">\s*(10⁻⁴|0.001|0.01)</text>", page)
    assert ticks == ["10⁻⁴", "0.001"]  # where something was swept and has a score, no 0.01


def test_a_sweep_without_scores_is_a_page_too(tmp_path):
    folder = epath.Path(tmp_path)
    sweep.write_table(folder, ["0"], [{"data.train_ops": "a|<b>"}], "a/map")
    assert "a|&lt;b&gt;" in (folder / "index.html").read_text()


# ------------------------------------------------------------------------- as a command


def run_command(path, workdir, *flags):
    return subprocess.run(
        [sys.executable, "-m", "mofi_jax.sweep", "--config", path, f"--workdir={workdir}", *flags],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_real_sweep_trains_ranks_and_does_nothing_twice(tmp_path):
    datasets.write(tmp_path / "data")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        picture = ops.encode_jpeg(datasets.drawing(i // 2, i), 95)
        (pictures / f"{i // 2}_{i}.jpg").write_bytes(picture)
    file = tmp_path / "tiny_sweep.py"
    file.write_text(
        textwrap.dedent(f"""
            from tests import datasets
            METRIC = "mine/map"
            def get_config(arg=None):
                config = datasets.tiny_config({str(tmp_path / "data")!r}, arg, steps=3)
                config.evaluators = {{
                    "mine": {{"kind": "retrieval", "images": {str(pictures)!r}, "every": "3 steps"}}
                }}
                return config
            def get_hyper(arg=None):
                assert arg == "task=supervised"
                return [{{"optimizer.learning_rate": rate}} for rate in (1e38, 1e-3)]
        """)
    )
    workdir = tmp_path / "sweep"
    done = run_command(f"{file}:task=supervised", workdir, "--config.seed=7")
    assert done.returncode == 0, done.stderr
    written = json.loads((workdir / "sweep.json").read_text())
    assert [point["state"] for point in written["points"]] == ["finished", "failed"]
    assert written["best"] == "001-optimizer.learning_rate=0.001"
    assert 0 < written["points"][0]["score"] <= 1
    assert "| 0.001 | " in done.stdout
    config = json.loads((workdir / written["best"] / "config.json").read_text())
    assert (config["seed"], config["optimizer"]["learning_rate"]) == (7, 1e-3)

    # Run again, both are through: a command that would be started fails.
    own = datasets.tiny_config(str(tmp_path / "data"), "task=supervised", steps=3)
    own.evaluators = {"mine": {"kind": "retrieval", "images": str(pictures), "every": "3 steps"}}
    own.seed = 7
    again = [
        (f"{i:03d}-optimizer.learning_rate={rate}", ("false",), sweep.point_config(own, point))
        for i, rate in enumerate((1e38, 1e-3))
        for point in [{"optimizer.learning_rate": rate}]
    ]
    assert sweep.run(again, epath.Path(workdir), lead=True) == 0


def test_points_that_fail_say_where(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "METRIC='a/b'\ndef get_config():\n pass\ndef get_hyper(arg):\n return {}['a']\n"
    )
    with pytest.raises(BadInput, match=r"own\.py fails in line 5 .KeyError: 'a'"):
        sweep.load(config_files.Source("", str(path), None, {}))


def test_config_without_points():
    with pytest.raises(BadInput, match=r"configs/quickstart.py has no get_hyper"):
        sweep.load(config_files.Source("", str(REPOSITORY / "configs/quickstart.py"), None, {}))


@pytest.mark.parametrize(
    ("metric", "index", "sentence"),
    [
        ("retrieval_unsen/map", "", "of no evaluator of the config: choose"),
        *((learning_rate.METRIC, i, "the points are 0 to 0") for i in ("1", "-1", "x")),
    ],
)
def test_metric_of_no_evaluator_and_index_outside(metric, index, sentence, monkeypatch, tmp_path):
    source = config_files.Source("file.py:short", "file.py", "short", {})
    monkeypatch.setattr(sweep, "load", lambda _: ([{"seed": 1}], metric))
    with pytest.raises(BadInput, match=sentence):
        sweep.main(learning_rate.get_config().lock(), source, str(tmp_path / "sweep"), index=index)
    assert not (tmp_path / "sweep").exists()


def test_points_survive_the_way_through_flags():
    """What a point's flags say is what its config says."""
    config = quickstart.get_config("task=supervised")
    point = {"data.train_ops": "decode|crop(40)", "losses.entity.learn_scale": True, "seed": 3}
    assert sweep.as_flags(point)[1] == "--config.losses.entity.learn_scale=True"
    settings.validate(sweep.point_config(config, point))
