"""Builds a knowledge base from a dump of Wikidata, JSONL or WordNet (see `data_prep.kb.build`).

    python -m data_prep.build_kb --dump latest-all.json.bz2 --out kb/ [--config configs/kb.py:...]
    python -m data_prep.build_kb --dump rows.jsonl.gz --out kb/
    python -m data_prep.build_kb --dump WordNet-3.0/dict --out kb/
    lbzip2 -dc latest-all.json.bz2 | python -m data_prep.build_kb --dump - --out kb/

The same command after a kill parses only what is not parsed yet; a finished folder is left alone.
The counts are in kb/result.json, what was dropped with its reasons among them; unusable lines with
their numbers and reasons are in kb/rejects.parquet.
"""

import json
import sys

import ml_collections
from absl import logging
from etils import epath

from data_prep import engine
from data_prep.kb import build as kb_build
from mofi_jax.common import cli, files


def main(config: ml_collections.ConfigDict, dump: str, out: str) -> None:
    """Builds `out` from `dump`.

    Raises:
      BadInput: `dump` is missing, damaged, of another format or without a usable entity.
    """
    files.output_folder(out, "--out")
    manifest = kb_build.build(dump, out, config)
    counts = manifest["counts"]
    logging.info("%s: %s", out, ", ".join(f"{value} {key}" for key, value in counts.items()))
    result = {"knowledge_base": manifest["outputs"], "counts": counts}
    engine.write_durably(epath.Path(out) / "result.json", json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    if not any(arg.lstrip("-").partition("=")[0] == "config" for arg in sys.argv[1:]):
        sys.argv.insert(1, "--config=kb")  # the defaults
    cli.run(main)
