"""The whole recipe on the bundled sample: noisy pairs in, scores and a model out.

    mofi quickstart            everything, in runs/quickstart/ of the current folder
    mofi quickstart --compare  supervised and contrastive training on the same labels, beside it

Each stage is one of the project's commands, printed as it runs, so that any of them can be copied
and changed.  A stage whose product is there is not run again; delete a folder and only what is
missing is made.  The figures end up in runs/quickstart/result.json, the report in index.html.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from configs.common import SAMPLE
from mofi_jax.common import cli, packages, processes
from mofi_jax.common.console import interrupts
from quickstart import report

OUT = "runs/quickstart"
MOFI = (sys.executable, "-m", "mofi_jax")  # also where the command itself is not installed
MODELS = ("contrastive_alt_text", "multitask")
COMPARED = ("supervised_entities", "contrastive_entities")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command, the file that exists once it has finished, and the stages it builds on.

    ``folder`` is removed before the stage is made anew; commands that know by themselves what is
    out of date (data preparation) have none.
    """

    name: str
    says: str
    product: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    folder: str = ""


def train(name: str, arguments: str) -> tuple[str, ...]:
    config = f"quickstart:{arguments}"
    return ("train", "--config", config, "--workdir", f"{OUT}/{name}")


DATA = f"{OUT}/data"
PREPARE = ("labels", "--workdir", DATA, "--config")
STAGES = (
    Stage(
        "pairs",
        "image-text pairs out of the tars, as a data set without labels",
        "data/i2t/1.0.0/dataset_info.json",
        (*PREPARE, "i2e:sample,dataset=i2t"),
    ),
    Stage(
        "contrastive_alt_text",
        "a CLIP model trained on the raw captions: it will choose the labels",
        "contrastive_alt_text/result.json",
        train("contrastive_alt_text", "task=contrastive,data=i2t"),
        needs=("pairs",),
        folder="contrastive_alt_text",
    ),
    Stage(
        "labels",
        "entities found in the captions, chosen by that model, written as I2E shards",
        "data/i2e/1.0.0/dataset_info.json",
        (*PREPARE, "i2e:sample", f"--config.clip={OUT}/contrastive_alt_text"),
        needs=("contrastive_alt_text",),
    ),
    Stage(
        "label_quality",
        "the labels against the sample's truth, which nothing else reads",
        "data/label_quality.json",
        (
            *("label-quality", "--workdir", DATA),
            *("--truth", f"{SAMPLE}/truth.jsonl.gz", "--classes", f"{SAMPLE}/classes.jsonl"),
        ),
        needs=("labels",),
    ),
    Stage(
        "multitask",
        "MOFI: entity softmax and contrastive loss on one embedding",
        "multitask/result.json",
        train("multitask", "task=multitask"),
        needs=("labels",),
        folder="multitask",
    ),
    Stage(
        "evaluation",
        "retrieval, entity and zero-shot scores beside raw pixels, with galleries and maps",
        "evaluation/result.json",
        (
            *("evaluate", "--config", "eval:sample"),
            *("--models", f"{OUT}/multitask", "raw_pixels", "--out", f"{OUT}/evaluation"),
        ),
        needs=("multitask",),
        folder="evaluation",
    ),
    Stage(
        "export",
        "a folder that transformers.CLIPModel loads",
        "export/result.json",
        (
            "export",
            "--model",
            f"{OUT}/multitask",
            "--format",
            "hf",
            "--out",
            f"{OUT}/export",
        ),
        needs=("multitask",),
        folder="export",
    ),
)
COMPARE_STAGES = tuple(
    Stage(
        f"{task}_entities",
        f"task={task} on the same I2E shards by the same config",
        f"{task}_entities/result.json",
        train(f"{task}_entities", f"task={task}"),
        needs=("labels",),
        folder=f"{task}_entities",
    )
    for task in ("supervised", "contrastive")
)


class Memory(threading.Thread):
    """Samples the resident memory of this process and all below it; ``peak`` is in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0
        self._stop_asked = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while True:
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:  # it ended between the listing and the reading
                    continue
            self.peak = max(self.peak, total)
            if self._stop_asked.wait(0.2):
                return

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()


def run_stages(stages: Sequence[Stage]) -> dict[str, dict[str, Any]]:
    """Runs what is missing; returns per stage its seconds and peak memory, also of earlier runs.

    A stage is left alone when its product exists, was made by the same command and configs, and no
    stage it builds on has run since.  One that was interrupted resumes.
    """
    record = pathlib.Path(OUT) / "stages.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    record.parent.mkdir(parents=True, exist_ok=True)
    ran: set[str] = set()
    for number, stage in enumerate(stages, 1):
        title = f"[{number}/{len(stages)}] {stage.name}: {stage.says}"
        made_by = fingerprint(stage)
        known = done.get(stage.name, {})
        current = known.get("made_by") == made_by and not ran & set(stage.needs)
        if current and (pathlib.Path(OUT) / stage.product).exists():
            print(f"{title} (done)", flush=True)
            continue
        print(f"\n{title}\n    mofi {' '.join(stage.command)}", flush=True)
        if not current and stage.folder:
            shutil.rmtree(pathlib.Path(OUT) / stage.folder, ignore_errors=True)
        ran.add(stage.name)
        # What an interrupted run had spent already counts too.
        resumes = current and not known.get("finished", True)
        spent = known.get("seconds", 0.0) if resumes else 0.0
        start, memory = time.monotonic(), Memory()
        memory.start()

        def note(finished: bool, name=stage.name, command=stage.command, made_by=made_by) -> None:
            done[name] = {
                "command": list(command),
                "made_by": made_by,
                "finished": finished,
                "seconds": round(spent + time.monotonic() - start, 2),  # noqa: B023
                "peak_rss_mb": round(memory.peak / 2**20),  # noqa: B023
            }
            temporary = record.with_suffix(".tmp")
            temporary.write_text(json.dumps(done, indent=2) + "\n")
            temporary.replace(record)

        note(finished=False)
        try:
            status = processes.wait_for([*MOFI, *stage.command])
        finally:
            memory.stop()
            note(finished=False)
        if status == interrupts.EXIT_CODE:
            cli.stopped()
        if status:
            print(f"\nstage {stage.name} failed; the same command resumes there", file=sys.stderr)
            sys.exit(status)
        note(finished=True)
    return {stage.name: done[stage.name] for stage in stages}


def fingerprint(stage: Stage) -> str:
    """Hash of what decides a stage's product here: its command and the configs."""
    digest = hashlib.sha256(" ".join(stage.command).encode())
    for path in sorted((packages.ROOT / "configs").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read(path: str) -> Any:
    return json.loads((pathlib.Path(OUT) / path).read_text())


def collect(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All figures of the quick start out of what the stages left behind."""
    quality = read("data/label_quality.json")
    multitask, raw_pixels = map(flatten, read("evaluation/result.json")["models"])
    retrieval = {"raw_pixels": scores_of(raw_pixels)}
    curve = [json.loads(line) for line in lines(f"{OUT}/multitask/metrics.jsonl")]
    # The first evaluation precedes the first step.
    retrieval["untrained"] = scores_of(next(line for line in curve if "retrieval_seen/map" in line))
    for name in (*MODELS[:1], *COMPARED, *MODELS[1:]):
        if name in MODELS or name in stages:
            retrieval[name] = scores_of(read(f"{name}/result.json")["scores"])
    parity = read("export/result.json")
    return {
        "seconds": round(sum(stages[s.name]["seconds"] for s in STAGES), 1),
        "peak_rss_mb": max(stages[s.name]["peak_rss_mb"] for s in STAGES),
        "labels": {
            name: {key: quality[name][key] for key in ("precision", "recall")}
            for name in ("text_only", "selected")
        },
        "retrieval": retrieval,
        "export": {"format": "hf", "max_abs_diff": parity["max_abs_diff"]},
        "scores": multitask,
        "stages": stages,
    }


def lines(path: str) -> list[str]:
    return pathlib.Path(path).read_text().splitlines()


def flatten(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an evaluated model as {"evaluator/metric": value}."""
    return {f"{e}/{m}": v for e, metrics in result["metrics"].items() for m, v in metrics.items()}


def scores_of(scores: Mapping[str, float]) -> dict[str, float]:
    """mAP of both sets by the GPR1200 protocol, and without the query among its own hits."""
    row = {}
    for name in report.SETS:
        row[name] = round(scores[f"retrieval_{name}/map"], 4)
        row[f"{name}_no_self"] = round(scores[f"retrieval_{name}/map_no_self"], 4)
    return row


def main(compare: bool = False) -> None:
    """Runs the stages that are missing; shows the figures.

    Args:
      compare: also trains each task alone on the chosen labels.
    """
    start = time.monotonic()
    compared = compare or all(
        (pathlib.Path(OUT) / stage.product).exists() for stage in COMPARE_STAGES
    )
    stages = run_stages(STAGES + (COMPARE_STAGES if compared else ()))
    result = collect(stages)
    result["shortfalls"] = report.shortfalls(result)
    (pathlib.Path(OUT) / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    (pathlib.Path(OUT) / "index.html").write_text(
        report.page(result, pathlib.Path(OUT)), encoding="utf-8"
    )
    print(f"\n{report.table(result)}\n")
    for sentence in result["shortfalls"]:
        print(f"falls short: {sentence}")
    print(
        f"{result['seconds']:.0f} s of work ({time.monotonic() - start:.0f} s now), at most "
        f"{result['peak_rss_mb']} MB of memory\n"
        f"report     {OUT}/index.html\n"
        f"data card  {DATA}/report/index.html\n"
        f"model      {OUT}/export (largest difference {result['export']['max_abs_diff']:.1e})"
    )


if __name__ == "__main__":
    cli.run(main)
