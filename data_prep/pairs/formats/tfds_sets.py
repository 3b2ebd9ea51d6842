"""Data sets that TFDS has prepared, by name: the records of their ArrayRecord shards.

A pointer is a shard and the record's number in it. Records are read as `tf.train.Example` and the
picture's bytes are taken out as they were stored (what `tfds.decode.SkipDecoding` does), so that
neither TensorFlow nor the code of the data set's builder is needed.
"""

import functools
import json
import os
import typing
from collections.abc import Iterator, Sequence

from data_prep.pairs import pictures, samples
from data_prep.pairs.samples import Sample
from mofi_jax.common import errors
from mofi_jax.data import metadata

PREFIX = "tfds:"
_MODULE = "tensorflow_datasets.core.features"
_PICTURE_FEATURES = ("image", "jpg", "picture", "photo")
_CLASSES = {
    "Image": (f"{_MODULE}.image_feature.Image", f"{_MODULE}.labeled_image.LabeledImage"),
    "Text": (f"{_MODULE}.text_feature.Text",),
}
_BATCH = 32  # records


class Shard(typing.NamedTuple):
    """An ArrayRecord file and the records of it that a split takes."""

    path: str
    start: int
    stop: int


def find(pattern: str) -> list[Shard]:
    """The shards of `tfds:NAME[:SPLIT][@DATA_DIR]`.

    NAME may be `name/config`, SPLIT (default `train`) a slice such as `train[:10%]`, DATA_DIR is
    where TFDS looks unless told otherwise ($TFDS_DATA_DIR or ~/tensorflow_datasets).

    Raises:
      BadInput: no such data set or split, another file format, or no picture or caption in it.
    """
    rest, _, data_dir = pattern.removeprefix(PREFIX).partition("@")
    name, _, split = rest.partition(":")
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    directory = metadata.find_directory(os.path.abspath(os.path.expanduser(data_dir)), name)
    _features(os.fspath(directory))
    shards = []
    for part in metadata.shard_parts(directory, split or "train"):
        path, start, stop = os.fspath(part.filename), part.skip, part.skip + part.take
        # Metadata may claim 10^18 records, whose parts nobody can list. No record takes less than a
        # byte; that a shard is shorter is told when the last record is read.
        size = os.path.getsize(path) if os.path.exists(path) else 0
        shards.append(Shard(path, start if stop <= size else stop - 1, stop))
    return shards


def described_in(shard: str) -> tuple[str, ...]:
    """The files beside a shard that say what its records hold."""
    directory = os.path.dirname(shard)
    names = (metadata.INFO_FILE, metadata.FEATURES_FILE)
    return tuple(os.path.join(directory, name) for name in names)


def is_shard(path: str) -> bool:
    return ".array_record-" in os.path.basename(path)


def read(
    inputs: Sequence[str], part: dict, keep: Sequence[str], counts: dict[str, int]
) -> Iterator[Sample]:
    """The samples of the records `part["range"]` of a shard.

    Args:
      inputs: the shard, then `described_in`.
      part: `range`: first record and the one after the last.
      keep: further features to read, where they hold one value.
      counts: `members` is counted up.
    """
    path, (start, stop) = inputs[0], part["range"]
    picture, text = _features(os.path.dirname(path))
    for number, fields in zip(range(start, stop), _examples(path, range(start, stop)), strict=True):
        counts["members"] += 1
        key = f"{os.path.basename(path)}/{number:08d}"
        if fields is None:
            yield Sample(key, reason="broken_record")
            continue
        row = {name: _value(fields[name]) for name in fields if name != picture}
        key, url = samples.key_and_url(row, key)
        words = row.get(text)
        found = fields[picture].bytes_list.value if picture in fields else []
        if not found:
            yield Sample(key, reason="no_picture")
        elif len(found[0]) > pictures.MAX_BYTES:
            yield Sample(key, reason="too_many_bytes")
        else:
            words = words if isinstance(words, bytes) else None
            extras = {name: samples.text_of(samples.at(row, name)) for name in keep}
            yield Sample(key, words, found[0], path, number, len(found[0]), url, extras)


def read_rows(path: str, rows: Sequence[int]) -> Iterator[bytes]:
    """The pictures of records of a shard."""
    picture, _ = _features(os.path.dirname(path))
    for fields in _examples(path, rows):
        yield (
            next(iter(fields[picture].bytes_list.value), b"") if picture in (fields or ()) else b""
        )


@functools.lru_cache(maxsize=64)
def _features(directory: str) -> tuple[str, str]:
    """The names of the picture and the caption among the features of a data set."""
    features = _feature_classes(directory)
    found = []
    for kind, wanted in (("Image", _PICTURE_FEATURES), ("Text", samples.TEXT_COLUMNS)):
        names = [name for name, feature in features.items() if feature in _CLASSES[kind]]
        name = samples.pick(names, wanted)
        if name is None and len(names) == 1:
            [name] = names
        if name is None:
            raise errors.BadInput(
                f"sources: {directory} has no {kind} feature that is known by its name"
                f" (features found: {', '.join(features)}): write it with one of"
                f" {', '.join(wanted)}."
            )
        found.append(name)
    return found[0], found[1]


def _feature_classes(directory: str) -> dict[str, str]:
    """The name of each feature's Python class, which TFDS would import: here it is only a name."""
    path = os.path.join(directory, metadata.FEATURES_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if "content" in content:  # as TFDS wrote it before 4.6
            return {name: str(feature["type"]) for name, feature in content["content"].items()}
        features = content["featuresDict"]["features"]
        return {name: str(feature["pythonClassName"]) for name, feature in features.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise errors.BadInput(
            f"{path} does not name the features of a data set ({error!r}): copy it again."
        ) from error


def _examples(path: str, rows: Sequence[int]) -> Iterator[typing.Mapping | None]:
    """The features of records of a shard; None for a damaged one."""
    from array_record.python import array_record_module
    from google.protobuf import message
    from tensorflow_datasets.proto import tf_example_pb2

    def examples(some: list[int]) -> list[typing.Mapping | None]:
        try:
            found = reader.read(some)
            return [tf_example_pb2.Example.FromString(one).features.feature for one in found]
        except (RuntimeError, message.DecodeError) as error:
            if isinstance(error, RuntimeError) and "Corrupted" not in str(error):
                raise  # the disk or the network: the file may be sound
            return [None] if len(some) == 1 else [examples([row])[0] for row in some]

    reader = array_record_module.ArrayRecordReader(path)
    try:
        # On a truncated file the reader constructs, reports 0 records and raises nothing.
        if not reader.ok() or (rows and rows[-1] >= reader.num_records()):
            raise errors.BadInput(
                f"sources: {path} is damaged or shorter than its dataset_info.json says: fetch it"
                " again."
            )
        for at in range(0, len(rows), _BATCH):
            yield from examples(list(rows[at : at + _BATCH]))
    finally:
        if reader.ok():
            reader.close()


def _value(field) -> typing.Any:
    """The one value of a field; None where it holds none or several."""
    kind = field.WhichOneof("kind")
    values = getattr(field, kind).value if kind else ()
    return values[0] if len(values) == 1 else None
