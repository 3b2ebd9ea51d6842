"""The quick start's driver: done work is left alone, missing work is made, shortfalls are said."""

import json
import sys

import numpy as np
import pytest

from mofi_jax import __main__ as commands
from mofi_jax.data import ops
from quickstart import __main__ as driver
from quickstart import neighbours, report


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Two stages by commands that exist everywhere: a JSON file, and a copy of it."""
    monkeypatch.setattr(driver, "OUT", str(tmp_path / "out"))
    monkeypatch.setattr(driver, "MOFI", (sys.executable, "-m"))
    (tmp_path / "out").mkdir()
    (tmp_path / "in.json").write_text('{"a": 1}')
    first, second = str(tmp_path / "out/first.json"), str(tmp_path / "out/second.json")
    return (
        driver.Stage("first", "", "first.json", ("json.tool", str(tmp_path / "in.json"), first)),
        driver.Stage("second", "", "second.json", ("json.tool", first, second)),
    )


def products(tmp_path):
    return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*nd.json")} | {
        p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("first.json")
    }


def test_only_missing_work_is_done(stages, tmp_path):
    figures = driver.run_stages(stages)
    assert figures["first"]["seconds"] > 0
    assert figures["second"]["peak_rss_mb"] > 0
    before = products(tmp_path)
    assert driver.run_stages(stages) == figures
    assert products(tmp_path) == before
    (tmp_path / "out/second.json").unlink()
    driver.run_stages(stages)
    after = products(tmp_path)
    assert after["first.json"] == before["first.json"]
    assert after["second.json"] > before["second.json"]


def test_a_changed_command_runs_again(stages, tmp_path):
    driver.run_stages(stages)
    before = products(tmp_path)
    changed = driver.dataclasses.replace(
        stages[1], command=("json.tool", "--sort-keys", *stages[1].command[1:])
    )
    driver.run_stages((stages[0], changed))
    after = products(tmp_path)
    assert after["first.json"] == before["first.json"]
    assert after["second.json"] > before["second.json"]


def test_a_failing_stage_stops_with_its_code(stages, tmp_path, capfd):
    (tmp_path / "in.json").write_text("not json")
    with pytest.raises(SystemExit) as caught:
        driver.run_stages(stages)
    assert caught.value.code == 1
    assert "stage first failed; the same command resumes there" in capfd.readouterr().err
    assert not (tmp_path / "out/second.json").exists()


def row(seen, unseen):
    return {"seen": seen, "unseen": unseen, "seen_no_self": 0.1, "unseen_no_self": 0.1}


def result(multitask, selected):
    return {
        "labels": {"text_only": {"precision": 0.4, "recall": 0.8}, "selected": selected},
        "retrieval": {
            "raw_pixels": row(0.53, 0.25),
            "untrained": row(0.52, 0.23),
            "contrastive_alt_text": row(0.55, 0.31),
            "multitask": multitask,
        },
    }


def test_nothing_falls_short_of_a_good_run():
    assert report.shortfalls(result(row(0.58, 0.36), {"precision": 0.6, "recall": 0.72})) == []


def test_every_shortfall_is_said():
    sentences = report.shortfalls(result(row(0.54, 0.3), {"precision": 0.45, "recall": 0.6}))
    assert len(sentences) == 5
    text = " ".join(sentences)
    for part in ("On seen things", "On unseen things", "5.0 points above raw pixels", "precision"):
        assert part in text


def test_table_has_every_row_and_no_other():
    text = report.table(result(row(0.58, 0.36), {"precision": 0.6, "recall": 0.72}))
    assert "multi-task, chosen labels" in text
    assert "supervised" not in text
    assert "0.360" in text


def test_stages_are_the_public_commands():
    for stage in (*driver.STAGES, *driver.COMPARE_STAGES):
        name, *flags = stage.command
        assert name in commands.COMMANDS
        assert all(
            "quickstart" in f
            or "sample" in f
            or f.startswith("-")
            or f == "hf"
            or f == "raw_pixels"
            for f in flags
        )
    assert json.dumps([s.command for s in driver.STAGES])


def test_the_page_holds_all_figures_and_escapes_what_it_shows(tmp_path):
    (tmp_path / "multitask").mkdir()
    steps = [{"step": 0, "loss_entity": 3.0}, {"step": 10, "loss_entity": 1.0}]
    steps += [{"step": 10, "retrieval_seen/map": 0.5}]
    lines = "".join(json.dumps(step) + "\n" for step in steps)
    (tmp_path / "multitask/metrics.jsonl").write_text(lines)
    stage = {"seconds": 61.0, "peak_rss_mb": 2345, "command": ["train", "--a=<b>"]}
    text = report.page(
        {
            **result(row(0.58, 0.36), {"precision": 0.6, "recall": 0.72}),
            **{"scores": {"entity_seen/top5": 0.9}, "seconds": 90, "peak_rss_mb": 2345},
            **{"stages": {"train": stage}, "shortfalls": ["1 < 2"]},
        },
        tmp_path,
    )
    for part in (
        "0.360",
        "0.580",
        "90.0 %",
        "1.5\u2009min",
        "2\u2009345\u2009MB",
        "0.720",
        "61\u2009s",
    ):
        assert part in text
    for part in ("1 &lt; 2", "--a=&lt;b&gt;", "contrastive, raw alt-text", "Loss by step"):
        assert part in text
    assert 'href="evaluation/index.html"' in text
    assert "58.0,26.0 410.0,134.0" in " ".join(text.split())  # a loss of 3 and of 1, from 0 to 3
    assert "supervised, chosen labels" not in text


def test_the_picture_of_neighbours_shows_the_upper_half_of_things_evenly():
    """Ten things of three pictures each: of each the best stands for it, the first of equals."""
    classes = np.repeat(np.arange(10), 3)
    right = np.zeros(30, int)
    right[1::3] = [0, 3, 0, 2, 2, 0, 1, 3, 1, 0]  # the second picture of each
    chosen = neighbours.choose(classes, right)
    assert [classes[i] for i in chosen] == [1, 7, 3, 4, 6]
    assert all(i % 3 == 1 for i in chosen)


def test_the_picture_of_neighbours_tells_right_from_wrong():
    drawing = ops.encode_jpeg(np.full((24, 24, 3), 128, np.uint8), 90)
    right = np.array([[True, True, True], [False, False, False]])
    image = np.asarray(neighbours.draw([[drawing] * 4] * 2, right))
    assert image.shape[2] == 4
    assert (image[0, 0] == 0).all()  # nothing of a background
    first, second = np.split(image, 2)
    assert (first != second).mean() > 0.05  # the frames and marks
    assert (first[:, : first.shape[1] // 5] == second[:, : first.shape[1] // 5]).mean() > 0.8
