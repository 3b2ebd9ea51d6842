"""What evaluators share: picture sets, class names, embeddings, and how to run them all.

An evaluator is a file of this folder with a class ``Evaluator(towers, **cfg)``:

* ``run(params)`` yields (name, value) pairs;
* ``card()`` returns the protocol card, the facts without which its numbers mean nothing;
* ``needs`` names the attributes of `mofi_jax.inference.Towers` that must not be None.

`build` finds it by the file's name.  This file knows nothing of metrics.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import tqdm
from etils import epath
from jaxtyping import Float, Int

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops

# Files that are no evaluators.
_SHARED = ("common", "neighbours")
_PICTURE = re.compile(r"(\d+)_.+\.(jpe?g|png|webp)", re.IGNORECASE)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# How files begin that a picture set comes in and is not read from.
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_DECODE_THREADS = 8
_CHUNK = 1024  # pictures decoded ahead of the devices: 150 MB at 224 pixels


@runtime_checkable
class Evaluator(Protocol):
    """What `build` returns; `needs` are attributes of the towers that must not be None."""

    needs: tuple[str, ...]

    def run(self, params: Any) -> Iterator[tuple[str, float]]: ...

    def card(self) -> dict[str, Any]: ...


# ----------------------------------------------------------------------------------- picture sets


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """Pictures named ``{class}_{name}.jpg`` in a folder or an uncompressed tar; use `read_set`.

    Attributes:
      path: folder or tar.
      names: file names, ordered by (class number, name).
      classes: int64 [n], the number before the first underscore.
      spans: per picture, offset and length in the tar; empty for a folder.
    """

    path: epath.Path
    names: tuple[str, ...]
    classes: Int[np.ndarray, " n"]
    spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        """The file of picture i; safe to call from several threads."""
        if not self.spans:
            return (self.path / self.names[i]).read_bytes()
        offset, length = self.spans[i]
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def sha256(self) -> str:
        """Hash of names and contents, the same for a folder and for a tar of the same pictures."""
        total = hashlib.sha256()
        with futures.ThreadPoolExecutor(_DECODE_THREADS) as pool:
            digests = pool.map(lambda i: hashlib.sha256(self.read(i)).hexdigest(), range(len(self)))
            for name, digest in zip(self.names, digests, strict=True):
                total.update(f"{digest}  {name}\n".encode())
        return total.hexdigest()


def read_set(path: epath.PathLike) -> PictureSet:
    """Lists a picture set in GPR1200 naming: a folder, or a tar whose folders are ignored.

    GPR1200 leaves the order within a class to the directory listing; here it is by (int, name), so
    that numbers and neighbours repeat.  Files that are no pictures are passed over.

    Raises:
      BadInput: missing or unreadable path, no pictures, or a picture named otherwise.
    """
    path = files.local_input(path, "the picture set")
    if path.is_dir():
        found = {p.name: None for p in path.iterdir() if _is_picture(p.name)}
    elif path.exists():
        found = _tar_spans(path)
    else:
        raise BadInput(
            f"There is no picture set at {path}: give a folder or a .tar of {{class}}_{{name}}.jpg."
        )
    if not found:
        raise BadInput(
            f"{path} holds no pictures of its own: give a folder or .tar with the files of all "
            "classes in it, each named {class number}_{name}.jpg."
        )
    matches = {name: _PICTURE.fullmatch(name) for name in found}
    wrong = sorted(name for name, match in matches.items() if not match)
    if wrong:
        raise BadInput(
            f"{wrong[0]} in {path} is not named {{class number}}_{{name}}.jpg: rename it or take "
            f"it out ({len(wrong)} such files)."
        )
    numbers = {name: int(match[1]) for name, match in matches.items()}
    names = sorted(found, key=lambda name: (numbers[name], name))
    return PictureSet(
        path=path,
        names=tuple(names),
        classes=np.array([numbers[name] for name in names], np.int64),
        spans=() if path.is_dir() else tuple(found[name] for name in names),
    )


def _is_picture(name: str) -> bool:
    # macOS leaves resource forks named ._picture.jpg in the tars it makes.
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


def _tar_spans(path: epath.Path) -> dict[str, tuple[int, int]]:
    spans: dict[str, tuple[int, int]] = {}
    with path.open("rb") as file:
        start = file.read(8)
    if packed := next((kind for mark, kind in _PACKED.items() if start.startswith(mark)), None):
        raise BadInput(
            f"{path} is packed by {packed}, so that no picture in it can be found by its place: "
            "unpack it and give the folder."
        )
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if not member.isfile() or not _is_picture(name):
                    continue
                if name in spans:
                    raise BadInput(f"{path} holds {name} twice: each picture needs its own name.")
                spans[name] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise BadInput(
            f"{path} cannot be read as a .tar ({error}): fetch it again, or unpack it and give the "
            "folder."
        ) from None
    return spans


# ----------------------------------------------------------------------------------- class tables


@dataclasses.dataclass(frozen=True)
class Class:
    """What the number of a class stands for; `qid` is empty where no knowledge base is named."""

    qid: str
    label: str


def read_classes(path: epath.PathLike) -> dict[int, Class]:
    """Reads which thing each class number of a picture set is.

    Two formats: JSON lines with ``class`` (number), ``label`` (text) and ``id`` (qid, optional),
    other keys being ignored; or, in a file named ``.json``, one object {"number": "label"} as
    GPR1200 publishes it (GPR1200_categoryNumber_to_text.json).

    Raises:
      BadInput: missing file, or a line that is not as described.
    """
    path = files.local_input(path, "the class table")
    if not path.exists():
        raise BadInput(f"There is no class table at {path}: correct `classes` or leave it out.")
    classes: dict[int, Class] = {}
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            rows = ({"class": number, "label": label} for number, label in json.loads(text).items())
        else:
            rows = (json.loads(line) for line in text.splitlines() if line.strip())
        for row in rows:
            classes[int(row["class"])] = Class(str(row.get("id", "")), str(row["label"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"Entry {len(classes) + 1} of the class table {path} cannot be read ({error!r}): write "
            'lines such as {"class": 0, "label": "airplane", "id": "Q197"}.'
        ) from None
    return classes


def require_classes(pictures: PictureSet, classes: Mapping[int, Class], path: Any) -> None:
    """Raises BadInput when a class of the picture set is not in the table read from `path`."""
    missing = sorted(set(pictures.classes.tolist()) - set(classes))
    if missing:
        raise BadInput(
            f"Class {missing[0]} of {pictures.path} is not in the class table {path} "
            f"({len(missing)} missing): add it or give the table that belongs to the pictures."
        )


# -------------------------------------------------------------------------------------- embedding


def embed_pictures(towers: Any, params: Any, pictures: PictureSet) -> Float[np.ndarray, "n d"]:
    """Embeds a picture set; the result is float32, in the set's order, the same on every host.

    Threads decode one chunk ahead of the devices.  Every host reads all pictures and runs the same
    number of batches, so that no collective waits for a host that has finished; `Towers` pads the
    last batch and drops the padding again.

    Raises:
      BadInput: a picture that cannot be decoded.  None is left out, or the metric would be another.
    """

    def decode(i: int) -> np.ndarray:
        try:
            return towers.decode(pictures.read(i))
        except ops.UndecodableImage as error:
            raise BadInput(
                f"{pictures.names[i]} in {pictures.path} cannot be decoded ({error.reason}): fetch "
                "the picture set again, for scores are comparable on the whole of it only."
            ) from None

    features = []
    bar = tqdm.tqdm(
        total=len(pictures),
        desc=f"embed {pictures.path.name}",
        unit="img",
        leave=False,
        delay=2,
        disable=None if jax.process_index() == 0 else True,  # None: shown on terminals only
    )
    with futures.ThreadPoolExecutor(_DECODE_THREADS) as pool, bar:
        jobs = [pool.submit(decode, i) for i in range(min(_CHUNK, len(pictures)))]
        for start in range(0, len(pictures), _CHUNK):
            images = np.stack([job.result() for job in jobs])
            following = range(start + _CHUNK, min(start + 2 * _CHUNK, len(pictures)))
            jobs = [pool.submit(decode, i) for i in following]
            features.append(towers.embed_images(params, images))
            bar.update(len(images))
    return np.concatenate(features).astype(np.float32, copy=False)


class FeatureCache:
    """Embeddings shared by evaluators that look at the same pictures with the same parameters.

    It keeps the features of the last parameter tree that it saw.  That tree is kept too, to know it
    again; a training step donates its state, so this holds no memory of an earlier one.
    """

    def __init__(self):
        self._params: Any = None
        self._features: dict[str, np.ndarray] = {}

    def embed(self, towers: Any, params: Any, pictures: PictureSet) -> Float[np.ndarray, "n d"]:
        """As `embed_pictures`, computed once."""
        if params is not self._params:
            self._params, self._features = params, {}
        key = str(pictures.path)
        if key not in self._features:
            self._features[key] = embed_pictures(towers, params, pictures)
        return self._features[key]


def picture_card(towers: Any, pictures: PictureSet) -> dict[str, Any]:
    """The part of a protocol card that concerns the pictures and their embedding."""
    return {
        "pictures": len(pictures),
        "classes": len(np.unique(pictures.classes)),
        "sha256": pictures.sha256(),
        "preprocessing": towers.preprocess,
        "feature": f"{type(towers).__name__}.embed_images (towers: after the projection), float32",
        "normalisation": "L2",
    }


# ---------------------------------------------------------------------------- building and running


def kinds() -> list[str]:
    """The evaluators there are, by file name."""
    package = importlib.util.find_spec(__package__)
    names = [m.name for m in pkgutil.iter_modules(package.submodule_search_locations)]
    return sorted(set(names) - set(_SHARED))


def build(kind: str, towers: Any, *, features: FeatureCache | None = None, **cfg: Any) -> Evaluator:
    """Builds the evaluator in ``mofi_jax/evaluators/{kind}.py``.

    Args:
      kind: name of the file.
      towers: the functions of a model (`mofi_jax.inference.Towers`).
      features: shared with other evaluators, or a cache of its own.
      **cfg: arguments of its class, as named in the config.

    Raises:
      BadInput: no such kind, an argument that it does not have, or what the class itself refuses.
    """
    return _class(kind, cfg)(towers, features=features or FeatureCache(), **cfg)


def _class(kind: str, cfg: Mapping[str, Any]) -> Any:
    """The class of a kind, after checking that it takes these arguments."""
    if kind not in kinds():
        raise BadInput(f"Unknown evaluator kind {kind!r}: choose from {', '.join(kinds())}.")
    module = importlib.import_module(f"{__package__}.{kind}")
    parameters = inspect.signature(module.Evaluator).parameters
    keys = {name: p for name, p in parameters.items() if name not in ("towers", "features")}
    for name in cfg:
        if name not in keys:
            raise BadInput(
                f"The evaluator kind {kind} has no key {name!r}: it takes {', '.join(keys)}."
            )
    for name, parameter in keys.items():
        if parameter.default is inspect.Parameter.empty and not cfg.get(name):
            raise BadInput(f"The evaluator kind {kind} needs the key {name!r}: set it.")
    return module.Evaluator


@dataclasses.dataclass(frozen=True)
class Suite:
    """Evaluators by name, and why the others are left out."""

    evaluators: dict[str, Evaluator]
    skipped: dict[str, str]


def build_all(towers: Any, configs: Mapping[str, Mapping[str, Any]]) -> Suite:
    """Builds every evaluator of a config ``{name: {"kind": ..., **arguments}}``, embeddings shared.

    One config serves all models: an evaluator that needs what the towers lack (the entities of a
    class table, the tokenizer of a text tower) is left out, and the reason kept.

    Raises:
      BadInput: as `build`, with the evaluator's name.
    """
    suite, shared = Suite({}, {}), FeatureCache()
    for name, config in configs.items():
        arguments = dict(config)
        kind = arguments.pop("kind", "")
        try:
            missing = [n for n in _class(kind, arguments).needs if getattr(towers, n) is None]
            if missing:
                suite.skipped[name] = f"the model has no {' and no '.join(missing)}"
            else:
                suite.evaluators[name] = build(kind, towers, features=shared, **arguments)
        except BadInput as error:
            raise BadInput(f"Evaluator {name}: {error}") from error
    return suite


def run_all(
    evaluators: Mapping[str, Evaluator],
    params: Any,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Runs evaluators one after the other and names their numbers ``evaluator/metric``.

    Args:
      progress: called after each number, so that a watchdog knows that something moves.

    Raises:
      BadInput: what an evaluator refused, with its name in front.
      RuntimeError: anything else that went wrong in one, named, with the original as its cause.
    """
    results = {}
    for name, evaluator in evaluators.items():
        try:
            for metric, value in evaluator.run(params):
                results[f"{name}/{metric}"] = float(value)
                progress()
        except BadInput as error:
            raise BadInput(f"Evaluator {name}: {error}") from error
        except Exception as error:
            raise RuntimeError(f"evaluator {name} failed: {error}") from error
    return results
