"""Selection: of all entities a caption may mean, those that the picture shows. links/ -> labels/

A candidate's fit is (text fit + w * picture fit) / (1 + w) + c * coherence (w = prototype_weight,
c = coherence_weight): how far the picture stands out among all pictures for the entity's text, and
for its other pictures, and whether it is something that pictures show at all (see `evidence`). Of
each mention the candidate with the highest fit + prior_weight * log(prior) stays: the prior decides
between senses of a word, never between words. Of those with cosine >= min_score and fit >= min_fit
the best is a label, and so are others within max_gap of it, up to max_labels.

No ground truth is read, neither here nor for the thresholds; new thresholds cost seconds, because
cosines and fits are kept.

    labels/  NNNNN.parquet  key, entities (rows of the knowledge base, best first), scores (cosine;
                            the prior for labels="text"), fits, reason (null when labelled)
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections
from etils import epath

from data_prep import engine, evidence
from mofi_jax import errors


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Chooses the labels of every pair: labels/NNNNN.parquet, and rejects with a reason.

    Reasons: no_mention, no_candidate, and for labels="clip" below_min_score, below_min_fit.

    Args:
      config: `labels`, "clip" (by picture) or "text" (the best prior of each mention); for "clip"
        also the fields of `Rule` and what `evidence.run` reads.
      work: the engine; its work directory holds pairs/, links/ and kb/.

    Returns:
      The manifests of labels/; counts `pairs`, `labelled` and each reason.

    Raises:
      BadInput: a value of `labels` that is neither; see also `evidence.run`.
    """
    workdir = work.workdir
    links = sorted(workdir.glob("links/*.parquet"))
    if config.labels == "text":
        tasks = [engine.Task(path.stem, (path,)) for path in links]
        settings = {"labels": "text"}
        return work.map_shards("labels", _label_by_text, tasks, settings)
    if config.labels != "clip":
        raise errors.BadInput(f"config.labels={config.labels!r} is unknown: choose clip or text.")
    evidence.run(config, work)
    tasks = [engine.Task(path.stem, (path, *evidence_files(workdir, path.name))) for path in links]
    settings = {"labels": "clip", **Rule.of(config)._asdict()}
    return work.map_shards("labels", _label_by_clip, tasks, settings)


# ------------------------------------------------------------------------------------- the decision


class Rule(NamedTuple):
    """The numbers of the decision; see the docstring of this file."""

    prototype_weight: float
    coherence_weight: float
    prior_weight: float
    min_fit: float
    min_score: float
    max_gap: float
    max_labels: int

    @classmethod
    def of(cls, config: Mapping) -> "Rule":
        return cls(*(config[name] for name in cls._fields))


class Evidence(NamedTuple):
    """What is known of one candidate entity of one picture; see `evidence`."""

    score: float  # cosine between picture and text
    text_fit: float
    picture_fit: float
    coherence: float

    def fit(self, rule: Rule) -> float:
        """One number in standard deviations."""
        fit = self.text_fit + rule.prototype_weight * self.picture_fit
        fit = fit / (1 + rule.prototype_weight) + rule.coherence_weight * self.coherence
        return round(fit, evidence.DECIMALS)


def choose(
    candidates: Sequence[Mapping], known: Mapping[int, Evidence], rule: Rule
) -> tuple[list[int], str | None]:
    """Decides on the labels of one picture.

    Args:
      candidates: {"mention": int, "entity": int, "prior": float} each, as in links/.
      known: the evidence of each candidate's entity.
      rule: weights and thresholds.

    Returns:
      (entities, best first; None), or ([], the reason).
    """
    if not candidates:
        return [], "no_candidate"
    likely = [c for c in candidates if known[c["entity"]].score >= rule.min_score]
    if not likely:
        return [], "below_min_score"
    best: dict[int, tuple] = {}  # by mention
    for candidate in likely:
        entity = candidate["entity"]
        fit = known[entity].fit(rule)
        strength = fit + rule.prior_weight * math.log(candidate["prior"])
        # Equal strengths (two senses of one text): the smaller row, for determinism.
        entry = (strength, -entity, fit)
        best[candidate["mention"]] = max(entry, best.get(candidate["mention"], entry))
    ranked = sorted({(-fit, -negated) for _, negated, fit in best.values() if fit >= rule.min_fit})
    if not ranked:
        return [], "below_min_fit"
    floor = ranked[0][0] + rule.max_gap
    return [entity for unfit, entity in ranked[: rule.max_labels] if unfit <= floor], None


def best_prior_entities(mentions: Sequence[Mapping], candidates: Sequence[Mapping]) -> list[int]:
    """Linking by text alone: the entity with the highest prior of each mention.

    Args:
      mentions: the mentions of a caption, as in links/.
      candidates: {"mention": int, "entity": int, "prior": float} each.

    Returns:
      Distinct entities (rows of the knowledge base) in the order of their mentions.
    """
    chosen: dict[int, None] = {}
    for mention in range(len(mentions)):
        own = [c for c in candidates if c["mention"] == mention]
        if own:
            chosen[min(own, key=lambda c: (-c["prior"], c["entity"]))["entity"]] = None
    return list(chosen)


def _label_by_text(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    rows = []
    for link in _rows(task.inputs[0]):
        entities = best_prior_entities(link["mentions"], link["candidates"])
        priors: dict[int, float] = {}
        for candidate in link["candidates"]:
            entity = candidate["entity"]
            priors[entity] = max(candidate["prior"], priors.get(entity, 0.0))
        reason = None if entities else "no_candidate" if link["mentions"] else "no_mention"
        scores = [priors[entity] for entity in entities]
        rows.append((link["key"], entities, scores, scores, reason))
    return _write_labels(task, outputs, rows)


def _label_by_clip(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    links_path, *evidence_paths = task.inputs
    rule = Rule.of(settings)
    by_key = read_evidence(*evidence_paths)
    rows = []
    for link in _rows(links_path):
        known = by_key.get(link["key"], {})
        entities, reason = choose(link["candidates"], known, rule)
        if not link["mentions"]:
            reason = "no_mention"
        scores = [known[entity].score for entity in entities]
        fits = [known[entity].fit(rule) for entity in entities]
        rows.append((link["key"], entities, scores, fits, reason))
    return _write_labels(task, outputs, rows)


def evidence_files(workdir: epath.Path, name: str) -> tuple[epath.Path, ...]:
    """What `read_evidence` takes for the shard whose parquet files are called `name`."""
    return (
        workdir / "scores" / name,
        workdir / "fits" / name,
        workdir / "coherence/entities.parquet",
    )


def read_evidence(scores: str, fits: str, coherence: str) -> dict[str, dict[int, Evidence]]:
    """The evidence of a shard by key and entity; arguments are files of `evidence`'s stages."""
    coherent = {row["entity"]: row["coherence"] for row in _rows(coherence)}
    return {
        score["key"]: {
            entity: Evidence(*values, coherent[entity])
            for entity, *values in zip(
                score["entities"],
                score["scores"],
                fit["text_fits"],
                fit["picture_fits"],
                strict=True,
            )
        }
        for score, fit in zip(_rows(scores), _rows(fits), strict=True)
    }


def _write_labels(task: engine.Task, outputs: engine.Outputs, rows: list[tuple]) -> dict[str, int]:
    import pyarrow as pa

    columns = zip(*rows, strict=True) if rows else [[]] * 5
    types = {
        "key": pa.string(),
        "entities": pa.list_(pa.int32()),
        "scores": pa.list_(pa.float32()),
        "fits": pa.list_(pa.float32()),
        "reason": pa.string(),
    }
    arrays = {
        name: pa.array(list(column), type_)
        for (name, type_), column in zip(types.items(), columns, strict=True)
    }
    outputs.write_table(f"labels/{task.name}.parquet", pa.table(arrays))
    rejects = [(row[0], row[4]) for row in rows if row[4] is not None]
    outputs.write_rejects(rejects)
    counts = {"pairs": len(rows), "labelled": len(rows) - len(rejects)}
    for _, reason in rejects:
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def _rows(path: str) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()
