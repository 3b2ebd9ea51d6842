"""Copies a finished data set to where others read it: a bucket, or a folder on another disk.

ArrayRecord writes local files only, so a data set is made in the work directory and copied. A
reader takes a folder for a data set once it holds dataset_info.json: that file is taken away first
and comes back last, so that nobody sees half of a data set or a mixture of two. `SHA256SUMS`, which
`sha256sum -c` understands, tells what has arrived: run again, after a kill too, only what is
missing or has changed is copied.
"""

import os
import shutil

import ml_collections
from absl import logging
from etils import epath

from data_prep import engine
from mofi_jax.common import errors, files
from mofi_jax.data import records

INFO_FILE = "dataset_info.json"
SUMS_FILE = "SHA256SUMS"
_BLOCK = 16 << 20  # bytes; object stores upload in parts of this order


def run(config: ml_collections.ConfigDict, work: engine.Engine, dataset: str) -> dict[str, int]:
    """Copies W/`dataset`/VERSION to `config.publish`/`dataset`/VERSION.

    Args:
      config: `publish`, a folder or a URL that epath knows (gs://, s3://, az://).
      work: the engine, whose work directory holds the data set.
      dataset: "i2e" or "i2t".

    Returns:
      Counts `files`, `copied`, `bytes` (copied).

    Raises:
      BadInput: the data set is not finished, the destination cannot be used, or the library for
        its scheme is not installed.
    """
    source = work.workdir / dataset / records.VERSION
    if not (source / INFO_FILE).exists():
        raise errors.BadInput(
            f"{source} holds no finished data set ({INFO_FILE} is missing): run build_i2e first."
        )
    check(config.publish)
    target = epath.Path(config.publish) / dataset / records.VERSION
    if os.path.abspath(target) == os.path.abspath(source):
        raise errors.BadInput(
            f"config.publish={config.publish!r} is where the data set was made: name another"
            " folder, or none."
        )
    sums = _known_sums(work.workdir, dataset)
    files = sorted(path for path in source.iterdir() if path.name != INFO_FILE)
    files.append(source / INFO_FILE)
    wanted = {path.name: sums.get(path.name) or engine.sha256(path) for path in files}
    arrived = _read_sums(target / SUMS_FILE)
    missing = [path for path in files if not _is_there(path, target, wanted, arrived)]
    if missing:
        target.mkdir(parents=True, exist_ok=True)
        (target / INFO_FILE).unlink(missing_ok=True)
        if files[-1] not in missing:
            missing.append(files[-1])
    for path in missing:
        _copy(path, target / path.name)
        arrived = {**arrived, path.name: wanted[path.name]}
        lines = [f"{digest}  {name}\n" for name, digest in sorted(arrived.items())]
        (target / SUMS_FILE).write_text("".join(lines))
    copied = sum(path.stat().length for path in missing)
    logging.info("Published %s: %d of %d files were copied", target, len(missing), len(files))
    return {"files": len(files), "copied": len(missing), "bytes": copied}


def check(publish: str) -> None:
    """Raises BadInput unless `publish` names a bucket to look at or a folder to write."""
    scheme, separator, _ = os.fspath(publish).partition("://")
    if not separator:
        files.output_folder(publish, "config.publish")
    if separator and scheme not in ("gs", "s3", "az"):
        raise errors.BadInput(
            f"config.publish={publish!r} cannot be used: give a folder, or a URL that begins with"
            " gs://, s3:// or az://."
        )
    try:
        epath.Path(publish).exists()
    except ImportError as error:
        package = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}.get(scheme)
        raise errors.BadInput(
            f"config.publish={publish!r} needs a library that is not installed: run pip install"
            f" {package}."
        ) from error
    except Exception as error:  # each cloud's library raises exceptions of its own
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise errors.BadInput(
            f"config.publish={publish!r} cannot be reached ({reason}): check the address and the"
            " credentials of this machine."
        ) from error


def _known_sums(workdir: epath.Path, dataset: str) -> dict[str, str]:
    """sha256 by file name, as the manifests of the stages that wrote the data set hold them."""
    sums = {}
    stages = [f"{stage}-{dataset}" for stage in ("shards", "metadata")]
    for manifest in (m for stage in stages for m in engine.read_manifests(workdir, stage)):
        for output in manifest["outputs"]:
            if output["path"].startswith(f"{dataset}/{records.VERSION}/"):
                sums[os.path.basename(output["path"])] = output["sha256"]
    return sums


def _read_sums(path: epath.Path) -> dict[str, str]:
    if not path.exists():
        return {}
    lines = (line.split("  ", 1) for line in path.read_text().splitlines())
    return {words[1]: words[0] for words in lines if len(words) == 2}


def _is_there(
    path: epath.Path, target: epath.Path, wanted: dict[str, str], arrived: dict[str, str]
) -> bool:
    there = target / path.name
    if arrived.get(path.name) != wanted[path.name] or not there.exists():
        return False
    return there.stat().length == path.stat().length


def _copy(source: epath.Path, target: epath.Path) -> None:
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, _BLOCK)
