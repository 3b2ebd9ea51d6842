"""Curves of real and of made-up runs: which panels, what is drawn in them, pictures and pages."""

import json
import xml.etree.ElementTree

import cv2
import numpy as np
import pytest
from etils import epath

from mofi_jax import curves, telemetry
from mofi_jax.common.errors import BadInput


def run(lines, name="run"):
    return curves.Run(name, lines)


def titles(*runs):
    return [panel.title for panel in curves.panels(runs)]


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
    assert drawn[:2] == ["Loss", "Accuracy on the batch"]
    assert {"Learning rates", "Norms", "Images per second", "Data wait (%)"} <= set(drawn)
    assert not [title for title in drawn if "MFU" in title]  # not known here: no panel for it


def test_two_real_runs_as_a_page_that_needs_no_other_file(runs, tmp_path):
    out = tmp_path / "both.html"
    curves.main(*map(str, runs), out=str(out))
    text = out.read_text()
    assert "Loss: entity" in text
    assert "long: 20 steps" in text
    assert "short: 4 steps" in text
    for reference in ("<script", "<link", "<img", "url(http", "@import"):
        assert reference not in text
    last = telemetry.read_metrics(runs[1])[-1]
    assert f"<td>{last['loss']:.5g}</td><td>4</td>" in text
    drawings = text.split("<svg")[1:]
    assert len(drawings) == len(curves.panels(curves.read_runs(list(map(str, runs))))) + 1
    for drawing in drawings:
        svg = xml.etree.ElementTree.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>")
        assert "viewBox" in svg.attrib
        assert "width" not in svg.attrib


def test_families_of_one_run_and_single_metrics_of_several():
    line = {
        "step": 1,
        "time": 5.0,
        "loss": 1.0,
        "loss_entity": 2.0,
        "entity_accuracy": 0.5,
        "update_norm": 0.1,
        "seen/map": 0.5,
        "unseen/map": 0.4,
        "speed/mfu": 0.4,
        "speed/data_wait": 0.1,
        "goodput/step": 1.0,
        "constant": 1.0,
        "surprise": 1.0,
    }
    lines = [line, {**line, "step": 2, "surprise": 2.0}]
    assert titles(run(lines)) == [
        *("Loss", "Accuracy on the batch: entity", "mAP", "Update norm", "Data wait and MFU (%)"),
        "Surprise",
    ]
    assert titles(run(lines), run(lines, "other")) == [
        *("Loss: total", "Loss: entity", "Accuracy on the batch: entity"),
        *("seen: mAP", "unseen: mAP", "Update norm", "MFU (%)", "Data wait (%)", "Surprise"),
    ]


def noise(count=2000):
    draw = np.random.default_rng(3)
    return np.linspace(5, 1, count) + draw.normal(0, 0.5, count)


def test_smoothing_follows_the_course_and_ignores_what_is_not_finite():
    values = noise()
    values[700] = np.nan
    values[900:905] = np.inf
    smoothed = curves.smooth(values)
    assert np.abs(smoothed - np.linspace(5, 1, 2000)).max() < 0.35
    assert np.abs(smoothed[50:-50] - np.linspace(5, 1, 2000)[50:-50]).max() < 0.15
    assert np.isnan(curves.smooth(np.full(10, np.nan))).all()
    np.testing.assert_allclose(curves.smooth(np.full(100, 3.0)), 3.0)


def test_only_noise_is_smoothed():
    assert curves.noisy(noise())
    assert not curves.noisy(noise(20))
    warmup = np.concatenate([np.linspace(0, 1, 50), np.cos(np.linspace(0, np.pi, 500))])
    assert not curves.noisy(warmup)


def test_thinning_keeps_peaks_and_order():
    values = noise(50_000)
    values[31_234] = 100.0
    steps, kept = curves.thinned(np.arange(50_000.0), values)
    assert len(kept) <= 1200
    assert kept.max() == 100.0
    assert (np.diff(steps) > 0).all()


def test_a_hiccup_does_not_flatten_the_rest():
    """Raw values faint, the smooth curve strong, and the axis fits what is usual."""
    values = noise()
    values[3] = 1e4
    lines = [{"step": i, "loss": float(v)} for i, v in enumerate(values)]
    figure = curves.draw([run(lines)])
    [axes] = figure.axes
    assert 5 < axes.get_ylim()[1] < 10
    faint, strong = axes.lines
    assert faint.get_alpha() < 0.5
    assert strong.get_linewidth() > faint.get_linewidth()


def test_parts_of_norms_and_learning_rates_are_no_evaluators():
    names = ("learning_rate", "learning_rate/class_table", "gradient_norm", "gradient_norm/table")
    found = {
        panel.title: set(panel.metrics) for panel in curves.panels([run([dict.fromkeys(names, 1)])])
    }
    assert found == {"Learning rates": set(names[:2]), "Norms": set(names[2:])}


def test_logarithmic_norms_leave_out_zeros():
    lines = [{"step": i, "gradient_norm": 10.0 ** (-i / 20) * (i != 5)} for i in range(100)]
    [axes] = curves.draw([run(lines)]).axes
    assert axes.get_yscale() == "log"
    assert np.isnan(axes.lines[-1].get_ydata()[5])


def test_the_bar_is_the_last_split():
    def line(at, **split):
        return {"step": at, **{f"goodput/{phase}": share for phase, share in split.items()}}

    known = run([line(1, step=1.0), line(2, step=0.75, lost=0.25), {"step": 3, "x/map": 0.1}])
    assert curves.goodput(known) == {"step": 75.0, "lost": 25.0}
    assert curves.goodput(run([{"step": 1}])) == {}
    figure = curves.draw([known])
    widths = [patch.get_width() for patch in figure.axes[-1].patches if patch.get_width()]
    assert widths == [75.0, 25.0]


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
