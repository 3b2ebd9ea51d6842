"""Makes evaluation sets out of the downloads of public ones.

    mofi eval-sets list
    mofi eval-sets cub --source CUB_200_2011.tgz --out sets/cub

``list`` says of each set where it is to be had, its size and licence; nothing is downloaded.
SOURCE is what was downloaded, an archive or a folder of files and archives.
The folder OUT, which must be new, receives

    images.tar      the pictures, or the index, named {class}_{name}, with class 0 for none
    classes.jsonl   what class numbers stand for
    queries.tar, queries.jsonl, text_queries.jsonl
                    queries apart from the index (`evaluators.query_index`)
    captions.jsonl  texts of the pictures (`evaluators.image_text`)
    result.json     counts, fingerprints, source and licence; pictures that cannot be decoded, by
                    name: they stay in the set
"""

import dataclasses
import hashlib
import io
import itertools
import json
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from concurrent import futures
from typing import Any

import tqdm
from absl import logging
from etils import epath

from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.evaluators.sets import catalogue
from mofi_jax.evaluators.sets import pictures as picture_sets
from mofi_jax.evaluators.sets.downloads import adapters, archives

_CHUNK = 64  # pictures in memory


def main(*name: str, source: str = "", out: str = "") -> None:
    """Makes the evaluation set `name`, or lists those that there are.

    Args:
      name: of the set, or list for those that there are.
      source: what was downloaded: an archive, or a folder of files and archives.
      out: the folder of the set, which must not exist.
    """
    if name == ("list",):
        print(listed(), flush=True)
        return
    if len(name) != 1 or name[0] not in adapters.ADAPTERS:
        raise BadInput(
            f"{' '.join(name)} is no set that can be read: choose one of "
            f"{', '.join(adapters.ADAPTERS)}, or `list`."
        )
    origin = catalogue.ORIGINS[name[0]]
    if not source or not out:
        raise BadInput(f"--source and --out are needed; the set is {origin}.")
    target = files.output_folder(out, "--out")
    if target.exists():
        raise BadInput(f"--out={out} is there already: name a new folder, or remove it.")
    path = files.local_input(source, "the download")
    if not path.exists():
        raise BadInput(f"There is no --source={source}; {origin}: download it first.")
    download = archives.Download(path)
    made = read(name[0], download)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        folder = epath.Path(scratch) / "set"
        folder.mkdir()
        result = {**write(made, download, folder), **dataclasses.asdict(origin), "name": name[0]}
        result["published"] = {key: result.pop(key) for key in ("pictures", "queries")}
        files.write_json(folder / "result.json", result)
        folder.rename(target)
    for key, count in result["published"].items():
        if count and result["counts"][key] != count:
            logging.warning("%s has %d %s, not %d", out, result["counts"][key], key, count)
    if result["broken"]:
        logging.warning("cannot be decoded: %s", ", ".join(result["broken"][:10]))
    logging.info("written: %s, %s", target, result["counts"])


def listed() -> str:
    """The sets for people, a paragraph each."""
    return "\n".join(f"{name:<15} {origin}" for name, origin in catalogue.ORIGINS.items())


def read(name: str, download: archives.Download) -> adapters.Made:
    """What a download holds of the set `name`; BadInput where it is not laid out as published."""
    try:
        made = adapters.ADAPTERS[name](download)
    except BadInput:
        raise
    except Exception as error:  # whatever a stranger's table leads to
        adapter = adapters.ADAPTERS[name]
        raise BadInput(
            f"The ground truth in {download.path} is not laid out as published ({error!r}), which "
            f"is {' '.join(adapter.__doc__.split())} Fetch it again."
        ) from error
    if not made.pictures:
        raise BadInput(
            f"{download.path} holds no pictures of {name}, which is "
            f"{' '.join(adapters.ADAPTERS[name].__doc__.split())} Name the folder that does."
        )
    return made


def write(made: adapters.Made, download: archives.Download, folder: epath.Path) -> dict[str, Any]:
    """Writes the files of a set; returns counts, fingerprints, and what cannot be decoded."""
    broken = write_tar(folder / "images.tar", made.pictures, download)
    fingerprints = {"images.tar": picture_sets.read_set(folder / "images.tar").sha256()}
    if made.query_pictures:
        broken += write_tar(folder / "queries.tar", made.query_pictures, download)
        fingerprints["queries.tar"] = picture_sets.read_set(folder / "queries.tar").sha256()
    classes = [
        {"class": number, "label": label, **({"id": identity} if identity else {})}
        for number, (label, identity) in sorted(made.classes.items())
    ]
    tables = {"classes": classes, "captions": made.captions}
    tables |= {"queries": made.queries, "text_queries": made.text_queries}
    for name, rows in tables.items():
        if rows:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            files.write_text(folder / f"{name}.jsonl", text)
            fingerprints[f"{name}.jsonl"] = hashlib.sha256(text.encode()).hexdigest()
    counts = {
        "pictures": len(made.pictures),
        "classes": len({name.partition("_")[0] for name in made.pictures}),
        "queries": len(made.queries),
        "text_queries": len(made.text_queries),
        "captions": sum(len(row["captions"]) for row in made.captions),
    }
    return {"counts": counts, "sha256": fingerprints, "broken": sorted(broken)}


def write_tar(
    path: epath.Path, pictures: Mapping[str, str | bytes], download: archives.Download
) -> list[str]:
    """Writes pictures under their new names; returns those that cannot be decoded, written too."""
    broken = []

    def is_broken(picture: tuple[str, bytes]) -> bool:
        try:
            ops.decode_rgb(picture[1])
        except ops.UndecodableImage:
            return True
        return False

    contents = _contents(pictures, download)
    bar = tqdm.tqdm(total=len(pictures), desc=path.name, unit="img", leave=False, delay=2)
    with tarfile.open(path, "w") as tar, futures.ThreadPoolExecutor() as pool, bar:
        while chunk := list(itertools.islice(contents, _CHUNK)):
            for (name, data), bad in zip(chunk, pool.map(is_broken, chunk), strict=True):
                member = tarfile.TarInfo(name)  # of no time and no owner: the same bytes each time
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                broken += [name] * bad
            bar.update(len(chunk))
    return broken


def _contents(
    pictures: Mapping[str, str | bytes], download: archives.Download
) -> Iterator[tuple[str, bytes]]:
    new_names: dict[str, list[str]] = {}
    for new, old in pictures.items():
        if isinstance(old, bytes):
            yield new, old
        else:
            new_names.setdefault(old, []).append(new)
    for old, data in download.read(new_names):
        yield from ((new, data) for new in new_names[old])


if __name__ == "__main__":
    cli.run(main)
