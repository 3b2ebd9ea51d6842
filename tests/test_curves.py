"""Curves of real and of made-up runs: which panels, what is drawn in them, pictures and pages."""

import io
import json
import xml.etree.ElementTree

import cv2
import matplotlib as mpl
import numpy as np
import pytest
from etils import epath

from mofi_jax import curves, telemetry
from mofi_jax.common.errors import BadInput
from mofi_jax.common.pages import plots


def run(lines, name="run"):
    return curves.Run(name, lines)


def titles(*runs):
    return list(curves.panels(runs))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, trained):
    """The metrics of a run of 20 steps, and those of another killed after 4."""
    folder = tmp_path_factory.mktemp("runs")
    lines = (trained / "run" / telemetry.METRICS_FILE).read_text().splitlines(keepends=True)
    told = {"long": "".join(lines), "short": "".join(lines[:4]) + lines[4][:30]}
    for name, text in told.items():
        (folder / name).mkdir()
        (folder / name / telemetry.METRICS_FILE).write_text(text)
    return folder / "long", folder / "short"


def test_a_real_run_as_a_picture(runs, capsys):
    curves.main(str(runs[0]))
    path = runs[0] / "curves.png"
    assert capsys.readouterr().out.strip() == str(path)
    picture = cv2.imread(str(path))
    assert picture.shape[1] > 1500
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    drawn = titles(*curves.read_runs([str(runs[0])]))
    assert drawn[:2] == ["loss", "accuracy on the batch"]
    assert {"learning rate", "gradient norm", "speed/images_per_second"} <= set(drawn)
    assert "speed/mfu" not in drawn  # not known here: no panel for it


def test_two_real_runs_as_a_page_that_needs_no_other_file(runs, tmp_path):
    out = tmp_path / "both.html"
    curves.main(*map(str, runs), out=str(out))
    text = out.read_text()
    assert "loss_entity" in text
    assert "long: 20 steps" in text
    assert "short: 4 steps" in text
    for reference in ("<script", "<link", "<img", "url(http", "@import", "src="):
        assert reference not in text
    last = telemetry.read_metrics(runs[1])[-1]
    assert f"<td>{last['loss']:.3g}</td><td>4</td>" in text
    drawings = text.split("<svg")[1:]
    assert len(drawings) == len(curves.panels(curves.read_runs(list(map(str, runs)))))
    for drawing in drawings:
        svg = xml.etree.ElementTree.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>")
        assert "viewBox" in svg.attrib  # without which it could not shrink to a phone's width
        assert "var(--soft, " in drawing  # what is dark on a light page is light on a dark one


def test_groups_of_one_run_and_single_metrics_of_several():
    line = {
        **{"step": 1, "time": 5.0, "surprise": 1.0},
        **{"loss": 1.0, "loss_entity": 2.0, "entity_accuracy": 0.5},
        **{"learning_rate": 0.1, "learning_rate/class_table": 0.5, "update_norm": 0.1},
        **{"gradient_norm": 3.0, "gradient_norm/table": 2.0, "logit_scale": 14.0},
        **{"seen/map": 0.5, "unseen/map": 0.4, "memory/host_gib": 1.0},
        **{"speed/mfu": 0.4, "speed/step_seconds": 3.0, "speed/compile_seconds": 9.0},
        **{"goodput/step": 0.75, "goodput/lost": 0.25, "goodput/profile": 0.0},
    }
    assert curves.panels([run([line])]) == {
        "loss": ["loss", "loss_entity"],
        "accuracy on the batch": ["entity_accuracy"],
        "map": ["seen/map", "unseen/map"],
        "learning rate": ["learning_rate", "learning_rate/class_table"],
        "gradient norm": ["gradient_norm", "gradient_norm/table"],
        "memory (GiB)": ["memory/host_gib"],
        "goodput: share of the wall time so far": ["goodput/step", "goodput/lost"],
        **{name: [name] for name in ("surprise", "update_norm", "logit_scale", "speed/mfu")},
    }
    several = curves.panels([run([line]), run([line], "other")])
    assert all(metrics == [title] for title, metrics in several.items())
    assert {"loss", "loss_entity", "seen/map", "unseen/map"} <= set(several)


def noise(count=2000):
    draw = np.random.default_rng(3)
    return np.linspace(5, 1, count) + draw.normal(0, 0.5, count)


def test_smoothing_follows_the_course_and_ignores_what_is_not_finite():
    values = noise()
    values[700] = np.nan
    values[900:905] = np.inf
    _, values = run([{"step": i, "x": v} for i, v in enumerate(values)]).series("x")
    smoothed = curves.smooth(values)
    assert np.abs(smoothed - np.linspace(5, 1, 2000)).max() < 0.35
    assert np.abs(smoothed[50:-50] - np.linspace(5, 1, 2000)[50:-50]).max() < 0.15
    assert np.isnan(curves.smooth(np.full(10, np.nan))).all()
    np.testing.assert_allclose(curves.smooth(np.full(100, 3.0)), 3.0)


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        (noise(), 2),
        (noise(20), 1),
        (np.concatenate([np.linspace(0, 1, 50), np.cos(np.linspace(0, np.pi, 500))]), 1),  # warm-up
    ],
)
def test_only_noise_is_smoothed(values, lines):
    """Raw values faint, the smooth curve strong."""
    [axes] = curves.draw([run([{"step": i, "loss": v} for i, v in enumerate(values)])]).axes
    assert len(axes.lines) == lines
    faint, strong = axes.lines[0], axes.lines[-1]
    assert (faint.get_alpha() or 1) < 0.5 or faint is strong
    assert (strong.get_alpha() or 1) == 1


def test_a_page_of_a_long_run_stays_small():
    lines = [{"step": i, "loss": value} for i, value in enumerate(noise(50_000))]
    with mpl.rc_context(plots.STYLE):
        assert len(curves.page([run(lines)])) < 1e6


def test_a_hiccup_does_not_flatten_the_rest():
    values = noise()
    values[3] = 1e4
    lines = [{"step": i, "loss": float(v)} for i, v in enumerate(values)]
    [axes] = curves.draw([run(lines)]).axes
    assert 5 < axes.get_ylim()[1] < 10


def test_norms_on_a_logarithmic_axis_leave_out_zeros():
    lines = [{"step": i, "gradient_norm": 10.0 ** (-i / 20) * (i != 5)} for i in range(100)]
    figure = curves.draw([run(lines)])
    figure.savefig(io.BytesIO())
    [axes] = figure.axes
    assert axes.get_yscale() == "log"
    assert 0 < axes.get_ylim()[0] < 1e-4


def test_names_tell_runs_apart(tmp_path):
    folders = [epath.Path(tmp_path) / name for name in ("a/run", "b/run")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / telemetry.METRICS_FILE).write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    assert [r.name for r in curves.read_runs(list(map(str, folders)))] == ["a/run", "b/run"]
    assert [r.name for r in curves.read_runs([str(folders[1])])] == ["run"]
    with pytest.raises(BadInput, match="a folder that does not exist: create no/where"):
        curves.main(str(folders[0]), out="no/where/curves.png")
    with pytest.raises(BadInput, match="is given twice"):
        curves.read_runs([str(folders[0])] * 2)


def test_points_of_a_sweep_are_named_by_what_tells_them_apart():
    names = [f"s/00{i}-optimizer.learning_rate={v},losses.margin=0.1" for i, v in enumerate("12")]
    assert curves._as_points(names) == ["learning_rate=1", "learning_rate=2"]
    assert curves._as_points(names[:1]) == names[:1]
    assert curves._as_points([*names, "run"]) == [*names, "run"]
    assert len(set(curves._colours(9))) == 9


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("", r"There is no metric in .*metrics.jsonl: name the --workdir"),
        ("curves.jpg", r"--out=curves.jpg must end in .png or .html"),
    ],
)
def test_bad_input(tmp_path, out, sentence):
    with pytest.raises(BadInput, match=sentence):
        curves.main(str(tmp_path), out=out)
    assert not list(epath.Path(tmp_path).iterdir())
