"""model.json: what a run's folder says of its model to whoever reads it."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.losses import class_order
from mofi_jax.model import mofi

NAME = "model.json"

# Of a model's config, what only training asks for, and what readers take instead: they have other
# devices.
OWN_TO_TRAINING = {"remat": "none", "attention": "auto"}


def describe(
    config: mofi.MofiConfig, preprocess: str, *, classified: bool = True
) -> dict[str, Any]:
    """The content of the file; with the order of the class table where there is one."""
    order = {"table_order": class_order.TABLE_ORDER} if classified else {}
    model = {k: v for k, v in config.to_dict().items() if k not in OWN_TO_TRAINING}
    return {**model, "preprocess": preprocess, **order}


def read(run: epath.PathLike) -> dict[str, Any]:
    """The file of a run.

    Raises:
      BadInput: it is not there, or does not describe a model.
    """
    path = epath.Path(run) / NAME
    remedy = "put back a copy, or take it away and run the training again, which writes it"
    values = files.read_json_object(path, remedy)
    try:
        config(values)
        ops.parse(values["preprocess"])
    except (BadInput, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} does not describe a model ({error}): {remedy}.") from error
    return values


def config(description: Mapping[str, Any]) -> mofi.MofiConfig:
    """The model that the file describes."""
    values = {k: v for k, v in description.items() if k not in ("preprocess", "table_order")}
    return mofi.MofiConfig.from_dict(values | OWN_TO_TRAINING)


def compared(description: Mapping[str, Any]) -> dict[str, Any]:
    """What has to stay as it is while a run goes on; earlier versions wrote more."""
    return {k: v for k, v in description.items() if k not in ("dtype", *OWN_TO_TRAINING)}
