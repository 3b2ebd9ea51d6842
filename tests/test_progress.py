"""What a person sees of a stage: a bar on a terminal, lines in a log, room for others."""

import io
import logging
import re
import time

import pytest

from data_prep import engine
from data_prep.engine import progress
from data_prep.kb import build as kb_build
from mofi_jax.common import console
from tests import inputs


class Terminal(io.StringIO):
    def isatty(self):
        return True


def count(task, outputs, settings):
    outputs.path(f"count/{task.name}.txt").write_text(task.name)
    return {"rows": 500}


def slowly(task, outputs, settings):
    time.sleep(0.05)
    count(task, outputs, settings)
    return {"pairs_found": 500}


TASKS = [engine.Task(f"{number:05d}", ()) for number in range(3)]


@pytest.fixture
def take_terminal(monkeypatch):
    """To be called in the test: pytest puts its own standard error in place before that."""

    def take():
        made = Terminal()
        monkeypatch.setattr("sys.stderr", made)
        monkeypatch.setenv("TERM", "xterm-256color")
        return made

    return take


def test_a_terminal_shows_every_stage_with_its_shards(tmp_path, take_terminal, monkeypatch):
    monkeypatch.setattr(console.lines, "TICK", 0.001)
    terminal = take_terminal()
    with engine.Engine(tmp_path) as work:
        work.map_shards("count", slowly, TASKS, {})
        work.map_shards("second", slowly, TASKS[:2], {})
    shown = terminal.getvalue()
    assert "count: 0 of 3 shards" in shown
    assert re.search(r"count: 2 of 3 shards, [\d,]+ pairs found/s, \d+ s left", shown)
    assert "second: 1 of 2 shards" in shown


def test_a_knowledge_base_shows_how_much_of_its_source_is_read(tmp_path, take_terminal):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"id": "Q1", "label": "rose"}\n')
    terminal = take_terminal()
    kb_build.build(source, tmp_path / "kb", inputs.kb_rules())
    shown = terminal.getvalue()
    assert "kb: read" in shown
    assert "30.0/30.0" in shown


def test_a_log_has_a_line_for_each_long_stage_and_for_silence(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(console.lines, "TICK", 0.001)
    monkeypatch.setattr(console, "WORKING", 0.01)
    monkeypatch.setattr(progress, "_SHORT", 0.0)
    with engine.Engine(tmp_path) as work:
        work.map_shards("count", slowly, TASKS, {})
    lines = [record.getMessage() for record in caplog.records]
    assert sum("of 3 shards, " in line for line in lines) >= 2
    assert sum(line.startswith("count: 3 shards in ") for line in lines) == 1


def test_what_is_done_is_told_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with engine.Engine(tmp_path) as work:
        work.map_shards("count", count, TASKS, {})
        work.map_shards("second", count, TASKS, {})
    assert not caplog.records  # quick, and no matter for people
    with engine.Engine(tmp_path) as work:
        work.map_shards("count", count, TASKS, {})
        work.map_shards("second", count, TASKS, {})
        work.map_shards("third", count, TASKS, {})
    assert [record.getMessage() for record in caplog.records] == ["2 stages are done already"]
