"""Pictures a second of the whole training step, beside the same model in PyTorch.

    python -m benchmarks.train_step [--quick] [--only SECTION] [--minutes N] [--variants B/16,L/14]
        [--remat dots,none,full] [--attention auto,xla] [--tasks contrastive,multitask]
        [--batch N] [--entities N] [--unroll N]

Prints a table for people and then one JSON object per figure; exits 1 when a figure that was
asked for does not hold.  Sections:

* speed: the supervised step by rematerialisation and attention, then the other tasks the first
  way; img/s and MFU (model arithmetic, nothing computed again, over the device's peak).
* torch: the same model, batch and optimiser in PyTorch (`benchmarks.torch_vit`), in the same run.
* patch_dropout: the supervised step that looks at half of the patches, over the one that looks at
  all; a CPU runs two layers of the variant in float32.
* attention: forward and backward of attention alone by each implementation
  (`benchmarks.attention_case`), and which one `mofi_jax.model.attention.AUTO` should name.

Each measurement is a process of its own with the whole memory of the device; what does not fit is
tried again with half the batch.  It needs jax, flax and optax, and PyTorch for its section.

On NVIDIA GPUs the processes start with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 (jax takes 0.75 left to
itself); XLA_FLAGS come from the environment.  Of those that docs.jax.dev names among its GPU
performance tips, ``--xla_gpu_triton_gemm_any=true`` is worth a try on one GPU and
``--xla_gpu_enable_latency_hiding_scheduler=true`` on several.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import figures
from benchmarks.step_case import Case
from mofi_jax.model import mofi

SECTIONS = ("speed", "torch", "patch_dropout", "attention")

# Halved where they do not fit.
BATCH = {"B/16": 1024, "L/14": 256, "H/14": 128, "Ti/16": 16}
ASKED = {"B/16": 3750, "L/14": 813, "H/14": 394}  # img/s on one H200, supervised
ASKED_OVER_TORCH = {"B/16": 1.13, "L/14": 1.10, "H/14": 1.10}  # times its img/s, likewise
ASKED_OF_PATCH_DROPOUT = 1.7  # times the img/s at 0.5, ViT-B/16

Result = dict[str, Any]


class Runner:
    """Starts measurements as processes, as long as there is time."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes
        self.cache = tempfile.TemporaryDirectory(prefix="train_step_")
        self.environment = {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
            # What XLA finds out about a matrix product in one process serves the next ones.
            "JAX_COMPILATION_CACHE_DIR": self.cache.name,
            **os.environ,
        }

    def run(self, module: str, case: dict[str, Any]) -> Result | None:
        """What ``python -m module CASE`` printed; {"error": ...}; None when the time is up."""
        left = self.end - time.monotonic()
        if left <= 0:
            return None
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, json.dumps(case)],
                env=self.environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=left,
            )
        except subprocess.TimeoutExpired:
            return None
        if done.returncode == 0:
            sys.stderr.write(done.stderr if "torch.compile does not" in done.stderr else "")
            return json.loads(done.stdout.splitlines()[-1])
        signs = ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "Out of memory")
        if done.returncode == -9 or any(sign in done.stderr for sign in signs):
            return {"error": "out of memory"}
        print(done.stderr[-3000:], file=sys.stderr)
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        return {"error": lines[-1][:300] if lines else f"exit code {done.returncode}"}

    def platform(self) -> str:
        """Jax's, asked in a process that does not keep the device's memory."""
        code = "import jax; print(jax.default_backend())"
        asked = [sys.executable, "-c", code]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    def fit(self, case: Case) -> tuple[Case, Result | None]:
        """Measures the case with its batch or the largest half of a half of it that fits."""
        result = self.run("benchmarks.step_case", dataclasses.asdict(case))
        while result and result.get("error") == "out of memory" and case.batch > 1:
            print(f"does not fit: {case}", flush=True)
            case = dataclasses.replace(case, batch=case.batch // 2)
            result = self.run("benchmarks.step_case", dataclasses.asdict(case))
        return case, self.told(str(case), result)

    def told(self, what: str, result: Result | None) -> Result | None:
        """The result, or None once it has been said why there is none."""
        if result is None:
            print(f"not measured, the time was up: {what}", flush=True)
        elif "error" in result:
            print(f"not measured, {result['error']}: {what}", flush=True)
            return None
        return result


def per_second(case: Case, result: Result) -> float:
    return case.batch / result["seconds"]


def device(result: Result) -> str:
    simulated = " simulated" if result["platform"] == "cpu" and result["devices"] > 1 else ""
    return f"{result['device']} x{result['devices']}{simulated}"


def on_h200(result: Result) -> bool:
    return "H200" in result["device"] and result["devices"] == 1


# ---------------------------------------------------------------------------- sections


def steps(report: figures.Report, runner: Runner, flags: argparse.Namespace) -> None:
    """Every variant, way and task, the most telling first, for the time may not do for all."""
    measured: dict[str, dict[Case, Result]] = {variant: {} for variant in flags.variants}
    torch: dict[str, tuple[int, Result | None]] = {}
    first_remat, first_attention = flags.remat[0], flags.attention[0]

    def add(variant: str, task: str, remat: str, attention: str) -> None:
        case, result = runner.fit(flags.case(variant, task, remat, attention))
        if result is not None:
            measured[variant][case] = result
            add_step(report, case, result)

    for variant in flags.variants:
        add(variant, "supervised", first_remat, first_attention)
        for attention in flags.attention[1:]:
            if not measured[variant]:  # the first one does not run here
                add(variant, "supervised", first_remat, attention)
    if "torch" in flags.sections:
        for variant in flags.variants:
            for case, result in measured[variant].items():
                torch[variant] = case.batch, add_torch(report, runner, case, result)
    if "speed" in flags.sections:
        for task in flags.tasks:
            for variant in flags.variants:
                for case in tuple(measured[variant])[:1]:
                    add(variant, task, case.remat, case.attention)
        ways = [(first_remat, attention) for attention in flags.attention[1:]]
        ways += [(remat, first_attention) for remat in flags.remat[1:]]
        for remat, attention in ways:
            for variant in flags.variants:
                # On devices without cuDNN "auto" was "xla".
                done = {(c.remat, r["attention"]) for c, r in measured[variant].items()}
                if (remat, attention) not in done:
                    add(variant, "supervised", remat, attention)
    for variant in flags.variants:
        add_best(report, measured[variant], torch.get(variant))


def add_step(report: figures.Report, case: Case, result: Result) -> None:
    where = device(result)
    used = "" if case.attention == result["attention"] else f" ({result['attention']})"
    report.add(f"{case}{used}", per_second(case, result), "img/s", where)
    rate = result["flops"] / result["seconds"] / result["devices"]
    if result["peak"] and case.dtype == "bfloat16":
        report.add("  MFU", rate / result["peak"], "", where)
    else:
        report.add("  model arithmetic per device", rate / 1e12, "TFLOP/s", where)
    report.add("  temporary memory per device", result["temporary_gib"], "GiB", where)
    report.add("  compile time", result["compile_seconds"], "s", where)


def torch_case(case: Case) -> dict[str, Any]:
    """What `benchmarks.torch_vit` wants to know."""
    model = mofi.VARIANTS[case.variant]
    return {
        **{name: getattr(model["image"], name) for name in ("width", "layers", "heads")},
        "patch_size": model["patch_size"],
        "embed_dim": model["embed_dim"],
        **{
            name: getattr(case, name)
            for name in ("image_size", "batch", "entities", "dtype", "groups", "steps")
        },
    }


def add_torch(report: figures.Report, runner: Runner, case: Case, result: Result) -> Result | None:
    """The same in PyTorch."""
    shape = torch_case(case)
    found = runner.told(
        f"PyTorch, {case.variant} B={case.batch:,}", runner.run("benchmarks.torch_vit", shape)
    )
    if found is not None:
        how = "compiled" if found["compiled"] else "eager"
        what = f"PyTorch {how}, tower of {found['tower']}: {case.variant} supervised"
        name = f"{what} B={case.batch:,}"
        report.add(name, case.batch / found["seconds"], "img/s", device(result))
    return found


def add_best(
    report: figures.Report, measured: dict[Case, Result], torch: tuple[int, Result | None] | None
) -> None:
    """The fastest supervised step of a variant against what is asked, and against PyTorch."""
    supervised = {c: r for c, r in measured.items() if c.task == "supervised"}
    if not supervised:
        return
    best = max(supervised, key=lambda case: per_second(case, supervised[case]))
    result = supervised[best]
    asked = f">= {ASKED[best.variant]}" if on_h200(result) and best.image_size == 224 else None
    report.add(f"fastest: {best}", per_second(best, result), "img/s", device(result), asked)
    if torch is None or torch[1] is None:
        return
    batch, other = torch
    same = {c: r for c, r in supervised.items() if c.batch == batch}
    best = max(same, key=lambda case: per_second(case, same[case]))
    ratio = other["seconds"] / same[best]["seconds"]
    over = ASKED_OVER_TORCH.get(best.variant)
    asked = f">= {over}" if over and on_h200(result) and other["compiled"] else None
    report.add(f"fastest of this batch / PyTorch: {best}", ratio, "x", device(result), asked)


def patch_dropout(report: figures.Report, runner: Runner, flags: argparse.Namespace) -> None:
    """Half of the patches against all, in the same run."""
    for variant in flags.variants:
        whole = flags.case(variant, "supervised", flags.remat[0], flags.attention[0])
        if runner.platform() == "cpu":
            whole = dataclasses.replace(
                whole, batch=16, entities=1_000, dtype="float32", layers=2, groups=3, steps=2
            )
        whole, all_of_them = runner.fit(whole)
        case, half = runner.fit(dataclasses.replace(whole, patch_dropout=0.5))
        if all_of_them is None or half is None or case.batch != whole.batch:
            continue
        for measured, result in ((whole, all_of_them), (case, half)):
            report.add(str(measured), per_second(measured, result), "img/s", device(result))
        asked = f">= {ASKED_OF_PATCH_DROPOUT}" if variant == "B/16" else None
        ratio = all_of_them["seconds"] / half["seconds"]
        report.add(f"patch_dropout 0.5 / 0: {variant}", ratio, "x", device(half), asked)


def attention(report: figures.Report, runner: Runner, flags: argparse.Namespace) -> None:
    """Milliseconds of attention's forward and backward pass by implementation."""
    for variant in flags.variants:
        case = flags.case(variant, "supervised", flags.remat[0], "auto")
        shape = mofi.VARIANTS[variant]
        image, text = shape["image"], shape["text"]
        tokens = (case.image_size // shape["patch_size"]) ** 2 + 1
        for tower, length, causal in ((image, tokens, False), (text, 77, True)):
            what = f"attention {variant}, {length} tokens, B={case.batch:,}"
            arguments = {
                "batch": case.batch,
                "length": length,
                "heads": tower.heads,
                "head_dim": tower.width // tower.heads,
                "causal": causal,
                "dtype": case.dtype,
            }
            result = runner.told(what, runner.run("benchmarks.attention_case", arguments))
            if result is None:
                continue
            for name, found in result["implementations"].items():
                if "error" in found:
                    print(f"{name} does not run here, {found['error']}: {what}")
                    continue
                report.add(f"{what}, {name}", 1000 * found["seconds"], "ms", device(result))
                error = f"  gradients, {name} vs float32"
                report.add(error, found["error_of_gradients"], "rel", device(result), "<= 0.03")
            print(f"-> {result['fastest']} for {what}; auto is {result['auto']} here")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = {"type": lambda text: [name for name in text.split(",") if name], "metavar": "A,B"}
    parser.add_argument("--quick", action="store_true", help="Ti/16 at 32 pixels in float32")
    parser.add_argument("--only", choices=SECTIONS, help="one section alone")
    parser.add_argument("--minutes", type=float, default=600, help="all ends by then")
    parser.add_argument("--variants", default=list(ASKED), **names)
    parser.add_argument("--tasks", default=["multitask", "contrastive"], **names)
    parser.add_argument("--remat", default=["dots", "none", "full"], **names)
    parser.add_argument("--attention", default=["auto", "xla"], **names)
    parser.add_argument("--batch", type=int, help="instead of one for each variant")
    parser.add_argument("--entities", type=int, default=100_000)
    parser.add_argument("--unroll", type=int, default=Case.unroll, help="layers without a loop")
    flags = parser.parse_args()
    flags.sections = (flags.only,) if flags.only else SECTIONS
    small = {"image_size": 32, "dtype": "float32", "groups": 3, "steps": 2} if flags.quick else {}
    if flags.quick:
        flags.variants, flags.entities = ["Ti/16"], 1000

    def case(variant: str, task: str, remat: str, attention: str) -> Case:
        return Case(
            variant=variant,
            task=task,
            batch=flags.batch or BATCH[variant],
            entities=flags.entities,
            remat=remat,
            attention=attention,
            unroll=flags.unroll,
            **small,
        )

    flags.case = case
    return flags


def main() -> int:
    flags = parse()
    if "torch" in flags.sections and importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed here: not compared with it")
        flags.sections = tuple(section for section in flags.sections if section != "torch")
    report, runner = figures.Report(), Runner(flags.minutes)
    if {"speed", "torch"} & set(flags.sections):
        steps(report, runner, flags)
    if "patch_dropout" in flags.sections:
        patch_dropout(report, runner, flags)
    if "attention" in flags.sections:
        attention(report, runner, flags)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
