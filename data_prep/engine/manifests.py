"""Manifests: what a finished shard was made from, and whether it still is.

A manifest `W/STAGE/NAME.json` holds the sha256 of all inputs and outputs, the settings and the
counts. Beside it lies `.NAME.stat.json` with sizes, modification times and the seconds that the
shard took: while sizes and times are unchanged nothing is hashed again, so that a finished stage
run again costs a few stat calls. A shard whose files were touched or copied is hashed and, where
the bytes are the same, kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence

from absl import logging
from etils import epath

from mofi_jax.common import errors

# A file as last seen: size in bytes, modification time in ns, sha256 in hex.
Seen = tuple[int, int, str]

_NOTE = ".stat.json"

# Hashes known to this process, by absolute path. Outputs of one stage are inputs of the next: with
# this no file is hashed twice in one run.
_known: dict[str, Seen] = {}


def sha256(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: epath.Path, data: bytes) -> None:
    """Writes a file so that after a kill or power cut it is there in full or not at all."""
    temporary = path.parent / f".{path.name}.tmp"  # one name: a kill leaves nothing behind for long
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def publish(temporary: epath.Path, final: epath.Path) -> None:
    """Gives a finished file its name, durably."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    final.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, final)
    _sync_folder(final.parent)


def _sync_folder(folder: epath.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: epath.Path) -> Iterator[None]:
    """Holds a stage's folder for this process alone.

    Raises:
      BadInput: another process holds it.
    """
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise errors.BadInput(
                f"The folder {os.fspath(folder)} is in use by another run: wait for it, or name"
                " another --workdir."
            ) from error
        yield


def look_up(paths: Sequence[str]) -> dict[str, Seen]:
    """What this process knows of the files, to be handed to another one."""
    absolute = (os.path.abspath(path) for path in paths)
    return {path: _known[path] for path in absolute if path in _known}


def learn(seen: Mapping[str, Seen]) -> None:
    """Takes over what another process knows."""
    _known.update(seen)


def describe(
    workdir: epath.Path, path: str | os.PathLike[str], name: str | os.PathLike[str], where: str
) -> dict:
    """The entry {path, bytes, sha256} of a file that the manifest calls `name`.

    Raises:
      BadInput: no such file; `where` says whose it is.
    """
    digest = _hash(path)
    if digest is None:
        raise errors.BadInput(
            f"{where}: the file {os.fspath(path)} is missing: restore it, or run the stage that"
            " writes it again."
        )
    size, _ = _stat(path)
    return {"path": _record_path(workdir, name), "bytes": size, "sha256": digest}


def read(workdir: epath.Path, stage: str, shard: str) -> dict | None:
    """The manifest of a shard, None where there is none."""
    return read_json(workdir / stage / f"{shard}.json")


def write(workdir: epath.Path, manifest: dict, seconds: float) -> None:
    """Writes a manifest, which is what makes its shard finished, and notes how long it took."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    write_durably(workdir / manifest["stage"] / f"{manifest['shard']}.json", text.encode())
    remember(workdir, manifest, round(seconds, 3))


def finished(
    workdir: epath.Path,
    stage: str,
    shard: str,
    inputs: Sequence[str],
    settings: dict,
    hash_changed: bool,
) -> dict | None:
    """The manifest of a shard whose inputs, settings and outputs are unchanged, or None.

    With `hash_changed` a file of the same size but another time is read to find out; without, the
    shard counts as unfinished, so that workers do the reading.
    """
    manifest = read(workdir, stage, shard)
    if manifest is None or manifest.get("settings") != settings:
        return None
    if [entry["path"] for entry in manifest["inputs"]] != [
        _record_path(workdir, path) for path in inputs
    ]:
        return None
    stats = _note(workdir, stage, shard).get("files", {})
    for entry in (*manifest["inputs"], *manifest["outputs"]):
        path = os.path.abspath(workdir / entry["path"])
        status = _stat(path)
        if status is None or status[0] != entry["bytes"]:
            return None
        if stats.get(entry["path"]) == list(status):
            _known[path] = (*status, entry["sha256"])
        known = _known.get(path)
        if (known is None or known[:2] != status) and not hash_changed:
            return None
        if _hash(path) != entry["sha256"]:
            return None
    return manifest


def remember(workdir: epath.Path, manifest: dict, seconds: float | None = None) -> None:
    """Notes sizes and times beside a manifest whose hashes were just verified."""
    stage, shard = manifest["stage"], manifest["shard"]
    stats = {}
    for entry in (*manifest["inputs"], *manifest["outputs"]):
        path = os.path.abspath(workdir / entry["path"])
        status = _stat(path)
        if status is not None:
            stats[entry["path"]] = status
            _known[path] = (*status, entry["sha256"])
    before = _note(workdir, stage, shard)
    note = {"files": stats, "seconds": before.get("seconds", 0.0) if seconds is None else seconds}
    if json.loads(json.dumps(note)) != before:
        _note_path(workdir, stage, shard).write_text(json.dumps(note, sort_keys=True))


def stage_seconds(workdir: str | os.PathLike[str]) -> dict[str, dict]:
    """Per stage, in the order in which they were first finished: worker-seconds and shards.

    The times are of the run in which each shard was made; they belong to no fingerprint.
    """
    found: dict[str, dict] = {}
    order: dict[str, float] = {}
    root = os.path.abspath(workdir)
    stages = sorted(name for name in os.listdir(root) if os.path.isdir(os.path.join(root, name)))
    for path in (p for s in stages for p in _notes(epath.Path(root, s))):
        stage = path.parent.name
        shard = path.name.removeprefix(".").removesuffix(_NOTE)
        if read(path.parent.parent, stage, shard) is None:
            continue
        total = found.setdefault(stage, {"seconds": 0.0, "shards": 0})
        total["seconds"] += (read_json(path) or {}).get("seconds", 0.0)
        total["shards"] += 1
        made = os.path.getmtime(path.parent / f"{shard}.json")
        order[stage] = min(made, order.get(stage, made))
    return {
        stage: {**found[stage], "seconds": round(found[stage]["seconds"], 3)}
        for stage in sorted(found, key=order.__getitem__)
    }


def remove_strays(workdir: epath.Path, stage: str, names: set[str]) -> None:
    """Removes the shards of a stage that are not among `names`, with their outputs."""
    for name in sorted(os.listdir(workdir / stage)):
        path = workdir / stage / name
        if path.suffix != ".json" or name.startswith(".") or path.stem in names:
            continue
        manifest = read_json(path)
        if manifest is None or manifest.get("stage") != stage:
            continue
        logging.info("%s: removing shard %s, which has no input any more", stage, path.stem)
        remove(workdir, stage, path.stem)


def remove(workdir: epath.Path, stage: str, shard: str) -> None:
    """Removes a shard: its manifest, then all its outputs."""
    manifest = read(workdir, stage, shard)
    # First: without a manifest the outputs are nobody's.
    (workdir / stage / f"{shard}.json").unlink(missing_ok=True)
    _note_path(workdir, stage, shard).unlink(missing_ok=True)
    for entry in (manifest or {}).get("outputs", []):
        (workdir / entry["path"]).unlink(missing_ok=True)


def read_json(path: epath.Path) -> dict | None:
    """The content of a JSON file, None where there is none or it was cut short by a kill."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _notes(folder: epath.Path) -> list[epath.Path]:
    return [folder / n for n in sorted(os.listdir(folder)) if n[0] == "." and n.endswith(_NOTE)]


def _note_path(workdir: epath.Path, stage: str, shard: str) -> epath.Path:
    return workdir / stage / f".{shard}{_NOTE}"


def _note(workdir: epath.Path, stage: str, shard: str) -> dict:
    return read_json(_note_path(workdir, stage, shard)) or {}


def _stat(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def _hash(path: str | os.PathLike[str]) -> str | None:
    """The sha256 of a file, not read again while size and time are as known; None: no file."""
    absolute = os.path.abspath(path)
    status = _stat(absolute)
    if status is None:
        return None
    known = _known.get(absolute)
    if known is None or known[:2] != status:
        known = _known[absolute] = (*status, sha256(absolute))
    return known[2]


def _record_path(workdir: epath.Path, path: str | os.PathLike[str]) -> str:
    absolute, root = os.path.abspath(path), os.path.abspath(workdir)
    return os.path.relpath(absolute, root) if absolute.startswith(root + os.sep) else absolute
