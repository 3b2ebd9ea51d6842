"""Labels against ground truth, with each part of the labelling switched off in turn.

    python -m benchmarks.labels --config configs/i2e.py:folder=PAIRS,kb=KB --config.clip=RUN \\
        --workdir W --truth TRUTH.jsonl

prepares W as far as labels/ once for each row and prints what `data_prep.label_quality` measures.
What a row does not change is not made again, so that rows cost seconds, those that read captions
otherwise a minute or so for each 20,000 of them.
"""

import json
import os

import ml_collections

from data_prep import engine, label_quality
from data_prep.kb import build as kb_build
from data_prep.kb import kinds
from data_prep.linking import stage as linking_stage
from data_prep.pairs import stage as pairs_stage
from data_prep.selection import choose
from mofi_jax.common import cli, files

# Keys that differ from the configuration that is given; the first row changes nothing.
WAYS = {
    "all parts": {},
    "target_precision 0.8": {"target_precision": 0.8},
    "all kinds may be labels": {"label_kinds": kinds.KINDS},
    "senses without kin": {"kin_weight": 0.0},
    "senses without priors": {"prior_weight": 0.0},
    "pictures by text alone": {"prototype_weight": 0.0},
    "captions without types": {"ner_weight": 1.0},
    "captions without case": {"case_weight": 1.0},
    "captions without nothing": {"nil_weight": 0.0},
    "captions without spaCy": {"spacy_model": None},
    "labels=text": {"labels": "text"},
}
_COLUMNS = ("precision", "broader", "recall", "pairs", "refused", "silent", "sense")


def main(
    config: ml_collections.ConfigDict, workdir: str, truth: str, classes: str | None = None
) -> None:
    """Prints a row for each way; W/ablations.json keeps all that was measured.

    Args:
      workdir: the work directory.
      truth: of the pictures, see `data_prep.quality.truth`.
      classes: what the truth's classes mean, where it has classes.
    """
    root = files.output_folder(workdir, "--workdir")
    print(f"{'':<28}" + "".join(f"{name:>10}" for name in _COLUMNS), flush=True)
    results = {}
    for name, changes in WAYS.items():
        results[name] = measure(config, changes, workdir, truth, classes)["selected"]
        print(row(name, results[name]), flush=True)
    text = json.dumps(results, indent=1) + "\n"
    engine.write_durably(root / "ablations.json", text.encode())


def measure(config, changes, workdir, truth, classes) -> dict:
    """What `data_prep.label_quality` finds in the labels of a changed configuration."""
    # References would hand the change on to the next row.
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    with engine.Engine(os.fspath(workdir), changed.workers) as work:
        pairs_stage.run(changed, work)
        kb_build.prepare(changed, work)
        linking_stage.run(changed, work)
        choose.run(changed, work)
    return label_quality.measure_workdir(workdir, truth, classes)


def row(name: str, result: dict) -> str:
    """A line of the table."""
    rates = [
        *(result["precision"], result["or_broader"], result["recall"], result["chosen"]),
        result["wrong_captions"]["without_its_label"],
        result["silent_captions"]["without_label"],
        result["senses"]["right"],
    ]
    told = ("-" if r is None else f"{r:.3f}" if isinstance(r, float) else str(r) for r in rates)
    return f"{name:<28}" + "".join(f"{one:>10}" for one in told)


if __name__ == "__main__":
    cli.run(main)
