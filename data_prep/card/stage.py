"""The data card: what went in, what came out, and why. All stages -> report/.

    report/report.json   every number of the page
    report/index.html    the page (`page`), self-contained

Numbers are counted in `numbers` and `labels`, pictures chosen in `pictures`.
For the same inputs both files are the same every time, but for the seconds that the stages took.
"""

import itertools
import json
import os
import re

import ml_collections
import numpy as np
from etils import epath

from data_prep import engine
from data_prep.card import labels as card_labels
from data_prep.card import numbers as card_numbers
from data_prep.card import page as card_page
from data_prep.card import pictures as card_pictures
from data_prep.selection import choose, embed
from mofi_jax.data import records

# What a path looks like: absolute, from home, from here or from above, or of a bucket.
_PATH = re.compile(r"(?:[a-z][a-z0-9+.-]*:/(?=/)|(?<![\w.~}/])(?:~|\.{1,2}))?(?<!\w)/[^\s,{}]+")

_TOLD = ("indexed", "pairs", "dropped-i2e", "shards-i2e")  # of these the counts, or files


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Writes report/index.html and report/report.json for the labelled data set in `workdir`.

    Args:
      config: printed on the page, of paths the last part; `sources`, `labels`, `min_images` and,
        where pictures are embedded, what `embed.is_on` reads.
      work: the engine; its work directory holds all the stages' output.

    Returns:
      The one manifest; counts `pictures`, those on the page.
    """
    workdir = work.workdir
    stages = ("pairs", "links", "barred", "labels", "labels_final", "rejects")
    stages += ("z_scores", "visibility", "twins") if embed.is_on(config) else ()
    files = {stage: engine.listed(workdir / stage) for stage in stages}
    # What the other data set leaves out is none of this one's.
    other = re.compile("(dropped|ordered|planned|shards)-i2t-")
    files["rejects"] = [path for path in files["rejects"] if not other.match(path.name)]
    # Which filters are on, also of one whose shards are all in quarantine.
    filters = [m["settings"]["stages"] for m in engine.read_manifests(workdir, "dropped-i2e")]
    for stage in sorted({*card_pictures.JUDGES} & {*itertools.chain(*filters)}):
        files[stage] = engine.listed(workdir / stage)
    if "eval_cosines" in files:
        files["eval_limits"] = engine.listed(workdir / "eval_limits")
    vocabulary = workdir / "i2e" / records.VERSION / records.ENTITIES_FILE
    files["kb"] = [workdir / "kb/entities.parquet"]
    files["vocabulary"] = [vocabulary, workdir / "vocabulary/kb_rows.npy"]
    manifests = (workdir / stage / engine.MANIFESTS for stage in _TOLD)
    files["manifests"] = [path for path in manifests if path.exists()]
    settings = {
        "version": 6,
        "files": [(stage, len(paths)) for stage, paths in files.items()],
        "config": without_folders(config.to_dict()),
        "rule": choose.rule_in_force(workdir)._asdict() if embed.is_on(config) else {},
    }
    task = engine.Task("card", tuple(path for paths in files.values() for path in paths))
    return work.map_shards("report", _write, [task], settings, keys=None)


def without_folders(value):
    """A config value, of paths only the last part, and no workers: a page tells of no machine.

    Args:
      value: anything that JSON holds.
    """
    if isinstance(value, dict):
        return {key: without_folders(v) for key, v in value.items() if key != "workers"}
    if isinstance(value, list | tuple):
        return [without_folders(entry) for entry in value]
    if isinstance(value, str):
        return _PATH.sub(lambda path: os.path.basename(path.group().rstrip("/")), value)
    return value


def _write(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    files, rest = {}, list(task.inputs)
    for stage, count in settings["files"]:
        files[stage], rest = rest[:count], rest[count:]
    config = settings["config"]
    entities = records.read_entities(files["vocabulary"][0])
    stages = [os.path.basename(os.path.dirname(path)) for path in files.pop("manifests")]
    manifests = [m for stage in stages for m in engine.read_manifests(outputs.workdir, stage)]
    counts = {
        stage: engine.total_counts([m for m in manifests if m["stage"] == stage])
        for stage in ("pairs", "dropped-i2e", "shards-i2e")
    }
    with engine.connect(outputs) as connection:
        files["unwritten"] = card_numbers.unwritten(connection, files["rejects"])
        about = (connection, files)
        sources = card_numbers.by_source(*about)
        report = {
            "name": ", ".join(source.partition("=")[0] for source in config["sources"]),
            "config": config,
            "funnel": {
                "not_downloaded": counts["pairs"].get("not_downloaded", 0),
                "missing": counts["pairs"].get("pairs_missing", 0),
                **card_numbers.funnel(*about, sources, counts["shards-i2e"]["records"]),
                "entities": int(np.count_nonzero(entities.counts)),
            },
            "sources": sources,
            "failed_downloads": _failed_downloads(counts["pairs"]),
            "rejects": card_numbers.rejects(*about),
            "labels_per_picture": card_labels.labels_per_picture(*about),
            "images_per_entity": card_labels.images_per_entity(entities.counts),
            "picture_sizes": card_numbers.picture_sizes(*about),
            **dict.fromkeys(("probabilities", "sensitivity")),
            "entity_types": card_labels.entity_types(*about),
            "captions": card_numbers.scripts(*about),
            "duplicates": card_numbers.duplicates(*about, counts["dropped-i2e"]),
            **card_pictures.entity_strips(*about, entities),
            "gallery": card_pictures.gallery(*about, config),
            "rates": _rates(outputs.workdir),
            "lineage": _lineage(manifests),
        }
        if embed.is_on(config):
            report |= card_labels.thresholds(*about, config | settings["rule"])
        keys = [picture["key"] for picture in report["gallery"]]
        for entity in (*report["top_entities"], *report["rare_entities"]):
            keys += entity["keys"]
        thumbnails = card_pictures.thumbnails(*about, outputs.workdir, keys)
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    outputs.path("report/report.json").write_text(text)
    outputs.path("report/index.html").write_text(card_page.render(report, thumbnails))
    return {"pictures": len(thumbnails)}


def _failed_downloads(counts: dict[str, int]) -> dict[str, int]:
    """Pairs that the downloader got no picture for, by status, where the input tells."""
    found = [(*name.partition("not_downloaded_")[1:], n) for name, n in counts.items()]
    found = [(status, n) for prefix, status, n in found if prefix]
    return dict(sorted(found, key=lambda entry: (-entry[1], entry[0])))


def _rates(workdir: epath.Path) -> list[dict]:
    """Seconds of each stage, summed over workers; rows are what its first count counts."""
    rows = []
    for stage, spent in engine.stage_seconds(workdir).items():
        if stage == "report":
            continue
        counts = engine.total_counts(engine.read_manifests(workdir, stage))
        unit, count = next(iter(counts.items()), ("", 0))
        rows.append({"stage": stage, **spent, "rows": count, "unit": unit})
    return rows


def _lineage(manifests: list[dict]) -> dict:
    """Of files path, bytes and sha256, of shards also how many records."""
    # A large file is the input of several shards.
    inputs = {m["inputs"][0]["path"]: m["inputs"][0] for m in manifests if m["stage"] == "indexed"}
    written = [
        (m, entry) for m in manifests for entry in m["outputs"] if m["stage"] == "shards-i2e"
    ]
    return {
        "inputs": [{**i, "path": os.path.basename(path)} for path, i in inputs.items()],
        "shards": [
            {**entry, "records": manifest["counts"]["records"]}
            for manifest, entry in written
            if ".array_record-" in entry["path"]
        ],
    }
