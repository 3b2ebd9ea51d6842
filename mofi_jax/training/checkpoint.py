"""Checkpoints: state, data position and clock as one thing (Orbax), restored onto any mesh.

The data position is a single number, the examples consumed, so a checkpoint does not depend on the
number of hosts.  A restore that does not fit lists every mismatch at once and changes nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

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
    """

    examples: int
    data_fingerprint: Mapping[str, Any]
    seconds: Mapping[str, float]


class Checkpointer:
    """Saves and restores (TrainState, Position); saving is asynchronous."""

    def __init__(self, workdir: epath.PathLike, *, keep: int):
        self.folder = epath.Path(workdir).absolute() / FOLDER
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_names=("params", "optimizer", "position"),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: Position) -> None:
        """Starts saving; the arrays are copied first, so the state may be donated afterwards."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave({"step": state.step, "state": state.opt_state}),
                position=ocp.args.JsonSave(dataclasses.asdict(position)),
            ),
        )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, Position]:
        """Restores onto the shardings of ``abstract``, a TrainState of ShapeDtypeStructs.

        Raises:
          BadInput: names every array that is missing, left over or of another shape.
        """
        folder = self.folder / str(step)
        optimizer = {"step": abstract.step, "state": abstract.opt_state}
        compare(folder, {"params": abstract.params, "optimizer": optimizer})
        # Not strict: the class table's padding, which depends on the mesh, is cut or filled with
        # zeros.  Everything else has been compared.
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params, strict=False),
                optimizer=ocp.args.StandardRestore(optimizer, strict=False),
                position=ocp.args.JsonRestore(),
            ),
        )
        state = TrainState(items.optimizer["step"], items.params, items.optimizer["state"])
        return state, Position(**items.position)

    def wait(self) -> None:
        """Returns once the last save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def compare(folder: epath.Path, expected: Mapping[str, Any]) -> None:
    """Compares a checkpoint's arrays with trees of ShapeDtypeStructs, item by item.

    Raises:
      BadInput: names every array that is missing, left over or of another shape.
    """
    problems = []
    for item, tree in expected.items():
        saved = _shapes(_saved_tree(folder / item))
        wanted = _shapes(tree)
        for name in sorted(saved.keys() | wanted.keys()):
            if name not in saved:
                problems.append(f"{item}/{name} is not in the checkpoint")
            elif name not in wanted:
                problems.append(f"{item}/{name} is not in the model")
            elif saved[name] != wanted[name] and not _padding_alone(
                name, saved[name], wanted[name]
            ):
                problems.append(f"{item}/{name} is {saved[name]} there and {wanted[name]} here")
    if problems:
        raise BadInput(
            f"The checkpoint {folder} belongs to another model ({'; '.join(problems)}): use its "
            "own config, or another --workdir."
        )


def _padding_alone(name: str, saved: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether two shapes of a class table, or of its moments, may differ by the mesh's padding.

    That both belong to the same vocabulary is for the data fingerprint to say.
    """
    return name.endswith("entity_table") and saved[1:] == wanted[1:]


def restore_params(workdir: epath.PathLike) -> Any:
    """The parameters of a run's latest checkpoint, whole, on the first device.

    Raises:
      BadInput: there is no checkpoint.
    """
    folder = epath.Path(workdir).absolute() / FOLDER
    step = ocp.utils.checkpoint_steps(folder) if folder.exists() else []
    if not step:
        raise BadInput(f"There is no checkpoint in {folder}: train first, or name another folder.")
    item = folder / str(max(step)) / "params"
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        _saved_tree(item),
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
