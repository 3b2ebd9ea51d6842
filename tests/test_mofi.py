"""The command `mofi`: its table, its help, and what is installed with it."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

import mofi_jax
from mofi_jax import __main__ as mofi
from mofi_jax.common import command_help, config_files, packages

ROOT = packages.ROOT


def run(monkeypatch, capsys, *arguments):
    """Exit code and what is printed, without another process."""
    monkeypatch.setattr(sys, "argv", ["mofi", *arguments])
    monkeypatch.setattr(command_help.signal, "signal", lambda *_: None)
    try:
        mofi.main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    return code, said.out if code == 0 else said.err


def test_every_main_is_a_command_and_has_a_line():
    mains = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for house in ("mofi_jax", "data_prep", "quickstart")
        for path in (ROOT / house).rglob("*.py")
        if "cli.run(main" in path.read_text() and path.stem != "cli"
    }
    assert sorted(mofi.COMMANDS.values()) == sorted(mains)
    for name in mofi.COMMANDS:
        assert mofi.source(name).is_file()
        assert 20 < len(mofi.summary(name)) <= 80, name
        assert mofi.summary(name).endswith("."), name


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_what_there_is(arguments, monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, *arguments)
    assert code == 0
    assert all(f"  {name} " in said for name in mofi.COMMANDS)


def test_a_mistyped_command_and_the_version(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "trian") == (
        2,
        "error: There is no command 'trian': did you mean `mofi train`?\n",
    )
    code, said = run(monkeypatch, capsys, "\x1b[31m")
    assert code == 2
    assert said == r"error: There is no command '\x1b[31m': `mofi --help` lists them." + "\n"
    assert run(monkeypatch, capsys, "--version") == (0, f"mofi_jax {mofi_jax.__version__}\n")


@pytest.mark.parametrize("name", mofi.COMMANDS)
def test_help_of_a_command(name, monkeypatch, capsys):
    command = command_help.read(mofi.source(name))
    code, said = run(monkeypatch, capsys, name, "--help")
    assert code == 0
    assert len([e for e in command.examples if not e.startswith(" ")]) >= 2
    assert any(f"mofi {name}" in example for example in command.examples)
    for flag in command.flags:
        assert flag.written in said
        assert flag.says, flag
    assert ("--config=NAME" in said) == bool(command.config)
    if command.config:
        path, arguments = config_files.find(command.config)
        for key in config_files.load(path, arguments):
            assert f"\n  {key}" in said
    assert max(map(len, said.splitlines())) <= 120


def test_help_of_a_key_a_group_and_a_flag(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "train", "--help=optimizer.learning_rate")
    assert code == 0
    assert said.startswith("Of mofi:\n  --config.optimizer.learning_rate=0.0005\n")
    code, said = run(
        monkeypatch, capsys, "train", "--help=checkpoint", "--config=quickstart", "--workdir=w"
    )
    assert "--config.checkpoint.keep=1" in said
    assert "batch_size" not in said
    code, said = run(monkeypatch, capsys, "train", "--help=workdir")
    assert said.startswith("  --workdir=WORKDIR ")
    code, said = run(monkeypatch, capsys, "train", "--help=optimizer.lerning_rate")
    assert (code, said) == (
        2,
        "error: There is no flag or key 'optimizer.lerning_rate' in mofi: did you mean"
        " --help=optimizer.learning_rate?\n",
    )


def test_help_where_the_config_cannot_be_read(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "train", "--help", "--config", "finetune")
    assert code == 0
    assert "Its keys cannot be shown: configs/finetune.py has no model" in said
    assert "Examples:" in said


def test_the_list_needs_no_library():
    code = "import sys; from mofi_jax.__main__ import usage; usage(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"jax", "numpy", "ml_collections", "absl"} & {*done.stdout.split()}


# ----------------------------------------------------------------------------------- installed


HOUSES = ("mofi_jax", "data_prep", "configs", "quickstart")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by what pyproject.toml says, from a copy: a build leaves files in its source."""
    folder = tmp_path_factory.mktemp("wheel")
    for house in HOUSES:
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / house, folder / "source" / house, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, folder / "source")
    build = ("wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), "./source")
    subprocess.run([*PIP, *build], cwd=folder, check=True)
    [path] = folder.glob("*.whl")
    return path


def test_all_files_are_installed(wheel):
    installed = set(zipfile.ZipFile(wheel).namelist())
    for house in HOUSES:
        for path in (ROOT / house).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.relative_to(ROOT).as_posix() in installed
    assert wheel.name.startswith(f"mofi_jax-{mofi_jax.__version__}-")
    [told] = [name for name in installed if name.endswith("entry_points.txt")]
    assert "mofi = mofi_jax.__main__:main" in zipfile.ZipFile(wheel).read(told).decode()
    assert "data_prep/sample/pairs/00000.tar.gz" in installed


@pytest.mark.slow
@pytest.mark.parametrize("shadowed", [False, True])
def test_what_is_installed_works_from_any_folder(shadowed, wheel, tmp_path):
    """Also from one with folders of the same names; nothing of this checkout is in its way."""
    into = ("install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    subprocess.run([*PIP, *into], check=True)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    if shadowed:
        for name in ("configs", "data_prep", "quickstart"):
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text("raise SystemError('not ours')")
    (folder / "own.py").write_text(
        "from configs import quickstart\nget_config = quickstart.get_config\n"
    )

    def said(*command):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert f"{ROOT}/" not in (done.stdout + done.stderr).replace(f"{ROOT}/.venv", "")
        return done.returncode, done.stdout + done.stderr

    script = (sys.executable, str(tmp_path / "site/bin/mofi"))
    module = (sys.executable, "-m", "mofi_jax")
    for start in (script, module):
        assert said(*start, "--version") == (0, f"mofi_jax {mofi_jax.__version__}\n")
        code, text = said(*start, "labels", "--help=sources")
        assert code == 0
        assert str(tmp_path / "site/data_prep/sample/pairs") in text
    for start in ((*script, "train"), (sys.executable, "-m", "mofi_jax.train")):
        code, text = said(*start, "--config", "own.py", "--workdir=w")
        assert code == 2
        assert text.splitlines()[-1].startswith("error: There is no data set 'i2e' in runs/quick")
    code, text = said(*script, "labels", "--config", "i2e:sample,dataset=i2t", "--workdir=w")
    assert code == 0, text
    assert (folder / "w/i2t/1.0.0/dataset_info.json").exists()
