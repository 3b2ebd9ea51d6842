"""Every main's command line: bad input is one sentence on stderr, exit code 2, nothing written."""

import logging
import os
import runpy
import subprocess
import sys

import ml_collections
import pytest
from etils import epath

from mofi_jax import __main__
from mofi_jax.common import cli, errors
from mofi_jax.common.console import lines

REPOSITORY = epath.Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--config quickstart --config.data.blok=3", "did you mean --config.data.block?"),
        ("--config configs/quickstart.py --config.data.dir=no/where", "no data set 'i2e' in no/wh"),
    ],
)
def test_one_sentence(arguments, sentence, tmp_path):
    workdir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "mofi_jax", "train", *arguments.split(), f"--workdir={workdir}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert sentence in last
    assert "Traceback" not in done.stderr
    assert not workdir.exists()


def test_a_mistyped_config_is_told_before_a_command_is_imported(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mofi", "train", "--config", "mofi", "--config.totl=3"])
    monkeypatch.setattr(runpy, "run_module", lambda *_, **__: pytest.fail("imported"))
    with pytest.raises(SystemExit, match="2"):
        __main__.main()


def test_flags_that_are_not_there_or_missing(tmp_path):
    """As above, by a command that imports next to nothing."""
    code = (
        "from mofi_jax.common import cli\ndef main(out, several=()):\n  print(out)\ncli.run(main)"
    )
    for arguments, sentence in (
        ("--uot=3", "There is no flag --uot: did you mean --out?"),
        ("--zzz=3", "There is no flag --zzz: see --help."),
        ("stray --out=3", "Unexpected argument 'stray'"),
        ("--several a b", "--out missing: see --help for what they mean."),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments.split()],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {sentence}")


def test_a_flag_may_take_all_that_follows_it():
    several = {"--models"}
    for given in (["--models", "A", "B", "--out", "D"], ["--models=A", "B", "--out", "D"]):
        found = list(cli._repeated(["main", *given], several))
        assert found == ["main", "--models=A", "--models=B", "--out", "D"]
    assert list(cli._repeated(["main", "--out", "D", "E"], several)) == ["main", "--out", "D", "E"]


def test_home_a_poor_terminal_and_the_config_of_another_command(tmp_path):
    code = (
        "from mofi_jax.common import cli\n"
        "def main(config, out):\n"
        "    print(out, config.data.dir, config.sources, config.data.name, '\u2588')\n"
        "    config.data.seed\n"
        "cli.run(main)"
    )
    (tmp_path / "c.py").write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    values = {'data': {'dir': '~/d', 'name': 'a~/b'}, 'sources': ('t=~/t', '~/u=v')}\n"
        "    return ml_collections.ConfigDict(values)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--config=~/c.py", "--out=~/o"],
        cwd=REPOSITORY,
        env={**os.environ, "HOME": str(tmp_path), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    home = str(tmp_path)
    sources = (f"t={home}/t", f"{home}/u=v")
    assert done.stdout == f"{home}/o {home}/d {sources} a~/b ?\n"
    assert done.returncode == 2
    assert done.stderr.startswith("error: The config has no key 'seed', which this command reads:")


def test_none_by_a_flag_is_none_and_no_text():
    config = ml_collections.ConfigDict({"clip": "None", "safety": {"head": "None", "name": "a"}})
    cli._with_home(config)
    assert config.to_dict() == {"clip": None, "safety": {"head": None, "name": "a"}}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [((), "No workdirs given"), (("no/where",), "There is no metric in no/where/metrics.jsonl")],
)
def test_what_is_written_without_a_flag(arguments, sentence):
    done = subprocess.run(
        [sys.executable, "-m", "mofi_jax.curves", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {sentence}")


@pytest.mark.parametrize(
    ("ask", "key"),
    [
        (lambda config: config.sed, "sed"),
        (lambda config: config["data.blok"], "blok"),
        (lambda config: config.zzz, "zzz"),
        (lambda config: setattr(config, "new", 3), "new"),
        (lambda config: config.update({"data": {"blk": 3}}), "blk"),
    ],
)
def test_the_key_that_a_config_lacks(ask, key):
    """Its own errors quote the key, then quote that, and suggest others."""
    config = ml_collections.ConfigDict({"data": {"dir": "d", "block": 2}, "seed": 1}).lock()
    with pytest.raises((KeyError, AttributeError)) as raised:
        ask(config)
    assert cli._key(raised.value) == key


def test_libraries_are_heard_without_tracebacks():
    error = (ValueError, ValueError("full"), None)
    for name, level, heard, traced in (
        (cli.__file__, logging.INFO, True, True),
        ("/lib/orbax/save.py", logging.ERROR, True, False),
        ("/lib/orbax/save.py", logging.INFO, False, False),
    ):
        record = logging.LogRecord("absl", level, name, 1, "failed", (), error)
        assert lines._from_here(record) is heard
        assert bool(record.exc_info) is traced


def test_what_cannot_be_written_ends_at_once(monkeypatch, capsys):
    """Without what a normal exit waits for: threads of libraries, and the other hosts."""
    codes = []
    monkeypatch.setattr(cli.os, "_exit", codes.append)
    with pytest.raises(SystemExit):
        cli.complain(errors.StorageFailed("W cannot be written"))
    assert codes == [2]
    assert capsys.readouterr().err == "error: W cannot be written\n"


def test_a_complaint_cannot_steer_the_terminal(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.complain("the file \x1b[31m\x9bx\u202e\udce9.tar\nis\tno tar")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said == r"error: the file \x1b[31m\x9bx\u202e\udce9.tar is no tar" + "\n"
