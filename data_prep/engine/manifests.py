"""Manifests: what a finished shard was made from, and whether it still is.

`W/STAGE/manifests.jsonl` has a line for each finished shard: the sha256 of all inputs and outputs,
the settings and the counts. The process that hands out the work adds to it as shards are made, and
leaves it sorted. Beside it lies `.times.json` with sizes, modification times and the seconds that
each shard took: while sizes and times are unchanged nothing is hashed again, so that a finished
stage run again costs a few stat calls. A shard whose files were touched or copied is hashed and,
where the bytes are the same, kept.

A work directory may come from a stranger: what is no manifest is passed over, and so is one whose
outputs lie elsewhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
import typing
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence

from absl import logging
from etils import epath

from mofi_jax.common import errors

# A file as last seen: size in bytes, modification time in ns, sha256 in hex.
Seen = tuple[int, int, str]

MANIFESTS = "manifests.jsonl"
_TIMES = ".times.json"

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
    sync(path.parent)


def sync(path: epath.Path) -> None:
    """Brings a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
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


def read(workdir: str | os.PathLike[str], stage: str) -> list[dict]:
    """The manifests of a stage, by shard; none where it never ran."""
    path = epath.Path(workdir) / stage / MANIFESTS
    found: dict[str, dict] = {}
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                manifest = _parse(line)
                if _is_manifest(manifest, stage):
                    found[manifest["shard"]] = manifest
                elif isinstance(manifest, dict) and isinstance(manifest.get("removed"), str):
                    found.pop(manifest["removed"], None)
                else:  # the end of a line that a kill cut short, or nothing of ours
                    logging.warning("%s: a line is no manifest of %s", path, stage)
    return [found[shard] for shard in sorted(found)]


def _parse(text: str) -> typing.Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_manifest(found: typing.Any, stage: str) -> bool:
    def is_entry(entry: typing.Any) -> bool:
        types = {"path": str, "bytes": int, "sha256": str}
        return isinstance(entry, dict) and all(
            isinstance(entry.get(name), kind) for name, kind in types.items()
        )

    def is_inside(path: str) -> bool:
        return os.path.normpath(path) == path and path.split(os.sep)[0] not in ("", "..", ".")

    types = {"shard": str, "settings": dict, "inputs": list, "outputs": list, "counts": dict}
    return (
        isinstance(found, dict)
        and found.get("stage") == stage
        and all(isinstance(found.get(name), kind) for name, kind in types.items())
        and all(map(is_entry, (*found["inputs"], *found["outputs"])))
        and all(is_inside(entry["path"]) for entry in found["outputs"])
        and all(type(count) is int for count in found["counts"].values())
    )


def unchanged(
    workdir: epath.Path,
    manifest: dict | None,
    inputs: Sequence[str],
    settings: dict,
    times: Mapping[str, Sequence[int]],
    hash_changed: bool,
) -> bool:
    """Whether a manifest's inputs, settings and outputs are what they were.

    Args:
      workdir: the work directory.
      manifest: None: there is none.
      inputs, settings: those of now.
      times: size and modification time of files by name, for which the manifest's hashes hold.
      hash_changed: read a file of the same size but another time to find out; else it counts as
        changed, so that workers do the reading.
    """
    if manifest is None or manifest["settings"] != settings:
        return False
    if [entry["path"] for entry in manifest["inputs"]] != [
        _record_path(workdir, path) for path in inputs
    ]:
        return False
    for entry in (*manifest["inputs"], *manifest["outputs"]):
        path = os.path.abspath(workdir / entry["path"])
        status = _stat(path)
        if status is None or status[0] != entry["bytes"]:
            return False
        if times.get(entry["path"]) == list(status):
            _known[path] = (*status, entry["sha256"])
        known = _known.get(path)
        if (known is None or known[:2] != status) and not hash_changed:
            return False
        if _hash(path) != entry["sha256"]:
            return False
    return True


def outdated(workdir: str | os.PathLike[str], stage: str) -> list[str]:
    """The inputs of a stage's shards, as they are called, that have changed since or are gone.

    They have where a later run with another configuration has not come as far as this stage.
    """
    root, found = epath.Path(os.path.abspath(workdir)), set()
    ledger = Ledger(root, stage)
    for shard, manifest in ledger._manifests.items():
        times = ledger.times(shard)
        for entry in manifest["inputs"]:
            status = _stat(root / entry["path"])
            if status and times.get(entry["path"]) == list(status):
                continue
            if _hash(root / entry["path"]) != entry["sha256"]:
                found.add(entry["path"])
    return sorted(found)


class Ledger:
    """The manifests of a stage, for the one process that holds its folder (`locked`)."""

    def __init__(self, workdir: epath.Path, stage: str):
        self._workdir, self._folder = workdir, workdir / stage
        self._stage = stage
        self._manifests = {manifest["shard"]: manifest for manifest in read(workdir, stage)}
        self._owner = {
            entry["path"]: shard
            for shard, manifest in self._manifests.items()
            for entry in manifest["outputs"]
        }
        self._notes = _read_notes(self._folder)

    def __enter__(self) -> Ledger:
        self._tidy()  # a line that a kill cut short would take the next one with it
        return self

    def __exit__(self, kind, *error) -> None:
        try:
            self._tidy()
        except OSError:
            if kind is None:  # else there is an earlier reason to tell
                raise

    def _tidy(self) -> None:
        """Leaves both files sorted, the same whatever order the shards were made in."""
        for shard in {*self._notes} - {*self._manifests}:
            del self._notes[shard]
        lines = [_line(self._manifests[shard]) for shard in sorted(self._manifests)]
        path, data = self._folder / MANIFESTS, "".join(lines).encode()
        if not path.exists() or path.read_bytes() != data:
            write_durably(path, data)
        notes = json.dumps(self._notes, sort_keys=True)
        if self._notes != _read_notes(self._folder):
            (self._folder / _TIMES).write_text(notes)

    def get(self, shard: str) -> dict | None:
        return self._manifests.get(shard)

    def times(self, shard: str) -> dict[str, list[int]]:
        """Size and modification time, by name, of a shard's files when its hashes were known."""
        note = self._notes.get(shard, {})
        # After a kill they may be of the files of an earlier manifest.
        return note.get("files", {}) if note.get("of") == self._checksum(shard) else {}

    def _checksum(self, shard: str) -> int:
        return zlib.crc32(_line(self._manifests.get(shard)).encode())

    def add(self, manifest: dict, seconds: float, folder: str | os.PathLike[str]) -> None:
        """Writes a shard's manifest and gives its outputs, which lie in `folder`, their names.

        In this order: after a kill between the two the outputs are not what the manifest says, and
        the shard is made again; the other way round files would be there that no manifest names.
        """
        shard = manifest["shard"]
        paths = {entry["path"] for entry in manifest["outputs"]}
        # What had one of these names is made again too: it cannot own the name any more.
        for other in {self._owner[path] for path in paths & {*self._owner}} - {shard}:
            self.remove(other)
        self._unlink(shard, keep=paths)
        self._manifests[shard] = manifest
        self._owner |= dict.fromkeys(paths, shard)
        self._append(manifest)
        for path in manifest["outputs"]:
            final = self._workdir / path["path"]
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(os.path.join(folder, path["path"]), final)
        for parent in {os.path.dirname(path) for path in paths}:
            sync(self._workdir / parent)
        self._notes[shard] = {"seconds": round(seconds, 3), "made": time.time()}

    def remember(self, shard: str) -> None:
        """Notes sizes and times of files whose hashes were just verified."""
        manifest, stats = self._manifests[shard], {}
        for entry in (*manifest["inputs"], *manifest["outputs"]):
            path = os.path.abspath(self._workdir / entry["path"])
            status = _stat(path)
            if status is not None:
                stats[entry["path"]] = list(status)
                _known[path] = (*status, entry["sha256"])
        self._notes.setdefault(shard, {}).update(files=stats, of=self._checksum(shard))

    def remove(self, shard: str) -> None:
        """Removes a shard: all its outputs, then its manifest, or nobody would know of them."""
        if shard in self._manifests:
            self._unlink(shard)
            del self._manifests[shard]
            self._append({"removed": shard})

    def _unlink(self, shard: str, keep: Collection[str] = ()) -> None:
        for entry in self._manifests.get(shard, {}).get("outputs", []):
            path = entry["path"]
            if path not in keep and self._owner.get(path) == shard:
                (self._workdir / path).unlink(missing_ok=True)
                del self._owner[path]

    def remove_others(self, names: set[str]) -> None:
        """Removes the shards that are not among `names`, with their outputs."""
        for shard in sorted({*self._manifests} - names):
            logging.info("%s: removing shard %s, which has no input any more", self._stage, shard)
            self.remove(shard)

    def _append(self, entry: dict) -> None:
        with open(self._folder / MANIFESTS, "a", encoding="utf-8") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())


def _line(entry: dict | None) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _read_notes(folder: epath.Path) -> dict[str, dict]:
    """Of each shard {"files": {name: [bytes, ns]}, "of": of which manifest, "seconds", "made"}."""
    types = {"files": dict, "of": int, "seconds": int | float, "made": int | float}
    return {
        shard: note
        for shard, note in (read_json(folder / _TIMES) or {}).items()
        if isinstance(note, dict)
        and all(name in types and isinstance(value, types[name]) for name, value in note.items())
    }


def stage_seconds(workdir: str | os.PathLike[str]) -> dict[str, dict]:
    """Per stage, in the order in which they were first finished: worker-seconds and shards.

    The times are of the run in which each shard was made; they belong to no fingerprint. What is a
    link was made elsewhere.
    """
    found: list[tuple[float, str, dict]] = []
    for stage in sorted(os.listdir(workdir)):
        folder = epath.Path(workdir) / stage
        notes = {} if os.path.islink(folder) else _read_notes(folder)
        if notes:
            seconds = sum(note.get("seconds", 0.0) for note in notes.values())
            made = min(note.get("made", 0.0) for note in notes.values())
            found.append((made, stage, {"seconds": round(seconds, 3), "shards": len(notes)}))
    return {stage: spent for _, stage, spent in sorted(found, key=lambda entry: entry[:2])}


def read_json(path: epath.Path) -> dict | None:
    """The content of a JSON file, None where there is none or it was cut short by a kill."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


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
