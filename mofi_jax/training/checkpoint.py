"""Checkpoints: state, data position, clock and config as one thing (Orbax), for any mesh.

The data position is a single number, the examples consumed, so a checkpoint does not depend on the
number of hosts.  A restore that does not fit lists every mismatch at once and changes nothing.
An interrupted save does not count and is removed at the next start; checksums tell a file that has
changed since.  The folder may lie in a bucket, where Orbax marks what is complete by a file.
"""

import concurrent.futures
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers

from mofi_jax.common import checksums, files
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import hosts, stored
from mofi_jax.training import arrays
from mofi_jax.training.state import TrainState

FOLDER = "checkpoints"
BEST_FILE = "best.json"  # beside it: {"metric", "step", "value"} of the best checkpoint
# What every step holds; beside it "ema", where a run keeps an average of its parameters.
ITEMS = ("params", "optimizer", "position")


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a run has come, beside its state.

    Attributes:
      examples: consumed by all hosts together.
      data_fingerprint: what decides the order and content of the examples; must match on resume.
      seconds: wall time so far by phase (`mofi_jax.telemetry.Goodput.save`).
      config: the whole training config, as JSON has it; differences on resume are logged.
      evaluated: whether the evaluations due at this step are in the metrics; a preempted run saves
        without them.
      best: the best step so far (`find_best`), None where none is looked for.
    """

    examples: int
    data_fingerprint: Mapping[str, Any]
    seconds: Mapping[str, float]
    config: Mapping[str, Any]
    evaluated: bool = True
    best: Mapping[str, Any] | None = None


class Checkpointer:
    """Saves (TrainState, Position) in the background; `restore` reads what it saved.

    The step of the position's `best` is kept too, and named in ``best.json``.

    Args:
      workdir: checkpoints lie in ``checkpoints/STEP/`` there.
      keep: how many of the last ones are kept.
      keep_every: checkpoints of steps that this number divides are kept too; 0 for none.
      verify: whether host 0 reads a saved step once more to write its checksums.
    """

    def __init__(
        self, workdir: epath.PathLike, *, keep: int, keep_every: int = 0, verify: bool = True
    ):
        self.folder = files.absolute(workdir) / FOLDER
        self._best = _Best()
        policies = [checkpoint_managers.LatestN(keep), self._best]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        self._manager = _Manager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                create=True,
                single_host_load_and_broadcast=True,
                async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier),
            ),
            item_names=(*ITEMS, "ema"),
        )
        self._verify = verify and jax.process_index() == 0
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None

    def save(self, step: int, state: TrainState, position: Position) -> None:
        """Saves in the background; the arrays are copied first, so the state may be donated."""
        self.wait()
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        items["position"] = ocp.args.JsonSave(dataclasses.asdict(position))
        # Before the manager is asked which older steps may go.
        self._best.step = position.best["step"] if position.best else None
        self._manager.save(step, args=ocp.args.Composite(**items))
        self._saving = self._pool.submit(self._finish, self.folder / str(step), position.best)

    def _finish(self, folder: epath.Path, best: Mapping[str, Any] | None) -> None:
        self._manager.wait_until_finished()
        if self._verify:
            checksums.write(folder)
        if best and jax.process_index() == 0:
            files.write_json(self.folder.parent / BEST_FILE, dict(best))

    def check(self) -> None:
        """Raises what went wrong with the last save, without waiting for it."""
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


class _Best(checkpoint_managers.PreservationPolicy):
    """Keeps the best step, which changes while a run goes on."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class _Manager(ocp.CheckpointManager):
    """Orbax's, which leaves the preemption service, which counts calls, to `PreemptionGuard`."""

    def reached_preemption(self, step: int) -> bool:
        return False


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier, but a host whose save has failed does not wait for the others."""
    if sys.exception() is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """The steps whose saves were finished, ascending; they may be damaged."""
    folder = files.absolute(workdir) / FOLDER
    try:
        return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []
    except NotADirectoryError as error:
        raise BadInput(
            f"{folder} is a file, and a run keeps its checkpoints there: move it away, or name "
            "another folder."
        ) from error


def damage(workdir: epath.PathLike, step: int, *, verify: bool = True) -> str | None:
    """What is wrong with a saved step, in words with its folder; None if it can be read.

    With `verify` every file is read and compared with its checksum, if it has one: a process killed
    between save and checksums, ``config.checkpoint.verify=False`` and earlier versions left none.
    """
    folder = _step(workdir, step)
    if verify and (folder / checksums.FILE).is_file():
        problem = checksums.damage(folder)
        return problem and f"{folder}: {problem}"
    if verify:
        logging.warning("%s has no %s: damage to it may go unnoticed", folder, checksums.FILE)
    try:
        read_position(workdir, step)
        for item in ITEMS[:2]:
            stored.saved_tree(folder / item)
    except BadInput as error:
        return str(error)
    return None


def latest_intact(
    workdir: epath.PathLike, *, verify: bool = True
) -> tuple[int | None, list[tuple[int, str]]]:
    """The last step that can be read, None if none was saved; later ones with what is wrong.

    BadInput where steps were saved, and all of them are damaged.
    """
    damaged: list[tuple[int, str]] = []
    for step in reversed(saved_steps(workdir)):
        problem = damage(workdir, step, verify=verify)
        if problem is None:
            return step, damaged
        damaged.append((step, problem))
    if damaged:
        raise BadInput(
            f"No checkpoint of {workdir} is intact ({damaged[0][1]}): restore its {FOLDER}/ from a "
            "copy, or train anew in another folder."
        )
    return None, damaged


def set_aside(
    workdir: epath.PathLike, damaged: Sequence[tuple[int, str]], step: int | None
) -> None:
    """Renames damaged steps, so that a run that resumes from ``step`` can save them again."""
    for bad, problem in damaged:
        folder = _step(workdir, bad)
        names = (f"{bad}.damaged{number or ''}" for number in range(1_000))
        aside = next(folder.parent / name for name in names if not (folder.parent / name).exists())
        folder.rename(aside)
        logging.warning(
            "the checkpoint of step %d is damaged (%s): it is renamed to %s, and the run resumes "
            "from step %d",
            *(bad, problem, aside, step),
        )


def last_step(workdir: epath.PathLike) -> int:
    """The last saved step, for readers of a run; BadInput if there is none, or it is damaged."""
    step, damaged = latest_intact(workdir)
    if step is None:
        raise BadInput(
            f"There is no checkpoint in {_step(workdir, 0).parent}: train first, or name another "
            "folder."
        )
    if damaged:
        problems = "; ".join(problem for _, problem in damaged)
        raise BadInput(
            f"The last checkpoint is damaged ({problems}): restore it from a copy, or move it out "
            f"of {FOLDER}/, and step {step} is read."
        )
    return step


def chosen_step(workdir: epath.PathLike, step: str = "") -> int:
    """The saved step that a flag names: a number, "best", or "" for the last.

    Raises BadInput: there is none such, or it is damaged.
    """
    if not step:
        return last_step(workdir)
    saved = saved_steps(workdir)
    if step == "best":
        remedy = "set config.checkpoint.keep_best in training, or name a step"
        number = files.read_json_object(files.absolute(workdir) / BEST_FILE, remedy).get("step")
    else:
        number = int(step) if step.isdecimal() else None
    if number not in saved:
        steps = ", ".join(map(str, saved)) or "none at all"
        raise BadInput(f"{workdir} has no checkpoint of --step={step}: it has {steps}, or `best`.")
    if problem := damage(workdir, number):
        raise BadInput(f"The checkpoint of --step={step} is damaged ({problem}): name another.")
    return number


def find_best(
    metric: str, best: Mapping[str, Any] | None, step: int, scores: Mapping[str, float]
) -> Mapping[str, Any] | None:
    """The best step so far: ``best``, or this one where its score is larger.

    Never step 0, which is not saved.  A run whose ``metric`` is another than before looks anew.

    Args:
      metric: "EVALUATOR/METRIC", or "" for none.
      scores: of the evaluators that have just run, by such names.

    Raises BadInput: the evaluator has run and gives no such metric.
    """
    if best and best["metric"] != metric:
        best = None
    evaluator = metric.partition("/")[0]
    known = [name for name in scores if metric and name.partition("/")[0] == evaluator]
    if known and metric not in known:
        raise BadInput(
            f"config.checkpoint.keep_best={metric} is nothing that its evaluator measures: choose "
            f"from {', '.join(known)}."
        )
    if known and step and scores[metric] > (best["value"] if best else -np.inf):
        return {"metric": metric, "step": step, "value": float(scores[metric])}
    return best


def _step(workdir: epath.PathLike, step: int) -> epath.Path:
    return files.absolute(workdir) / FOLDER / str(step)


def read_position(workdir: epath.PathLike, step: int) -> Position:
    """How far a run had come at a saved step; BadInput if that cannot be read."""
    folder = _step(workdir, step) / "position"
    handler = ocp.JsonCheckpointHandler()
    with stored.reading(folder), ocp.Checkpointer(handler, **stored.single_host()) as checkpointer:
        position = Position(**checkpointer.restore(folder))
        kinds = {"examples": int, "data_fingerprint": dict, "seconds": dict, "config": dict}
        wrong = [name for name, kind in kinds.items() if type(getattr(position, name)) is not kind]
        if wrong or position.examples < 0 or not isinstance(position.best, dict | None):
            raise ValueError(f"{wrong or ['examples']} cannot be")
    return position


def restore(workdir: epath.PathLike, step: int, abstract: TrainState) -> TrainState:
    """Restores onto the shardings of ``abstract``, a TrainState of ShapeDtypeStructs.

    Raises BadInput: names every array that is missing, left over or of another shape; files that
      cannot be read, and parameters that are not finite.
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
        with stored.reading(folder / name), ocp.StandardCheckpointer() as checkpointer:
            # Not strict: the class table's padding, which depends on the mesh, is cut or filled
            # with zeros.  Everything else has been compared.
            items[name] = checkpointer.restore(folder / name, tree, strict=False)
    arrays.check_finite({name: items[name] for name in ("params", "ema") if name in items}, folder)
    optimizer = items["optimizer"]
    return TrainState(optimizer["step"], items["params"], optimizer["state"], items.get("ema"))


def restore_params(workdir: epath.PathLike, step: str = "", *, by_rows: Sequence[str] = ()) -> Any:
    """The parameters of a run's checkpoint (`chosen_step`) as numpy arrays, whole.

    Their average where the run has one: it is what a run evaluates.  Those named in `by_rows` come
    as `stored.Rows`.  BadInput as of `chosen_step`.
    """
    folder = _step(workdir, hosts.agree(lambda: chosen_step(workdir, step)))
    item = folder / "ema" if (folder / "ema").exists() else folder / "params"
    return hosts.all_or_none(lambda: stored.read_item(item, by_rows))


def mismatches(workdir: epath.PathLike, step: int, abstract: TrainState) -> list[str]:
    """Every array of a saved step that is missing, left over or of another shape, in words."""
    folder = _step(workdir, step)
    expected = _items(abstract)
    problems: list[str] = []
    has_ema = (folder / "ema").exists()
    if has_ema != ("ema" in expected):
        expected.pop("ema", None)
        # One sentence in place of one for each parameter.
        article = "an" if has_ema else "no"
        problems = [f"{article} average of the parameters is in it (config.ema.decay)"]
    named: set[str] = set()  # a parameter's moments and average are not named again
    for item, tree in expected.items():
        for name, problem in arrays.differences(stored.saved_tree(folder / item), tree).items():
            if any(name.endswith(f"/{parameter}") or name == parameter for parameter in named):
                continue
            problems.append(f"{item}/{name} {problem}")
            if item == "params":
                named.add(name)
    return problems


def _items(state: TrainState) -> dict[str, Any]:
    """A state's parts on disk; parameters and their average can be read on their own."""
    items = {"params": state.params, "optimizer": {"step": state.step, "state": state.opt_state}}
    return items if state.ema is None else items | {"ema": state.ema}
