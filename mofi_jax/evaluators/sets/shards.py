"""Labelled pictures in ArrayRecord shards: our own, and data sets that TFDS has prepared.

Neither TensorFlow nor the code of a data set's builder is needed.  Records stay in their order.
"""

import os

import numpy as np
from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.data import metadata, records
from mofi_jax.data.pictures import examples
from mofi_jax.evaluators.sets import catalogue, listing

PREFIX = "tfds:"
_ENTITIES = "entity_ids"
_LABELS = (_ENTITIES, "label", "labels", "fine_label", "class", "class_id")
_BATCH = 64  # records in one read


def find(text: str) -> tuple[epath.Path, str]:
    """Folder and split of ``tfds:NAME:SPLIT[@DATA_DIR]``.

    NAME may be ``name/config``, SPLIT a slice such as ``test[:10%]``; DATA_DIR is where TFDS looks
    unless told otherwise ($TFDS_DATA_DIR or ~/tensorflow_datasets).

    Raises BadInput: no split, or no such data set there; says where it is to be had.
    """
    rest, _, data_dir = text.removeprefix(PREFIX).partition("@")
    name, _, split = rest.partition(":")
    if not name or not split:
        raise BadInput(
            f"{text} names no split: write {PREFIX}NAME:SPLIT, as in tfds:cifar100:test."
        )
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    root = epath.Path(os.path.abspath(os.path.expanduser(data_dir)))
    if not (root / name).is_dir():
        origin = catalogue.origin_of_tfds(name.partition("/")[0])
        raise BadInput(
            f"There is no data set {name} in {root}{origin}: where TensorFlow is installed, "
            f"`tfds build {name} --file_format=array_record` prepares it; or name its DATA_DIR as "
            f"in {PREFIX}{rest}@FOLDER."
        )
    return metadata.find_directory(root, name), split


def read(directory: epath.Path, split: str) -> listing.Listing:
    """Lists the records of a split; reads all of them, since labels lie among the pictures.

    The class of a record of ours is its first entity, the label that fits best.

    Raises BadInput: as `records.open_directory`; records without picture or label.
    """
    source = records.open_directory(directory, split, examples.fields)
    names, classes = [], []
    for start in range(0, len(source), _BATCH):
        for record in source.read(range(start, min(start + _BATCH, len(source)))):
            number = len(names)
            label = examples.first(record, _LABELS)
            if label is None or label < 0 or examples.first(record, examples.PICTURES) is None:
                raise BadInput(
                    f"{source.place(number)} lacks a {'label' if label is None else 'picture'} "
                    f"(features: {', '.join(sorted(record))}): use a split and set with both."
                )
            name = examples.first(record, examples.NAMES)
            classes.append(label)
            name = name.decode(errors="replace") if isinstance(name, bytes) else name
            names.append(f"{number:08d}" if name is None else f"{number:08d}_{name}")
    feature = next(name for name in _LABELS if name in record)
    labels = _class_names(directory, feature, set(classes))

    def read_picture(i: int) -> bytes:
        return examples.first(source[i], examples.PICTURES)

    return listing.Listing(names, np.array(classes, np.int64), labels, read_picture)


def _class_names(directory: epath.Path, feature: str, classes: set[int]) -> dict[int, str]:
    """By the vocabulary of our own sets, or the names that TFDS writes beside its shards."""
    path = directory / f"{feature}.labels.txt"
    if feature == _ENTITIES:
        known = records.read_entities(directory / records.ENTITIES_FILE).names
    elif path.is_file():
        known = [line.strip() for line in path.read_text("utf-8").split("\n") if line.strip()]
    else:
        return {}
    if max(classes) >= len(known):
        raise BadInput(
            f"{directory} has a record of class {max(classes)} and names for {len(known)}: copy "
            "the data set again."
        )
    return {number: known[number] for number in sorted(classes)}
