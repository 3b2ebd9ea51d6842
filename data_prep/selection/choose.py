"""Selection: of all entities a caption may mean, those that the picture shows. links/ -> labels/

A candidate's z-score is (text + w * picture) / (1 + w) + c * coherence (w = prototype_weight, c =
coherence_weight): how far the picture stands out among all pictures for the entity's text, and for
its other pictures, and whether it is something that pictures show at all (see `z_scores`). Of each
mention the candidate with the highest z-score + prior_weight * log(prior) stays: the prior decides
between senses of a word, never between words. Of those with cosine >= min_score and z-score >=
min_z_score the best is a label, and so are others within max_gap of it, up to max_labels.

No ground truth is read, neither here nor for the thresholds; new thresholds cost seconds, because
cosines and z-scores are kept.

    labels/  NNNNN.parquet  key, entities (rows of the knowledge base, best first), scores (cosine;
                            the prior for labels="text"), z_scores, reason (null when labelled)
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import NamedTuple

import ml_collections
import numpy as np
from etils import epath

from data_prep import engine
from data_prep.linking import rows as link_rows
from data_prep.selection import embed, z_scores

if typing.TYPE_CHECKING:
    import pyarrow as pa


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Chooses the labels of every pair: labels/NNNNN.parquet, and rejects with a reason.

    Reasons: no_mention, no_candidate, and for labels="clip" picture_unreadable (since pairs/ was
    written), below_min_score, below_min_z_score.

    Args:
      config: `labels`, and where pictures are embedded (`embed.is_on`) also the fields of `Rule`
        and what `embed.run` reads; elsewhere the best prior of each mention counts.
      work: the engine; its work directory holds pairs/, links/ and kb/.

    Returns:
      The manifests of labels/; counts `pairs`, `labelled` and each reason.

    Raises:
      BadInput: see `embed.run`.
    """
    workdir = work.workdir
    links = engine.listed(workdir / "links")
    if not embed.is_on(config):
        tasks = [engine.Task(path.stem, (path,)) for path in links]
        settings = {"version": 3, "labels": "text"}
        return work.map_shards("labels", _label_by_text, tasks, settings)
    names = [f"{shard}.parquet" for shard in z_scores.run(work, embed.run(config, work))]
    tasks = [
        engine.Task(
            epath.Path(name).stem, (workdir / "links" / name, *evidence_files(workdir, name))
        )
        for name in names
    ]
    settings = {"labels": "clip", **Rule.of(config)._asdict()}
    return work.map_shards("labels", _label_by_clip, tasks, settings)


# ------------------------------------------------------------------------------------- the decision


class Rule(NamedTuple):
    """The numbers of the decision; see the docstring of this file."""

    prototype_weight: float
    coherence_weight: float
    prior_weight: float
    min_z_score: float
    min_score: float
    max_gap: float
    max_labels: int

    @classmethod
    def of(cls, config: Mapping) -> Rule:
        return cls(*(config[name] for name in cls._fields))


class Evidence(NamedTuple):
    """What is known of candidate entities of pictures: numbers, or arrays float64 [c] of them."""

    score: float | np.ndarray  # cosine between picture and text; NaN: nothing is known
    text_z_score: float | np.ndarray
    picture_z_score: float | np.ndarray
    coherence: float | np.ndarray

    def z_score(self, rule: Rule) -> float | np.ndarray:
        """One number each, in standard deviations."""
        found = self.text_z_score + rule.prototype_weight * self.picture_z_score
        found = found / (1 + rule.prototype_weight) + rule.coherence_weight * self.coherence
        return np.round(found, embed.DECIMALS)


class Chosen(NamedTuple):
    """Labels by row, best first."""

    row: np.ndarray  # int64 [m], ascending
    entity: np.ndarray  # int32 [m]
    score: np.ndarray  # float64 [m]
    z_score: np.ndarray  # float64 [m]


def choose(links: link_rows.LinkRows, known: Evidence, rule: Rule) -> Chosen:
    """Decides on the labels of all pictures of a shard: this is the decision, wherever it is made.

    min_z_score changes nothing but where the labels of a picture end, the best being first.

    Args:
      links: the candidates.
      known: the evidence of each.
      rule: weights and thresholds.
    """
    z_score = known.z_score(rule)
    strength = z_score + rule.prior_weight * np.log(links.prior.astype(np.float64))
    likely = np.flatnonzero(known.score >= rule.min_score)  # NaN is not
    strongest = _strongest(links, strength, likely)
    # Those that stand out, each once, from the best down.
    good = strongest[z_score[strongest] >= rule.min_z_score]
    good = good[np.lexsort((links.entity[good], -z_score[good], links.row[good]))]
    good = good[link_rows.starts_run(links.row[good], links.entity[good])]
    row = links.row[good]
    first = np.flatnonzero(link_rows.starts_run(row))
    best = np.repeat(first, np.diff(first, append=len(row)))
    below, place = -z_score[good], np.arange(len(row)) - best
    kept = good[(place < rule.max_labels) & (below <= below[best] + rule.max_gap)]
    return Chosen(links.row[kept], links.entity[kept], known.score[kept], z_score[kept])


def choose_by_text(links: link_rows.LinkRows) -> Chosen:
    """The likeliest entity of each mention that means it more likely than nothing in the base.

    Nothing has the probability that the priors of a mention leave. No picture is looked at.

    Returns:
      Distinct entities in the order of their mentions; score and z_score are the highest prior that
      any mention gives the entity.
    """
    width = int(links.mention.max(initial=0)) + 1
    _, mention = np.unique(links.row * width + links.mention, return_inverse=True)
    nothing = 1 - np.bincount(mention, links.prior)[mention]
    likeliest = _strongest(links, links.prior, np.flatnonzero(links.prior > nothing))
    # Stable: of equal entities the one of the first mention comes first.
    by_entity = likeliest[np.lexsort((links.entity[likeliest], links.row[likeliest]))]
    once = by_entity[link_rows.starts_run(links.row[by_entity], links.entity[by_entity])]
    kept = once[np.lexsort((links.mention[once], links.row[once]))]
    known = link_rows.distinct(links)
    entities = int(known.entity.max(initial=0)) + 1
    codes = known.row * entities + known.entity
    places = np.searchsorted(codes, links.row[kept] * entities + links.entity[kept])
    prior = known.prior[places].astype(np.float64)
    return Chosen(links.row[kept], links.entity[kept], prior, prior)


def _strongest(links: link_rows.LinkRows, strength: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Of each mention the strongest of the candidates `among`, of equal ones the smaller row."""
    keys = (links.entity, -strength, links.mention, links.row)
    order = among[np.lexsort([key[among] for key in keys])]
    return order[link_rows.starts_run(links.row[order], links.mention[order])]


# ------------------------------------------------------------------------------------- the evidence


def evidence_files(workdir: epath.Path, name: str) -> tuple[epath.Path, epath.Path]:
    """What `read_evidence` takes for the shard whose parquet files are called `name`."""
    return workdir / "z_scores" / name, workdir / "coherence/entities.parquet"


def read_evidence(
    links: link_rows.LinkRows, z_scores: str | epath.Path, coherence: str | epath.Path
) -> tuple[Evidence, np.ndarray]:
    """What is known of each candidate of a shard.

    Args:
      links: the shard's candidates.
      z_scores, coherence: files of the stages of these names.

    Returns:
      The evidence, NaN for candidates of pictures that could not be scored; and, bool [n], which
      pictures were scored.
    """
    names = ("scores", "text_z_scores", "picture_z_scores")
    keys, entities, *known = (
        link_rows.read_column(z_scores, name) for name in ("key", "entities", *names)
    )
    position = link_rows.positions(keys, links.keys)
    row = np.repeat(position, link_rows.lengths(entities))
    entity = _flat(entities)
    # A pair of row and entity as one number, ascending: so it is searched.
    width = int(max(entity.max(initial=0), links.entity.max(initial=0))) + 1
    code, wanted = row * width + entity, links.row * width + links.entity
    place = np.searchsorted(code, wanted)
    found = place < len(code)
    found[found] = code[place[found]] == wanted[found]

    table = engine.read_table(coherence, columns=["entity", "coherence"])
    known_entities, coherences = (table[name].to_numpy() for name in table.column_names)
    columns = np.full((len(Evidence._fields), len(wanted)), np.nan)
    for column, values in zip(columns, known, strict=False):
        column[found] = _flat(values)[place[found]]
    columns[-1, found] = coherences[np.searchsorted(known_entities, links.entity[found])]
    scored = np.zeros(len(links.keys), bool)
    scored[position] = True
    return Evidence(*columns), scored


def _flat(column: pa.ListArray) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=False)


# --------------------------------------------------------------------------------------- the labels


def _label_by_text(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    links = link_rows.read(task.inputs[0])
    reasons = np.full(len(links.keys), "no_candidate", object)
    return _write_labels(task, outputs, links, choose_by_text(links), reasons)


def _label_by_clip(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    links_path, *evidence_paths = task.inputs
    rule = Rule.of(settings)
    links = link_rows.read(links_path)
    known, scored = read_evidence(links, *evidence_paths)
    likely = np.zeros(len(links.keys), bool)
    likely[links.row[known.score >= rule.min_score]] = True
    reasons = np.where(likely, "below_min_z_score", "below_min_score").astype(object)
    reasons[~scored] = "picture_unreadable"
    return _write_labels(task, outputs, links, choose(links, known, rule), reasons)


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
