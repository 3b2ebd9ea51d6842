"""Filters: what may not be published, what occurs twice, entities with too many or few pictures.

In this order, each counting what those before have left:

    dropped-DATASET/  NNNNN.parquet  key, reason. What is on the removal list (`removed`), pictures
                                     of evaluation sets (`decontaminate`), unsafe pairs (`safety`),
                                     copies of other pictures (`copies`), what is to be measured on
                                     (`held_out`). Of the labelled pairs, or of all pairs where
                                     there are no labels.
    capped/           NNNNN.parquet  key: pictures over the cap of their entities (`frequency`)
    frequent/                        entities with enough pictures (`frequency`)
    labels_final/     NNNNN.parquet  columns of labels/, labelled rows that are left

A stage whose filters are off does not run, and what an earlier run wrote for it is removed. Every
pair that goes stands in rejects/ once, with the first reason of: removed, eval_duplicate:SET, those
of `safety`, duplicate, held_out, over_cap, rare_entity.
"""

import os
from collections.abc import Sequence

import ml_collections
import numpy as np
from absl import logging
from etils import epath

from data_prep import engine
from data_prep.filters import (
    copies,
    decontaminate,
    eval_sets,
    frequency,
    held_out,
    nearest,
    removed,
    safety,
)
from data_prep.selection import embed
from mofi_jax.common import errors

FEEDBACKS = ("one_pass", "converge")
DROPS = ("label", "picture")
COPIES = ("keep", "exact")


# What to look at where a reason takes all.
_REMEDIES = {
    "removed": "config.removed",
    "eval_duplicate": "config.filters.eval_sets, max_hamming and eval_false_positives",
    "unsafe": "config.filters.safety",
    "blocked": "config.filters.safety",
    "rare_entity": "config.min_images",
    "held_out": "config.held_out",
    "barred": "config.label_kinds and never_labels",
    "no_": "that config.knowledge_base fits the captions, or config.given",
}
_SELECTION = "config.clip and the thresholds of the selection"


def check(config: ml_collections.ConfigDict) -> None:
    """Checks all that the filters read, files too.

    Raises:
      BadInput: naming the first key that cannot be used.
    """
    filters = config.filters
    removed.read(config.removed, "config.removed")
    eval_sets.find(filters.eval_sets.to_dict())
    _need(config.held_out >= 0, "held_out", config.held_out, "give 0 (none) or more")
    _need(0 <= filters.max_hamming <= 6, "filters.max_hamming", filters.max_hamming, "give 0 to 6")
    most, share = nearest.MOST_FALSE_POSITIVES, filters.eval_false_positives
    remedy = f"give a share from 0 (cosines are not compared) to {most}"
    _need(0 <= share <= most, "filters.eval_false_positives", share, remedy)
    _choose("filters.duplicates", filters.duplicates, COPIES)
    safety.check(filters.safety)
    for name in filters.safety.columns:
        remedy = "add the column to config.keep_columns"
        _need(name in config.keep_columns, f"filters.safety.columns.{name}", name, remedy)
    remedy = "it judges the embeddings of labels=clip, which this configuration does not make"
    _need(
        embed.is_on(config) or not filters.safety.head,
        "filters.safety.head",
        filters.safety.head,
        remedy,
    )
    if config.dataset != "i2e":
        return
    _need(config.min_images >= 1, "min_images", config.min_images, "give at least 1")
    _choose("min_images_feedback", config.min_images_feedback, FEEDBACKS)
    _choose("rare_entity_drops", config.rare_entity_drops, DROPS)
    cap = config.max_images
    remedy = f"give at least min_images={config.min_images}, or leave the flag out for no cap"
    _need(cap is None or cap >= config.min_images, "max_images", cap, remedy)


def _need(holds: bool, key: str, value: object, remedy: str) -> None:
    if not holds:
        raise errors.BadInput(f"config.{key}={value!r} cannot be used: {remedy}.")


def _choose(key: str, value: object, values: Sequence[str]) -> None:
    _need(value in values, key, value, f"choose {' or '.join(values)}")


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Writes dropped-i2e/, capped/, labels_final/ and rejects of each.

    Args:
      config: what `drop_pictures` reads; `min_images`, pictures an entity needs, with
        `min_images_feedback` and `rare_entity_drops`, `max_images` or None (see `frequency`);
        `seed`.
      work: the engine; its work directory holds labels/, and pairs/ for filters of pictures.

    Returns:
      The manifests of dropped-i2e/, capped/ and labels_final/; counts: those of `drop_pictures`,
      `over_cap`, `labelled`, `rare_entity`.

    Raises:
      BadInput: see `check`.
    """
    check(config)
    written = drop_pictures(config, work)
    folders = ["labels", *(["dropped-i2e"] if written else [])]
    if config.max_images is None:
        _clear(work, "entity_counts", "capped")
    else:
        shards = engine.aligned(work.workdir, *folders)
        written += frequency.cap(work, shards, config.max_images, config.seed)
        folders.append("capped")
    shards = engine.aligned(work.workdir, *folders)
    frequent = frequency.find_frequent(
        work, shards, config.min_images, config.min_images_feedback, config.rare_entity_drops
    )
    tasks = [engine.Task(files[0].stem, (frequent, *files)) for files in shards]
    settings = {"rare_entity_drops": config.rare_entity_drops}
    written += work.map_shards("labels_final", _drop_rare, tasks, settings)
    taken = losses(work.workdir, "i2e")
    labelled = engine.total_counts(written).get("labelled", 0) + sum(count for _, count in taken)
    for reason, count in taken:
        # Of more than half people want to know at once.
        log = logging.warning if 2 * count > labelled else logging.info
        log(
            "filters: %d of %d labelled pairs (%.1f %%) go as %s",
            *(count, labelled, 100 * count / labelled, reason),
        )
    return written


def losses(workdir: epath.Path, dataset: str) -> list[tuple[str, int]]:
    """How many pairs each filter takes: (reason, pairs), in the order of the filters."""
    found: dict[str, int] = {}
    for stage in (f"dropped-{dataset}", *(("capped", "labels_final") if dataset == "i2e" else ())):
        counts = engine.total_counts(engine.read_manifests(workdir, stage))
        for name, count in counts.items():
            # With its layer a picture of an evaluation set is counted once more.
            if name not in ("candidates", "dropped", "labelled") and name.count(":") < 2:
                found[name] = count
    return [(name, count) for name, count in found.items() if count]


def why_empty(workdir: epath.Path, dataset: str) -> str:
    """One sentence about a work directory in which no pair is left for a data set."""
    taken = losses(workdir, dataset)
    of = f"{sum(count for _, count in taken):,} {'labelled ' * (dataset == 'i2e')}pairs"
    if not taken:
        counts = engine.total_counts(engine.read_manifests(workdir, "labels"))
        of = f"{counts.pop('pairs', 0):,} pairs"
        taken = [(name, count) for name, count in counts.items() if count and name != "labelled"]
    told = ", ".join(f"{count:,} are {reason}" for reason, count in taken) or "there is none"
    reason = max(taken, key=lambda one: one[1], default=("", 0))[0].partition(":")[0]
    remedy = next((key for name, key in _REMEDIES.items() if reason.startswith(name)), _SELECTION)
    return f"No pair is left of {of} ({told}): check {remedy}."


def drop_pictures(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Writes dropped-DATASET/: pictures that go whatever their labels are.

    Args:
      config: `held_out` and `seed`: see `held_out`; `removed`: see `removed`; `filters`: see
        `decontaminate.match_sets` and `safety.run`; `filters.duplicates`, "keep" or "exact": of
        equal pictures the one with the smallest key stays. `dataset`: "i2e", of the pairs with a
        label in labels/, or "i2t", of all.
      work: the engine; its work directory holds pairs/ and, for i2e, labels/ and embeddings/;
        perhaps removed/.

    Returns:
      The manifests, none where no such filter is on; counts `candidates`, `dropped`, each reason,
      and of the pictures of evaluation sets `eval_duplicate:SET:LAYER`, where a picture that is in
      two sets counts for both.
    """
    filters = config.filters
    labelled = config.dataset == "i2e"
    first = "labels" if labelled else "pairs"
    shards = [path.stem for (path,) in engine.aligned(work.workdir, first)]
    stages = []
    if lists := removed.lists(work.workdir, config.removed):
        removed.run(work, lists, filters.max_hamming, shards)
        stages.append("takedowns")
    if filters.eval_sets:
        stages += decontaminate.match_sets(config, work, shards)
    if safety.is_on(filters.safety):
        safety.run(config, work, shards)
        stages.append("unsafe")
    if filters.duplicates == "exact":
        shards = [files[0].stem for files in engine.aligned(work.workdir, first, *stages)]
        copies.run(work, shards, labelled, stages)
        stages.append("copies")
    if config.held_out:
        held_out.run(work, shards, config.held_out, config.seed)
        stages.append("held_out")
    made_for = {"eval_matches": ["eval_hashes"], "eval_cosines": ["eval_embeddings"]}
    made_for["eval_cosines"] += ["eval_nearest", "eval_spread", "eval_limits"]
    made_for |= {"takedowns": [], "unsafe": []}
    made_for["copies"] = ["copy_rows", "copy_found", "copy_shards"]
    made_for["held_out"] = ["held_out_rows"]
    off = [
        folder for stage in made_for if stage not in stages for folder in (stage, *made_for[stage])
    ]
    dropped = f"dropped-{config.dataset}"
    _clear(work, *off, *([] if stages else [dropped]))
    if not stages:
        return []
    tasks = [
        engine.Task(files[0].stem, files) for files in engine.aligned(work.workdir, first, *stages)
    ]
    return work.map_shards(dropped, _drop, tasks, {"stages": stages, "labelled": labelled})


def _clear(work: engine.Engine, *stages: str) -> None:
    """Removes what an earlier run wrote for stages that are off now."""
    for stage in stages:
        if (work.workdir / stage).exists():
            work.map_shards(stage, _drop, [], {})


def _drop(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    """Gathers what the stages found; of several reasons the first counts."""
    candidates_path, *paths = task.inputs
    if settings["labelled"]:
        table = frequency.read_candidates(candidates_path, columns=["key"])
    else:
        table = engine.read_table(candidates_path, columns=["key"])
    keys = table["key"].to_pylist()
    candidates = set(keys)
    counts = {"candidates": len(keys), "dropped": 0}
    found: dict[str, str] = {}

    def count(name: str) -> None:
        counts[name] = counts.get(name, 0) + 1

    for stage, path in zip(settings["stages"], paths, strict=True):
        for row in engine.read_table(path).to_pylist():
            if row["key"] not in candidates:
                continue
            if "set" in row:
                found.setdefault(row["key"], f"eval_duplicate:{row['set']}")
                count(f"eval_duplicate:{row['set']}:{row['layer']}")
            else:
                found.setdefault(row["key"], "duplicate" if stage == "copies" else row["reason"])
    rows = [(key, found[key]) for key in keys if key in found]
    counts["dropped"] = len(rows)
    for _, reason in rows:
        count(reason)
    table = engine.rejects_table(outputs.stage, rows).drop_columns("stage")
    outputs.write_table(f"{outputs.stage}/{task.name}.parquet", table)
    outputs.write_rejects(rows)
    return counts


def _drop_rare(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa
    import pyarrow.compute as pc

    frequent_path, labels_path, *dropped = task.inputs
    table = frequency.read_candidates(labels_path, *dropped)
    entities, row = frequency.labels_of(table)
    known = np.isin(entities, engine.read_table(frequent_path)["entity"])
    if settings["rare_entity_drops"] == "picture":
        with_rare = np.zeros(len(table), bool)
        with_rare[row[~known]] = True
        known &= ~with_rare[row]
    left = np.bincount(row[known], minlength=len(table))
    final = table.select(["key"])
    rejects = [(key, "rare_entity") for key in final.filter(pa.array(left == 0))["key"].to_pylist()]
    offsets = pa.array(np.concatenate([[0], np.cumsum(left)]), pa.int32())
    columns = {}
    for name in table.column_names:
        column = table[name]
        if pa.types.is_list(column.type):
            values = pc.list_flatten(column).filter(pa.array(known)).combine_chunks()
            column = pa.ListArray.from_arrays(offsets, values, type=column.type)
        columns[name] = column
    kept = pa.table(columns, schema=table.schema).filter(pa.array(left > 0))
    outputs.write_table(f"labels_final/{os.path.basename(labels_path)}", kept)
    outputs.write_rejects(rejects)
    return {"labelled": len(kept), "rare_entity": len(rejects)}
