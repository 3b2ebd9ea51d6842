"""Trains every point of a sweep and compares them.

    python -m mofi_jax.sweep --config configs/sweeps/learning_rate.py:... --workdir S

Beside ``get_config`` the config file has ``get_hyper(arg)``, the ordered list of points, each a
dict {dotted config key: value}, and ``METRIC``, the score that ranks them (higher is better).
Point I is a training of its own in S/NAME/, in its own process, so that its memory is free
afterwards; a point that is finished is not trained again, one that was cut goes on.  Flags such as
``--config.total=...`` hold for all points.  ``--list`` shows the points, ``--index=I`` runs one, as
in a SLURM array.  S holds

    points.json  the points, so that a folder never mixes two sweeps
    sweep.json   {"metric", "best", "points": [{"name", "values", "state", "score", ...}]}
    sweep.md     the same as a table, best first
    sweep.png    the score over the value that is swept, where one is a number

Exit codes: 0 all points are through (one that diverged counts), 75 preempted and saved (the same
command goes on), 2 bad input, 1 a point crashed.
"""

import copy
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from mofi_jax import telemetry
from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput
from mofi_jax.sweep import table as sweep_table
from mofi_jax.training import settings

POINTS_FILE, FAILED_FILE = "points.json", "failed.json"
DELETE = "delete this folder, and the sweep runs the point again"
TRAIN = (sys.executable, "-m", "mofi_jax.train")
NAME_LENGTH = 120  # a folder's name has room for 255 bytes


def main(
    config: Any,
    workdir: str,
    index: str = "",
    list: bool = False,
    coordinator: str = "",
    processes: str = "",
    process: str = "",
) -> int:
    """Runs the sweep of the file that ``--config`` names; returns the exit code.

    Args:
      config: the base of all points, with the flags' values.
      workdir: folder of the sweep; one that all hosts share.
      index: runs this point alone.
      list: prints the points and runs none.
      coordinator, processes, process: handed on to every training.

    Raises:
      BadInput: no points, a point that does not fit the config, a folder of another sweep.
    """
    flag = flags.FLAGS["config"]
    path, _, arg = config_flags.get_config_filename(flag).partition(":")
    overrides = config_flags.get_override_values(flag)
    points, metric = load(path, arg or None)
    if metric.partition("/")[0] not in config.evaluators:
        raise BadInput(
            f"METRIC={metric!r} in {path} is of no evaluator of the config: choose EVALUATOR/SCORE "
            f"of {', '.join(config.evaluators) or 'config.evaluators, which is empty'}."
        )
    names = check(points, config, overrides)
    chosen = range(len(points)) if index == "" else [number(index, len(points))]
    workdir = files.output_folder(workdir, "--workdir")
    if list:
        for i in chosen:
            print(f"{i:3d}  {sweep_table.state_of(workdir / names[i]):9s} {names[i]}")
        return 0
    lead = process in ("", "0")
    claim(workdir, points, lead)

    common = [f"--config={path}{':' if arg else ''}{arg}", *as_flags(overrides)]
    joined = {"coordinator": coordinator, "processes": processes, "process": process}
    common += [f"--{name}={value}" for name, value in joined.items() if value]

    def command(i: int) -> Sequence[str]:
        return (*TRAIN, *common, *as_flags(points[i]), f"--workdir={workdir / names[i]}")

    code = run(
        [(names[i], command(i), point_config(config, points[i])) for i in chosen], workdir, lead
    )
    if lead:
        print(sweep_table.write(workdir, names, points, metric))
    return code


def load(path: str, arg: str | None) -> tuple[Sequence[Mapping[str, Any]], str]:
    """The points and the metric of a config file."""
    spec = importlib.util.spec_from_file_location("sweep_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, what in (("get_hyper", "the points of a sweep"), ("METRIC", "what ranks them")):
        if not hasattr(module, name):
            raise BadInput(
                f"{path} has no {name}, {what}: see configs/sweeps/learning_rate.py for one."
            )
    return module.get_hyper(arg), module.METRIC


def check(
    points: Sequence[Mapping[str, Any]], config: Any, overrides: Mapping[str, Any]
) -> Sequence[str]:
    """The folder of each point; all of them are checked before the first one costs anything.

    Raises:
      BadInput: no points, two alike, a key that the config lacks, a value it cannot take, a key
        that a flag sets as well.
    """
    if not points:
        raise BadInput("get_hyper returns no points: give it at least one {key: value}.")
    for i, point in enumerate(points):
        if clash := sorted(point.keys() & overrides.keys()):
            raise BadInput(f"--config.{clash[0]} is swept by get_hyper: leave the flag away.")
        if point in points[:i]:
            raise BadInput(f"Points {points.index(point)} and {i} of get_hyper are the same.")
        try:
            settings.validate(point_config(config, point))
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise BadInput(
                f"Point {i} of get_hyper, {dict(point)}, does not fit the config: "
                f"{' '.join(str(error).split())}"
            ) from error
    return [f"{i:03d}-{readable(point)}" for i, point in enumerate(points)]


def point_config(config: Any, point: Mapping[str, Any]) -> Any:
    """The config that the training of this point sees."""
    own = copy.deepcopy(config)
    for key in point:
        inner = own
        for part in key.split("."):
            if part not in inner:
                raise KeyError(f"there is no config.{key}")
            inner = inner[part]
    own.update_from_flattened_dict(dict(point))
    return own


def readable(point: Mapping[str, Any]) -> str:
    """learning_rate=0.001,margin=0.1; more of a key where its last part alone is ambiguous."""
    short = [sweep_table.short_key(key, point) for key in point]
    text = ",".join(f"{key}={value}" for key, value in zip(short, point.values(), strict=True))
    return re.sub(r"[^\w.,=+-]+", "_", text)[:NAME_LENGTH]


def number(index: str, count: int) -> int:
    if not index.isdecimal() or int(index) >= count:
        raise BadInput(f"--index={index}: the points are 0 to {count - 1}, see --list.")
    return int(index)


def as_flags(values: Mapping[str, Any]) -> Sequence[str]:
    return [f"--config.{key}={value}" for key, value in values.items()]


def claim(workdir: epath.Path, points: Sequence[Mapping[str, Any]], lead: bool) -> None:
    """Marks the folder as this sweep's.

    Raises:
      BadInput: it is another one's.
    """
    path = workdir / POINTS_FILE
    own = json.loads(json.dumps([dict(point) for point in points]))
    if path.exists() and files.read_json(path, "name another folder for the sweep") != own:
        raise BadInput(
            f"{workdir} holds a sweep over other points ({path}): choose another --workdir."
        )
    if lead:
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(path, own)


# ------------------------------------------------------------------------- the trainings


def run(
    trainings: Sequence[tuple[str, Sequence[str], Any]], workdir: epath.Path, lead: bool
) -> int:
    """Runs (name, command, config) one after the other; returns the sweep's exit code."""
    crashed = refused = through = 0
    with Signals() as signals:
        for name, command, config in trainings:
            if is_through(workdir / name, config):
                logging.info("%s is through", name)
                through += 1
                continue
            if signals.asked:
                return os.EX_TEMPFAIL
            logging.info("%s starts", name)
            code = signals.wait(subprocess.Popen(command))
            failed = workdir / name / FAILED_FILE
            if lead and code not in (0, os.EX_TEMPFAIL):
                failed.parent.mkdir(parents=True, exist_ok=True)
                values = json.loads(config.to_json_best_effort())
                files.write_json(failed, {"exit_code": code, "config": values})
            elif lead:
                failed.unlink(missing_ok=True)
            if code == os.EX_TEMPFAIL or (code and signals.asked):
                return os.EX_TEMPFAIL
            logging.info("%s ended with exit code %d", name, code)
            # Diverged: the loss was no number any more, which for a sweep is a result.
            diverged = code == 2 and is_through(workdir / name, config)
            through += code == 0 or diverged
            refused += code == 2 and not diverged
            crashed += code not in (0, 2)
    return 1 if crashed else 2 if refused else 0


def is_through(folder: epath.Path, config: Any) -> bool:
    """Whether this very point was trained to its end, or until its loss was no number any more."""
    values = json.loads(config.to_json_best_effort())
    if (folder / "result.json").exists():
        # With another config, say a larger total, the training itself knows what is left to do.
        return files.read_json(folder / "config.json", DELETE) == values
    if (folder / FAILED_FILE).exists() and telemetry.read_metrics(folder):
        return files.read_json(folder / FAILED_FILE, DELETE) == {"exit_code": 2, "config": values}
    return False


class Signals:
    """Hands SIGTERM on to the training that runs, which saves and ends with 75."""

    def __init__(self) -> None:
        self.asked = False
        self._child: subprocess.Popen | None = None
        self._before: dict[int, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> "Signals":
        self._before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._heard),
            signal.SIGINT: signal.signal(signal.SIGINT, self._heard),
        }
        return self

    def __exit__(self, *error: object) -> None:
        for signal_number, handler in self._before.items():
            signal.signal(signal_number, handler)

    def _heard(self, signal_number: int, frame: Any) -> None:
        del frame
        self.asked = True
        # A terminal sends Ctrl-C to the training as well, and two of them would kill it.
        if self._child is not None and signal_number == signal.SIGTERM:
            self._child.send_signal(signal_number)

    def wait(self, child: subprocess.Popen) -> int:
        """The child's exit code, as a shell would tell it: 128 + N for signal N."""
        self._child = child
        if self.asked:
            child.send_signal(signal.SIGTERM)  # the signal came just before the child
        code = child.wait()
        self._child = None
        return code if code >= 0 else 128 - code


if __name__ == "__main__":
    cli.run(main)
