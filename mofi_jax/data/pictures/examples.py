"""Pictures in `tf.train.Example` records of anybody's schema, read without TensorFlow."""

from typing import Any

PICTURES = ("image", "jpg", "picture", "photo")
NAMES = ("key", "file_name", "image/filename", "filename", "id")


def fields(record: bytes) -> dict[str, Any]:
    """The first value of each feature; None for one that is empty."""
    from tensorflow_datasets.proto import tf_example_pb2

    found = {}
    for name, field in tf_example_pb2.Example.FromString(record).features.feature.items():
        kind = field.WhichOneof("kind")
        found[name] = next(iter(getattr(field, kind).value), None) if kind else None
    return found


def first(record: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The first of these features that a record has, else None."""
    return next((record[name] for name in names if name in record), None)
