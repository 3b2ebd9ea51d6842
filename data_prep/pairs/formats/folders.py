"""Folders of pictures with captions beside them: img2dataset's format `files`, and anybody's.

A folder is read as the tar that would hold its files (`formats.tars`). Links are followed only to
where the folder itself was downloaded to: one from elsewhere shall not pick files it was not given.
"""

import hashlib
import os
import re
from collections.abc import Collection

from data_prep.pairs import samples
from mofi_jax.data.pictures import tree
from mofi_jax.data.pictures.tar_headers import Listing, Member

PICTURE_SUFFIXES = tuple(suffix.removeprefix(".") for suffix in tree.PICTURES)


def split(name: str) -> tuple[str, str]:
    """("folder/000001", "jpg") from "folder/000001.JPG"."""
    folder, base = os.path.split(name)
    stem, _, suffix = base.rpartition(".")
    return os.path.join(folder, stem or base), suffix.lower() if stem else ""


def is_shard(path: str) -> bool:
    """Whether a path is a folder that img2dataset wrote."""
    return os.path.isdir(path) and os.path.isfile(f"{os.path.abspath(path)}_stats.json")


def has_pairs(names: Collection[str]) -> bool:
    """Whether among the names in a folder is a picture with something said of it beside it."""
    parts = {split(name) for name in names}
    return any(
        suffix in PICTURE_SUFFIXES and not parts.isdisjoint({(key, "txt"), (key, "json")})
        for key, suffix in parts
    )


def fingerprint(path: str) -> str:
    """A hash of the names in a folder. What a file of a name holds is taken for granted."""
    names = b"\0".join(sorted(os.listdir(os.fsencode(path))))
    return hashlib.md5(names).hexdigest()


def list_files(path: str) -> Listing:
    """The files of a folder as members of a tar; folders in it are none of its own."""
    # In the hub's cache a folder snapshots/REVISION/ holds links to files in blobs/.
    above = re.match(r"(.*/)snapshots/[0-9a-f]{40}(/|$)", path)
    blobs = os.path.join(os.path.realpath(above[1]), "blobs", "") if above else None
    members = []
    for name in sorted(os.listdir(path)):
        at = os.path.join(path, name)
        if tree.is_hidden(name) or os.path.isdir(at):
            continue
        is_given = not os.path.islink(at) or (blobs and os.path.realpath(at).startswith(blobs))
        is_file = is_given and os.path.isfile(at) and samples.encodable(at) == at
        length = os.path.getsize(at) if is_file else 0
        members.append(Member(name, 0, length, None if is_file else "not_a_file"))
    return Listing(members, [], True)
