"""Packs pictures in a folder for each class, so that they become training data.

    mofi class-folders --pictures PICTURES --out PAIRS
    mofi labels --config i2e:classes=PAIRS --workdir W

PICTURES/CLASS/**/*.jpg (png, webp, gif) are of the entity `class:CLASS`, by whose name, CLASS
without underscores, their captions go.  PICTURES may also be parquet or Arrow with a column of
labels, as Hugging Face has them, a tar, or `tfds:NAME:SPLIT`.  Of train/ and val/ or test/ the
first is taken; PICTURES/val names another.  PAIRS gets tars of pairs as img2dataset writes them, in
the order of the files' names, and the knowledge base of the classes, `classes.jsonl`; more may be
said there of a class (`description`, `aliases`) before the second command.  The pictures' bytes
stay as they are; those that cannot be read are rejected, with a reason, by the second command.
"""

import functools
import io
import json
import os
import tarfile
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput
from mofi_jax.data.pictures import tree
from mofi_jax.evaluators.sets import folders, parquets, tables
from mofi_jax.evaluators.sets import pictures as picture_sets
from mofi_jax.interop import from_hub

CLASSES_FILE = "classes.jsonl"
CLASS = "class"  # of a pair's JSON: the id of its class


def main(pictures: str, out: str, per_tar: str = "1000") -> None:
    """The command: writes PAIRS; does nothing where it is there already.

    Args:
      pictures: a folder of folders, or rows with labels (`evaluators.sets.pictures.read_set`).
      out: the new folder.
      per_tar: pictures of a tar, which is read by one process.

    Raises:
      BadInput: no folder of classes with pictures in them, or an `out` that holds something else.
    """
    target = files.replaced_folder(out, "--out")
    size = cli.whole("--per_tar", per_tar, 1)
    if (target / "result.json").exists():
        logging.info("%s is there already", target)
        return
    if target.exists() and any(target.iterdir()):
        raise BadInput(f"--out={out} is not empty: name a new folder.")
    found = _pictures(pictures)
    names = sorted({picture.label for picture in found})
    if not names:
        raise BadInput(
            f"--pictures={pictures} holds no pictures in folders ({', '.join(tree.PICTURES)}): "
            "name a folder that holds one for each class."
        )
    # Under another name until it is complete.
    part = target.parent / f"{target.name}.partial"
    if part.exists():
        part.rmtree()
    part.mkdir(parents=True)
    for number, start in enumerate(range(0, len(found), size)):
        with tarfile.open(part / f"{number:05d}.tar", "w") as tar:
            for index, picture in enumerate(found[start : start + size], start):
                _add(tar, f"{index:08d}", picture)
    lines = ({"id": identity(name), "label": label(name)} for name in names)
    files.write_text(part / CLASSES_FILE, "".join(f"{json.dumps(line)}\n" for line in lines))
    result: dict[str, Any] = {"classes": len(names), "pictures": len(found)}
    if fetched := from_hub.revisions():
        result["revisions"] = fetched
    files.write_json(part / "result.json", result)
    if target.exists():
        target.rmdir()  # it is empty
    part.rename(target)
    logging.info("%s: %d pictures of %d classes", target, len(found), len(names))


def identity(name: str) -> str:
    """The entity's id: the same for a class in whatever set of them."""
    return f"class:{urllib.parse.quote(name, safe='')}"


def label(name: str) -> str:
    return name.replace("_", " ").strip() or name


class _Picture(NamedTuple):
    label: str
    where: str  # for people
    read: Callable[[], bytes]


def _pictures(path: str) -> list[_Picture]:
    """What there is to learn from, in the order of names or of rows."""
    path = from_hub.data(path)
    folder = files.local_input(path, "the pictures")
    if folder.is_dir() and not parquets.files_of(folder, tree.TO_LEARN)[1]:
        folder = folders.of_split(folder, tree.TO_LEARN)
        if not tables.find(folder):
            return list(_in_folders(os.fspath(folder)))
    found = picture_sets.read_set(path, tree.TO_LEARN)
    return [
        _Picture(found.labels.get(number, str(number)), name, functools.partial(found.read, i))
        for i, (number, name) in enumerate(zip(found.classes.tolist(), found.names, strict=True))
    ]


def _in_folders(folder: str) -> Iterator[_Picture]:
    for name in tree.walk(folder):
        label, inside, _ = name.partition("/")
        if inside and name.lower().endswith(tree.PICTURES):
            try:
                label.encode()
            except UnicodeEncodeError:
                raise BadInput(
                    f"--pictures: the name of {label!r} in {folder} is not UTF-8: rename it."
                ) from None
            yield _Picture(label, name, epath.Path(folder, name).read_bytes)


def _add(tar: tarfile.TarFile, key: str, picture: _Picture) -> None:
    """The three files of a pair."""
    data, where = picture.read(), picture.where.encode("utf-8", "replace").decode()
    about = {CLASS: identity(picture.label), "file": where}
    suffix = os.path.splitext(where)[1].lower()
    if suffix not in tree.PICTURES:  # a row; whatever it is called, readers look at the bytes
        suffix = ".jpg"
    name = picture.label
    contents = {suffix: data, ".txt": label(name).encode(), ".json": json.dumps(about).encode()}
    for kind, content in contents.items():
        member = tarfile.TarInfo(f"{key}{kind}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    cli.run(main)
