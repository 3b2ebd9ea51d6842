"""Outputs are judged before the work, and judging writes nothing."""

import os
import pathlib

import pytest

from configs import eval as eval_config
from configs import i2e, kb, quickstart
from data_prep import build_i2e, build_kb, label_quality
from data_prep.dataset import publish
from mofi_jax import curves, evaluate, export, grow
from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.plan import __main__ as plan


@pytest.mark.parametrize("name", ["run", "a/b/c", "lr=1e-3 {a,b}", "ü]"])
def test_a_new_folder_is_fine_and_not_made(tmp_path, name):
    assert files.output_folder(tmp_path / name, "--workdir") == tmp_path / name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["run [lr=1e-3]", "run*", "r?", "[x]/run"])
def test_patterns_are_refused_also_above_the_folder(tmp_path, monkeypatch, name):
    with pytest.raises(BadInput, match=r"--workdir=.* has one of the characters \* \? \["):
        files.output_folder(str(tmp_path / name), "--workdir")
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(BadInput, match="has one of the characters"):
        files.output_folder("out", "--out")


def test_a_folder_that_is_replaced_can_be_moved_away(tmp_path, monkeypatch):
    (tmp_path / "disk/exports/old").mkdir(parents=True)
    (tmp_path / "latest").symlink_to(tmp_path / "disk/exports")
    assert files.replaced_folder(tmp_path / "latest", "--out") == tmp_path / "disk/exports"
    assert files.replaced_folder(f"{tmp_path}/x/y/", "--out") == tmp_path / "x/y"
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: True)
        with pytest.raises(BadInput, match=r"--out=.* is mounted or the current folder"):
            files.replaced_folder(tmp_path / "disk", "--out")
    monkeypatch.chdir(tmp_path / "disk/exports/old")
    for here in (".", "..", tmp_path / "latest"):
        with pytest.raises(BadInput, match=r"current folder, .* name a new folder in it"):
            files.replaced_folder(here, "--out")
    assert files.replaced_folder("new", "--out") == tmp_path / "disk/exports/old/new"


def test_files_folders_and_remote_paths_are_told_apart(tmp_path):
    (tmp_path / "file").touch()
    for call, text, said in (
        (files.output_folder, tmp_path / "file", "is a file: name a folder"),
        (files.output_folder, tmp_path / "file/run", "cannot be written .not a directory"),
        (files.output_file, tmp_path, "is a folder: name a file"),
        (files.output_folder, "gs://bucket/run", "is a remote path"),
        (files.output_file, "gs://bucket/plan.json", "is a remote path"),
    ):
        with pytest.raises(BadInput, match=f"^--out=.*{said}"):
            call(text, "--out")


def test_a_place_that_takes_no_files_is_named(tmp_path):
    if not pathlib.Path("/proc/self").exists():
        pytest.skip("no /proc, where not even root may write")
    for call in (files.output_folder, files.output_file):
        with pytest.raises(BadInput, match="--out=/proc/run cannot be written"):
            call("/proc/run", "--out")
    (tmp_path / "link").symlink_to("/proc/nothing/there")  # a link that leads nowhere
    with pytest.raises(BadInput, match="cannot be written"):
        files.output_folder(tmp_path / "link", "--out")
    assert os.listdir(tmp_path) == ["link"]


# Every command that writes, its input being nowhere.  `train` and `doctor` are in their own tests;
# `sweep` cannot do without flags.
WRITERS = {
    "build_i2e": lambda out: build_i2e.build(i2e.get_config("sample"), out),
    "build_kb": lambda out: build_kb.main(kb.get_config(), "no/dump", out),
    "curves": lambda out: curves.main("no/run", out=f"{out}/curves.png"),
    "evaluate": lambda out: evaluate.main(eval_config.get_config("sample"), "no/model", out),
    "export": lambda out: export.main("no/model", out),
    "grow": lambda out: grow.main("no/model", "no/data", out),
    "label_quality": lambda out: label_quality.main(out, "no/truth"),
    "publish": lambda out: publish.check(out),
    "plan": lambda out: plan.main(quickstart.get_config("task=multitask"), "v5e:2x2", out=out),
}


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="no /proc")
@pytest.mark.parametrize("name", WRITERS)
def test_a_command_looks_at_its_output_before_its_input(name):
    with pytest.raises(BadInput, match=r"=/proc/run.* cannot be written"):
        WRITERS[name]("/proc/run")
