"""Selection: of all entities a caption may mean, those that the picture shows. links/ -> labels/

A candidate is a label as far as it is probable that its mention means it and that the picture shows
it: p = share * odds / (1 + the odds of the caption's mentions), odds = q / (1 - q), where

    share  what the mention means, of all senses of the name: by its prior, by how much the pictures
           of each sense look like those of its kin (`senses`), and by how well this one fits each
    q      whether the picture shows it (`visibility`): by how far it stands out for the entity
           (`z_scores`), and whether that is something that pictures show at all; times p(the name
           means anything in the base)

Of each mention the candidate with the highest share * q counts. The mentions of a caption are
explanations of one picture: what one of them explains, the others need not. Labels are those with
p >= min_probability, the best max_labels of them. With target_precision the threshold is raised
until labels have at least this p on average, over the whole data set.

What `label_kinds` and `never_labels` rule out takes its share of a mention, and is no label.

No ground truth is read, neither here nor for the thresholds; new thresholds cost seconds, because
the evidence is kept.

    precision_parts/  NNNNN.npy float64 [2, 1000]: labels by p, and the sum of p; of a run of shards
    labels/      NNNNN.parquet  key, entities (rows of the knowledge base, best first), scores
                 (cosine), z_scores, probabilities (for labels by text alone all three are the
                 prior), reason (null when labelled)
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import NamedTuple

import ml_collections
import numpy as np
from absl import logging
from etils import epath

from data_prep import engine
from data_prep.kb import kinds
from data_prep.linking import rows as link_rows
from data_prep.selection import admissible, embed, senses, twins, visibility, z_scores
from mofi_jax.common import errors

if typing.TYPE_CHECKING:
    import pyarrow as pa

_STEPS = 1000  # of probabilities, where a threshold may lie
_TIES = 9  # decimals: what differs beyond, by the last bits of products, is equal


def check(config: ml_collections.ConfigDict) -> None:
    """Checks what `run` reads.

    Raises:
      BadInput: naming the first key that cannot be used.
    """
    for name in ("min_probability", "target_precision"):
        if not 0 <= (config[name] or 0) < 1:
            raise errors.BadInput(
                f"config.{name}={config[name]!r} cannot be used: give a number from 0 to below 1."
            )
    for name in ("prototype_weight", "prior_weight", "kin_weight"):
        if not 0 <= config[name] < np.inf:
            raise errors.BadInput(
                f"config.{name}={config[name]!r} cannot be used: give 0, which turns it off, or"
                " more."
            )
    if config.target_precision and not embed.is_on(config):
        raise errors.BadInput(
            f"config.target_precision={config.target_precision!r} cannot be used: what is right the"
            " picture says, which nothing looks at here. Name config.clip and labels=clip or given."
        )
    unknown = sorted({*config.label_kinds} - {*kinds.KINDS})
    if unknown:
        raise errors.BadInput(
            f"config.label_kinds has {unknown[0]!r}: choose among {', '.join(kinds.KINDS)}."
        )


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Chooses the labels of every pair: labels/NNNNN.parquet, and rejects with a reason.

    Reasons: no_mention, no_candidate, barred (all that it may be is no label), by text alone
    likely_nothing (each mention rather means nothing in the base), and where pictures
    are embedded, picture_unreadable (since pairs/ was written), below_min_probability.

    Args:
      config: `labels`, `label_kinds`, `never_labels`, and where pictures are embedded
        (`embed.is_on`) also the fields of `Rule`, `target_precision`, `prototype_weight` and what
        `embed.run` reads; elsewhere the best prior of each mention counts.
      work: the engine; its work directory holds pairs/, links/ and kb/.

    Returns:
      The manifests of labels/; counts `pairs`, `labelled` and each reason.

    Raises:
      BadInput: see `embed.run`.
    """
    workdir = work.workdir
    links = engine.listed(workdir / "links")
    barred = admissible.run(config.label_kinds, config.never_labels, work)
    if not embed.is_on(config):
        tasks = [engine.Task(path.stem, (path, barred)) for path in links]
        settings = {"version": 6, "labels": "text"}
        return work.map_shards("labels", _label_by_text, tasks, settings)
    rule = Rule.of(config)
    embedded = embed.run(config, work)
    same = twins.run(work, embedded)
    shards = z_scores.run(work, embedded, same, config.prototype_weight)
    same = [path for path in same if path.stem in {*shards}]
    visibility.run(work, shards, same, rule.prior_weight, rule.kin_weight)
    files = [
        (workdir / "links" / name, *evidence_files(workdir, name))
        for name in (f"{shard}.parquet" for shard in shards)
    ]
    if config.target_precision:
        rule = _reach(work, rule, files, config.target_precision)
    tasks = [engine.Task(shard, own) for shard, own in zip(shards, files, strict=True)]
    settings = {"version": 5, "labels": "clip", **rule._asdict()}
    return work.map_shards("labels", _label_by_clip, tasks, settings)


def _reach(work: engine.Engine, rule: Rule, files: list[tuple], precision: float) -> Rule:
    """The rule with the lowest threshold whose labels have this probability on average."""
    tasks = [
        engine.Task(task.name, (*files[0][2:], *task.inputs))
        for task in engine.run_tasks(*[list(part) for part in zip(*files, strict=True)][:2])
    ]
    parts = work.map_shards("precision_parts", _count, tasks, rule._asdict(), keys=None)
    counts, sums = sum(
        (np.load(work.workdir / m["outputs"][0]["path"]) for m in parts), np.zeros((2, _STEPS))
    )[:, ::-1].cumsum(axis=1)
    reached = np.flatnonzero((sums >= precision * counts) & (counts > 0))
    step = _STEPS - 1 - reached[-1] if len(reached) else _STEPS - 1
    rule = rule._replace(min_probability=max(rule.min_probability, float(step / _STEPS)))
    logging.info("target_precision=%g: labels from p = %g on", precision, rule.min_probability)
    return rule


def _count(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    rule = Rule.of(settings)
    shared, files = task.inputs[:2], task.inputs[2:]
    counts = np.zeros((2, _STEPS))
    for links_path, z_scores_path in zip(*np.split(np.array(files), 2), strict=True):
        links = link_rows.read(links_path)
        known, _ = read_evidence(links, z_scores_path, *shared)
        found = choose(links, known, rule).probability
        step = np.minimum((found * _STEPS).astype(int), _STEPS - 1)
        counts += [np.bincount(step, w, minlength=_STEPS) for w in (np.ones(len(step)), found)]
    np.save(outputs.path(f"precision_parts/{task.name}.npy"), counts)
    return {"labels": int(counts[0].sum())}


def rule_in_force(workdir: epath.Path) -> Rule | None:
    """The rule by which labels/ were chosen, None where it was not by picture."""
    made = engine.read_manifests(workdir, "labels")
    settings = made[0]["settings"] if made else {}
    return Rule.of(settings) if settings.get("labels") == "clip" else None


# ------------------------------------------------------------------------------------- the decision


class Rule(NamedTuple):
    """The numbers of the decision; see the docstring of this file."""

    prior_weight: float
    kin_weight: float
    min_probability: float
    max_labels: int

    @classmethod
    def of(cls, config: Mapping) -> Rule:
        return cls(*(config[name] for name in cls._fields))


class Evidence(NamedTuple):
    """What is known of candidate entities of pictures: arrays float64 [c]."""

    score: np.ndarray  # cosine between picture and text; NaN: nothing is known
    z_score: np.ndarray
    kin: np.ndarray
    shown: np.ndarray  # whether the picture shows it, if it is meant; 0: it is no label
    fit: np.ndarray  # how many times likelier the picture is where it is meant


class Chosen(NamedTuple):
    """Labels by row, best first."""

    row: np.ndarray  # int64 [m], ascending
    entity: np.ndarray  # int32 [m]
    score: np.ndarray  # float64 [m]
    z_score: np.ndarray  # float64 [m]
    probability: np.ndarray  # float64 [m]


def choose(links: link_rows.LinkRows, known: Evidence, rule: Rule) -> Chosen:
    """Decides on the labels of all pictures of a shard: this is the decision, wherever it is made.

    min_probability changes nothing but where the labels of a picture end, the best being first.

    Args:
      links: the candidates.
      known: the evidence of each.
      rule: weights and thresholds.
    """
    weights = (rule.prior_weight, rule.kin_weight)
    share, means = senses.shares(links, known.kin, *weights, known.fit)
    possible = np.flatnonzero(known.shown > 0)  # NaN is not
    strongest = _strongest(links, share * known.shown, possible)
    # An entity of several mentions counts once, for that which means it most.
    keys = (-share, -np.round(share * means, _TIES), links.entity, links.row)
    once = strongest[np.lexsort([key[strongest] for key in keys])]
    once = once[link_rows.starts_run(links.row[once], links.entity[once])]
    row, shown = links.row[once], np.clip(known.shown[once] * means[once], 1e-6, 1 - 1e-6)
    odds = shown / (1 - shown)
    total = np.bincount(row, odds, minlength=len(links.keys))[row]
    probability = np.round(share[once] * odds / (1 + total), embed.DECIMALS)
    order = np.lexsort((links.entity[once], -probability, row))
    once, row, probability = once[order], row[order], probability[order]
    first = np.flatnonzero(link_rows.starts_run(row))
    place = np.arange(len(row)) - np.repeat(first, np.diff(first, append=len(row)))
    kept = (place < rule.max_labels) & (probability >= rule.min_probability)
    of = once[kept]
    numbers = (known.score[of], known.z_score[of], probability[kept])
    return Chosen(row[kept], links.entity[of], *numbers)


def choose_by_text(links: link_rows.LinkRows, barred: np.ndarray | None = None) -> Chosen:
    """The likeliest entity of each mention that means it at least as likely as nothing in the base.

    Nothing has the probability that the priors of a mention leave. No picture is looked at.

    Args:
      links: the candidates.
      barred: int32 [b], entities that are no labels; ascending.

    Returns:
      Distinct entities in the order of their mentions; score, z_score and probability are the
      highest prior that any mention gives the entity.
    """
    mention = link_rows.mention_of(links)
    nothing = 1 - np.bincount(mention, links.prior)[mention]
    likeliest = _strongest(links, links.prior, np.flatnonzero(links.prior >= nothing))
    likeliest = likeliest[~_is_barred(links, barred)[likeliest]]
    # Stable: of equal entities the one of the first mention comes first.
    by_entity = likeliest[np.lexsort((links.entity[likeliest], links.row[likeliest]))]
    once = by_entity[link_rows.starts_run(links.row[by_entity], links.entity[by_entity])]
    kept = once[np.lexsort((links.mention[once], links.row[once]))]
    known = link_rows.distinct(links)
    entities = int(known.entity.max(initial=0)) + 1
    codes = known.row * entities + known.entity
    places = np.searchsorted(codes, links.row[kept] * entities + links.entity[kept])
    prior = known.prior[places].astype(np.float64)
    return Chosen(links.row[kept], links.entity[kept], prior, prior, prior)


def _strongest(links: link_rows.LinkRows, strength: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Of each mention the strongest of the candidates `among`, of equal ones the smaller row."""
    keys = (links.entity, -np.round(strength, _TIES), links.mention, links.row)
    order = among[np.lexsort([key[among] for key in keys])]
    return order[link_rows.starts_run(links.row[order], links.mention[order])]


# ------------------------------------------------------------------------------------- the evidence


def evidence_files(workdir: epath.Path, name: str) -> tuple[epath.Path, ...]:
    """What `read_evidence` takes for the shard whose parquet files are called `name`."""
    shared = (workdir / stage / "entities.parquet" for stage in ("visibility", "barred"))
    return (workdir / "z_scores" / name, *shared)


def read_evidence(
    links: link_rows.LinkRows, *files: str | epath.Path
) -> tuple[Evidence, np.ndarray]:
    """What is known of each candidate of a shard, by its `evidence_files`; see `evidence`."""
    return evidence(links, *map(engine.read_table, files))


def evidence(
    links: link_rows.LinkRows, z_scores: pa.Table, visibility_of: pa.Table, barred: pa.Table
) -> tuple[Evidence, np.ndarray]:
    """What is known of candidates.

    Args:
      links: the candidates.
      z_scores, visibility_of, barred: rows of the stages of these names, the latter two ascending.

    Returns:
      The evidence, NaN for candidates of pictures that could not be scored; and, bool [n], which
      pictures were scored.
    """
    names = ("scores", "z_scores")
    (score, z_score), scored = visibility.read_z_scores(links, z_scores, names)
    entities = visibility_of["entity"].to_numpy()
    kin = link_rows.look_up(entities, visibility_of["kin"].to_numpy(), links.entity)
    mixture = link_rows.whole(visibility_of["mixture"]).flatten().to_numpy(zero_copy_only=False)
    mixture = mixture.reshape(len(entities), -1 if len(entities) else 0)
    shown, fit = visibility.shown(links.entity, z_score, entities, mixture)
    shown[_is_barred(links, barred["entity"].to_numpy()) & ~np.isnan(shown)] = 0
    return Evidence(score, z_score, kin, shown, fit), scored


def _is_barred(links: link_rows.LinkRows, barred: np.ndarray | None) -> np.ndarray:
    """bool [c]."""
    return np.isin(links.entity, () if barred is None else barred)


# --------------------------------------------------------------------------------------- the labels


def _label_by_text(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    links = link_rows.read(task.inputs[0])
    barred = engine.read_table(task.inputs[1])["entity"].to_numpy()
    likely = np.zeros(len(links.keys), bool)
    likely[choose_by_text(links).row] = True
    reasons = np.where(likely, "barred", "likely_nothing").astype(object)
    return _write_labels(task, outputs, links, choose_by_text(links, barred), reasons)


def _label_by_clip(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    links_path, *evidence_paths = task.inputs
    links = link_rows.read(links_path)
    known, scored = read_evidence(links, *evidence_paths)
    possible = np.zeros(len(links.keys), bool)
    possible[links.row[known.shown > 0]] = True
    reasons = np.where(possible, "below_min_probability", "barred").astype(object)
    reasons[~scored] = "picture_unreadable"
    chosen = choose(links, known, Rule.of(settings))
    return _write_labels(task, outputs, links, chosen, reasons)


def _write_labels(
    task: engine.Task,
    outputs: engine.Outputs,
    links: link_rows.LinkRows,
    chosen: Chosen,
    reasons: np.ndarray,
) -> dict[str, int]:
    """`reasons`: for each pair why it has no label, where it has a candidate."""
    import pyarrow as pa

    starts = np.searchsorted(chosen.row, np.arange(len(links.keys) + 1))
    reason = np.where(links.mentions > 0, "no_candidate", "no_mention").astype(object)
    reason[links.row] = reasons[links.row]
    reason[np.diff(starts) > 0] = None
    table = {
        "key": links.keys,
        "entities": link_rows.lists(chosen.entity, starts),
        "scores": link_rows.lists(chosen.score.astype(np.float32), starts),
        "z_scores": link_rows.lists(chosen.z_score.astype(np.float32), starts),
        "probabilities": link_rows.lists(chosen.probability.astype(np.float32), starts),
        "reason": pa.array(reason, pa.string()),
    }
    outputs.write_table(f"labels/{task.name}.parquet", pa.table(table))
    rejected = np.flatnonzero(np.diff(starts) == 0)
    keys = links.keys.take(pa.array(rejected)).to_pylist()
    outputs.write_rejects(list(zip(keys, reason[rejected], strict=True)))
    counts = {"pairs": len(links.keys), "labelled": len(links.keys) - len(rejected)}
    for name in reason[rejected]:
        counts[name] = counts.get(name, 0) + 1
    return counts
