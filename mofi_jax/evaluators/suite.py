"""Builds the evaluators of a config and runs them one after the other."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mofi_jax import evaluators
from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.features.embedding import Embedder


class Suite(NamedTuple):
    """Evaluators by name, and why the others are left out."""

    evaluators: dict[str, Any]
    skipped: dict[str, str]


def kinds() -> dict[str, Any]:
    """The evaluator classes by the names of their files."""
    names = [module.name for module in pkgutil.iter_modules(evaluators.__path__)]
    modules = {name: importlib.import_module(f"{evaluators.__name__}.{name}") for name in names}
    return {n: module.Evaluator for n, module in modules.items() if hasattr(module, "Evaluator")}


def build_all(towers: Any, configs: Mapping[str, Mapping[str, Any]]) -> Suite:
    """Builds every evaluator of a config ``{name: {"kind": ..., **arguments}}``.

    One config serves all models: an evaluator that needs what the towers lack (the entities of a
    class table, the tokenizer of a text tower) is left out, and the reason recorded.

    Raises:
      BadInput: an unknown kind, an argument that it does not have or that is missing, or what the
        evaluator itself refuses, with its name.
    """
    suite = Suite({}, {})
    for name, config in configs.items():
        try:
            arguments = dict(config)
            evaluator = _evaluator_class(arguments.pop("kind", ""), arguments)
            missing = _missing(evaluator, towers)
            if not missing:
                evaluator = evaluator(towers, **arguments)
                missing = _missing(evaluator, towers)  # its files may need more: queries in words
            if missing:
                suite.skipped[name] = f"the model has no {' and no '.join(missing)}"
            else:
                suite.evaluators[name] = evaluator
        except BadInput as error:
            raise BadInput(f"Evaluator {name}: {error}") from error
    return suite


def _missing(evaluator: Any, towers: Any) -> list[str]:
    return [need for need in evaluator.needs if getattr(towers, need) is None]


def _evaluator_class(kind: str, arguments: Mapping[str, Any]) -> Any:
    """The class of a kind, after checking that it takes these arguments."""
    known = kinds()
    if kind not in known:
        raise BadInput(f"Unknown evaluator kind {kind!r}: choose from {', '.join(known)}.")
    _, *parameters = inspect.signature(known[kind]).parameters.values()  # but the towers
    names = [parameter.name for parameter in parameters]
    for name in arguments:
        if name not in names:
            raise BadInput(
                f"The evaluator kind {kind} has no key {name!r}: it takes {', '.join(names)}."
            )
    for parameter in parameters:
        if parameter.default is parameter.empty and not arguments.get(parameter.name):
            raise BadInput(f"The evaluator kind {kind} needs the key {parameter.name!r}: set it.")
    return known[kind]


def run_all(
    evaluators: Mapping[str, Any], embedder: Embedder, progress: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Runs evaluators one after the other; {"evaluator/metric": value}.

    `progress` is called after each number, so that a watchdog knows that something moves.

    Raises:
      BadInput: what an evaluator refused, with its name.
      RuntimeError: anything else that went wrong in one, with its name and the original as cause.
    """
    results = {}
    for name, evaluator in evaluators.items():
        try:
            for metric, value in evaluator.run(embedder):
                # An `Estimate` stays one, which can tell its interval.
                results[f"{name}/{metric}"] = value if isinstance(value, float) else float(value)
                progress()
        except BadInput as error:
            raise BadInput(f"Evaluator {name}: {error}") from error
        except Exception as error:
            raise RuntimeError(f"evaluator {name} failed: {error}") from error
    return results
