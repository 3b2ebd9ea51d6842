"""Weights & Biases, for those who want it: the same numbers as the JSON lines."""

import importlib
import secrets
from typing import Any

import jax
from etils import epath

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput


def require_wandb(project: str) -> Any:
    """The package ``wandb`` if a project is named, else None; BadInput if it is not installed."""
    if not project:
        return None
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise BadInput(
            f"config.telemetry.wandb={project!r} needs Weights & Biases: pip install wandb, or "
            "leave the key empty."
        ) from None


def open_wandb(project: str, workdir: epath.PathLike, config: Any) -> Any:
    """This workdir's run, new or resumed; None without a project and on other hosts than 0.

    Its id is kept in the workdir.  Weights & Biases takes no second value for a step: the steps
    that a resumed run repeats stay as they were, and they are the same.
    """
    package = require_wandb(project)
    if package is None or jax.process_index() != 0:
        return None
    workdir = files.absolute(workdir)
    path = workdir / "wandb_id.txt"
    if not path.exists():
        files.write_text(path, secrets.token_hex(8) + "\n")
    return package.init(
        project=project,
        name=workdir.name,
        id=path.read_text().strip(),
        resume="allow",
        dir=None if files.is_remote(workdir) else str(workdir),
        config=config.to_dict(),
    )
