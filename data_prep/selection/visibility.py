"""Whether a picture shows what its caption mentions: a probability. z_scores/, kin/ -> visibility/

Of the pictures that mention an entity some show it and the others are, for all one knows, pictures
drawn at random. The z-scores of the latter have mean 0 and variance 1 by their making; those of the
former lie around a distance d that depends on how well the model tells the entity, and how well its
pictures do. So the z-scores of an entity are a mixture,

    (1 - v) N(0, 1) + v N(d, 1),        of which v N(d, 1) / ((1 - v) N(0, 1) + v N(d, 1))

is the probability that a picture of a given z-score shows it. v is `_CAPTIONS_TRUE` for what can
be seen and about 0 for what captions merely say (photo, free, 2019). v and d of an entity of few
pictures are guessed from those of all others: how often each v and each d occurs, EM over all
entities finds (empirical Bayes). No ground truth is read.

    visibility_parts/  NNNNN.parquet entity, bin (of z-scores), weight (millionths): mentions, each
                       as far as it means the entity; of a run of shards
    visibility_sums/   entities.parquet the same of all
    visibility/        entities.parquet entity, support (mentions), kin, visible (the probability
                       that v is not about 0), mixture (of each v and each d, in this order)
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

import numpy as np
from etils import epath

from data_prep import engine
from data_prep.linking import rows as link_rows
from data_prep.selection import senses, twins, z_scores
from data_prep.selection.embed import DECIMALS

if typing.TYPE_CHECKING:
    import pyarrow as pa

# Of mentions of what can be seen, the share whose picture shows it. Entities that are well told
# apart say 0.6 (photos; in truth 0.7) and 0.8 (the sample; 0.85). With 0.6 a
# probability means what it says on both sets; what is chosen hardly depends on it.
_CAPTIONS_TRUE = 0.6
_VISIBLE = np.array([0.01, _CAPTIONS_TRUE])
_DISTANCES = np.array([0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0])
_ROUNDS = 40  # of EM; later ones change nothing that is kept

_BIN, _LOWEST, _BINS = 0.25, -6.0, 64  # of z-scores; beyond the last ones they count as these
_SUM = """
    SELECT entity, bin, sum(weight)::BIGINT AS weight FROM read_parquet($parts)
    GROUP BY entity, bin ORDER BY entity, bin
"""


def run(
    work: engine.Engine,
    shards: Sequence[str],
    same: Sequence[epath.Path],
    prior_weight: float,
    kin_weight: float,
) -> epath.Path:
    """Runs the stages visibility_parts, visibility_sums and visibility; returns the last's file.

    In memory are a shard and a few numbers for each entity.

    Args:
      work: the engine; its work directory holds links/, z_scores/ and what `senses.run` reads.
      shards: those of z_scores/.
      same: of each the file of twins/.
      prior_weight, kin_weight: see `senses.shares`.
    """
    workdir = work.workdir
    kin = senses.run(work)
    files = [
        [workdir / folder / f"{shard}.parquet" for shard in shards]
        for folder in ("links", "z_scores")
    ]
    tasks = [
        engine.Task(task.name, (*kin, *task.inputs)) for task in engine.run_tasks(*files, same)
    ]
    settings = {
        "version": 2,
        "kin": len(kin),
        "prior_weight": prior_weight,
        "kin_weight": kin_weight,
    }
    parts = work.map_shards("visibility_parts", _count, tasks, settings, keys=None)
    sums, visibility = "visibility_sums/entities.parquet", "visibility/entities.parquet"
    tables = {"parts": [workdir / m["outputs"][0]["path"] for m in parts]}
    work.aggregate("visibility_sums", {sums: _SUM}, tables)
    task = engine.Task("entities", (*kin, workdir / sums))
    work.map_shards("visibility", _fit, [task], {}, keys=None)
    return workdir / visibility


def _count(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa

    kin, shards = task.inputs[: settings["kin"]], task.inputs[settings["kin"] :]
    entities, kinship = _read_kin(kin)
    codes, weights = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for links_path, z_scores_path, same in zip(
        *map(list, np.split(np.array(shards), 3)), strict=True
    ):
        links = link_rows.read(links_path)
        [z_score], _ = read_z_scores(links, engine.read_table(z_scores_path), ("z_scores",))
        own = link_rows.look_up(entities, kinship, links.entity)
        shares = senses.shares(links, own, settings["prior_weight"], settings["kin_weight"])
        # Of several mentions of an entity that which means it most.
        weight = np.round(shares.share * shares.means * 1e6).astype(np.int64)
        order = np.lexsort((-weight, links.entity, links.row))
        order = order[~np.isnan(z_score[order])]
        once = order[link_rows.starts_run(links.row[order], links.entity[order])]
        once = once[~twins.among(links.keys, links.row[once], links.entity[once], same)]
        bins = np.floor((z_score[once] - _LOWEST) / _BIN).clip(0, _BINS - 1).astype(np.int64)
        found, place = np.unique(links.entity[once] * np.int64(_BINS) + bins, return_inverse=True)
        total = np.zeros(len(found), np.int64)
        np.add.at(total, place, weight[once])
        codes.append(found)
        weights.append(total)
    found, place = np.unique(np.concatenate(codes), return_inverse=True)
    total = np.zeros(len(found), np.int64)
    np.add.at(total, place, np.concatenate(weights))
    entity, bins = np.divmod(found, _BINS)
    table = {"entity": entity.astype(np.int32), "bin": bins.astype(np.int8), "weight": total}
    outputs.write_table(f"visibility_parts/{task.name}.parquet", pa.table(table))
    return {"rows": len(found)}


def _fit(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa

    *kin, sums = task.inputs
    table = engine.read_table(sums)
    entity, bins, weight = (table[name].to_numpy() for name in ("entity", "bin", "weight"))
    entities, place = np.unique(entity, return_inverse=True)
    middle = _LOWEST + _BIN * (np.arange(_BINS) + 0.5)
    likelihood = np.log(1 - _VISIBLE[:, None] + _VISIBLE[:, None] * _ratio(middle)[:, None])
    evidence = np.zeros((len(entities), *likelihood.shape[1:]))
    z_scores.add_by(evidence, place, weight[:, None, None] / 1e6 * likelihood[bins])
    evidence = np.exp(evidence - evidence.max((1, 2), keepdims=True, initial=-np.inf))
    of_visible, of_distance = (np.full(n, 1 / n) for n in evidence.shape[1:])
    for _ in range(_ROUNDS):
        mixture = evidence * of_visible[:, None] * of_distance
        mixture /= mixture.sum((1, 2), keepdims=True)
        total = mixture.sum(0) / max(len(entities), 1)
        of_visible, of_distance = total.sum(1), total.sum(0)
    mixture = np.round(mixture, DECIMALS)
    kin_of, kinship = _read_kin(kin)
    support = np.bincount(place, weight, minlength=len(entities)) / 1e6
    columns = {
        "entity": entities,
        "support": support.astype(np.float32),
        "kin": link_rows.look_up(kin_of, kinship, entities).astype(np.float32),
        "visible": mixture[:, 1:].sum((1, 2)).astype(np.float32),
        "mixture": link_rows.lists(
            mixture.astype(np.float32).ravel(), np.arange(len(entities) + 1) * likelihood[0].size
        ),
    }
    outputs.write_table("visibility/entities.parquet", pa.table(columns))
    return {"entities": len(entities), "visible": int((columns["visible"] > 0.5).sum())}


def _ratio(z_score: np.ndarray) -> np.ndarray:
    """float64 [n, distances]: N(d, 1) / N(0, 1) at each z-score."""
    highest = _LOWEST + _BIN * _BINS
    return np.exp(np.clip(z_score, _LOWEST, highest)[:, None] * _DISTANCES - _DISTANCES**2 / 2)


def _read_kin(paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Entities, ascending, and the kinship of each."""
    tables = [engine.read_table(path) for path in paths]
    entity, kin = (
        np.concatenate([np.zeros(0, dtype), *(table[name].to_numpy() for table in tables)])
        for name, dtype in (("entity", np.int32), ("kin", np.float32))
    )
    order = np.argsort(entity)
    return entity[order], kin[order]


# ------------------------------------------------------------------------------- of the candidates


def read_z_scores(
    links: link_rows.LinkRows, table: pa.Table, names: Sequence[str]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Columns of a table of z_scores/, for each candidate of its shard.

    Returns:
      Of each name float64 [c], NaN for candidates of pictures that could not be scored; and, bool
      [n], which pictures were scored.
    """
    keys, entities, *known = (link_rows.whole(table[name]) for name in ("key", "entities", *names))
    position = link_rows.positions(keys, links.keys)
    row = np.repeat(position, link_rows.lengths(entities))
    entity = entities.flatten().to_numpy(zero_copy_only=False)
    # A pair of row and entity as one number, ascending: so it is searched.
    width = int(max(entity.max(initial=0), links.entity.max(initial=0))) + 1
    code, wanted = row * width + entity, links.row * width + links.entity
    scored = np.zeros(len(links.keys), bool)
    scored[position] = True
    values = (column.flatten().to_numpy(zero_copy_only=False) for column in known)
    return [link_rows.look_up(code, column, wanted) for column in values], scored


class Shown(typing.NamedTuple):
    """Of a picture and an entity that its caption mentions.

    Attributes:
      probability: float64 [c], that the picture shows the entity, if it is meant.
      fit: float64 [c], how many times likelier the z-score is if it is meant, shown or not, than
        for a picture drawn at random.
    """

    probability: np.ndarray
    fit: np.ndarray


def shown(
    entity: np.ndarray, z_score: np.ndarray, entities: np.ndarray, mixture: np.ndarray
) -> Shown:
    """Whether pictures show entities.

    Args:
      entity: int32 [c].
      z_score: float64 [c]; NaN gives NaN.
      entities: int32 [e], ascending; all of `entity` whose z-score is known are among them.
      mixture: float [e, visible * distances], see the docstring of this file.
    """
    place = np.minimum(np.searchsorted(entities, entity), max(len(entities) - 1, 0))
    probability, fit = np.full((2, len(entity)), np.nan)
    for start in range(0, len(entity) if len(entities) else 0, z_scores.CHUNK):
        of = slice(start, start + z_scores.CHUNK)
        weights = mixture[place[of]]
        is_shown = (_VISIBLE[:, None] * _ratio(z_score[of])[:, None]).reshape(weights.shape)
        is_any = is_shown + np.repeat(1 - _VISIBLE, len(_DISTANCES))
        probability[of] = (weights * is_shown / is_any).sum(1)
        # The weights have seen this picture: it is taken out of them again.
        fit[of] = weights.sum(1) / (weights / is_any).sum(1)
    return Shown(probability, fit)
