"""What a name means in this data set: pictures of its kin speak for a sense. prototypes/ -> kin/

The senses of a name share the pictures that it comes with: these cannot tell them apart. But
pictures called crane look like pictures of other birds, which come with other names, or like other
machines. An entity's kin are all candidates below one of its classes (`types`, `hypernyms`), up to
`_STEPS` away from each, without those that share a name with it: they have the same pictures. Of
equally distant classes the small one counts as much as the large one.

How far the pictures that mention the entity stand out, on average, along the discriminant of its
kin (see `z_scores`) is its kinship, in standard deviations: shrunk by n / (n + `_DOUBT`) for kin
with n pictures, and at least 0, as to be unlike them or to have none says nothing. All of it is
sums over sums: of candidates by class, and of classes by candidate.

    ancestors/  entities.parquet place (among candidates), class, steps; of classes of several
    classes/    sums.npy float32 [k, d] and sizes.npy float64 [k], of all candidates below each;
                namesakes.npy int32 [m, 2], places of candidates that share a name; each its own
    kin/        NNNNN.parquet entity, kin; of a block of prototypes/
"""

from __future__ import annotations

import os
import typing
from collections.abc import Sequence

import numpy as np

from data_prep import engine
from data_prep.linking import rows as link_rows
from data_prep.selection import z_scores
from data_prep.selection.embed import DECIMALS

# Of 2 or 4 steps senses are right as often, of 1 less often in the sample (64 % for 67 %).
_STEPS = 3
_DECAY = 0.5  # of a class's weight with each step
_DOUBT = 5.0  # pictures of kin; 1 and 20 are worse in the sample

_ANCESTORS = f"""
    WITH RECURSIVE known AS (
        SELECT file_row_number AS entity, qid,
               list_distinct(list_concat(coalesce(types, []), coalesce(hypernyms, []))) AS parents
        FROM read_parquet($kb, file_row_number = true)
    ), edges AS (SELECT qid AS child, unnest(parents) AS parent FROM known), above AS (
        SELECT seen.file_row_number AS place, qid AS class, 0 AS steps
        FROM read_parquet($candidates, file_row_number = true) AS seen JOIN known USING (entity)
        UNION
        SELECT place, parent, steps + 1 FROM above JOIN edges ON child = class
        WHERE steps < {_STEPS}
    ), nearest AS (
        SELECT place, class, min(steps)::INT AS steps FROM above GROUP BY place, class
    ), shared AS (
        SELECT class, row_number() OVER (ORDER BY class) - 1 AS number
        FROM nearest GROUP BY class HAVING count(*) > 1
    )
    SELECT place, number AS class, steps FROM nearest JOIN shared USING (class)
    ORDER BY place, number
"""


def run(work: engine.Engine) -> list[str]:
    """Runs the stages ancestors, classes and kin; returns the files of kin/.

    In memory are the sums of a few thousand candidates at a time and the numbers of them all.

    Args:
      work: the engine; its work directory holds kb/, candidates/, moments/ and prototypes/.
    """
    workdir = work.workdir
    ancestors, candidates = "ancestors/entities.parquet", workdir / "candidates/entities.parquet"
    tables = {"kb": [workdir / "kb/entities.parquet"], "candidates": [candidates]}
    work.aggregate("ancestors", {ancestors: _ANCESTORS}, tables)
    blocks = [path.stem for path in engine.listed(workdir / "texts", ".npy")]
    prototypes = [
        workdir / f"prototypes/{block}{end}.npy" for end in ("", "-measures") for block in blocks
    ]
    names = [workdir / f"kb/{name}.npy" for name in ("alias_offsets", "cand_entity")]
    task = engine.Task("all", (workdir / ancestors, candidates, *names, *prototypes))
    work.map_shards("classes", _sum_classes, [task], {}, keys=None)
    classes = [workdir / f"classes/{name}.npy" for name in ("sums", "sizes", "namesakes")]
    moments = workdir / "moments/moments.npy"
    tasks = [
        engine.Task(block, (workdir / ancestors, candidates, *classes, moments, *prototypes))
        for block in blocks
    ]
    work.map_shards("kin", _measure, tasks, {}, keys=None)
    return [os.fspath(workdir / f"kin/{block}.parquet") for block in blocks]


def _sum_classes(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    ancestors, candidates, offsets, entity, *blocks = task.inputs
    place, of, _ = _read_ancestors(ancestors)
    prototypes, support = _read_prototypes(blocks)
    count = int(of.max(initial=-1)) + 1
    sums = z_scores.zeros(outputs.path("classes/sums.npy"), (count, prototypes.width), np.float32)
    sizes = np.zeros(count)
    for start in range(0, len(place), z_scores.CHUNK):
        some = slice(start, start + z_scores.CHUNK)
        z_scores.add_by(sums, of[some], prototypes[place[some]])
        z_scores.add_by(sizes, of[some], support[place[some]])
    if isinstance(sums, np.memmap):
        sums.flush()
    np.save(outputs.path("classes/sizes.npy"), sizes)
    entities = z_scores.read_entities(candidates)
    offsets, entity = (np.load(path, mmap_mode="r") for path in (offsets, entity))
    np.save(outputs.path("classes/namesakes.npy"), _namesakes(entities, offsets, entity))
    return {"classes": count}


def _namesakes(entities: np.ndarray, offsets: np.ndarray, meant: np.ndarray) -> np.ndarray:
    """int32 [m, 2]: pairs of places in `entities` that a name has in common, each with itself."""
    place_of = np.full(max(int(entities.max(initial=0)), int(meant.max(initial=0))) + 1, -1)
    place_of[entities] = np.arange(len(entities))
    place, name = place_of[meant], np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    place, name = place[place >= 0], name[place >= 0]
    found = [np.repeat(np.arange(len(entities)), 2).reshape(-1, 2)]
    for apart in range(1, len(place)):  # those of a name are together
        same = np.flatnonzero(name[apart:] == name[:-apart])
        if not len(same):
            break
        pairs = np.stack([place[same], place[same + apart]], axis=1)
        found += [pairs, pairs[:, ::-1]]
    codes = np.unique(np.concatenate([p[:, 0] * len(entities) + p[:, 1] for p in found]))
    return np.stack(np.divmod(codes, max(len(entities), 1)), axis=1).astype(np.int32)


def _measure(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa

    ancestors, candidates, *classes, moments, _ = task.inputs[:7]
    place, of, steps = _read_ancestors(ancestors)
    sums, sizes, namesakes = (np.load(path, mmap_mode="r") for path in classes)
    prototypes, support = _read_prototypes(task.inputs[6:])
    _, covariance = z_scores.mean_and_covariance(moments, prototypes.width)
    ridged = z_scores.ridged(covariance)
    # A candidate's own place among its classes is none of its kin.
    weight = np.where(steps > 0, _DECAY**steps / (sizes[of] + 1), 0)
    ends = np.searchsorted(place, np.arange(len(support) + 1))
    codes = place * max(len(sizes), 1) + of
    first, last = prototypes.bounds(int(task.name))
    kin = np.zeros(last - first)
    for start in range(first, last, z_scores.CHUNK):
        end = min(start + z_scores.CHUNK, last)
        own = slice(ends[start], ends[end])
        direction, pictures = np.zeros((end - start, prototypes.width)), np.zeros(end - start)
        z_scores.add_by(direction, place[own] - start, weight[own, None] * sums[of[own]])
        z_scores.add_by(pictures, place[own] - start, (steps[own] > 0) * sizes[of[own]])
        pairs = namesakes[slice(*np.searchsorted(namesakes[:, 0], (start, end)))].astype(np.int64)
        # Each pair with each class of the first, where the second is below it too.
        counts = ends[pairs[:, 0] + 1] - ends[pairs[:, 0]]
        pair = np.repeat(np.arange(len(pairs)), counts)
        row = np.arange(len(pair)) + np.repeat(
            ends[pairs[:, 0]] - np.cumsum(counts) + counts, counts
        )
        wanted = pairs[pair, 1] * max(len(sizes), 1) + of[row]
        at = np.minimum(np.searchsorted(codes, wanted), max(len(codes) - 1, 0))
        below = np.flatnonzero((codes[at] == wanted) & (steps[row] > 0)) if len(codes) else row
        one, other = pairs[pair[below], 0] - start, pairs[pair[below], 1]
        z_scores.add_by(direction, one, -weight[row[below], None] * prototypes[other])
        z_scores.add_by(pictures, one, -support[other])
        spread = np.einsum("pd,pd->p", direction @ covariance, direction)
        along = np.einsum("pd,pd->p", direction @ ridged, prototypes[np.arange(start, end)])
        mean = along / np.maximum(support[start:end], 1e-6)
        pictures = np.maximum(pictures, 0)
        found = z_scores.deviations(mean, spread) * pictures / (pictures + _DOUBT)
        kin[start - first : end - first] = np.maximum(found, 0)
    entities = z_scores.read_entities(candidates)[first:last]
    table = {"entity": entities, "kin": np.round(kin, DECIMALS).astype(np.float32)}
    outputs.write_table(f"kin/{task.name}.parquet", pa.table(table))
    return {"entities": len(kin)}


def _read_ancestors(path: str) -> list[np.ndarray]:
    table = engine.read_table(path)
    return [table[name].to_numpy().astype(np.int64) for name in ("place", "class", "steps")]


def _read_prototypes(paths: Sequence[str]) -> tuple[z_scores.Blocks, np.ndarray]:
    """All prototypes, and the sum of weights of each."""
    vectors, measures = paths[: len(paths) // 2], paths[len(paths) // 2 :]
    support = [np.load(path)[0] for path in measures]
    return z_scores.Blocks(vectors), np.concatenate([np.zeros(0), *support])


# ------------------------------------------------------------------------------------ of a mention


class Shares(typing.NamedTuple):
    """Of each candidate of a mention.

    Attributes:
      share: float64 [c], p(entity | the name means something in the knowledge base); adds up to 1.
      means: float64 [c], p(the name means something in the knowledge base); the mention's.
    """

    share: np.ndarray
    means: np.ndarray


def shares(
    links: link_rows.LinkRows,
    kin: np.ndarray,
    prior_weight: float,
    kin_weight: float,
    fit: np.ndarray | None = None,
) -> Shares:
    """What mentions mean, in proportion to prior^prior_weight * exp(kin_weight * kinship) * fit.

    Args:
      links: the candidates.
      kin: float [c], the kinship of each; NaN: nothing is known.
      prior_weight, kin_weight: how much they count.
      fit: float [c], how many times likelier the picture is where each is meant than where the name
        means nothing in the base; NaN: nothing is known. Without, before a picture is looked at.
    """
    mention = link_rows.mention_of(links)
    prior = links.prior.astype(np.float64)
    strength = prior_weight * np.log(np.maximum(prior, 1e-9)) + kin_weight * np.nan_to_num(kin)
    highest = np.full(int(mention.max(initial=-1)) + 1, -np.inf)
    np.maximum.at(highest, mention, strength)
    weight = np.exp(strength - highest[mention])
    share = weight / np.bincount(mention, weight)[mention]
    means = np.minimum(np.bincount(mention, prior), 1)[mention]
    if fit is None:
        return Shares(share, means)
    share = share * np.nan_to_num(fit, nan=1.0)
    fits = np.bincount(mention, share)[mention]
    return Shares(share / fits, means * fits / (means * fits + 1 - means))
