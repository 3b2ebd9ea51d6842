"""A set to measure on: the held-out pictures that have a label. -> evaluation/

    held_out_labels/  rows.parquet  the pairs of these pictures with their best label
    evaluation/       held_out.tar             {class}_{number}.jpg, the class being the best label
                      held_out.captions.jsonl  of each picture its captions
                      classes.jsonl            class, id, label

There is none where no two pictures would be of one entity.  The layout is that of sets of one's own
(`configs/eval.py`).  Only labelled pairs, as in the data set: a caption that tells nothing of its
picture measures nothing.  The classes are as right as the labels are, which is the same for all
models that are compared.
"""

import io
import json
import os
import tarfile

import ml_collections
from absl import logging

from data_prep import engine
from data_prep.dataset import shards
from data_prep.filters import held_out
from data_prep.pairs import pictures
from data_prep.pairs import stage as pairs_stage
from mofi_jax.data import ops

FOLDER, TASK = "evaluation", "held_out"  # in the work directory
_ROWS = "held_out_labels"

_LABELLED = """
    SELECT pairs.path, pairs."offset", pairs.length, pairs.sha256, pairs.text,
           labels.entities[1] AS entity, kb.qid, kb.label
    FROM read_parquet($pairs) AS pairs
    JOIN (SELECT key FROM read_parquet($dropped) WHERE reason = $reason) USING (key)
    JOIN read_parquet($labels) AS labels USING (key)
    JOIN read_parquet($kb, file_row_number = true) AS kb
      ON kb.file_row_number = labels.entities[1]
    ORDER BY pairs.sha256, key
"""


def run(config: ml_collections.ConfigDict, work: engine.Engine) -> list[dict]:
    """Writes evaluation/, of the pairs that dropped-i2e/ has as held out.

    Args:
      config: `held_out`, 0 for no such set; `jpeg_quality` and `max_side` of its pictures, as in
        the data set.
      work: the engine; its work directory holds pairs/, labels/, dropped-i2e/ and kb/.

    Returns:
      The one manifest, if any; counts `pictures`, `classes`.
    """
    if not config.held_out:  # what an earlier run wrote goes
        for stage in (_ROWS, FOLDER):
            if (work.workdir / stage).exists():
                work.map_shards(stage, _write, [], {})
        return []
    names = {"pairs": "pairs", "dropped": "dropped-i2e", "labels": "labels"}
    tables = {name: engine.listed(work.workdir / folder) for name, folder in names.items()}
    tables["kb"] = [work.workdir / "kb/entities.parquet"]
    rows = f"{_ROWS}/rows.parquet"
    work.aggregate(_ROWS, {rows: _LABELLED}, tables, {"reason": held_out.REASON})
    settings = {key: config[key] for key in ("jpeg_quality", "max_side")}
    settings["decoders"] = pictures.DECODERS
    task = engine.Task(TASK, (work.workdir / rows,))
    return work.map_shards(FOLDER, _write, [task], settings, keys=None)


def _write(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    rows = engine.read_table(task.inputs[0]).to_pylist()
    first = {row["sha256"]: row for row in reversed(rows)}  # of the pairs of one picture
    captions: dict[str, list[str]] = {digest: [] for digest in first}
    for row in rows:
        captions[row["sha256"]].append(row["text"])
    kept = list(first.values())
    if len({row["entity"] for row in kept}) == len(kept):
        logging.warning(
            "no two of %d held-out pictures are of one entity: no set of them", len(kept)
        )
        return {"pictures": 0, "classes": 0}
    pointers = ([row[name] for row in kept] for name in ("path", "offset", "length"))
    read = dict(pairs_stage.read_pictures(outputs.workdir, *pointers))
    lines = []
    with tarfile.open(os.fspath(outputs.path(f"{FOLDER}/held_out.tar")), "w") as tar:
        for number, row in enumerate(kept):
            try:
                found = read.pop(number)
                data, *_ = shards.to_jpeg(found, settings["max_side"], settings["jpeg_quality"])
            except ops.UndecodableImage:
                continue
            member = tarfile.TarInfo(f"{row['entity']}_{number}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            lines.append({"image": member.name, "captions": captions[row["sha256"]]})
    classes = {row["entity"]: (row["qid"], row["label"]) for row in kept}
    table = [{"class": n, "id": qid, "label": label} for n, (qid, label) in classes.items()]
    for name, content in (("held_out.captions", lines), ("classes", table)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content)
        outputs.path(f"{FOLDER}/{name}.jsonl").write_text(text, encoding="utf-8")
    return {"pictures": len(lines), "classes": len(classes)}
