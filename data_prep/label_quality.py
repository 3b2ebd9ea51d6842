"""Label quality: measures labels against ground truth. The only code of data_prep that reads truth.

    python -m data_prep.label_quality --workdir W --truth truth.jsonl.gz --classes classes.jsonl

prints a table and writes W/label_quality.json. Two sets of labels are measured:

    text_only   the entity with the highest prior of each mention (`selection.best_prior_entities`)
    selected    labels/, what the picture chose

    precision   share of chosen (picture, entity) pairs that are the picture's entity
    recall      share of pictures whose caption names their entity that got it
    ceiling     share of pictures whose caption names their entity that have it as a candidate

truth holds {"key", "class", "says"} a line, "says" the entities that the caption names; classes
{"class", "id", "synsets", "sure"}: the entity of the class or, where "sure" is false, any of
"synsets".
"""

import gzip
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from etils import epath

from data_prep import engine, selection
from mofi_jax import cli, errors


class Truth(NamedTuple):
    """One picture: the entities that count as right, and whether its caption names the thing."""

    right: frozenset[str]
    named: bool


class Quality(NamedTuple):
    """Counts; the rates are None where nothing was there to be counted."""

    chosen: int
    right: int
    named: int
    found: int

    @property
    def precision(self) -> float | None:
        return self.right / self.chosen if self.chosen else None

    @property
    def recall(self) -> float | None:
        return self.found / self.named if self.named else None


def main(workdir: str, truth: str, classes: str) -> None:
    """The command: `measure_workdir`, and its table."""
    print(table(measure_workdir(workdir, truth, classes)))


def measure_workdir(workdir: str, truth: str, classes: str) -> dict:
    """Measures labels/ of `workdir`; returns what label_quality.json holds.

    Raises:
      BadInput: a file is missing or holds no usable row, or labels/ is not there yet.
    """
    known = read_truth(truth, classes)
    text_only, selected, candidates = {}, {}, {}
    for key, texts, labels, possible in _read_labels(epath.Path(workdir)):
        text_only[key], selected[key], candidates[key] = texts, labels, possible
    result = {
        name: _rates(measure(chosen, known))
        for name, chosen in (("text_only", text_only), ("selected", selected))
    }
    result["ceiling"] = measure(candidates, known).recall
    path = epath.Path(workdir) / "label_quality.json"
    engine.write_durably(path, (json.dumps(result, indent=1) + "\n").encode())
    return result


def measure(chosen: Mapping[str, Iterable[str]], truth: Mapping[str, Truth]) -> Quality:
    """Counts over the pictures that the truth knows.

    Args:
      chosen: the entities (ids) chosen for each picture; a picture that is missing got none.
      truth: by picture.
    """
    pairs = right = named = found = 0
    for key, known in truth.items():
        entities = set(chosen.get(key, ()))
        pairs += len(entities)
        right += len(entities & known.right)
        named += known.named
        found += known.named and bool(entities & known.right)
    return Quality(pairs, right, named, found)


def read_truth(truth: epath.PathLike, classes: epath.PathLike) -> dict[str, Truth]:
    """The truth of each picture, by key."""
    accepted = {}
    for row in _read_jsonl(classes, ("class", "id", "synsets", "sure")):
        sure = {row["id"]}
        accepted[row["class"]] = (row["id"], frozenset(sure if row["sure"] else row["synsets"]))
    found = {}
    for row in _read_jsonl(truth, ("key", "class", "says")):
        if row["class"] not in accepted:
            raise errors.BadInput(
                f"--truth={os.fspath(truth)} has class {row['class']!r}, which"
                f" --classes={os.fspath(classes)} does not list: give files that belong together."
            )
        entity, right = accepted[row["class"]]
        found[row["key"]] = Truth(right | {entity}, entity in row["says"])
    return found


def table(result: Mapping) -> str:
    """The result as a table for people."""
    lines = [f"{'labels':<12}{'precision':>10}{'recall':>10}{'pairs':>8}"]
    for name in ("text_only", "selected"):
        row = result[name]
        rates = "".join(f"{'-' if row[k] is None else f'{row[k]:.3f}':>10}" for k in _RATES)
        lines.append(f"{name:<12}{rates}{row['chosen']:>8}")
    if result["ceiling"] is not None:
        lines.append(f"{'ceiling':<12}{'':>10}{result['ceiling']:>10.3f}")
    return "\n".join(lines)


_RATES = ("precision", "recall")


def _rates(quality: Quality) -> dict:
    return {**{name: getattr(quality, name) for name in _RATES}, **quality._asdict()}


def _read_labels(
    workdir: epath.Path,
) -> Iterator[tuple[str, set[str], set[str], set[str]]]:
    """Yields (key, entities by text alone, selected entities, candidates), entities as ids."""
    import pyarrow.parquet as pq

    shards = sorted(workdir.glob("labels/*.parquet"))
    if not shards:
        raise errors.BadInput(
            f"--workdir={os.fspath(workdir)} holds no labels/: run data_prep.build_i2e first."
        )
    qids = pq.read_table(workdir / "kb/entities.parquet", columns=["qid"])["qid"].to_pylist()
    for shard in shards:
        labels = pq.read_table(shard, columns=["key", "entities"]).to_pylist()
        selected = {row["key"]: row["entities"] for row in labels}
        for row in pq.read_table(workdir / "links" / shard.name).to_pylist():
            best = selection.best_prior_entities(row["mentions"], row["candidates"])
            possible = [candidate["entity"] for candidate in row["candidates"]]
            chosen = selected.get(row["key"], ())
            yield row["key"], *({qids[entity] for entity in e} for e in (best, chosen, possible))


def _read_jsonl(path: epath.PathLike, fields: tuple[str, ...]) -> Iterator[dict]:
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise errors.BadInput(f"{path} does not exist: name a .jsonl or .jsonl.gz file.")
    number = 0
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                missing = [field for field in fields if field not in row]
            except ValueError:
                missing = list(fields)
            if missing:
                raise errors.BadInput(
                    f"{path}, line {number}: {missing[0]!r} cannot be read: give JSON objects with"
                    f" {', '.join(fields)}."
                )
            yield row
    if not number:
        raise errors.BadInput(f"{path} is empty: name the file with the truth.")


if __name__ == "__main__":
    cli.run(main)
