"""One run per folder, whatever becomes of the one before."""

import errno
import json
import os
import socket
import subprocess
import sys

import pytest
from etils import epath

from mofi_jax.common import errors
from mofi_jax.common.errors import BadInput
from mofi_jax.training import run_lock

# What another process does, without the imports of ours.
HOLD = """
import fcntl, json, os, signal, socket, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
owner = {"host": socket.gethostname(), "process": os.getpid(), "since": "2026-01-02 03:04:05 UTC"}
print(json.dumps(owner), file=file, flush=True)
print("held", flush=True)
signal.pause()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path / "run"; it is killed at the end."""
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLD, tmp_path / "run" / run_lock.FILE]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_a_second_run_is_told_who_holds_the_folder(tmp_path, holder):
    where = f"in use by process {holder.pid} on {socket.gethostname()} since 2026-01-02 .*: let it"
    with pytest.raises(BadInput, match=where), run_lock.held(epath.Path(tmp_path / "run")):
        pass
    assert (tmp_path / "run" / run_lock.FILE).exists()


def test_a_holder_that_died_holds_nothing(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / run_lock.FILE).exists()
    with run_lock.held(epath.Path(tmp_path / "run")):
        owner = json.loads((tmp_path / "run" / run_lock.FILE).read_text())
        assert owner["process"] == os.getpid()


def test_the_locks_of_a_machine_that_vanished_are_waited_for(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(run_lock.socket, "gethostname", lambda: "elsewhere")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        holder.kill()
        holder.wait()

    monkeypatch.setattr(run_lock.time, "sleep", sleep)
    with run_lock.held(epath.Path(tmp_path / "run")):
        assert len(waits) == 1


def test_a_run_that_was_refused_leaves_nothing(tmp_path):
    with run_lock.held(epath.Path(tmp_path / "new")):
        assert [path.name for path in (tmp_path / "new").iterdir()] == [run_lock.FILE]
    assert not list(tmp_path.iterdir())


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / run_lock.FILE).symlink_to("precious")
    with (
        pytest.raises(OSError, match="symbolic link") as caught,
        run_lock.held(epath.Path(tmp_path)),
    ):
        pass
    assert errors.storage_problem(caught.value, tmp_path)  # train's one sentence
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_lock.fcntl, "lockf", unsupported)
    with run_lock.held(epath.Path(tmp_path)):
        pass
    assert "cannot be locked (No locks available): start no second run in it" in caplog.text


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"host": 3}'])
def test_an_owner_that_cannot_be_read_is_no_owner(tmp_path, holder, monkeypatch, text):
    (tmp_path / "run" / run_lock.FILE).write_text(text)
    monkeypatch.setattr(run_lock, "_LEASE_SECONDS", -1.0)
    sentence = "in use by process"
    with pytest.raises(BadInput, match=sentence), run_lock.held(epath.Path(tmp_path / "run")):
        pass
