"""How long a run takes to its first step, and how long the second time: the compiled programs stay.

    python -m benchmarks.start_up [--quick]

Starts the real training main twice for one step of ``configs/mofi.py`` on a small synthetic data
set; the second start finds the programs of the first (``config.compile_cache``).  Both times are
from the start of the process to the end of the first step, imports included.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks import figures

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def child(arguments: list[str]) -> None:
    """One start: the training main, and the time of its first finished step on stdout."""
    folder, workdir, variant, began = arguments
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    import jax

    from configs import mofi
    from mofi_jax import train
    from mofi_jax.training import step as step_lib

    config = mofi.get_config(f"task=multitask,variant={variant},res=224")
    config.update_from_flattened_dict(
        {
            "batch_size": 2,
            "total": "1 steps",
            "data.dir": folder,
            "data.threads": 1,
            "data.workers": 0,
            # bfloat16 is emulated on CPUs, so that the step itself would be most of the time.
            "model.dtype": "float32" if jax.default_backend() == "cpu" else "bfloat16",
        }
    )
    make_train_step = step_lib.make_train_step

    def timed(*arguments):
        update = make_train_step(*arguments)

        def run(*step):
            result = jax.block_until_ready(update(*step))
            took = time.time() - float(began)
            device = jax.devices()[0].device_kind
            print(json.dumps({"first_step": took, "device": device}), flush=True)
            os._exit(0)  # what comes after, a save of the whole state, is not what is measured
            return result

        return run

    step_lib.make_train_step = timed
    train.main(config, workdir)


def start(folder: pathlib.Path, workdir: pathlib.Path, variant: str) -> tuple[float, str]:
    """Seconds from the start of the process to the end of the first step; the device."""
    command = [sys.executable, "-m", "benchmarks.start_up", "--child", str(folder), str(workdir)]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [*command, variant, str(time.time())],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            told = json.loads(line)
            return told["first_step"], told["device"]
    raise SystemExit(done.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", default="B/16")
    parser.add_argument("--quick", action="store_true", help="Ti/16")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return 0
    from tests import datasets

    report = figures.Report()
    variant = "Ti/16" if args.quick else args.variant
    with tempfile.TemporaryDirectory(prefix="mofi_jax_start_") as name:
        folder = pathlib.Path(name)
        datasets.write(folder / "data")
        first, device = start(folder / "data", folder / "run", variant)
        again, _ = start(folder / "data", folder / "run", variant)
    report.add(f"{variant} multi-task: first start to the first step", first, "s", device)
    report.add(f"{variant} multi-task: second start to the first step", again, "s", device)
    report.add(
        f"{variant} multi-task: first start / second start",
        *(first / again, "x", device, ">= 3"),
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
