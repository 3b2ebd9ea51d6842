"""Builds a knowledge base from a dump of Wikidata, JSONL or WordNet.

    mofi kb --dump latest-all.json.bz2 --out kb/ --config kb:languages=en+de
    mofi kb --dump rows.jsonl.gz --out kb/
    mofi kb --dump WordNet-3.0/dict --out kb/
    lbzip2 -dc latest-all.json.bz2 | mofi kb --dump - --out kb/

The same command after a kill parses only what is not parsed yet; a finished folder is left alone.
The counts are in kb/result.json, what was dropped with its reasons among them; unusable lines with
their numbers and reasons are in kb/rejects.parquet.
"""

from mofi_jax.common import console

if __name__ == "__main__":
    console.begin("knowledge base: loading the libraries for data")

import json

import ml_collections
from absl import logging
from etils import epath

from data_prep import engine
from data_prep.kb import build as kb_build
from mofi_jax.common import cli, files


def main(config: ml_collections.ConfigDict, dump: str, out: str) -> None:
    """Builds `out` from `dump`, see `data_prep.kb.build`.

    Args:
      dump: the file, or for WordNet the folder; - for what comes in by a pipe.
      out: folder of the knowledge base; the same command with it goes on.

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
    cli.run(main, config="kb")
