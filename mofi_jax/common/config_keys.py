"""The keys of a config by their dotted names: found, and set to what a command line says.

A value has the type of the one that it takes the place of, or of its placeholder.  Names that are
not there are an error, but in groups whose names are the user's choice.
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from mofi_jax.common.errors import BadInput, nearest

# Groups in which names, and what is in them, are the user's choice, as in any that is empty.
OPEN = (
    *("evaluators", "data.extra", "filters.eval_sets", "filters.safety.columns"),
    *("drop_types", "kb.drop_types"),
)
GROUPS = (ml_collections.ConfigDict, dict)

_STEP = re.compile(r"(?:^|\.)([^.\[\]]+)|\[([^\[\]]+)\]")
_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_WANTED = {
    int: "a whole number, as 3",
    float: "a number, as 0.5",
    bool: "True or False",
    tuple: "values in brackets, as \"('a', 'b')\"",
    list: "values in brackets, as \"['a', 'b']\"",
}


class Place(NamedTuple):
    """Where a key is, or is to be."""

    holder: Any  # a group, or a tuple's or list's
    name: Any  # of the key there
    kind: type | None  # of its value; None for whatever is written


def names(config: ml_collections.ConfigDict) -> list[str]:
    """The dotted names of all keys, groups among them."""
    return [name for name, _ in _values(config)]


def open_groups(config: ml_collections.ConfigDict) -> dict[str, type | None]:
    """Groups in which, and below which, names are the user's choice, by their dotted names.

    Returns:
      The type that all values of each share; None where there are none, or of several types.
    """
    groups: dict[str, type | None] = {}
    for name, value in _values(config):
        if isinstance(value, ml_collections.ConfigDict) and (name in OPEN or not len(value)):
            kinds = {type(inner) for inner in value.values()}
            groups[name] = kinds.pop() if len(kinds) == 1 else None
    return groups


def find(
    config: ml_collections.ConfigDict, key: str, given: str, opened: Mapping[str, type | None]
) -> Place:
    """The place of a key, for which groups are made where names are the user's choice.

    Args:
      given: what the config is called in an error.
      opened: its `open_groups`, as they were before anything was set.

    Raises:
      BadInput: there is no such key.
    """
    steps = [name or _literal(index) for name, index in _STEP.findall(key)]
    if not steps or _STEP.sub("", key) or any("." in str(step) for step in steps):
        raise BadInput(f"--config.{key} cannot be read: write --config.KEY=VALUE.")
    holder: Any = config
    for depth, step in enumerate(steps, 1):
        if not _holds(holder, step):
            group = ".".join(map(str, steps[: depth - 1]))
            is_open = any(f"{group}.".startswith(f"{name}.") for name in opened)
            if not is_open or not isinstance(holder, ml_collections.ConfigDict):
                raise unknown(config, key, given)
            if depth == len(steps):
                return Place(holder, step, opened.get(group))
            _put(holder, step, ml_collections.ConfigDict())
        if depth < len(steps):
            holder = holder[step]
    is_group = isinstance(holder, ml_collections.ConfigDict)
    kind = holder.get_type(step) if is_group else type(holder[step])
    return Place(holder, step, None if kind in (type(None), object) else kind)


def assign(
    config: ml_collections.ConfigDict,
    key: str,
    texts: Sequence[str],
    given: str,
    opened: Mapping[str, type | None],
) -> Any:
    """Sets a key to what is written for it and returns that: the last of several, a tuple to all.

    Raises:
      BadInput: there is no such key, or its values are of another type.
    """
    holder, name, kind = find(config, key, given, opened)
    try:
        if kind in (tuple, list):
            value: Any = kind(_several(texts))
        else:
            value = _value(texts[-1], kind, holder[name] if _holds(holder, name) else None)
    except (ValueError, SyntaxError) as error:
        if kind and issubclass(kind, GROUPS):
            inner = next(iter(holder[name]), "NAME") if _holds(holder, name) else "NAME"
            wanted = f"set its keys, as --config.{key}.{inner}=VALUE"
        else:
            wanted = f"give {_WANTED.get(kind, 'a value that Python can read')}"
        raise BadInput(f"--config.{key}={texts[-1]} cannot be used: {wanted}.") from error
    if isinstance(holder, tuple):
        raise BadInput(f"--config.{key} is one of several values: set them all together.")
    _put(holder, name, value)
    return value


def unknown(config: ml_collections.ConfigDict, key: str, given: str) -> BadInput:
    """The error of a key that is not there."""
    known, (group, _, last) = names(config), key.rpartition(".")
    # Of the same group, then of the same name in another: abbreviations are like neither.
    beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == group]
    elsewhere = [name for name in known if name.endswith(f".{last}")]
    remedy = (
        nearest(last, beside, f"--config.{key.removesuffix(last)}{{}}")
        or nearest(key, elsewhere, "--config.{}")
        or (f"--help={group} shows those of {group}." if group and beside else "")
        or nearest(key, known, "--config.{}")
        or "--help shows which it has."
    )
    return BadInput(f"There is no key --config.{key} in {given.partition(':')[0]}: {remedy}")


def _values(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        yield name, value
        if isinstance(value, GROUPS):
            yield from ((f"{name}.{inner}", v) for inner, v in _values(value))


def _holds(holder: Any, step: Any) -> bool:
    if isinstance(holder, tuple | list):
        return isinstance(step, int) and -len(holder) <= step < len(holder)
    return isinstance(holder, GROUPS) and step in holder


def _put(holder: Any, name: Any, value: Any) -> None:
    if isinstance(holder, ml_collections.ConfigDict):
        with holder.unlocked():
            holder[name] = ml_collections.ConfigDict(value) if isinstance(value, dict) else value
    else:
        holder[name] = value


def _value(text: str, kind: type | None, before: Any) -> Any:
    """Raises ValueError or SyntaxError where the text is of another type."""
    if text == "None" and (before is None or kind is str):
        return None  # a text that is None can be given in no other way
    if kind is None:
        try:
            return _literal(text)
        except (ValueError, SyntaxError):
            return text
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise ValueError(text)
        return _BOOLEANS[text.lower()]
    if kind in (int, float):
        return kind(text)
    value = _literal(text)
    if issubclass(kind, GROUPS) and isinstance(value, dict):
        return value
    if not isinstance(value, kind):
        raise ValueError(text)
    return value


def _several(texts: Sequence[str]) -> list[Any]:
    """``("(1, 2)",)`` and ``("1", "2")`` alike; a text needs no quotes where it is alone."""
    found: list[Any] = []
    for text in texts:
        try:
            value = _literal(text)
        except (ValueError, SyntaxError):
            if re.fullmatch(r"\s*[(\[].*[,'\"].*[)\]]\s*", text):
                raise
            value = text
        found += value if isinstance(value, tuple | list) and len(texts) == 1 else [value]
    return found


def _literal(text: str) -> Any:
    return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
