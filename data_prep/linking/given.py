"""Entities that come with the data, in place of those that captions name. pairs/ -> links/.

`config.given` says where they are, as one of

    ids         a column of the input, or a place in it (`a.b`: see `pairs.samples.at`), of ids as
                the knowledge base has them, or as `lookup.rows_of` takes them too, such as q42 or
                http://www.wikidata.org/entity/Q42:
                one, several with blanks between them, a list, or objects that hold them
    titles      the same of titles of Wikipedia's articles, by the sitelinks of the base
    entitynet   the folder of EntityNet's tables (`linking.entitynet`)

`weights` lies beside ids or titles: the probability of each that it is right, 1 where there is no
such column. `where` keeps of a list what meets all of its conditions PLACE=VALUE, such as
"features.language=en".

Published sets, and what is known of their layouts: Commons-VEL (by its card,
`aiintelligentsystems/vel_commons_wikidata`, and code that reads it) is tars of PAGE.jpg, PAGE.png
(one of the two a single pixel) and PAGE.json, where PAGE is Commons' id of the picture; how the
JSON calls the ids is not confirmed. `wikimedia/wit_base` (by code that reads it) is parquet whose
`wit_features` holds lists: language, page_title and so on of each article with the picture.

No caption is read nor needed, and no spaCy is loaded. Each id is a mention of kind "given" that
stands nowhere in the caption, with the weight as the prior of its one candidate; redirects are
followed. An id that the base does not have is a mention without candidate. So all that comes later
is as ever: the entities are labels as they are (more likely right than wrong), or those that
config.clip sees.
"""

from __future__ import annotations

import json
import os
import re
import typing
from collections.abc import Iterator, Mapping

import ml_collections
import numpy as np
from absl import logging

from data_prep import engine
from data_prep.kb import lookup
from data_prep.linking import entitynet
from data_prep.linking import stage as linking_stage
from data_prep.pairs import samples
from mofi_jax.common import errors

_WAYS = ("ids", "titles", "entitynet")
KIND = "given"  # of mentions


def check(config: ml_collections.ConfigDict) -> None:
    """Checks `config.given`.

    Raises:
      BadInput: not one way to the entities, or one where `labels` is another, a condition that is
        none, no such folder.
    """
    given = config.given
    ways = [name for name in _WAYS if given[name]]
    if config.labels != "given":
        if ways:
            raise errors.BadInput(
                f"config.given.{ways[0]}={given[ways[0]]!r} is for labels=given, and this is"
                f" labels={config.labels}: give both or neither."
            )
        return
    if config.context_columns:
        raise errors.BadInput(
            f"config.context_columns={tuple(config.context_columns)} is for captions, which"
            " labels=given does not read: give one of them."
        )
    if len(ways) != 1:
        raise errors.BadInput(
            f"config.given: labels=given needs one of {', '.join(_WAYS)} (set are:"
            f" {', '.join(ways) or 'none'}): name the column of the input that holds the ids, as"
            " --config.given.ids=COLUMN."
        )
    for condition in given.where:
        if not all(condition.partition("=")):
            raise errors.BadInput(
                f"config.given.where: {condition!r} is not PLACE=VALUE: write for example"
                " features.language=en."
            )
    if given.entitynet:
        entitynet.check(given.entitynet, given.join)


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Writes links/NNNNN.parquet as `linking.stage.run` does.

    Args:
      config: `given`.
      work: the engine; its work directory holds pairs/ and kb/.

    Returns:
      The manifests; counts `texts`, `linked`, `mentions` (ids), `candidates`, `unknown_ids`,
      `bad_weights`.

    Raises:
      BadInput: no pair has an id, or the base has none of them.
    """
    given, workdir = config.given, work.workdir
    pairs = engine.listed(workdir / "pairs")
    inputs = [(workdir / "kb/manifest.json", path) for path in pairs]
    if given.entitynet:
        found = {
            path.name: path for path in entitynet.run(given.entitynet, given.join, work, pairs)
        }
        inputs = [(*own, found[own[-1].name]) for own in inputs if own[-1].name in found]
    tasks = [engine.Task(own[-1].stem, own) for own in inputs]
    settings = {"version": 3, **{name: given[name] for name in ("ids", "titles", "weights")}}
    settings["where"] = [condition.partition("=")[::2] for condition in given.where]
    # The stage that writes links/ from captions bears this name too: what one of them wrote, the
    # other one removes.
    found = work.map_shards("gathered", _gather, tasks, settings)
    _check_found(given, engine.total_counts(found))
    return found


def _check_found(given: Mapping, counts: Mapping[str, int]) -> None:
    [way] = [name for name in _WAYS if given[name]]
    where = f"config.given.{way}={given[way]!r}"
    if counts.get("texts") and not counts["mentions"]:
        remedy = "the name of the column, the place in it and config.given.where"
        if way == "entitynet":
            remedy = (
                f"that the {given['join']} of pairs is EntityNet's, or choose another given.join"
            )
        raise errors.BadInput(
            f"{where}: none of {counts['texts']:,} pairs has an entity there: check {remedy}."
        )
    if counts.get("mentions") and not counts["candidates"]:
        ids = f"{counts['mentions']:,} ids"
        if counts["bad_weights"]:
            raise errors.BadInput(
                f"config.given.weights={given.weights!r}: {counts['bad_weights']:,} of {ids} have"
                " no number from 0 to 1 there: name the column or place of probabilities."
            )
        raise errors.BadInput(
            f"{where}: none of {ids} there is in the knowledge base: check what the column holds,"
            " and that config.knowledge_base is what the ids are of."
        )
    problems = {"unknown_ids": "are not in the knowledge base", "bad_weights": "have no weight"}
    for name, words in problems.items():
        if counts.get(name):
            logging.warning(
                "%d of %d ids %s: they are mentions without candidate in links/",
                *(counts[name], counts["mentions"], words),
            )


def _gather(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    import pyarrow as pa

    kb_manifest, pairs_path, *joined = task.inputs
    keys = engine.read_table(pairs_path, ["key"])["key"]
    if joined:
        given = _joined(joined[0], len(keys))
    else:
        extras = engine.read_table(pairs_path, ["extras"])["extras"].to_pylist()
        given = [[*_given(json.loads(text or "{}"), settings)] for text in extras]
    ids = [name for row in given for name, _ in row]
    weights = np.array([weight for row in given for _, weight in row], np.float64)
    look_up = lookup.rows_of_titles if settings["titles"] else lookup.rows_of
    entities = look_up(os.path.dirname(kb_manifest), ids)
    weighted = (weights >= 0) & (weights <= 1)  # NaN is not
    known = (entities >= 0) & weighted & (weights > 0)
    mentions, candidates, at = [], [], 0
    for row in given:
        numbers = range(at, at := at + len(row))
        # Nowhere in the caption.
        mentions.append([{"start": 0, "end": 0, "surface": ids[i], "kind": KIND} for i in numbers])
        candidates.append(
            [
                {"mention": n, "entity": entities[i], "prior": weights[i]}
                for n, i in enumerate(numbers)
                if known[i]
            ]
        )
    table = {
        "key": keys,
        "mentions": pa.array(mentions, linking_stage.mentions_type()),
        "candidates": pa.array(candidates, linking_stage.candidates_type()),
    }
    outputs.write_table(f"links/{task.name}.parquet", pa.table(table))
    return {
        "texts": len(keys),
        "linked": sum(map(bool, candidates)),
        "mentions": len(ids),
        "candidates": int(known.sum()),
        "unknown_ids": int(np.sum(entities < 0)),
        "bad_weights": int(np.sum(~weighted)),
    }


def _given(row: Mapping[str, typing.Any], settings: dict) -> Iterator[tuple[str, float]]:
    """The ids or titles of a pair and their weights, NaN for one that is no number.

    Args:
      row: what pairs/ kept of the input, by place.
      settings: `ids` or `titles`, `weights` or None, `where`: pairs (place, value).
    """
    names = row.get(settings["ids"] or settings["titles"])
    names = _several(names) if settings["ids"] else names
    names = names if isinstance(names, list) else [names]
    names = [str(name) if type(name) is int else name for name in names]

    def beside(place: str) -> list:
        """The values of a place, one for each of the ids."""
        found = row.get(place)
        if place == settings["weights"] and len(names) > 1:
            found = _several(found)
        found = found if isinstance(found, list) else [found] * len(names)
        return found[: len(names)] + [None] * (len(names) - len(found))

    weights = beside(settings["weights"]) if settings["weights"] else [1.0] * len(names)
    conditions = [(beside(place), value.casefold()) for place, value in settings["where"]]
    for number, (name, weight) in enumerate(zip(names, weights, strict=True)):
        if not isinstance(name, str) or not name.strip():
            continue
        if all(_spelt(values[number]).casefold() == value for values, value in conditions):
            yield samples.encodable(name.strip()), _number(weight)


def _several(value: typing.Any) -> typing.Any:
    """A list in place of a text that holds several, as tables write them."""
    if not isinstance(value, str):
        return value
    several = re.split(r"[\s,;|]+", value.strip())
    return several if len(several) > 1 else value


def _number(value: typing.Any) -> float:
    """NaN for what is none; CSV has texts."""
    try:
        return np.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return np.nan


def _spelt(value: typing.Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _joined(path: str, pairs: int) -> list[list[tuple[str, float]]]:
    """The ids of each pair of a shard, of the rows that `linking.entitynet` has found for it."""
    given: list[list[tuple[str, float]]] = [[] for _ in range(pairs)]
    table = engine.read_table(path, ["row", "entity"])
    for row, entity in zip(*(column.to_pylist() for column in table.columns), strict=True):
        given[row].append((entity, 1.0))
    return given
