"""Prepares data: image-text pairs in, ArrayRecord shards and a data card out.

    mofi labels --config i2e:sample,dataset=i2t --workdir W
    mofi labels --config i2e:sample --workdir W --config.clip=RUN

dataset=i2t writes the raw pairs, i2t/; dataset=i2e finds and chooses entities and writes the
labelled pairs, i2e/. The stages below read top to bottom; each skips what is finished, so the same
command run again, after a kill too, does only what is missing and ends in the same bytes.
W/result.json holds the counts of every stage, the sha256 of all shards and the seconds of this run.
"""

from mofi_jax.common import console

if __name__ == "__main__":
    console.begin("labels: loading the libraries for data")

import collections
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping

import ml_collections
from absl import logging

from data_prep import engine
from data_prep.card import stage as card_stage
from data_prep.dataset import evaluation, publish, shards, vocabulary
from data_prep.engine import executors
from data_prep.engine import slurm as slurm_jobs
from data_prep.filters import stage as filters_stage
from data_prep.kb import build as kb_build
from data_prep.linking import given
from data_prep.linking import stage as linking_stage
from data_prep.pairs import stage as pairs_stage
from data_prep.selection import choose, embed
from mofi_jax.common import cli, errors, files
from mofi_jax.data import ops
from mofi_jax.interop import from_hub


def main(
    config: ml_collections.ConfigDict,
    workdir: str,
    engine: str = "local",
    ray_address: str = "",
    slurm: str = "",
    slurm_accelerator: str = "",
) -> None:
    """The command: `build`, and its funnel for people to read.

    Args:
      workdir: all that is written; the same command with it goes on.
      engine: where the work is done: local (config.workers processes), ray or slurm.
      ray_address: of a running Ray cluster; without it Ray is started on this machine.
      slurm: what to ask SLURM for, as partition=cpu,time=240,array_parallelism=64 (minutes).
      slurm_accelerator: the same on top for the CLIP stage, as partition=gpu,gpus_per_node=1.
    """
    start = {
        "local": None,
        "ray": functools.partial(executors.Ray, ray_address or None),
        "slurm": functools.partial(slurm_jobs.Slurm, f"{workdir}/slurm", slurm, slurm_accelerator),
    }
    if engine not in start:
        raise errors.BadInput(f"--engine={engine} is unknown: choose {', '.join(start)}.")
    flags = {"ray_address": ray_address, "slurm": slurm, "slurm_accelerator": slurm_accelerator}
    for flag, value in flags.items():
        if value and not flag.startswith(engine):
            raise errors.BadInput(f"--{flag} is for --engine={flag.split('_')[0]}: give both.")
    result = build(config, workdir, start[engine])
    for stage, counts in result["stages"].items():
        told = [f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items() if n]
        logging.info("%s: %s", stage, ", ".join(told) or "none")
    print(funnel(result))


def build(
    config: ml_collections.ConfigDict,
    workdir: str,
    start: Callable[[], executors.Executor] | None = None,
) -> dict:
    """Runs all stages of `config.dataset`; returns what result.json holds.

    Args:
      config: see `configs/i2e.py`.
      workdir: the work directory.
      start: makes what runs the jobs; None is `config.workers` processes on this machine.

    Raises:
      BadInput: anything about the configuration or the input that makes it impossible.
    """
    started = time.monotonic()
    files.output_folder(workdir, "--workdir")
    if config.clip:
        config.clip = from_hub.model(config.clip)
    validate(config)
    stages: dict[str, dict[str, int]] = {}
    with engine.Engine(
        workdir,
        config.workers,
        executor=start() if start else None,
        failure_budget=config.failure_budget,
    ) as work:
        # ---------------------------------------------------------------------------------- pairs
        stages["pairs"] = engine.total_counts(pairs_stage.run(config, work))
        _check_rejects(stages["pairs"], config.reject_budget, work)

        # ------------------------------------------------------------------------------- entities
        if config.dataset == "i2e":
            kb_build.prepare(config, work)
            link = given.run if config.labels == "given" else linking_stage.run
            stages["links"] = engine.total_counts(link(config, work))
            _check_whole("links", stages["pairs"]["pairs"], stages["links"]["texts"], work)
            stages["labels"] = engine.total_counts(choose.run(config, work))
            _check_whole("labels", stages["pairs"]["pairs"], stages["labels"]["pairs"], work)
            stages["labels_final"] = engine.total_counts(filters_stage.run(config, work))
            stages["vocabulary"] = engine.total_counts(vocabulary.run(config, work))
        else:
            stages["dropped"] = engine.total_counts(filters_stage.drop_pictures(config, work))

        # --------------------------------------------------------------------------------- shards
        written = shards.run(config, work, config.dataset)
        stages["shards"] = engine.total_counts(written)
        if config.dataset == "i2e":
            stages["evaluation"] = engine.total_counts(evaluation.run(config, work))
            card_stage.run(config, work)
        if config.publish:
            publish.run(config, work, config.dataset)

        result = {
            "dataset": config.dataset,
            "stages": stages,
            "quarantined": work.quarantined,
            "lost_to_damage": lost_to_damage(stages["pairs"], work.quarantined),
            "shards_sha256": digest(written),
            "revisions": from_hub.revisions(),  # of what the Hugging Face hub was asked for
            "seconds": round(time.monotonic() - started, 1),
        }
        text = json.dumps(result, indent=1) + "\n"
        engine.write_durably(work.workdir / "result.json", text.encode())
    return result


# Of each stage, the counts that say how many pairs are left.
_FUNNEL = (
    ("pairs", "pairs", "pairs that can be used"),
    ("links", "linked", "with a candidate entity"),
    ("labels", "labelled", "with a label"),
    ("labels_final", "labelled", "left by the filters"),
    ("shards", "records", "written"),
)


def lost_to_damage(pairs: Mapping[str, int], quarantined: Mapping[str, int]) -> int:
    """How many pairs are known to be lost because a file or a shard is damaged.

    Args:
      pairs: counts of the stage pairs.
      quarantined: pairs lost with each shard in quarantine.
    """
    return pairs.get("pairs_missing", 0) + sum(quarantined.values())


def _check_rejects(counts: Mapping[str, int], budget: float, work: engine.Engine) -> None:
    """Raises BadInput where more of the samples are rejects than can be meant."""
    unusable = counts.get("rejected", 0) - counts.get("duplicate_keys", 0)
    total = counts.get("pairs", 0) + unusable
    if unusable <= budget * total and total:
        return
    reasons: collections.Counter[str] = collections.Counter()
    for path in engine.listed(work.workdir / "rejects"):
        rows = engine.read_table(path, ["stage", "reason"]).to_pylist()
        # Those of other stages are of an earlier run.
        reasons.update(row["reason"] for row in rows if row["stage"] in pairs_stage.STAGES)
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
    raise errors.BadInput(
        f"{unusable} of {total} samples cannot be used ({told or 'the sources are empty'}): see"
        f" {work.workdir / 'rejects'}, correct config.sources, or raise"
        f" config.reject_budget={budget} if that is as it should be."
    )


def _check_whole(stage: str, pairs: int, found: int, work: engine.Engine) -> None:
    """Raises ShardError where pairs are neither in a stage nor in quarantine."""
    late = [
        n for name, n in work.quarantined.items() if name.split("/")[0] not in pairs_stage.STAGES
    ]
    if found + sum(late) != pairs:
        raise engine.ShardError(
            f"{stage}/ holds {found} of {pairs} pairs, and {sum(late)} are in quarantine: remove"
            f" {work.workdir / stage} and run the same command again."
        )


def funnel(result: Mapping) -> str:
    """How many pairs are left after each step, as a table with bars."""
    stages = result["stages"]
    quarantined = result["quarantined"].items()
    lost = sum(n for name, n in quarantined if name.split("/")[0] in pairs_stage.STAGES)
    read = stages["pairs"]["pairs"] + stages["pairs"]["rejected"] + lost
    rows = [("pairs read", read)]
    rows += [(text, stages[stage][key]) for stage, key, text in _FUNNEL if stage in stages]
    shares = [count / max(read, 1) for _, count in rows]
    lines = [
        f"{text:<24}{count:>14,}{share:>8.1%}  {'█' * round(30 * share)}"
        for (text, count), share in zip(rows, shares, strict=True)
    ]
    if result["quarantined"]:
        lines.append(
            f"{len(result['quarantined'])} shards are in quarantine (see quarantine/): "
            + ", ".join([*result["quarantined"]][:5])
        )
    if result["lost_to_damage"]:
        # How many pairs a file holds that cannot be read at all, nobody knows.
        unread = any(name.startswith(("unpacked/", "scanned/")) for name, _ in quarantined)
        pairs = f"{'at least ' * unread}{result['lost_to_damage']:,} pairs"
        lines.append(f"{pairs} are lost to damaged files and shards")
    return "\n".join(lines)


def digest(manifests: list[dict]) -> str:
    """One sha256 over the paths and the sha256 of all outputs of the manifests."""
    lines = sorted(f"{o['sha256']}  {o['path']}\n" for m in manifests for o in m["outputs"])
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks every key before anything is written.

    Raises:
      BadInput: naming the first key that cannot be used.
    """
    _check(config.dataset in ("i2e", "i2t"), config, "dataset", "choose i2e or i2t")
    pairs_stage.find(config.sources, logging.debug)  # what is left out, the stage tells
    least = {
        "workers": 1,
        "min_side": 1,
        "max_aspect": 1,
        "max_pixels": 1,
        "max_caption_chars": 1,
        "rows_per_shard": 1,
        "max_side": 1,
        "shard_examples": 1,
        "vocab_size": 300,
    }
    if config.dataset == "i2e":
        least |= {"max_candidates": 1, "batch_size": 1, "max_labels": 1, "min_images": 1}
    for key, value in least.items():
        _check(config[key] >= value, config, key, f"give at least {value}")
    most = ops.MAX_PIXELS
    _check(config.max_pixels <= most, config, "max_pixels", f"give at most {most}")
    budget = config.failure_budget
    _check(0 <= budget < 1, config, "failure_budget", "give a share from 0 to below 1")
    _check(0 <= config.reject_budget <= 1, config, "reject_budget", "give a share from 0 to 1")
    _check(1 <= config.jpeg_quality <= 100, config, "jpeg_quality", "give 1 to 100")
    if config.publish:
        publish.check(config.publish)
    filters_stage.check(config)
    if config.dataset == "i2t":
        return
    kb_build.check_source(config.knowledge_base)
    kb_build.validate(config.kb, "config.kb")
    ways = ("clip", "text", "given")
    _check(config.labels in ways, config, "labels", f"choose {', '.join(ways)}")
    given.check(config)
    if config.labels != "given":
        linking_stage.check(config)
    choose.check(config)
    if embed.is_on(config):
        _check(
            bool(config.clip) and os.path.isdir(config.clip),
            config,
            "clip",
            "name the folder of a trained run or of a Hugging Face CLIP model (`hf download NAME"
            " --local-dir FOLDER` fetches one from the hub), or take --config.labels=text",
        )
        try:
            config.template.format(name="", description="")
        except (KeyError, IndexError, ValueError):
            _check(False, config, "template", "use {name} and {description} and no other braces")


def _check(holds: bool, config: ml_collections.ConfigDict, key: str, remedy: str) -> None:
    if not holds:
        raise errors.BadInput(f"config.{key}={config[key]!r} cannot be used: {remedy}.")


if __name__ == "__main__":
    cli.run(main)
