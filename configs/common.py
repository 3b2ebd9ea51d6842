"""What all configs share: the parser of the text behind the colon, and shared fragments."""

import ast
from typing import Any

import ml_collections

from mofi_jax.errors import BadInput


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """Parses ``"task=multitask,res=224,sample"`` into typed values.

    Values are Python literals where they can be read as such and have the type of the default; a
    name alone means True.

    Raises:
      BadInput: a name that is not among the defaults, or a value of another type.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, equals, text = part.partition("=")
        if name not in defaults:
            raise BadInput(
                f"Unknown config argument {name!r} in {arg!r}: choose from {', '.join(defaults)}."
            )
        if not equals:
            value: Any = True
        elif isinstance(defaults[name], str):
            value = text
        else:
            try:
                value = ast.literal_eval(text)
            except (SyntaxError, ValueError):
                value = text
        expected = type(defaults[name])
        if expected is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, expected):
            raise BadInput(
                f"Config argument {name}={text} in {arg!r} is not a {expected.__name__}."
            )
        values[name] = value
    return ml_collections.ConfigDict(values)
