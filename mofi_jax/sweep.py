"""Trains every point of a sweep and compares them.

    mofi sweep --config sweeps/learning_rate --workdir S --list
    mofi sweep --config sweeps/learning_rate:short --workdir S --config.total="50 steps"

Beside ``get_config`` the config file has ``get_hyper(arg)``, the ordered list of points, each a
dict {dotted config key: value}, and ``METRIC``, the score that ranks them (higher is better).
Each point is trained in S/NAME/ by a process of its own, so that its memory is free afterwards; a
finished point is not trained again, an interrupted one resumes.  Flags such as
``--config.total=...`` hold for all points.  ``--list`` shows the points, ``--index=I`` runs one, as
in a SLURM array.  S holds

    sweep.json  {"metric", "best", "points": [{"name", "values", "state", "score", ...}]}
    sweep.md    the same as a table, best first
    index.html  the same as a page, with the score drawn over each key that has numbers

Exit codes: 0 all points are done (one that diverged counts), 75 preempted and saved (the same
command resumes), 130 the same by Ctrl-C, 2 bad input, 1 a point crashed.
"""

import copy
import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from mofi_jax import telemetry
from mofi_jax.common import cli, config_files, config_keys, files
from mofi_jax.common.console import interrupts
from mofi_jax.common.errors import BadInput
from mofi_jax.common.pages import numbers
from mofi_jax.common.pages import page as pages
from mofi_jax.training import run_folder, settings

FAILED_FILE = "failed.json"
DELETE = "delete this folder, and the sweep runs the point again"
NAME_LENGTH = 120  # a folder's name has room for 255 bytes


def main(
    config: Any,
    config_source: config_files.Source,
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
      index: the point to train, counted from 0; all of them if left out.
      list: shows the points and which are trained, and trains none.
      coordinator, processes, process: passed on to every training.
    """
    points, metric = load(config_source)
    if metric.partition("/")[0] not in config.evaluators:
        raise BadInput(
            f"METRIC={metric!r} in {config_source.given} is of no evaluator of the config: choose "
            f"EVALUATOR/SCORE of {', '.join(config.evaluators) or 'config.evaluators, now empty'}."
        )
    names = check(points, config, config_source.overrides)
    if index and not (index.isdecimal() and int(index) < len(points)):
        raise BadInput(f"--index={index}: the points are 0 to {len(points) - 1}, see --list.")
    chosen = [int(index)] if index else range(len(points))
    workdir = files.output_folder(workdir, "--workdir")
    if list:
        for i in chosen:
            print(f"{i:3d}  {state_of(workdir / names[i]):9s} {names[i]}")
        return 0
    workdir.mkdir(parents=True, exist_ok=True)
    lead = process in ("", "0")
    hosts = {"coordinator": coordinator, "processes": processes, "process": process}
    train = [sys.executable, "-m", "mofi_jax.train", f"--config={config_source.given}"]
    train += as_flags(config_source.overrides)
    train += [f"--{name}={value}" for name, value in hosts.items() if value]
    trainings = []
    for i in chosen:
        command = [*train, *as_flags(points[i]), f"--workdir={workdir / names[i]}"]
        trainings.append((names[i], command, point_config(config, points[i])))
    code = run(trainings, workdir, lead)
    if lead:
        print(write_table(workdir, names, points, metric))
    return code


def load(source: config_files.Source) -> tuple[Sequence[Mapping[str, Any]], str]:
    """The points and the metric of a config file."""
    module = config_files.module(source.path)
    for name, what in (("get_hyper", "the points of a sweep"), ("METRIC", "what ranks them")):
        if not hasattr(module, name):
            raise BadInput(
                f"{source.path} has no {name}, {what}: see configs/sweeps/learning_rate.py for one."
            )
    with config_files.failures_told(source.path):
        points = module.get_hyper(source.arguments or None)
    return points, module.METRIC


def check(
    points: Sequence[Mapping[str, Any]], config: Any, overrides: Mapping[str, Any]
) -> list[str]:
    """The folder of each point; all of them are checked before the first one costs anything.

    Raises BadInput: no points, two alike, a key or value that the config lacks or a flag sets.
    """
    if not points:
        raise BadInput("get_hyper returns no points: give it at least one {key: value}.")
    names = []
    for i, point in enumerate(points):
        if clash := sorted(point.keys() & overrides.keys()):
            raise BadInput(f"--config.{clash[0]} is swept by get_hyper: remove the flag.")
        if point in points[:i]:
            raise BadInput(f"Points {points.index(point)} and {i} of get_hyper are the same.")
        made, opened = copy.deepcopy(config), config_keys.open_groups(config)
        for key in point:
            config_keys.find(made, key, "the config", opened)  # which makes groups
        try:
            settings.validate(point_config(config, point))
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            reason = str(error).partition(" Other fields")[0]
            raise BadInput(
                f"Point {i} of get_hyper, {dict(point)}, does not fit the config: {reason}"
            ) from error
        text = ",".join(f"{key}={value}" for key, value in point.items())
        text = re.sub(r"[^\w.,=+-]+", "_", text)
        names.append(f"{i:03d}-{text[:NAME_LENGTH]}")
    return names


def point_config(config: Any, point: Mapping[str, Any]) -> Any:
    """The config that the training of this point sees; `config` is locked."""
    own = copy.deepcopy(config)
    own.update_from_flattened_dict(dict(point))
    return own


def as_flags(values: Mapping[str, Any]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in values.items()]


def run(
    trainings: Sequence[tuple[str, Sequence[str], Any]], workdir: epath.Path, lead: bool
) -> int:
    """Runs (name, command, config) one after the other; returns the sweep's exit code."""
    child: subprocess.Popen | None = None
    stopping = 0  # the exit code of a sweep that is to stop

    def stop(number: int, frame: Any) -> None:
        nonlocal stopping
        stopping = interrupts.EXIT_CODE if number == signal.SIGINT else os.EX_TEMPFAIL
        # A terminal sends Ctrl-C to the training as well, and two of them would kill it.
        if child and number == signal.SIGTERM:
            child.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    interrupts.expect("the sweep stops when its training has; once more stops both at once")
    codes, left = [], (os.EX_TEMPFAIL, interrupts.EXIT_CODE)
    try:
        for name, command, config in trainings:
            if is_done(workdir / name, config):
                logging.info("%s is done", name)
                continue
            if stopping:
                return stopping
            logging.info("%s starts", name)
            child = subprocess.Popen(command)
            if stopping:
                child.send_signal(signal.SIGTERM)  # the signal came just before the child
            code = child.wait()
            code = code if code >= 0 else 128 - code  # as a shell has it: 128 + N for signal N
            child = None
            failed = workdir / name / FAILED_FILE
            if lead and code not in (0, *left):
                failed.parent.mkdir(exist_ok=True)
                files.write_json(failed, {"exit_code": code, "config": run_folder.as_json(config)})
            elif lead:
                failed.unlink(missing_ok=True)
            if code in left or (code and stopping):
                return stopping or code
            logging.info("%s ended with exit code %d", name, code)
            # Diverged: the loss is no longer finite, which for a sweep is a result.
            codes.append(0 if is_done(workdir / name, config) else code)
    finally:
        interrupts.expect()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 1 if set(codes) - {0, 2} else max(codes, default=0)


def is_done(folder: epath.Path, config: Any) -> bool:
    """Whether this very point was trained to its end, or until its loss was no longer finite."""
    if (folder / "result.json").exists():
        # With another config, say a larger total, the training itself knows what is left to do.
        return files.read_json(folder / "config.json", DELETE) == run_folder.as_json(config)
    if (folder / FAILED_FILE).exists() and telemetry.read_metrics(folder):
        diverged = {"exit_code": 2, "config": run_folder.as_json(config)}
        return files.read_json(folder / FAILED_FILE, DELETE) == diverged
    return False


def write_table(
    workdir: epath.Path, names: Sequence[str], points: Sequence[Mapping[str, Any]], metric: str
) -> str:
    """Writes sweep.json, sweep.md and index.html, ranked by `metric`; returns the table."""
    rows = [
        table_row(workdir / name, point, metric) for name, point in zip(names, points, strict=True)
    ]
    ranked = sorted(rows, key=lambda r: (r["score"] is None, -(r["score"] or 0.0)))
    best = ranked[0]["name"] if ranked[0]["score"] is not None else None
    files.write_json(workdir / "sweep.json", {"metric": metric, "best": best, "points": ranked})

    keys = list(dict.fromkeys(key for point in points for key in point))
    lines = [[*keys, metric, "state", "folder"], ["---"] * (len(keys) + 3)]
    for r in ranked:
        score = "" if r["score"] is None else f"{r['score']:.4f}"
        values = [str(r["values"].get(key, "")) for key in keys]
        lines.append([*values, score, r["state"], r["name"]])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    files.write_text(workdir / "sweep.md", table + "\n")
    files.write_text(workdir / "index.html", page(ranked, keys, metric))
    return table


def page(ranked: Sequence[Mapping[str, Any]], keys: Sequence[str], metric: str) -> str:
    """The table as a page, with a chart for each key that has several numbers.

    Args:
      ranked: rows of `table_row`, the best first.
      keys: all that are swept.
    """
    charts = []
    for key in keys:
        points = [
            (float(r["values"][key]), r["score"], f"{r['name']}: {numbers.fixed(r['score'])}")
            for r in ranked
            if r["score"] is not None and isinstance(r["values"].get(key), int | float)
        ]
        best = {point[0]: point for point in reversed(points)}
        values = sorted(best)
        if len(values) < 2:
            continue
        # Powers are swept on a logarithmic axis, steps on an even one.
        ratios = values[0] > 0 and values[-1] >= 8 * values[0]
        axis = numbers.scale(values, "log" if ratios else "tight")
        places = [axis.at(value) for value in values]
        if min(b - a for a, b in itertools.pairwise(places)) > 0.15:
            axis = axis._replace(ticks=[(value, numbers.decimal(value)) for value in values])
        charts.append(
            {
                **{"key": key, "name": key.rpartition(".")[2], "x": axis, "dots": points},
                **{"y": numbers.scale([point[1] for point in points])},
                "best": [best[value] for value in values],
            }
        )
    return pages.fill(
        os.path.join(os.path.dirname(__file__), "sweep.html.j2"),
        {"points": ranked, "keys": keys, "metric": metric, "charts": charts},
        written,
    )


def written(value: Any) -> str:
    """A value of a key, numbers as pages write them."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return numbers.decimal(value) if number else str(value)


def table_row(folder: epath.Path, point: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """One point: what it is, how far it is, what it scored."""
    state = state_of(folder)
    values = {"name": folder.name, "values": dict(point), "state": state, "score": None}
    if state == "finished":
        path = folder / "result.json"
        result = files.read_json_object(path, DELETE)
        if not isinstance(result.get("scores"), dict) or not {"steps", "seconds"} <= result.keys():
            raise BadInput(f"{path} is not the result of a training: {DELETE}.")
        values |= {key: result[key] for key in ("scores", "steps", "seconds")}
        values["score"] = result["scores"].get(metric)
    return values


def state_of(folder: epath.Path) -> str:
    """finished, failed, started or waiting."""
    marks = (("result.json", "finished"), (FAILED_FILE, "failed"), ("model.json", "started"))
    return next((state for file, state in marks if (folder / file).exists()), "waiting")


if __name__ == "__main__":
    cli.run(main)
