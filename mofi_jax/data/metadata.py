"""The metadata of a data set in TFDS's format, read without TFDS's builders.

Those import every Python class that features.json names: a file beside the data would run as code.
Here a class is only a name.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from mofi_jax.common.errors import BadInput

INFO_FILE = "dataset_info.json"
FEATURES_FILE = "features.json"


def find_directory(data_dir: epath.PathLike, name: str) -> epath.Path:
    """The folder of the newest version of data set `name` ("i2e" or "i2e/config") in `data_dir`.

    Raises:
      BadInput: remote path, no such data set, or one without metadata.
    """
    if "://" in str(data_dir):
        raise BadInput(
            f"Cannot read {data_dir}: ArrayRecord opens local files only; copy the data set to a "
            "local disk or mount the bucket with gcsfuse, and give that path."
        )
    root = epath.Path(data_dir) / name
    if not root.is_dir():
        within = [folder for folder in (root.parent, root.parent.parent) if folder.name == name]
        remedy = (
            f"give {within[0].parent}, which holds it"
            if within and within[0].is_dir()
            else "check the path, or write it with data_prep.build_i2e"
        )
        raise BadInput(
            f"There is no data set {name!r} in {data_dir} (looked for the folder {root}): {remedy}."
        )
    versions = []
    for child in root.iterdir():
        is_version = re.fullmatch(r"\d+\.\d+\.\d+", child.name)
        if is_version and (child / INFO_FILE).exists():
            versions.append(([int(number) for number in child.name.split(".")], child))
    if not versions:
        raise BadInput(
            f"{root} holds no finished version (a folder such as 1.0.0/ with {INFO_FILE}); run "
            "data_prep.build_i2e again, which resumes where it stopped."
        )
    return max(versions)[1]


def shard_parts(directory: epath.Path, split: str) -> Sequence[Any]:
    """The shards of a split, or the parts of them that a slice such as "train[:90%]" takes.

    Returns:
      For each its `filename`, `skip` and `take` records, of `examples_in_shard`.

    Raises:
      BadInput: metadata that cannot be read, another file format, no such split, an empty one.
    """
    from tensorflow_datasets.core import dataset_info

    try:
        info = dataset_info.read_proto_from_builder_dir(directory)
        file_format = info.file_format
        splits = dataset_info.get_split_dict_from_proto(info, directory, "array_record")
    except Exception as error:
        raise BadInput(
            f"{directory / INFO_FILE} cannot be read ({_reason(error)}): copy the data set again."
        ) from error
    if file_format != "array_record":
        raise BadInput(
            f"{directory} is not stored as ArrayRecord: prepare it again with tfds build "
            "--file_format=array_record."
        )
    try:
        parts = splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise BadInput(
            f"{directory} has no such split as {split!r} ({_reason(error)}): choose from "
            f"{', '.join(splits)}."
        ) from error
    if not parts:
        raise BadInput(f"Split {split!r} of {directory} is empty; ask for a larger one.")
    return parts


def feature_classes(directory: epath.PathLike) -> dict[str, str]:
    """The name of each feature's Python class, by feature.

    Raises:
      BadInput: features.json is missing or says something else.
    """
    path = epath.Path(directory) / FEATURES_FILE
    try:
        content = json.loads(path.read_text())
        if "content" in content:  # as TFDS wrote it before 4.6
            return {name: str(feature["type"]) for name, feature in content["content"].items()}
        features = content["featuresDict"]["features"]
        return {name: str(feature["pythonClassName"]) for name, feature in features.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"{path} does not name the features of a data set ({_reason(error)}): copy it again."
        ) from error


def _reason(error: Exception) -> str:
    return f"{error!r}" if isinstance(error, KeyError) else f"{error}".strip().partition("\n")[0]
