"""Copies a finished data set to where others read it: a bucket, or a folder on another disk.

ArrayRecord writes local files only, so a data set is made in the work directory and copied. A
reader takes a folder for a data set once it holds dataset_info.json: that file is taken away first
and comes back last, so that nobody sees half of a data set or a mixture of two. `SHA256SUMS`, which
`sha256sum -c` understands, comes just before it. What has arrived meanwhile is noted in the work
directory (W/publish-DATASET/): run again, after a kill too, only what is missing or has changed is
copied, and what the data set does not hold any more is deleted there.

What is published is the version that `build_i2e` writes, which lacks all that is on the removal
list. Versions beside it there are left alone, and named in a warning where there is such a list.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator, Sequence

import ml_collections
from absl import logging
from etils import epath

from data_prep import engine
from data_prep.dataset import versions
from data_prep.filters import removed
from mofi_jax.common import errors, files
from mofi_jax.data import records

INFO_FILE = "dataset_info.json"
SUMS_FILE = "SHA256SUMS"
_BLOCK = 16 << 20  # bytes; object stores upload in parts of this order
_STREAMS = 8  # files at a time: a single one does not fill the line to an object store


def run(config: ml_collections.ConfigDict, work: engine.Engine, dataset: str) -> dict[str, int]:
    """Copies W/`dataset`/VERSION to `config.publish`/`dataset`/VERSION.

    Args:
      config: `publish`, a folder or a URL that epath knows (gs://, s3://, az://).
      work: the engine, whose work directory holds the data set.
      dataset: "i2e" or "i2t".

    Returns:
      Counts `files`, `copied`, `bytes` (copied), `deleted`.

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
    sizes = {path.name: path.stat().length for path in source.iterdir()}
    wanted = {name: sums.get(name) or engine.sha256(source / name) for name in sorted(sizes)}
    # While there is a journal, a copy is on its way, and nothing else tells what has arrived.
    place = hashlib.sha256(os.fspath(target).encode()).hexdigest()[:16]
    journal = work.workdir / f"publish-{dataset}" / f"{place}.sums"
    arrived = _read_sums(journal if journal.exists() else target / SUMS_FILE)
    with _failures_told(config.publish), concurrent.futures.ThreadPoolExecutor(_STREAMS) as pool:
        there = _sizes(target, pool)
        kept = {
            name: digest
            for name, digest in wanted.items()
            if arrived.get(name) == digest and there.get(name) == sizes[name]
        }
        strays = sorted(there.keys() - wanted.keys() - {SUMS_FILE})
        missing = [name for name in wanted if name not in kept]
        if missing or strays or SUMS_FILE not in there:
            kept.pop(INFO_FILE, None)
            missing = [name for name in wanted if name not in kept]
            journal.parent.mkdir(exist_ok=True)
            engine.write_durably(journal, _sums_text(kept).encode())
            target.mkdir(parents=True, exist_ok=True)
            for name in (INFO_FILE, SUMS_FILE):
                (target / name).unlink(missing_ok=True)
            _copy_all(source, target, {name: wanted[name] for name in missing}, journal, pool)
            for name in strays:
                (target / name).unlink(missing_ok=True)
            (target / SUMS_FILE).write_text(_sums_text(wanted))
            _copy(source / INFO_FILE, target / INFO_FILE)
            journal.unlink(missing_ok=True)
        _warn_of_others(target, removed.lists(work.workdir, config.get("removed", ())))
    copied = sum(sizes[name] for name in missing)
    logging.info("Published %s: %d of %d files were copied", target, len(missing), len(sizes))
    return {
        "files": len(sizes),
        "copied": len(missing),
        "bytes": copied,
        "deleted": len(strays),
    }


@contextlib.contextmanager
def _failures_told(publish: str) -> Iterator[None]:
    """Whatever a cloud's library raises, in one sentence."""
    try:
        yield
    except errors.BadInput:
        raise
    except Exception as error:  # each of them has exceptions of its own
        raise errors.BadInput(
            f"config.publish={publish!r}: copying stopped ({_reason(error)}): run the same command"
            " again, and it goes on where it was."
        ) from error


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


def _warn_of_others(target: epath.Path, lists: Sequence[str]) -> None:
    """Names other versions beside `target`, which may hold what is on a removal list."""
    if not lists:
        return
    for path in versions.others(target):
        logging.warning(
            "%s is another version, made without today's removal lists: delete it once nobody reads"
            " it any more",
            path,
        )


def _sizes(folder: epath.Path, pool: concurrent.futures.ThreadPoolExecutor) -> dict[str, int]:
    """Bytes of each file of a folder, by name; of none where there is no folder."""
    if not folder.exists():
        return {}
    paths = list(folder.iterdir())
    found = zip(paths, pool.map(lambda path: path.stat(), paths), strict=True)
    return {path.name: status.length for path, status in found if not status.is_directory}


def _copy_all(
    source: epath.Path,
    target: epath.Path,
    wanted: dict[str, str],
    journal: epath.Path,
    pool: concurrent.futures.ThreadPoolExecutor,
) -> None:
    """Copies all but the metadata, several files at a time; each that has arrived is noted."""
    lock = threading.Lock()
    with open(journal, "a", encoding="utf-8") as file:

        def copy(name: str) -> None:
            _copy(source / name, target / name)
            with lock:
                file.write(_sums_text({name: wanted[name]}))
                file.flush()

        try:
            for done in concurrent.futures.as_completed(
                [pool.submit(copy, name) for name in wanted if name != INFO_FILE]
            ):
                done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _sums_text(sums: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


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
        raise errors.BadInput(
            f"config.publish={publish!r} cannot be reached ({_reason(error)}): check the address"
            " and the credentials of this machine."
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


def _copy(source: epath.Path, target: epath.Path) -> None:
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, _BLOCK)
