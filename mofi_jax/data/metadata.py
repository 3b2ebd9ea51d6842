"""The metadata of a data set in TFDS's format, read without TFDS's builders.

Those import every Python class that features.json names: a file beside the data would run as code.
"""

import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput

INFO_FILE = "dataset_info.json"
FEATURES_FILE = "features.json"
# What shards may be called: TFDS puts these into `str.format`, which knows widths of gigabytes too,
# and puts what comes out behind the folder, out of which `../` would lead.
_NAME = re.compile(r"\w[\w.-]{0,99}")
_FIELDS = r"\{(DATASET|SPLIT|FILEFORMAT|SHARD_INDEX|NUM_SHARDS|SHARD_X_OF_Y)\}"
_TEMPLATE = re.compile(rf"([\w.@=+-]|{_FIELDS}){{0,99}}")


def find_directory(data_dir: epath.PathLike, name: str) -> epath.Path:
    """The folder of the newest version of data set `name` ("i2e" or "i2e/config") in `data_dir`.

    Raises BadInput: remote path, no such data set, or one without metadata.
    """
    root = files.local_input(data_dir, "the data set") / name  # ArrayRecord opens no others
    if not root.is_dir():
        remedy = "check the path, or write it with `mofi labels`"
        for folder in (root.parent, root.parent.parent):  # the set's own folder, or its version
            if folder.name == name and folder.is_dir():
                remedy = f"give {folder.parent}, which holds it"
        raise BadInput(
            f"There is no data set {name!r} in {data_dir} (looked for the folder {root}): {remedy}."
        )
    versions = [
        ([int(number) for number in child.name.split(".")], child)
        for child in root.iterdir()
        if re.fullmatch(r"\d+\.\d+\.\d+", child.name) and (child / INFO_FILE).exists()
    ]
    if not versions:
        raise BadInput(
            f"{root} holds no finished version (a folder such as 1.0.0/ with {INFO_FILE}); run "
            "`mofi labels` again, which resumes where it stopped."
        )
    return max(versions)[1]


def shard_parts(directory: epath.Path, split: str) -> Sequence[Any]:
    """The shards of a split, or the parts of them that a slice such as "train[:90%]" takes.

    Each has its `filename`, `skip` and `take` records, of `examples_in_shard`.

    Raises BadInput: metadata that cannot be read, another file format, no such split, an empty one.
    """
    from tensorflow_datasets.core import dataset_info

    try:
        info = dataset_info.read_proto_from_builder_dir(directory)
        file_format = info.file_format
        names = [info.name, *(split.name for split in info.splits)]
        odd = [name for name in names if not _NAME.fullmatch(name)]
        templates = [split.filepath_template for split in info.splits]
        odd += [template for template in templates if not _TEMPLATE.fullmatch(template)]
        if odd:
            raise ValueError(f"shards cannot be named by {odd[0][:100]!r}")
        splits = dataset_info.get_split_dict_from_proto(info, directory, "array_record")
    except Exception as error:
        raise BadInput(
            f"{directory / INFO_FILE} cannot be read ({error!r}): copy the data set again."
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
            f"{directory} has no such split as {split!r} ({error!r}): choose from "
            f"{', '.join(splits)}."
        ) from error
    if not parts:
        raise BadInput(f"Split {split!r} of {directory} is empty; ask for a larger one.")
    return parts
