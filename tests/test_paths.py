"""Outputs are judged before the work, and judging writes nothing."""

import os
import pathlib

import pytest

from mofi_jax import paths
from mofi_jax.errors import BadInput


@pytest.mark.parametrize("name", ["run", "a/b/c", "lr=1e-3 {a,b}", "ü]"])
def test_a_new_folder_is_fine_and_not_made(tmp_path, name):
    assert paths.output_folder(tmp_path / name, "--workdir") == tmp_path / name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["run [lr=1e-3]", "run*", "r?", "[x]/run"])
def test_patterns_are_refused_also_above_the_folder(tmp_path, monkeypatch, name):
    with pytest.raises(BadInput, match=r"--workdir=.* has one of the characters \* \? \["):
        paths.output_folder(str(tmp_path / name), "--workdir")
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(BadInput, match="has one of the characters"):
        paths.output_folder("out", "--out")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.output_folder("~/run", "--workdir") == tmp_path / "run"
    assert paths.output_file("~/plan.json", "--out") == tmp_path / "plan.json"


def test_files_folders_and_remote_paths_are_told_apart(tmp_path):
    (tmp_path / "file").touch()
    for call, text, said in (
        (paths.output_folder, tmp_path / "file", "is a file: name a folder"),
        (paths.output_folder, tmp_path / "file/run", "cannot be written .not a directory"),
        (paths.output_file, tmp_path, "is a folder: name a file"),
        (paths.output_folder, "gs://bucket/run", "is a remote path"),
        (paths.output_file, "gs://bucket/plan.json", "is a remote path"),
    ):
        with pytest.raises(BadInput, match=f"^--out=.*{said}"):
            call(text, "--out")


def test_a_place_that_takes_no_files_is_named(tmp_path):
    if not pathlib.Path("/proc/self").exists():
        pytest.skip("no /proc, where not even root may write")
    for call in (paths.output_folder, paths.output_file):
        with pytest.raises(BadInput, match="--out=/proc/run cannot be written"):
            call("/proc/run", "--out")
    (tmp_path / "link").symlink_to("/proc/nothing/there")  # a link that leads nowhere
    with pytest.raises(BadInput, match="cannot be written"):
        paths.output_folder(tmp_path / "link", "--out")
    assert os.listdir(tmp_path) == ["link"]
