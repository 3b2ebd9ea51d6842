"""Label quality: measures labels against ground truth. The only code of data_prep that reads truth.

    python -m data_prep.label_quality --workdir W --truth truth.jsonl.gz --classes classes.jsonl

prints tables, writes W/label_quality.json and draws W/label_quality.png. Measured are:

    text_only   the entity with the highest prior of each mention (`choose.choose_by_text`)
    selected    labels/, what the picture chose
    sweep       what other thresholds would choose, from the evidence that is kept: min_z_score and
                min_score, each alone, at values that leave 100 %, 95 %, ... of the pictures a label

    precision   share of chosen (picture, entity) pairs that are the picture's entity
    recall      share of pictures whose caption names their entity that got it
    ceiling     share of pictures whose caption names their entity that have it as a candidate

truth holds a line for each picture, {"key", "wnid", "says"}: the id of its entity, and the entities
that the caption names. With classes it holds "class" in place of "wnid", and classes hold {"class",
"id", "synsets", "sure"}: the entity of the class or, where "sure" is false, any of "synsets".
"""

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from data_prep import engine
from data_prep.engine import manifests
from data_prep.linking import rows as link_rows
from data_prep.selection import choose
from mofi_jax.common import cli, errors, files

SETS = ("text_only", "selected")
SWEPT = {"min_z_score": 2, "min_score": 3}  # thresholds, and the decimals of the values tried
_SHARES = np.linspace(0, 0.95, 20)  # of the pictures that a threshold leaves without label


class Truth(NamedTuple):
    """One picture: the entities that count as right, and whether its caption names the thing."""

    right: frozenset[str]
    named: bool


class Quality(NamedTuple):
    """Counts; the rates are None where nothing was there to be counted.

    Attributes:
      chosen: (picture, entity) pairs.
      right: those of them that are the picture's entity.
      pictures: with an entity chosen.
      named: pictures whose caption names their entity.
      found: those of them with their entity chosen.
    """

    chosen: int
    right: int
    pictures: int
    named: int
    found: int

    @property
    def precision(self) -> float | None:
        return self.right / self.chosen if self.chosen else None

    @property
    def recall(self) -> float | None:
        return self.found / self.named if self.named else None


def main(workdir: str, truth: str, classes: str | None = None) -> None:
    """The command: `measure_workdir`, and its tables."""
    print(table(measure_workdir(workdir, truth, classes)))


def measure_workdir(workdir: str, truth: str, classes: str | None = None) -> dict:
    """Measures labels/ of `workdir`; writes label_quality.json and label_quality.png there.

    Returns:
      What label_quality.json holds: text_only and selected {precision, recall and the counts of
      `Quality`}, ceiling (a recall), and sweep: for each of min_z_score and min_score a list of the
      same by ascending `value`, with `configured` true for the one in force. No sweep where labels
      were chosen by text.

    Raises:
      BadInput: a file is missing or holds no usable row, or labels/ is not there yet.
    """
    root = files.output_folder(workdir, "--workdir")
    known = read_truth(truth, classes)
    shards = engine.listed(root / "labels")
    if not shards:
        raise errors.BadInput(
            f"--workdir={os.fspath(workdir)} holds no labels/: run data_prep.build_i2e first."
        )
    ids = link_rows.read_column(root / "kb/entities.parquet", "qid").to_pylist()
    wanted = {entity for picture in known.values() for entity in picture.right}
    numbers = {entity: row for row, entity in enumerate(ids) if entity in wanted}
    named = sum(picture.named for picture in known.values())

    rule = _rule_of(root, shards)
    values = _values(root, shards, rule) if rule else {}
    counts: dict[tuple, np.ndarray] = {}
    for shard in shards:
        links = link_rows.read(root / "links" / shard.name)
        judge = _Judge(links.keys.to_pylist(), known, numbers)
        chosen = {
            ("text_only",): choose.choose_by_text(links)[:2],
            ("selected",): _read_labels(shard),
            ("ceiling",): link_rows.distinct(links)[:2],
        }
        if rule:
            evidence, _ = choose.read_evidence(links, *choose.evidence_files(root, shard.name))
            for name in values:
                for value in values[name]:
                    changed = rule._replace(**{name: value})
                    chosen[name, value] = choose.choose(links, evidence, changed)[:2]
        for name, pairs in chosen.items():
            counts[name] = counts.get(name, 0) + judge.count(*pairs)

    def rates(name: tuple) -> dict:
        chosen, right, pictures, found = map(int, counts[name])
        quality = Quality(chosen, right, pictures, named, found)
        return {"precision": quality.precision, "recall": quality.recall, **quality._asdict()}

    result = {name: rates((name,)) for name in SETS}
    result["ceiling"] = rates(("ceiling",))["recall"]
    if rule:
        result["sweep"] = {
            name: [
                {"value": value, "configured": value == getattr(rule, name), **rates((name, value))}
                for value in values[name]
            ]
            for name in values
        }
        _draw(result, root / "label_quality.png")
    else:
        (root / "label_quality.png").unlink(missing_ok=True)  # of labels that are no more
    path = root / "label_quality.json"
    engine.write_durably(path, (json.dumps(result, indent=1) + "\n").encode())
    return result


class _Judge:
    """Counts right and wrong entities of one shard's pictures."""

    def __init__(self, keys: Sequence[str], truth: Mapping[str, Truth], numbers: Mapping[str, int]):
        """
        Args:
          keys: of the shard's pictures.
          truth: by key.
          numbers: of the entities that are right somewhere their rows of the knowledge base.
        """
        pictures = [truth.get(key) for key in keys]
        self._known = np.array([picture is not None for picture in pictures], bool)
        self._named = np.array([bool(picture and picture.named) for picture in pictures], bool)
        self._width = max(numbers.values(), default=0) + 1
        self._right = np.array(
            [
                row * self._width + numbers[entity]
                for row, picture in enumerate(pictures)
                for entity in (picture.right if picture else ())
                if entity in numbers
            ],
            np.int64,
        )

    def count(self, row: np.ndarray, entity: np.ndarray) -> np.ndarray:
        """int64 [4]: chosen, right, pictures and found of distinct pairs (row, entity)."""
        row, entity = row[self._known[row]], entity[self._known[row]]
        known = entity < self._width  # another one is right nowhere, and would be a pair's code
        right = known & np.isin(row * self._width + entity, self._right)
        found = np.unique(row[right])
        return np.array([len(row), right.sum(), len(np.unique(row)), self._named[found].sum()])


def _read_labels(shard: epath.Path) -> tuple[np.ndarray, np.ndarray]:
    entities = link_rows.read_column(shard, "entities")
    row = np.repeat(np.arange(len(entities)), link_rows.lengths(entities))
    return row, entities.flatten().to_numpy(zero_copy_only=False)


# --------------------------------------------------------------------------------------- the sweep


def _rule_of(root: epath.Path, shards: Sequence[epath.Path]) -> choose.Rule | None:
    """The rule by which the labels were chosen, None where it was not by picture."""
    made = manifests.read(root, "labels")
    settings = made[0]["settings"] if made else {}
    return choose.Rule.of(settings) if settings.get("labels") == "clip" else None


def _values(
    root: epath.Path, shards: Sequence[epath.Path], rule: choose.Rule
) -> dict[str, list[float]]:
    """Thresholds to try: quantiles of what the pictures' best candidates reach, and that in force.

    No truth is read for them.
    """
    reached: dict[str, list[np.ndarray]] = {name: [] for name in SWEPT}
    for shard in shards:
        links = link_rows.read(root / "links" / shard.name)
        evidence, _ = choose.read_evidence(links, *choose.evidence_files(root, shard.name))
        free = rule._replace(min_z_score=-np.inf, min_score=-np.inf)
        best = choose.choose(links, evidence, free)
        reached["min_z_score"].append(best.z_score[link_rows.starts_run(best.row)])
        order = np.lexsort((-evidence.score, links.row))
        top = order[link_rows.starts_run(links.row[order])]
        reached["min_score"].append(evidence.score[top])
    values = {}
    for name, decimals in SWEPT.items():
        found = np.concatenate(reached[name])
        found = found[~np.isnan(found)]
        # Rounded down: the lowest leaves all pictures their label.
        steps = np.quantile(found, _SHARES) if len(found) else np.zeros(0)
        steps = np.floor(steps * 10**decimals) / 10**decimals
        values[name] = sorted({float(getattr(rule, name)), *steps.tolist()})
    return values


def _draw(result: Mapping, path: epath.Path) -> None:
    """Precision over recall, for every threshold tried."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, colour in (("min_z_score", "#0b7285"), ("min_score", "#c77700")):
        points = [p for p in result["sweep"][name] if p["precision"] is not None]
        axes.plot(
            [p["recall"] or 0 for p in points],
            [p["precision"] for p in points],
            "o-",
            color=colour,
            markersize=3.5,
            linewidth=1.5,
            label=f"other values of {name}",
        )
    marks = (("selected", "*", 260, "#b42b3a"), ("text_only", "s", 70, "#1d2733"))
    for name, marker, size, colour in marks:
        point = result[name]
        if point["precision"] is None:
            continue
        text = f"{name.replace('_', ' ')}: {point['precision']:.3f} / {point['recall'] or 0:.3f}"
        place = (point["recall"] or 0, point["precision"])
        axes.scatter(*place, marker=marker, s=size, color=colour, zorder=3, label=text)
    if result["ceiling"]:
        axes.axvline(result["ceiling"], color="#9aa7b4", linestyle="--", linewidth=1)
        axes.annotate(
            "ceiling",
            (result["ceiling"], 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            color="#5d6975",
        )
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title("Labels against truth: precision / recall", loc="left")
    axes.grid(color="#e3e7ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    with path.open("wb") as file:
        # No version inside: the same labels give the same bytes.
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})


def table(result: Mapping) -> str:
    """The result as tables for people."""
    lines = [f"{'labels':<12}{'precision':>10}{'recall':>10}{'pairs':>10}{'pictures':>10}"]
    lines += [_line(name, result[name]) for name in SETS]
    if result["ceiling"] is not None:
        lines.append(f"{'ceiling':<12}{'':>10}{result['ceiling']:>10.3f}")
    for name, rows in result.get("sweep", {}).items():
        lines += ["", f"{name:<12}{'precision':>10}{'recall':>10}{'pairs':>10}{'pictures':>10}"]
        for row in rows:
            mark = "  < in force" if row["configured"] else ""
            lines.append(_line(f"{row['value']:.{SWEPT[name]}f}", row) + mark)
    return "\n".join(lines)


def _line(name: str, row: Mapping) -> str:
    rates = (row["precision"], row["recall"])
    rates = "".join(f"{'-' if rate is None else f'{rate:.3f}':>10}" for rate in rates)
    return f"{name:<12}{rates}{row['chosen']:>10}{row['pictures']:>10}"


# --------------------------------------------------------------------------------------- the truth


def read_truth(truth: epath.PathLike, classes: epath.PathLike | None = None) -> dict[str, Truth]:
    """The truth of each picture, by key; see the docstring of this file.

    Raises:
      BadInput: a file is missing or empty, a line lacks a field, or the files do not fit together.
    """
    found = {}
    if classes is None:
        for row in _read_jsonl(truth, ("key", "wnid", "says")):
            found[row["key"]] = Truth(frozenset({row["wnid"]}), row["wnid"] in row["says"])
        return found
    accepted = {}
    for row in _read_jsonl(classes, ("class", "id", "synsets", "sure")):
        sure = {row["id"]}
        accepted[row["class"]] = (row["id"], frozenset(sure if row["sure"] else row["synsets"]))
    for row in _read_jsonl(truth, ("key", "class", "says")):
        if row["class"] not in accepted:
            raise errors.BadInput(
                f"--truth={os.fspath(truth)} has class {row['class']!r}, which"
                f" --classes={os.fspath(classes)} does not list: give files that belong together."
            )
        entity, right = accepted[row["class"]]
        found[row["key"]] = Truth(right | {entity}, entity in row["says"])
    return found


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
                hint = ", or name the --classes that it goes with" if "wnid" in missing else ""
                raise errors.BadInput(
                    f"{path}, line {number}: {missing[0]!r} cannot be read: give JSON objects with"
                    f" {', '.join(fields)}{hint}."
                )
            yield row
    if not number:
        raise errors.BadInput(f"{path} is empty: name the file with the truth.")


if __name__ == "__main__":
    cli.run(main)
