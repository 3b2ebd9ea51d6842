"""Preemption, whenever the signal comes: exit code 75, and nothing is lost."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from etils import epath

from mofi_jax import telemetry, train
from mofi_jax.common.errors import Preempted
from mofi_jax.distributed import preemption
from mofi_jax.training import checkpoint
from tests import datasets

REPOSITORY = epath.Path(__file__).parent.parent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_the_loop_a_signal_is_a_request(number):
    before = signal.getsignal(number)
    with preemption.guard_preemption() as guard:
        guard.defer_exit()
        assert not guard.requested()
        os.kill(os.getpid(), number)
        assert guard.requested()
        assert guard.requested()
        os.kill(os.getpid(), signal.SIGTERM)  # again: no harm
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) is before


def test_before_the_loop_it_exits_at_once(capfd):
    with preemption.guard_preemption() as guard:
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert guard.requested()  # where a library has caught it
    assert left.value.code == Preempted.exit_code
    assert capfd.readouterr().err == "SIGTERM before the first step: exiting\n"


def test_during_the_imports():
    """The training's own imports: the first of jax raises the signal."""
    code = """
        import importlib.abc, runpy, signal, sys

        class Finder(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name == "jax":
                    try:
                        signal.raise_signal(signal.SIGTERM)
                    except BaseException:  # as libraries in C++ do, or worse
                        pass

        sys.meta_path.insert(0, Finder())
        sys.argv = ["train"]
        runpy.run_module("mofi_jax.train", run_name="__main__", alter_sys=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 75
    began, exiting = done.stderr.splitlines()
    assert began.endswith(" training: loading jax and the libraries for data")
    assert exiting == "SIGTERM before the first step: exiting"


@pytest.mark.parametrize("moment", ["open_training_set", "make_train_step", "restore"])
def test_before_the_first_step(tmp_path, monkeypatch, moment):
    """While data are opened, programs made, a checkpoint restored."""
    datasets.write(tmp_path / "data", examples=32, shards=1)
    config = datasets.tiny_config(tmp_path / "data", "task=supervised", steps=2)
    owner = {
        "open_training_set": train.training_set,
        "make_train_step": train.step_lib,
        "restore": checkpoint,
    }[moment]
    if moment == "restore":
        train.main(config, str(tmp_path / "run"))
        config.total = "3 steps"
    original = getattr(owner, moment)

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, interrupted)
        with pytest.raises(SystemExit) as left:
            train.main(config, str(tmp_path / "run"))
    assert left.value.code == Preempted.exit_code
    assert checkpoint.saved_steps(tmp_path / "run") == ([2] if moment == "restore" else [])


def test_while_the_last_save_is_under_way(tmp_path, monkeypatch):
    """The run has nothing left to do but to wait for it, and finishes."""
    datasets.write(tmp_path / "data", examples=32, shards=1)
    config = datasets.tiny_config(tmp_path / "data", "task=supervised", steps=2)
    close = telemetry.Metrics.close

    def interrupted(self):
        signal.raise_signal(signal.SIGTERM)
        close(self)

    monkeypatch.setattr(telemetry.Metrics, "close", interrupted)
    train.main(config, str(tmp_path / "run"))
    assert checkpoint.saved_steps(tmp_path / "run") == [2]
    assert (tmp_path / "run" / "result.json").exists()
