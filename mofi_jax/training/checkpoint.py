"""Checkpoints: state, data position, clock and config as one thing (Orbax), for any mesh.

The data position is a single number, the examples consumed, so a checkpoint does not depend on the
number of hosts.  A restore that does not fit lists every mismatch at once and changes nothing.
Only a checkpoint that is whole counts: a save that was cut short is cleaned away at the next start.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from mofi_jax import partition
from mofi_jax.errors import BadInput
from mofi_jax.training.state import TrainState

FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands beside its state.

    Attributes:
      examples: examples consumed by all hosts together.
      data_fingerprint: what decides the order and content of the examples; must match on resume.
      seconds: wall time so far by phase (`mofi_jax.telemetry.Goodput.save`).
      config: the whole training config, as JSON has it; what differs on resume is told.
      evaluated: whether the evaluations that were due at this step are in the metrics; a run that
        was asked to leave saves first.
    """

    examples: int
    data_fingerprint: Mapping[str, Any]
    seconds: Mapping[str, float]
    config: Mapping[str, Any]
    evaluated: bool = True


class Checkpointer:
    """Saves and restores (TrainState, Position); saving is asynchronous.

    Args:
      workdir: the run's folder; checkpoints lie in ``checkpoints/STEP/``.
      keep: how many of the last ones stay.
      keep_every: checkpoints of steps that this number divides stay for ever; 0 for none.
    """

    def __init__(self, workdir: epath.PathLike, *, keep: int, keep_every: int = 0):
        self.folder = epath.Path(workdir).absolute() / FOLDER
        policies = [checkpoint_managers.LatestN(keep)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                create=True,
            ),
            item_names=("params", "optimizer", "ema", "position"),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: Position) -> None:
        """Starts saving; the arrays are copied first, so the state may be donated afterwards."""
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        items["position"] = ocp.args.JsonSave(dataclasses.asdict(position))
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Restores onto the shardings of ``abstract``, a TrainState of ShapeDtypeStructs.

        Raises:
          BadInput: names every array that is missing, left over or of another shape.
        """
        problems = mismatches(self.folder.parent, step, abstract)
        if problems:
            raise BadInput(
                f"The checkpoint {self.folder / str(step)} belongs to another model "
                f"({'; '.join(problems)}): use its own config, or another --workdir."
            )
        # Not strict: the class table's padding, which depends on the mesh, is cut or filled with
        # zeros.  Everything else has been compared.
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{
                    name: ocp.args.StandardRestore(tree, strict=False)
                    for name, tree in _items(abstract).items()
                }
            ),
        )
        optimizer = items.optimizer
        return TrainState(
            optimizer["step"], items.params, optimizer["state"], items.get("ema", None)
        )

    def wait(self) -> None:
        """Returns once the last save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def read_position(workdir: epath.PathLike, step: int) -> Position:
    """Where a run stood at a saved step."""
    folder = epath.Path(workdir).absolute() / FOLDER / str(step) / "position"
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return Position(**checkpointer.restore(folder))


def mismatches(workdir: epath.PathLike, step: int, abstract: TrainState) -> list[str]:
    """Every array of a saved step that is missing, left over or of another shape, in words."""
    folder = epath.Path(workdir).absolute() / FOLDER / str(step)
    expected = _items(abstract)
    has_ema = (folder / "ema").exists()
    if has_ema != ("ema" in expected):
        expected.pop("ema", None)
        there = "an" if has_ema else "no"
        # One sentence in place of one for each parameter.
        return [
            f"{there} average of the parameters is in it (config.ema.decay)",
            *compare(folder, expected),
        ]
    return compare(folder, expected)


def _items(state: TrainState) -> dict[str, Any]:
    """What a state consists of on disk: parameters and their average can be read on their own."""
    items = {
        "params": state.params,
        "optimizer": {"step": state.step, "state": state.opt_state},
    }
    return items if state.ema is None else items | {"ema": state.ema}


def compare(folder: epath.Path, expected: Mapping[str, Any]) -> list[str]:
    """Compares a checkpoint's arrays with trees of ShapeDtypeStructs, item by item.

    What is wrong with a parameter is not told again of its moments and its average.
    """
    problems: list[str] = []
    told: set[str] = set()
    for item, tree in expected.items():
        saved = _shapes(_saved_tree(folder / item))
        wanted = _shapes(tree)
        for name in sorted(saved.keys() | wanted.keys()):
            before = len(problems)
            if any(name.endswith(f"/{parameter}") or name == parameter for parameter in told):
                continue
            if name not in saved:
                problems.append(f"{item}/{name} is not in the checkpoint")
            elif name not in wanted:
                problems.append(f"{item}/{name} is not in the model")
            elif saved[name] != wanted[name] and not _padding_alone(
                name, saved[name], wanted[name]
            ):
                problems.append(f"{item}/{name} is {saved[name]} there and {wanted[name]} here")
            if item == "params" and len(problems) > before:
                told.add(name)
    return problems


def _padding_alone(name: str, saved: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether two shapes of a class table, or of its moments, may differ by the mesh's padding.

    That both belong to the same vocabulary is for the data fingerprint to say.
    """
    return name.endswith("entity_table") and saved[1:] == wanted[1:]


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """The steps whose checkpoints are whole, ascending."""
    folder = epath.Path(workdir).absolute() / FOLDER
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def restore_params(workdir: epath.PathLike) -> Any:
    """The parameters of a run's latest checkpoint as numpy arrays, whole.

    Their average where the run has one: it is what a run evaluates.

    Raises:
      BadInput: there is no checkpoint.
    """
    folder = epath.Path(workdir).absolute() / FOLDER
    steps = saved_steps(workdir)
    if not steps:
        raise BadInput(f"There is no checkpoint in {folder}: train first, or name another folder.")
    last = folder / str(steps[-1])
    return read_item(last / "ema" if (last / "ema").exists() else last / "params")


def read_item(item: epath.Path) -> Any:
    """The tree in a folder of a checkpoint as numpy arrays, whole, on any number of devices."""
    # An array of numpy's asks Orbax for one; these have no memory of their own.
    abstract = jax.tree.map(
        lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), _saved_tree(item)
    )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(item, abstract)


def _saved_tree(folder: epath.Path) -> Any:
    """The tree of a saved item with ArrayMetadata leaves."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(folder).item_metadata.tree


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        partition.path_name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
