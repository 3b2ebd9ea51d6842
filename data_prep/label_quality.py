"""Measures labels against ground truth.

    mofi label-quality --workdir W --truth truth.jsonl.gz --classes classes.jsonl
    mofi label-quality --workdir W --truth truth.jsonl

prints tables, writes W/label_quality.json and draws W/label_quality.png. With `quality`, it
is all that ever reads truth, and `quality.truth` says what
the files hold. Measured are:

    text_only   what the caption alone makes likeliest (`choose.choose_by_text`)
    selected    labels/, what the picture chose
    sweep       what other thresholds would choose, from the evidence that is kept, each alone, at
                values that leave 100 %, 95 %, ... of the pictures a label

    precision   share of chosen (picture, entity) pairs that are the picture's entity
    or_broader  the same where what the entity is a kind of is right too: a caption may say no more,
                and no picture tells that it could have
    recall      share of pictures whose caption names their entity that got it
    ceiling     share of pictures whose caption names their entity that have it as a candidate
    wrong_captions    of pictures with another picture's caption, the share without its label
    silent_captions   of pictures whose caption names nothing, the share without any label
    senses      where an ambiguous name means the thing and has a label, the share that is right
    calibration       of labels by their probability, the share that is right

each of text_only and selected also by kind of entity and by the number of labels that it has.
Pictures that are not in W do not count.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from data_prep import engine
from data_prep.linking import rows as link_rows
from data_prep.quality import counts, picture
from data_prep.quality import truth as ground_truth
from data_prep.selection import choose
from mofi_jax.common import cli, errors, files

SETS = ("text_only", "selected")
SWEPT = {"min_probability": 3}  # thresholds, and the decimals of the values tried
_RATES = ("precision", "recall", "chosen", "right", "named", "found", "pictures")
_SHARES = np.linspace(0, 0.95, 20)  # of the pictures that a threshold leaves without label


def main(workdir: str, truth: str, classes: str | None = None) -> None:
    """The command: `measure_workdir`, and its tables.

    Args:
      workdir: that of the labels.
      truth: the file that says what each picture shows.
      classes: the entity of each class number, where the truth is given in these.
    """
    print(table(measure_workdir(workdir, truth, classes)))


def measure_workdir(workdir: str, truth: str, classes: str | None = None) -> dict:
    """Measures labels/ of `workdir`; writes label_quality.json and label_quality.png there.

    Returns:
      What label_quality.json holds: text_only and selected (`counts.Counts.result`), ceiling (a
      recall), calibration (`counts.Counts.calibration`) and sweep: for each threshold a list of
      precision, recall, chosen, right, named, found and pictures by ascending `value`, with
      `configured` true for the one in force. No sweep where labels were chosen by text.

    Raises:
      BadInput: a file is missing or holds no usable row, labels/ is not there yet or of another
        run than what it was made from, or the truth knows none of its pictures.
    """
    root = files.output_folder(workdir, "--workdir")
    known = ground_truth.read(truth, classes)
    shards = engine.listed(root / "labels")
    if not shards:
        raise errors.BadInput(
            f"--workdir={os.fspath(workdir)} holds no labels/: run `mofi labels` first."
        )
    # barred/, which is made again before labels/, is what tells of another knowledge base.
    changed = [*engine.outdated(root, "barred"), *engine.outdated(root, "labels")]
    made = engine.read_manifests(root, "labels")
    if any(manifest["settings"] != made[0]["settings"] for manifest in made):
        changed.append("configuration")
    if changed:
        raise errors.BadInput(
            f"--workdir={os.fspath(workdir)} holds labels/ that were not made from its"
            f" {changed[0]}: a later run has not come as far, or a copy is not whole, so run its"
            " `mofi labels` again to the end."
        )
    columns = ["qid", "kind", "types", "hypernyms"]
    entities = engine.read_table(root / "kb/entities.parquet", columns)
    above = ground_truth.above(entities, {entity for p in known.values() for entity in p.right})
    wanted = {entity for p in known.values() for entity in p.right | p.says}.union(*above.values())
    ids = entities["qid"].to_pylist()
    numbers = {entity: row for row, entity in enumerate(ids) if entity in wanted}
    kinds = np.array([kind or "" for kind in entities["kind"].to_pylist()])

    rule = choose.rule_in_force(root)
    values = _values(root, shards, rule) if rule else {}
    found: dict[tuple, counts.Counts] = {}
    sizes, pictures_known, example = np.zeros(len(ids), np.int64), 0, None
    for shard in shards:
        links = link_rows.read(root / "links" / shard.name)
        pictures = counts.Pictures(links.keys.to_pylist(), known, numbers, above)
        pictures_known += int(pictures.known.sum())
        example = links.keys[0].as_py() if len(links.keys) else example
        selected = _read_labels(shard)
        sizes += np.bincount(selected.entity, minlength=len(ids))
        labels = {
            ("text_only",): counts.Labels(*choose.choose_by_text(links)[:2]),
            ("selected",): selected,
            ("ceiling",): counts.Labels(*link_rows.distinct(links)[:2]),
            **dict(_sweep(root, shard.name, links, rule, values)),
        }
        for name, some in labels.items():
            found.setdefault(name, counts.Counts(len(ids))).add(pictures, links, some)
    if not pictures_known:
        raise errors.BadInput(
            f"--truth={os.fspath(truth)} knows none of the pictures in {root / 'labels'}: its keys"
            f" are such as {next(iter(known))!r}, theirs such as {example!r}."
        )

    results = {name: one.result(kinds, sizes) for name, one in found.items()}
    result = {name: results[name,] for name in SETS}
    result["ceiling"] = results["ceiling",]["recall"]
    result["calibration"] = found["selected",].calibration()
    if rule:
        result["sweep"] = {
            name: [
                {
                    **{"value": value, "configured": value == getattr(rule, name)},
                    **{rate: results[name, value][rate] for rate in _RATES},
                }
                for value in values[name]
            ]
            for name in values
        }
        picture.draw(result, root / "label_quality.png")
    else:
        (root / "label_quality.png").unlink(missing_ok=True)  # of labels that are no more
    path = root / "label_quality.json"
    engine.write_durably(path, (json.dumps(result, indent=1) + "\n").encode())
    return result


def _read_labels(shard: epath.Path) -> counts.Labels:
    table = engine.read_table(shard)
    entities = table["entities"].combine_chunks()
    row = np.repeat(np.arange(len(entities)), link_rows.lengths(entities))
    flat = [entities.flatten().to_numpy(zero_copy_only=False)]
    if "probabilities" in table.column_names:
        column = table["probabilities"].combine_chunks()
        flat.append(column.flatten().to_numpy(zero_copy_only=False))
    return counts.Labels(row, *flat)


# --------------------------------------------------------------------------------------- the sweep


def _sweep(
    root: epath.Path,
    name: str,
    links: link_rows.LinkRows,
    rule: choose.Rule | None,
    values: Mapping[str, Sequence[float]],
) -> Iterator[tuple[tuple, counts.Labels]]:
    """The labels of a shard for other thresholds."""
    if rule is None:
        return
    evidence, _ = choose.read_evidence(links, *choose.evidence_files(root, name))
    for key in values:
        for value in values[key]:
            chosen = choose.choose(links, evidence, rule._replace(**{key: value}))
            yield (key, value), counts.Labels(*chosen[:2])


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
        best = choose.choose(links, evidence, rule._replace(min_probability=0.0))
        reached["min_probability"].append(best.probability[link_rows.starts_run(best.row)])
    values = {}
    for name, decimals in SWEPT.items():
        found = np.concatenate(reached[name])
        # Rounded down: the lowest leaves all pictures their label.
        steps = np.quantile(found, _SHARES) if len(found) else np.zeros(0)
        steps = np.floor(steps * 10**decimals) / 10**decimals
        values[name] = sorted({float(getattr(rule, name)), *steps.tolist()})
    return values


# --------------------------------------------------------------------------------------- for people

_HEAD = ("precision", "recall", "pairs", "pictures")


def table(result: Mapping) -> str:
    """The result as tables for people."""
    lines = [_row("labels", *_HEAD), *(_line(name, result[name]) for name in SETS)]
    if result["ceiling"] is not None:
        lines.append(_row("ceiling", "", f"{result['ceiling']:.3f}"))
    selected = result["selected"]
    for group in ("by_kind", "by_size"):
        rows = sorted(selected[group].items(), key=lambda item: -item[1]["chosen"])
        lines += ["", _row(f"selected, {group.replace('_', ' ')}", *_HEAD[:3])]
        lines += [_line(name, row) for name, row in rows]
    lines += ["", _row("", *SETS)]
    rates = (_rate(result[name]["or_broader"]) for name in SETS)
    lines.append(_row("right, or a broader name", *rates))
    for group, rate, told in (
        ("wrong_captions", "without_its_label", "wrong caption, label refused"),
        ("silent_captions", "without_label", "empty caption, no label"),
        ("senses", "right", "right sense"),
    ):
        pictures = selected[group]["pictures"]
        if pictures:
            rates = (_rate(result[name][group][rate]) for name in SETS)
            lines.append(_row(told, *rates, f"of {pictures}"))
    if result["calibration"]:
        lines += ["", _row("probability", "precision", "pairs")]
        for one in result["calibration"]["bins"]:
            name = f"{one['probability']:.2f}"
            lines.append(_row(name, _rate(one["precision"]), one["labels"]))
    for name, rows in result.get("sweep", {}).items():
        lines += ["", _row(name, *_HEAD)]
        for row in rows:
            mark = "  < in force" if row["configured"] else ""
            lines.append(_line(f"{row['value']:.{SWEPT[name]}f}", row) + mark)
    return "\n".join(lines)


def _line(name: str, row: Mapping) -> str:
    rates = (_rate(row["precision"]), _rate(row["recall"]))
    return _row(name, *rates, row["chosen"], row.get("pictures", ""))


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.3f}"


def _row(name: str, *columns: object) -> str:
    return (f"{name:<30}" + "".join(f"{column:>10}" for column in columns)).rstrip()


if __name__ == "__main__":
    cli.run(main)
