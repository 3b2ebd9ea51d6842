"""Other people's readers that lie apart from the environment, for processes of the tests."""

import pathlib
import subprocess
import sys

import pytest

READERS = pathlib.Path(sys.prefix) / "readers"  # open_clip and timm
# What begins a process that can import what lies in these folders of the environment.
_BEGIN = {
    "readers": "from tests import with_readers; with_readers.find()",
    "transformers4": "import sys; sys.path.insert(0, sys.prefix + '/transformers4')",
}


def run(code: str, folder: str = "readers") -> str:
    """Runs Python code in a process that can import them; returns what it prints."""
    if not (READERS.parent / folder).is_dir():
        pytest.skip(f"{folder} is not installed: make {READERS.parent.name}/.{folder}")
    code = f"{_BEGIN[folder]}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def find() -> None:
    """Makes them importable in this process."""
    import torch

    sys.path.append(str(READERS))
    # torchvision's operators are compiled for another build of torch, and its import looks for two.
    for name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
