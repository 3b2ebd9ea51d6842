"""Packs pictures in a folder for each class, so that they become training data.

    mofi class-folders --pictures PICTURES --out PAIRS
    mofi labels --config i2e:classes=PAIRS --workdir W

PICTURES/CLASS/**/*.jpg (png, webp, gif) are of the entity `class:CLASS`, by whose name, CLASS
without underscores, their captions go.  PAIRS gets tars of pairs as img2dataset writes them, in the
order of the files' names, and the knowledge base of the classes, `classes.jsonl`; more may be said
there of a class (`description`, `aliases`) before the second command.  The pictures' bytes stay as
they are; those that cannot be read are rejected, with a reason, by the second command.
"""

import io
import json
import os
import tarfile
import urllib.parse
from collections.abc import Iterator

from absl import logging
from etils import epath

from data_prep.pairs.formats import tars
from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput

CLASSES_FILE = "classes.jsonl"
CLASS = "class"  # of a pair's JSON: the id of its class


def main(pictures: str, out: str, per_tar: str = "1000") -> None:
    """The command: writes PAIRS; does nothing where it is there already.

    Args:
      pictures: a folder of folders.
      out: the new folder.
      per_tar: pictures of a tar, which is read by one process.

    Raises:
      BadInput: no folder of classes with pictures in them, or an `out` that holds something else.
    """
    folder, target = files.input_folder(pictures, "--pictures"), files.replaced_folder(out, "--out")
    if not per_tar.isdecimal() or not int(per_tar):
        raise BadInput(f"--per_tar={per_tar} is not a whole number above 0.")
    if (target / "result.json").exists():
        logging.info("%s is there already", target)
        return
    if target.exists() and any(target.iterdir()):
        raise BadInput(f"--out={out} is not empty: name a new folder.")
    if not folder.is_dir():
        raise BadInput(f"--pictures={pictures} is no folder: name one with a folder a class.")
    found = list(_pictures(os.fspath(folder)))
    names = sorted({name for name, _ in found})
    if not names:
        raise BadInput(
            f"--pictures={pictures} holds no pictures in folders (.{', .'.join(SUFFIXES)}): name a "
            "folder that holds one for each class."
        )
    # Under another name until it is complete.
    part = target.parent / f"{target.name}.partial"
    if part.exists():
        part.rmtree()
    part.mkdir(parents=True)
    for number, start in enumerate(range(0, len(found), int(per_tar))):
        with tarfile.open(part / f"{number:05d}.tar", "w") as tar:
            for index, (name, path) in enumerate(found[start : start + int(per_tar)], start):
                _add(tar, f"{index:08d}", name, path, os.path.relpath(path, folder))
    lines = ({"id": identity(name), "label": label(name)} for name in names)
    files.write_text(part / CLASSES_FILE, "".join(f"{json.dumps(line)}\n" for line in lines))
    result = {"classes": len(names), "pictures": len(found)}
    files.write_json(part / "result.json", result)
    if target.exists():
        target.rmdir()  # it is empty
    part.rename(target)
    logging.info("%s: %d pictures of %d classes", target, len(found), len(names))


SUFFIXES = tars.PICTURE_SUFFIXES


def identity(name: str) -> str:
    """The entity's id: the same for a class in whatever set of them."""
    return f"class:{urllib.parse.quote(name, safe='')}"


def label(name: str) -> str:
    return name.replace("_", " ").strip() or name


def _pictures(folder: str) -> Iterator[tuple[str, str]]:
    """(class, path) of each picture, in the order of their names."""
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name.startswith(".") or not os.path.isdir(path):
            continue
        try:
            name.encode()
        except UnicodeEncodeError:
            raise BadInput(f"--pictures: the name of {path!r} is not UTF-8: rename it.") from None
        for inside, folders, members in os.walk(path):
            folders.sort()
            for member in sorted(members):
                suffix = member.rpartition(".")[2].lower()
                if suffix in SUFFIXES and not member.startswith("."):
                    yield name, os.path.join(inside, member)


def _add(tar: tarfile.TarFile, key: str, name: str, path: str, where: str) -> None:
    """The three files of a pair."""
    data = epath.Path(path).read_bytes()
    about = {CLASS: identity(name), "file": where.encode("utf-8", "replace").decode()}
    suffix = path.rpartition(".")[2].lower()
    contents = {suffix: data, "txt": label(name).encode(), "json": json.dumps(about).encode()}
    for kind, content in contents.items():
        member = tarfile.TarInfo(f"{key}.{kind}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    cli.run(main)
