"""Data sets that TFDS has prepared, by name: the records of their ArrayRecord shards.

A pointer is a shard and the record's number in it. Records are read as `tf.train.Example` and the
picture's bytes are taken out as they were stored (what `tfds.decode.SkipDecoding` does), so that
neither TensorFlow nor the code of the data set's builder is needed.
"""

import functools
import os
import typing
from collections.abc import Iterator, Sequence

from data_prep import pictures, samples
from data_prep.samples import Sample
from mofi_jax import errors

PREFIX = "tfds:"
_PICTURE_FEATURES = ("image", "jpg", "picture", "photo")
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
    import tensorflow_datasets as tfds

    from mofi_jax.data import records

    rest, _, data_dir = pattern.removeprefix(PREFIX).partition("@")
    name, _, split = rest.partition(":")
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    directory = records.find_directory(os.path.abspath(os.path.expanduser(data_dir)), name)
    info = tfds.builder_from_directory(directory).info
    if info.file_format is None or info.file_format.value != "array_record":
        raise errors.BadInput(
            f"sources: {directory} is not stored as ArrayRecord: prepare it again with"
            " tfds build --file_format=array_record."
        )
    _features(os.fspath(directory))
    try:
        instructions = info.splits[split or "train"].file_instructions
    except (KeyError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise errors.BadInput(
            f"sources: {pattern} has no such split ({reason}): choose from"
            f" {', '.join(info.splits)}."
        ) from error
    found = []
    for part in instructions:
        count = part.take if part.take >= 0 else part.examples_in_shard - part.skip
        found.append(Shard(os.fspath(part.filename), part.skip, part.skip + count))
    return found


def metadata(shard: str) -> tuple[str, ...]:
    """The files beside a shard that say what its records hold."""
    directory = os.path.dirname(shard)
    names = ("dataset_info.json", "features.json")
    return tuple(os.path.join(directory, name) for name in names)


def is_shard(path: str) -> bool:
    return ".array_record-" in os.path.basename(path)


def read(
    inputs: Sequence[str], part: dict, keep: Sequence[str], counts: dict[str, int]
) -> Iterator[Sample]:
    """The samples of the records `part["range"]` of a shard.

    Args:
      inputs: the shard, then `metadata`.
      part: `range`: first record and the one after the last.
      keep: further features to read, where they hold one value.
      counts: `members` is counted up.
    """
    path, (start, stop) = inputs[0], part["range"]
    picture, text = _features(os.path.dirname(path))
    for number, fields in zip(range(start, stop), _examples(path, range(start, stop)), strict=True):
        counts["members"] += 1
        row = {name: _value(fields[name]) for name in fields if name != picture}
        key, url = (
            row.get(samples.pick(row, columns))
            for columns in (samples.KEY_COLUMNS, samples.URL_COLUMNS)
        )
        key = _words(key) or f"{os.path.basename(path)}/{number:08d}"
        found = fields[picture].bytes_list.value if picture in fields else []
        extras = {name: _words(row.get(name)) for name in keep}
        if not found:
            yield Sample(key, reason="no_picture")
        elif len(found[0]) > pictures.MAX_BYTES:
            yield Sample(key, reason="too_many_bytes")
        else:
            url = _words(url) or None
            yield Sample(key, row.get(text), found[0], path, number, len(found[0]), url, extras)


def read_rows(path: str, rows: Sequence[int]) -> Iterator[bytes]:
    """The pictures of records of a shard."""
    picture, _ = _features(os.path.dirname(path))
    for fields in _examples(path, rows):
        yield next(iter(fields[picture].bytes_list.value), b"") if picture in fields else b""


@functools.lru_cache(maxsize=64)
def _features(directory: str) -> tuple[str, str]:
    """The names of the picture and the caption among the features of a data set."""
    import tensorflow_datasets as tfds

    features = tfds.builder_from_directory(directory).info.features
    kinds = {
        kind: [name for name, feature in features.items() if isinstance(feature, kind)]
        for kind in (tfds.features.Image, tfds.features.Text)
    }
    found = []
    for kind, wanted in (
        (tfds.features.Image, _PICTURE_FEATURES),
        (tfds.features.Text, samples.TEXT_COLUMNS),
    ):
        name = samples.pick(kinds[kind], wanted)
        if name is None and len(kinds[kind]) == 1:
            [name] = kinds[kind]
        if name is None:
            raise errors.BadInput(
                f"sources: {directory} has no {kind.__name__} feature that is known by its name"
                f" (features found: {', '.join(features)}): write it with one of"
                f" {', '.join(wanted)}."
            )
        found.append(name)
    return found[0], found[1]


def _examples(path: str, rows: Sequence[int]) -> Iterator[typing.Mapping]:
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2

    reader = array_record_module.ArrayRecordReader(path)
    try:
        # On a truncated file the reader constructs, reports 0 records and raises nothing.
        if not reader.ok() or (rows and rows[-1] >= reader.num_records()):
            raise errors.BadInput(
                f"sources: {path} is damaged or shorter than its dataset_info.json says: fetch it"
                " again."
            )
        for at in range(0, len(rows), _BATCH):
            for record in reader.read(list(rows[at : at + _BATCH])):
                yield tf_example_pb2.Example.FromString(record).features.feature
    finally:
        if reader.ok():
            reader.close()


def _value(field) -> typing.Any:
    """The one value of a field; None where it holds none or several."""
    kind = field.WhichOneof("kind")
    values = getattr(field, kind).value if kind else ()
    return values[0] if len(values) == 1 else None


def _words(value: typing.Any) -> typing.Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
