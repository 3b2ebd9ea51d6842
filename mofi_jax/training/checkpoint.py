"""Checkpoints: state, data position, clock and config as one thing (Orbax), for any mesh.

The data position is a single number, the examples consumed, so a checkpoint does not depend on the
number of hosts.  A restore that does not fit lists every mismatch at once and changes nothing.
Only a checkpoint that is whole counts: a save that was cut short is cleaned away at the next start,
and checksums tell a file that has changed since.
"""

import concurrent.futures
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers

from mofi_jax.common import checksums
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import hosts
from mofi_jax.training import arrays
from mofi_jax.training.state import TrainState

FOLDER = "checkpoints"
# What each host needs of a step; beside it "ema", where a run has an average.
ITEMS = ("params", "optimizer", "position")


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands beside its state.

    Attributes:
      examples: examples consumed by all hosts together.
      data_fingerprint: what decides the order and content of the examples; must match on resume.
      seconds: wall time so far by phase (`mofi_jax.telemetry.Goodput.save`).
      config: the whole training config, as JSON has it; what differs on resume is told.
      evaluated: whether the evaluations that were due at this step are in the metrics; a preempted
        run saves first.
    """

    examples: int
    data_fingerprint: Mapping[str, Any]
    seconds: Mapping[str, float]
    config: Mapping[str, Any]
    evaluated: bool = True


class Checkpointer:
    """Saves (TrainState, Position) in the background; `restore` reads what it saved.

    Args:
      workdir: the run's folder; checkpoints lie in ``checkpoints/STEP/``.
      keep: how many of the last ones stay.
      keep_every: checkpoints of steps that this number divides stay for ever; 0 for none.
      sums: whether host 0 reads a saved step once more to write its checksums.
    """

    def __init__(
        self, workdir: epath.PathLike, *, keep: int, keep_every: int = 0, sums: bool = True
    ):
        self.folder = epath.Path(workdir).absolute() / FOLDER
        policies = [checkpoint_managers.LatestN(keep)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        self._manager = _Manager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                create=True,
                single_host_load_and_broadcast=True,
                async_options=ocp.AsyncOptions(barrier_sync_fn=_together),
            ),
            item_names=(*ITEMS, "ema"),
        )
        self._sums = sums and jax.process_index() == 0
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None

    def save(self, step: int, state: TrainState, position: Position) -> None:
        """Starts saving; the arrays are copied first, so the state may be donated afterwards."""
        self.wait()
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        items["position"] = ocp.args.JsonSave(dataclasses.asdict(position))
        self._manager.save(step, args=ocp.args.Composite(**items))
        self._saving = self._pool.submit(self._finish, self.folder / str(step))

    def _finish(self, folder: epath.Path) -> None:
        """Sums a step that all hosts have finished; killed before, it counts as one without."""
        self._manager.wait_until_finished()
        if self._sums:
            checksums.write(folder)

    def check(self) -> None:
        """Raises what went wrong with the last save, without waiting for its end."""
        if self._saving is not None and self._saving.done():
            self._saving.result()

    def wait(self) -> None:
        """Returns once the last save is on disk."""
        if self._saving is not None:
            self._saving.result()

    def close(self) -> None:
        self._pool.shutdown(wait=False)
        self.wait()
        self._manager.close()


class _Manager(ocp.CheckpointManager):
    """Orbax's, without its own questions to the preemption service, by the number of the step.

    The service compares the numbers of questions: after one of another order than those of
    `preemption.PreemptionGuard`, a signal would wait for a number that the loop never asks.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


def _together(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier; a host whose save has failed leaves, and waits for nobody."""
    if sys.exception() is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


# ---------------------------------------------------------------------------- which step


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """The steps whose saves were finished, ascending; of damage it knows nothing.

    Raises:
      BadInput: a file lies where they should.
    """
    folder = epath.Path(workdir).absolute() / FOLDER
    try:
        return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []
    except NotADirectoryError as error:
        raise BadInput(
            f"{folder} is a file, and a run keeps its checkpoints there: move it away, or name "
            "another folder."
        ) from error


def damage(workdir: epath.PathLike, step: int, *, verify: bool = True) -> str | None:
    """What is wrong with a saved step, in words with its folder; None if it can be read.

    Args:
      verify: read every file and compare its checksum, where there are checksums: a process that
        was killed at the wrong moment, ``config.checkpoint.verify=False`` and earlier versions
        have left none.
    """
    folder = _step(workdir, step)
    if verify and (folder / checksums.FILE).is_file():
        wrong = checksums.damage(folder)
        return wrong and f"{folder}: {wrong}"
    if verify:
        logging.warning("%s has no %s: damage to it may go unnoticed", folder, checksums.FILE)
    try:
        read_position(workdir, step)
        for item in ITEMS[:2]:
            _saved_tree(folder / item)
    except BadInput as error:
        return str(error)
    return None


def newest_whole(
    workdir: epath.PathLike, *, verify: bool = True
) -> tuple[int | None, list[tuple[int, str]]]:
    """The last step that can be read, None if none was saved, and later ones with what is wrong.

    Raises:
      BadInput: steps were saved, and all of them are damaged.
    """
    damaged: list[tuple[int, str]] = []
    for step in reversed(saved_steps(workdir)):
        wrong = damage(workdir, step, verify=verify)
        if wrong is None:
            return step, damaged
        damaged.append((step, wrong))
    if damaged:
        raise BadInput(
            f"No checkpoint of {workdir} is whole ({damaged[0][1]}): restore its "
            f"{FOLDER}/ from a copy, or train anew in another folder."
        )
    return None, damaged


def set_aside(
    workdir: epath.PathLike, damaged: Sequence[tuple[int, str]], step: int | None
) -> None:
    """Takes damaged steps out of the way of a run that goes on from ``step``; deletes nothing."""
    for bad, wrong in damaged:
        folder = _step(workdir, bad)
        names = (f"{bad}.damaged{number or ''}" for number in range(1_000))
        aside = next(folder.parent / name for name in names if not (folder.parent / name).exists())
        folder.rename(aside)
        logging.warning(
            "the checkpoint of step %d is damaged (%s): it is kept as %s, and the run goes on from "
            "step %d",
            *(bad, wrong, aside, step),
        )


def last_step(workdir: epath.PathLike) -> int:
    """The last saved step, for whoever reads a run.

    Raises:
      BadInput: there is none, or it is damaged; names the step before it that is whole.
    """
    step, damaged = newest_whole(workdir)
    if step is None:
        raise BadInput(
            f"There is no checkpoint in {_step(workdir, 0).parent}: train first, or name another "
            "folder."
        )
    if damaged:
        wrong = "; ".join(wrong for _, wrong in damaged)
        raise BadInput(
            f"The last checkpoint is damaged ({wrong}): restore it from a copy, or move it out of "
            f"{FOLDER}/, and step {step} is read."
        )
    return step


def _step(workdir: epath.PathLike, step: int) -> epath.Path:
    return epath.Path(workdir).absolute() / FOLDER / str(step)


# ---------------------------------------------------------------------------- reading


def read_position(workdir: epath.PathLike, step: int) -> Position:
    """Where a run stood at a saved step.

    Raises:
      BadInput: it cannot be read.
    """
    folder = _step(workdir, step) / "position"
    handler = ocp.JsonCheckpointHandler()
    with _reading(folder), ocp.Checkpointer(handler, **_by_this_host()) as checkpointer:
        position = Position(**checkpointer.restore(folder))
        kinds = {"examples": int, "data_fingerprint": dict, "seconds": dict, "config": dict}
        wrong = [name for name, kind in kinds.items() if type(getattr(position, name)) is not kind]
        if wrong or position.examples < 0:
            raise ValueError(f"{wrong or ['examples']} cannot be")
    return position


def restore(workdir: epath.PathLike, step: int, abstract: TrainState) -> TrainState:
    """Restores onto the shardings of ``abstract``, a TrainState of ShapeDtypeStructs.

    Raises:
      BadInput: names every array that is missing, left over or of another shape; files that cannot
        be read, and parameters that are not finite.
    """
    folder = _step(workdir, step)
    problems = hosts.agree(lambda: mismatches(workdir, step, abstract))
    if problems:
        raise BadInput(
            f"The checkpoint {folder} belongs to another model ({'; '.join(problems)}): use its "
            "own config, or another --workdir."
        )
    items = {}
    for name, tree in _items(abstract).items():
        with _reading(folder / name), ocp.StandardCheckpointer() as checkpointer:
            # Not strict: the class table's padding, which depends on the mesh, is cut or filled
            # with zeros.  Everything else has been compared.
            items[name] = checkpointer.restore(folder / name, tree, strict=False)
    arrays.check_finite({name: items[name] for name in ("params", "ema") if name in items}, folder)
    optimizer = items["optimizer"]
    return TrainState(optimizer["step"], items["params"], optimizer["state"], items.get("ema"))


def restore_params(workdir: epath.PathLike) -> Any:
    """The parameters of a run's latest checkpoint as numpy arrays, whole.

    Their average where the run has one: it is what a run evaluates.

    Raises:
      BadInput: there is no checkpoint, or it is damaged.
    """
    folder = _step(workdir, hosts.agree(lambda: last_step(workdir)))
    return hosts.all_or_none(
        lambda: read_item(folder / "ema" if (folder / "ema").exists() else folder / "params")
    )


def read_item(item: epath.Path) -> Any:
    """The tree in a folder of a checkpoint as numpy arrays, whole, on any number of devices."""
    # An array of numpy's asks Orbax for one; these have no memory of their own.
    abstract = jax.tree.map(
        lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), _saved_tree(item)
    )
    with _reading(item), ocp.StandardCheckpointer(**_by_this_host()) as checkpointer:
        return checkpointer.restore(item, abstract)


@contextlib.contextmanager
def _reading(folder: epath.Path) -> Iterator[None]:
    """Says of a folder that cannot be read that it cannot."""
    try:
        yield
    except (BadInput, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # Orbax and tensorstore raise all kinds about damaged files
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"{folder} cannot be read ({type(error).__name__}: {reason}): restore it from a copy, "
            "or move its step out of the folder, and the one before it is read."
        ) from error


# ---------------------------------------------------------------------------- comparing


def mismatches(workdir: epath.PathLike, step: int, abstract: TrainState) -> list[str]:
    """Every array of a saved step that is missing, left over or of another shape, in words."""
    folder = _step(workdir, step)
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
        for name, wrong in arrays.differences(_saved_tree(folder / item), tree).items():
            if any(name.endswith(f"/{parameter}") or name == parameter for parameter in told):
                continue
            problems.append(f"{item}/{name} {wrong}")
            if item == "params":
                told.add(name)
    return problems


def _saved_tree(folder: epath.Path) -> Any:
    """The tree of a saved item with ArrayMetadata leaves."""
    with _reading(folder), ocp.StandardCheckpointer(**_by_this_host()) as checkpointer:
        return checkpointer.metadata(folder).item_metadata.tree


def _by_this_host() -> dict[str, Any]:
    """For readers that wait for no other host: Orbax has all of them meet after each read."""
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    return {"multiprocessing_options": alone}
