"""Kills training of several processes at random moments, resumes it, compares with one never cut.

    python -m benchmarks.kill_and_resume [--kills 10] [--quick]

Two figures, on real processes joined by jax.distributed over loopback, with simulated devices:

* kill -9 in a save, in an evaluation and between steps, in turn, of one process or of both; the
  same command goes on each time.  The final parameters have to be those of an uninterrupted run bit
  for bit, and every example has to be used once in each epoch.
* a run that moves from 2 processes x 4 devices to 1 x 8 and to 1 x 2, preempted by SIGTERM
  each time: the losses of its 20 steps have to be those of a run that stayed, within 1e-5.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from benchmarks import figures

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
PERIODS = {"checkpoint": 5, "evaluation": 7}  # steps
MOMENTS = ("in a save", "in an evaluation", "between steps")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Some processes with simulated devices each."""

    processes: int
    devices: int

    def start(
        self,
        folder: pathlib.Path,
        workdir: str,
        *,
        steps: int,
        pause: float,
        workers: int = 0,
        die_at: int = -1,
    ) -> list[subprocess.Popen]:
        """The same training in each process, with ``workers`` for data; each pauses before every
        step, and kills itself before step ``die_at``.  Logs lie in ``folder``/``workdir``.log/."""
        port = free_port()
        logs = folder / f"{workdir}.log"
        logs.mkdir(exist_ok=True)
        started = []
        for process in range(self.processes):
            command = [
                *(sys.executable, "-m", "benchmarks.kill_and_resume", "--child", str(folder)),
                *("--workdir", workdir, "--steps", str(steps), "--pause", str(pause)),
                *("--processes", str(self.processes), "--process", str(process)),
                *("--port", str(port), "--workers", str(workers), "--die_at", str(die_at)),
            ]
            log = open(logs / f"{time.time():.3f}-{process}.txt", "w")  # noqa: SIM115  the child's
            environment = {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(self.devices),
                "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
            }
            started.append(
                subprocess.Popen(
                    command,
                    cwd=REPOSITORY,
                    env={**os.environ, **environment},
                    stdout=log,
                    stderr=log,
                )
            )
        return started


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


def prepare(folder: pathlib.Path) -> None:
    """A data set whose examples are told apart by their text, and pictures to evaluate on."""
    from mofi_jax.data import ops
    from tests import datasets

    datasets.write(folder / "data", examples=48)
    pictures = folder / "pictures"
    pictures.mkdir()
    for entity in range(3):
        for i in range(3):
            picture = ops.encode_jpeg(datasets.drawing(entity, 50 + i), 95)
            (pictures / f"{entity}_{i}.jpg").write_bytes(picture)


# ---------------------------------------------------------------------------- one process


def child(args: argparse.Namespace) -> None:
    """The real training main; around it, notes of what each step uses and of evaluations."""
    from mofi_jax.distributed import preemption

    preemption.exit_on_sigterm()  # as the main does, before the imports
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    from mofi_jax import train
    from mofi_jax.common import cli
    from mofi_jax.common.errors import BadInput, Preempted
    from mofi_jax.evaluators import suite
    from mofi_jax.training import step as step_lib
    from tests import datasets

    folder = pathlib.Path(args.child)
    config = datasets.tiny_config(folder / "data", steps=args.steps)
    config.total = f"{args.steps} steps"
    config.data.workers, config.data.block = args.workers, 5
    config.checkpoint.every = f"{PERIODS['checkpoint']} steps"
    config.ema.decay = 0.9
    config.evaluators = {
        "mine": {
            "kind": "retrieval",
            "images": str(folder / "pictures"),
            "every": f"{PERIODS['evaluation']} steps",
        }
    }
    # Pixels without augmentation tell the drawings apart.
    config.data.train_ops = "decode|resize_short(16)"
    notes = folder / f"{args.workdir}.used.jsonl"

    make_train_step = step_lib.make_train_step

    def noted(*arguments: Any) -> Callable:
        update = make_train_step(*arguments)

        def run(train_state: Any, batch: Any) -> Any:
            step = int(np.asarray(train_state.step.addressable_shards[0].data))
            if step == args.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            rows = {}
            for shard in batch["image"].addressable_shards:
                start = shard.index[0].start or 0
                for i, pixels in enumerate(np.asarray(shard.data)):
                    rows[start + i] = zlib.crc32(pixels.tobytes())
            with open(notes, "a") as file:  # one write: two processes append
                file.write(json.dumps({"step": step, "rows": rows}) + "\n")
            time.sleep(args.pause)
            return update(train_state, batch)

        return run

    step_lib.make_train_step = noted
    run_all = suite.run_all

    def marked(*arguments: Any) -> Any:
        mark = folder / f"{args.workdir}.evaluating"
        mark.touch()
        try:
            time.sleep(args.pause)
            return run_all(*arguments)
        finally:
            mark.unlink(missing_ok=True)

    suite.run_all = marked
    where = {}
    if args.processes > 1:
        where = {
            "coordinator": f"localhost:{args.port}",
            "processes": str(args.processes),
            "process": str(args.process),
        }
    try:
        train.main(config, str(folder / args.workdir), **where)
    except BadInput as error:
        cli.complain(error)
    except Preempted as left:
        print(left)
        sys.exit(left.exit_code)


# ---------------------------------------------------------------------------- around it


def wait(started: list[subprocess.Popen], *, timeout: float = 600) -> list[int]:
    """Exit codes; once one has failed, the others have some seconds before they are killed."""
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in started):
        if any(process.poll() for process in started):
            deadline = min(deadline, time.monotonic() + 20)
        if time.monotonic() > deadline:
            for process in started:
                process.kill()
        time.sleep(0.05)
    return [process.wait() for process in started]


def used(folder: pathlib.Path, workdir: str) -> dict[int, dict[int, int]]:
    """step -> row of the global batch -> picture; of a step that was repeated, the last time."""
    steps: dict[int, dict[int, int]] = collections.defaultdict(dict)
    for line in (folder / f"{workdir}.used.jsonl").read_text().splitlines():
        try:
            note = json.loads(line)
        except json.JSONDecodeError:  # cut short by a kill
            continue
        steps[note["step"]].update({int(row): picture for row, picture in note["rows"].items()})
    return steps


def each_once(steps: dict[int, dict[int, int]], total: int, examples: int) -> bool:
    """Whether all steps are there and use every example exactly once in each epoch."""
    order = [steps[step][row] for step in range(total) for row in sorted(steps[step])]
    epochs = [order[i : i + examples] for i in range(0, len(order), examples)]
    if len(order) % examples:
        epochs.pop()
    return len(steps) == total and all(len(set(epoch)) == examples for epoch in epochs)


def saved(folder: pathlib.Path, workdir: str) -> list[int]:
    from mofi_jax.training import checkpoint

    return checkpoint.saved_steps(folder / workdir)


def parameters(folder: pathlib.Path, workdir: str) -> list[np.ndarray]:
    """Everything of the last checkpoint: parameters, optimizer, average."""
    import jax

    from mofi_jax.distributed import stored
    from mofi_jax.training import checkpoint

    last = folder.absolute() / workdir / checkpoint.FOLDER / str(saved(folder, workdir)[-1])
    trees = [stored.read_item(epath.Path(last / item)) for item in ("params", "optimizer", "ema")]
    return jax.tree.leaves(trees)


def bits_differ(some: list[np.ndarray], others: list[np.ndarray]) -> int:
    """In how many arrays."""
    return sum(
        a.shape != b.shape or a.tobytes() != b.tobytes() for a, b in zip(some, others, strict=True)
    )


def losses(folder: pathlib.Path, workdir: str) -> list[float]:
    from mofi_jax import telemetry

    return [line["loss"] for line in telemetry.read_metrics(folder / workdir) if "loss" in line]


def until(happens: Callable[[], bool], started: list[subprocess.Popen]) -> bool:
    """Waits for a moment; False if the run ended first."""
    while not happens():
        if any(process.poll() is not None for process in started):
            return False
        time.sleep(0.002)
    return True


def kill_at(
    moment: str, started: list[subprocess.Popen], folder: pathlib.Path, rng: random.Random
) -> bool:
    """Kills one process or all of them at a moment of this run; False if it ended first."""
    begun = len(losses(folder, "killed"))
    fresh = begun + rng.randint(1, 6)
    # Only once it has moved on: a run that is killed before its first save never arrives.
    if not until(lambda: len(losses(folder, "killed")) >= fresh, started):
        return False
    checkpoints = folder / "killed" / "checkpoints"
    happens = {
        "in a save": lambda: any(checkpoints.glob("*tmp*")),
        "in an evaluation": (folder / "killed.evaluating").exists,
        "between steps": lambda: True,
    }[moment]
    if not until(happens, started):
        return False
    time.sleep(rng.random() * (0.3 if moment == "between steps" else 0.02))
    victims = started if rng.random() < 0.5 else [rng.choice(started)]
    for process in victims:
        process.send_signal(signal.SIGKILL)
    time.sleep(0.5)
    for process in started:
        process.kill()  # as a launcher does with the rest
    for process in started:
        process.wait()
    (folder / "killed.evaluating").unlink(missing_ok=True)
    return True


def kills(folder: pathlib.Path, number: int, *, steps: int, seed: int) -> dict[str, Any]:
    """Runs the first figure; returns what came of it."""
    rng = random.Random(seed)
    cluster = Cluster(processes=2, devices=4)
    done: list[str] = []
    assert wait(cluster.start(folder, "whole", steps=steps, pause=0.0)) == [0, 0]
    while len(done) < number:
        started = cluster.start(folder, "killed", steps=steps, pause=0.05)
        moment = MOMENTS[len(done) % len(MOMENTS)]
        if not kill_at(moment, started, folder, rng):
            codes = wait(started)
            raise SystemExit(f"the run ended before kill {len(done) + 1} ({moment}): {codes}")
        done.append(moment)
        print(f"  killed {moment} after {len(losses(folder, 'killed'))} steps", flush=True)
    assert wait(cluster.start(folder, "killed", steps=steps, pause=0.0)) == [0, 0]
    return {
        "moments": done,
        "differing": bits_differ(parameters(folder, "whole"), parameters(folder, "killed")),
        "same_losses": losses(folder, "whole") == losses(folder, "killed"),
        "each_once": each_once(used(folder, "killed"), steps, 48),
        "same_steps": used(folder, "whole") == used(folder, "killed"),
    }


def moves(folder: pathlib.Path, clusters: list[Cluster], *, steps: int = 20) -> dict[str, Any]:
    """Runs the second figure: a run that stays on the last cluster, and one that goes through all.

    Returns what came of it.
    """
    assert not any(wait(clusters[-1].start(folder, "stayed", steps=steps, pause=0.0)))
    codes = []
    for i, cluster in enumerate(clusters):
        started = cluster.start(folder, "moved", steps=steps, pause=0.3)
        if i < len(clusters) - 1:
            goal = (i + 1) * steps // len(clusters)
            if not until(lambda goal=goal: len(losses(folder, "moved")) >= goal, started):
                raise SystemExit(f"the run ended before its move {i + 1}: {wait(started)}")
            started[0].send_signal(signal.SIGTERM)
        codes.append(wait(started))
    stayed, moved = np.array(losses(folder, "stayed")), np.array(losses(folder, "moved"))
    return {
        "codes": codes,
        "steps": len(moved),
        "difference": float(np.max(np.abs(moved - stayed) / np.abs(stayed))),
        "each_once": each_once(used(folder, "moved"), steps, 48),
        "same_steps": used(folder, "stayed") == used(folder, "moved"),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three kills, one of each kind")
    parser.add_argument("--keep", default="", help="folder to work in, which stays")
    for name in ("child", "workdir"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("steps", "processes", "process", "port", "workers", "die_at"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--pause", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(args)
        return 0
    number = 3 if args.quick else args.kills
    folder = pathlib.Path(args.keep or tempfile.mkdtemp(prefix="mofi_jax_kill_"))
    folder.mkdir(exist_ok=True)
    prepare(folder)
    report, device = figures.Report(), "cpu, 2 processes x 4 simulated devices"
    result = kills(folder, number, steps=20 * number + 40, seed=args.seed)
    report.add("kill -9 and resume: kills", len(result["moments"]), "times", device)
    report.add(
        "kill -9 and resume: arrays of the final state that differ in a bit",
        *(result["differing"], "arrays", device, "<= 0"),
    )
    report.add(
        "kill -9 and resume: each example of an epoch used once, in the same step",
        *(float(result["each_once"] and result["same_steps"]), "yes", device, ">= 1"),
    )
    result = moves(folder, [Cluster(2, 4), Cluster(1, 8), Cluster(1, 2)])
    device = "cpu, 2 x 4 -> 1 x 8 -> 1 x 2 simulated devices"
    report.add(
        "moved run: largest relative difference of 20 losses",
        *(result["difference"], "", device, "<= 1e-5"),
    )
    report.add(
        "moved run: each example of an epoch used once, in the same step",
        *(float(result["each_once"] and result["same_steps"]), "yes", device, ">= 1"),
    )
    report.add(
        "moved run: left with exit code 75, then finished with 0",
        *(float(result["codes"] == [[75, 75], [75], [0]]), "yes", device, ">= 1"),
    )
    if not args.keep:
        shutil.rmtree(folder)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
