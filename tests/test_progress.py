"""What a person sees of a stage: a bar on a terminal, lines in a log, room for others."""

import io
import logging

import pytest

from data_prep import engine
from data_prep.engine import progress
from data_prep.kb import build as kb_build
from tests import inputs


class Terminal(io.StringIO):
    def isatty(self):
        return True


def count(task, outputs, settings):
    outputs.path(f"count/{task.name}.txt").write_text(task.name)
    return {"rows": 500}


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


def test_a_terminal_shows_every_stage_with_its_shards(tmp_path, take_terminal):
    terminal = take_terminal()
    with engine.Engine(tmp_path) as work:
        work.map_shards("count", count, TASKS, {})
        work.map_shards("second", count, TASKS[:2], {})
    shown = terminal.getvalue()
    assert "count" in shown
    assert "3/3" in shown
    assert "second" in shown
    assert "2/2" in shown
    assert "rows/s" in shown


def test_a_knowledge_base_shows_how_much_of_its_source_is_read(tmp_path, take_terminal):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"id": "Q1", "label": "rose"}\n')
    terminal = take_terminal()
    kb_build.build(source, tmp_path / "kb", inputs.kb_rules())
    shown = terminal.getvalue()
    assert "kb: read" in shown
    assert "30.0/30.0" in shown
    assert "1/1" in shown


def test_a_log_has_a_line_for_each_stage_and_for_each_minute(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "_UPDATE", 0.0)
    with engine.Engine(tmp_path) as work:
        work.map_shards("count", count, TASKS, {})
        work.map_shards("count", count, TASKS, {})
    lines = [record.getMessage() for record in caplog.records]
    assert sum("of 3 shards" in line for line in lines) == 3
    assert sum(line.startswith("count: 3 shards in") for line in lines) == 1
    assert lines[-1] == "count: all 3 shards are done already"
