"""The data card: what went in, what came out, and why. All stages -> report/.

    report/report.json   every number of the page
    report/index.html    the page (`report_page`), self-contained

Numbers are counted by DuckDB over the stages' tables; pictures are few and chosen by the hash of
their key, so that the page is the same every time and costs the same for a billion pairs.
"""

import base64
import json
import os
from collections.abc import Sequence

import ml_collections
import numpy as np
from etils import epath

from data_prep import engine, report_page, selection, shards, sources
from mofi_jax.data import records

# Pictures of the gallery, by what happened to them.
GALLERY = {"changed": 16, "agreed": 12, "rejected": 12}
TOP_ENTITIES = 12
PICTURES_PER_ENTITY = 8
_THUMBNAIL = 112  # px of the shorter side


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Writes report/index.html and report/report.json for the labelled data set in `workdir`.

    Args:
      config: printed on the page; `labels` and `prototype_weight` are read.
      work: the engine; its work directory holds all the stages' output.

    Returns:
      The one manifest.
    """
    workdir = work.workdir
    stages = ("pairs", "links", "labels", "labels_final", "rejects")
    files = {stage: sorted(workdir.glob(f"{stage}/*.parquet")) for stage in stages}
    if config.labels == "clip":
        for stage in ("scores", "fits", "coherence"):
            files[stage] = sorted(workdir.glob(f"{stage}/*.parquet"))
    files["kb"] = [workdir / "kb/entities.parquet"]
    files["vocabulary"] = [
        workdir / "vocabulary/entities.parquet",
        workdir / "vocabulary/kb_rows.npy",
    ]
    files["manifests"] = [
        path
        for stage in ("pairs", "shards-i2e")
        for path in sorted((workdir / stage).glob("*.json"))
        if not path.name.startswith(".")
    ]
    settings = {
        "files": [(stage, len(paths)) for stage, paths in files.items()],
        # The number of workers changes nothing, so the page does not show it.
        "config": {key: value for key, value in config.to_dict().items() if key != "workers"},
    }
    task = engine.Task("card", tuple(path for paths in files.values() for path in paths))
    return work.map_shards("report", _write, [task], settings, here=True)


def _write(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    files, rest = {}, list(task.inputs)
    for stage, count in settings["files"]:
        files[stage], rest = rest[:count], rest[count:]
    config = settings["config"]
    entities = records.read_entities(files["vocabulary"][0])
    report = {
        "config": config,
        "funnel": _funnel(files, len(entities)),
        "rejects": _rejects(files),
        "labels_per_picture": _labels_per_picture(files),
        "images_per_entity": _images_per_entity(entities.counts),
        "fits": _fit_histogram(files, config) if config["labels"] == "clip" else None,
        "top_entities": _top_entities(files, entities),
        "gallery": _gallery(files, config),
        "lineage": _lineage(files),
    }
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    outputs.path("report/report.json").write_text(text)
    thumbnails = _thumbnails(files, outputs.workdir, report)
    outputs.path("report/index.html").write_text(report_page.render(report, thumbnails))
    return {"pictures": len(thumbnails)}


# ------------------------------------------------------------------------------------------ numbers


def _query(sql: str, **parameters) -> list[tuple]:
    import duckdb

    return duckdb.sql(sql, params=parameters).fetchall()


def _funnel(files: dict, num_entities: int) -> dict[str, int]:
    """How many pairs are left after each step, in order; and the entities."""
    [(pairs,)] = _query("SELECT count(*) FROM read_parquet($files)", files=files["pairs"])
    [(invalid,)] = _query(
        "SELECT count(*) FROM read_parquet($files) WHERE stage = 'pairs'", files=files["rejects"]
    )
    [(mention, candidate)] = _query(
        "SELECT count(*) FILTER (len(mentions) > 0), count(*) FILTER (len(candidates) > 0)"
        " FROM read_parquet($files)",
        files=files["links"],
    )
    [(labelled,)] = _query(
        "SELECT count(*) FROM read_parquet($files) WHERE reason IS NULL", files=files["labels"]
    )
    [(final,)] = _query("SELECT count(*) FROM read_parquet($files)", files=files["labels_final"])
    return {
        "read": pairs + invalid,
        "valid": pairs,
        "with_mention": mention,
        "with_candidate": candidate,
        "labelled": labelled,
        "final": final,
        "entities": num_entities,
    }


def _rejects(files: dict) -> list[dict]:
    stages = ("pairs", "labels", "labels_final")
    rows = _query(
        "SELECT stage, reason, count(*) FROM read_parquet($files) GROUP BY stage, reason",
        files=files["rejects"],
    )
    rows = [row for row in rows if row[0] in stages]
    rows.sort(key=lambda row: (stages.index(row[0]), -row[2], row[1]))
    return [{"stage": stage, "reason": reason, "count": n} for stage, reason, n in rows]


def _labels_per_picture(files: dict) -> dict[str, int]:
    rows = _query(
        "SELECT len(entities), count(*) FROM read_parquet($files) GROUP BY 1 ORDER BY 1",
        files=files["labels_final"],
    )
    return {str(labels): count for labels, count in rows}


def _images_per_entity(counts: np.ndarray) -> list[dict]:
    """Entities by their number of pictures, in bins that double: 1, 2-3, 4-7, ..."""
    bins = np.floor(np.log2(counts)).astype(int)
    return [
        {"from": 2**b, "to": 2 ** (b + 1) - 1, "entities": int((bins == b).sum())}
        for b in range(bins.min(), bins.max() + 1)
    ]


def _fit_histogram(files: dict, config: dict) -> dict:
    """Candidates by fit in bins of 0.25, chosen ones apart."""
    rows = _query(
        """
        WITH fits AS (
            SELECT key, unnest(entities) AS entity, unnest(text_fits) AS text_fit,
                   unnest(picture_fits) AS picture_fit
            FROM read_parquet($fits)
        ),
        labels AS (SELECT key, entities AS chosen FROM read_parquet($labels)),
        coherence AS (SELECT * FROM read_parquet($coherence))
        SELECT floor(4 * ((text_fit + $w * picture_fit) / (1 + $w) + $c * coherence))::INT AS bin,
               count(*) FILTER (list_contains(chosen, entity)),
               count(*) FILTER (NOT list_contains(chosen, entity))
        FROM fits JOIN labels USING (key) JOIN coherence USING (entity) GROUP BY 1 ORDER BY 1
        """,
        fits=files["fits"],
        labels=files["labels"],
        coherence=files["coherence"],
        w=float(config["prototype_weight"]),
        c=float(config["coherence_weight"]),
    )
    return {
        "threshold": config["min_fit"],
        "bins": [{"from": b / 4, "chosen": chosen, "others": n} for b, chosen, n in rows],
    }


def _top_entities(files: dict, entities: records.Entities) -> list[dict]:
    """The entities with most pictures, and some of these."""
    kb_rows = np.load(files["vocabulary"][1])
    top = range(min(TOP_ENTITIES, len(entities)))
    rows = _query(
        """
        SELECT entity, key FROM (
            SELECT unnest(entities) AS entity, key FROM read_parquet($labels)
        ) WHERE list_contains($entities, entity)
        QUALIFY row_number() OVER (PARTITION BY entity ORDER BY md5(key), key) <= $limit
        ORDER BY entity, md5(key), key
        """,
        labels=files["labels_final"],
        entities=[int(kb_rows[i]) for i in top],
        limit=PICTURES_PER_ENTITY,
    )
    return [
        {
            "qid": entities.qids[i],
            "name": entities.names[i],
            "description": entities.descriptions[i],
            "images": int(entities.counts[i]),
            "keys": [key for entity, key in rows if entity == kb_rows[i]],
        }
        for i in top
    ]


def _lineage(files: dict) -> dict:
    manifests = [json.loads(epath.Path(path).read_text()) for path in files["manifests"]]
    inputs = [m["inputs"][0] for m in manifests if m["stage"] == "pairs"]
    written = [m for m in manifests if m["stage"] == "shards-i2e"]
    return {
        "inputs": [
            {"path": os.path.basename(i["path"]), "bytes": i["bytes"], "sha256": i["sha256"]}
            for i in inputs
        ],
        "shards": [
            {
                "path": output["path"],
                "bytes": output["bytes"],
                "sha256": output["sha256"],
                "records": manifest["counts"]["records"],
            }
            for manifest in written
            for output in manifest["outputs"]
            if ".array_record-" in output["path"]
        ],
    }


# ----------------------------------------------------------------------------------------- pictures


def _gallery(files: dict, config: dict) -> list[dict]:
    """Pictures with everything that was known about them, grouped as in `GALLERY`."""
    # More than are shown: which group a labelled picture belongs to is known only afterwards.
    sample = _query(
        """
        SELECT key, entities, reason FROM read_parquet($labels)
        WHERE reason IS DISTINCT FROM 'no_mention' AND reason IS DISTINCT FROM 'no_candidate'
        QUALIFY row_number() OVER (PARTITION BY reason IS NULL ORDER BY md5(key), key) <= 200
        ORDER BY md5(key), key
        """,
        labels=files["labels"],
    )
    keys = [key for key, _, _ in sample]
    where = "FROM read_parquet($files) WHERE list_contains($keys, key)"
    links = {
        key: (mentions, candidates)
        for key, mentions, candidates in _query(
            f"SELECT key, mentions, candidates {where}", files=files["links"], keys=keys
        )
    }
    texts = dict(_query(f"SELECT key, text {where}", files=files["pairs"], keys=keys))
    evidence = _evidence(files, where, keys) if config["labels"] == "clip" else {}
    names = _names(files, [c["entity"] for _, candidates in links.values() for c in candidates])
    gallery, left = [], dict(GALLERY)
    for key, chosen, reason in sample:
        mentions, candidates = links[key]
        by_text = selection.best_prior_entities(mentions, candidates)
        group = "rejected" if reason else "agreed" if set(chosen) == set(by_text) else "changed"
        if not left[group]:
            continue
        left[group] -= 1
        rows = []
        distinct: dict[int, dict] = {}  # an entity may be a candidate of several mentions
        for candidate in sorted(candidates, key=lambda candidate: candidate["prior"]):
            distinct[candidate["entity"]] = candidate
        for entity, candidate in distinct.items():
            row = {
                "name": names[entity][0],
                "description": names[entity][1],
                "prior": round(candidate["prior"], 3),
                "by_text": entity in by_text,
                "chosen": entity in chosen,
            }
            if (key, entity) in evidence:
                known = evidence[key, entity]
                row["score"] = known.score
                row["fit"] = known.fit(selection.Rule.of(config))
            rows.append(row)
        gallery.append(
            {
                "key": key,
                "group": group,
                "reason": reason,
                "text": texts[key],
                "mentions": [[m["start"], m["end"], m["kind"]] for m in mentions],
                "candidates": rows,
            }
        )
    return sorted(gallery, key=lambda picture: list(GALLERY).index(picture["group"]))


def _evidence(files: dict, where: str, keys: list[str]) -> dict[tuple, selection.Evidence]:
    scores = _query(f"SELECT key, entities, scores {where}", files=files["scores"], keys=keys)
    fits = {
        key: (text_fits, picture_fits)
        for key, text_fits, picture_fits in _query(
            f"SELECT key, text_fits, picture_fits {where}", files=files["fits"], keys=keys
        )
    }
    coherence = dict(
        _query("SELECT entity, coherence FROM read_parquet($files)", files=files["coherence"])
    )
    return {
        (key, entity): selection.Evidence(round(score, 4), *values, coherence[entity])
        for key, entities, cosines in scores
        for entity, score, *values in zip(entities, cosines, *fits[key], strict=True)
    }


def _names(files: dict, entities: Sequence[int]) -> dict[int, tuple[str, str]]:
    """Name and description of rows of the knowledge base."""
    rows = _query(
        "SELECT file_row_number, label, coalesce(description, '')"
        " FROM read_parquet($kb, file_row_number = true)"
        " WHERE list_contains($entities, file_row_number)",
        kb=files["kb"],
        entities=sorted(set(entities)),
    )
    return {entity: (name, description) for entity, name, description in rows}


def _thumbnails(files: dict, workdir: epath.Path, report: dict) -> dict[str, str]:
    """JPEG as base64 of every picture on the page, by key."""
    keys = [picture["key"] for picture in report["gallery"]]
    keys += [key for entity in report["top_entities"] for key in entity["keys"]]
    rows = _query(
        'SELECT key, path, "offset", length FROM read_parquet($files)'
        " WHERE list_contains($keys, key) ORDER BY key",
        files=files["pairs"],
        keys=keys,
    )
    pointers = list(zip(*rows, strict=True))[1:] if rows else [(), (), ()]
    thumbnails = {}
    for row, data in sources.read_pictures(workdir, *pointers):
        jpeg, _, _ = shards.to_jpeg(data, max_side=_THUMBNAIL, quality=85)
        thumbnails[rows[row][0]] = base64.b64encode(jpeg).decode()
    return thumbnails
