"""Builds a knowledge base from a JSONL file (see `data_prep.kb_build` for both formats).

    python -m data_prep.build_kb --dump knowledge_base.jsonl.gz --out kb/

A finished folder is left alone. The counts are in kb/result.json, unusable lines with their numbers
and reasons in kb/rejects.parquet.
"""

import json

from absl import logging
from etils import epath

from data_prep import engine, kb_build
from mofi_jax import cli


def main(dump: str, out: str) -> None:
    """Builds `out` from `dump`.

    Raises:
      BadInput: `dump` is missing, damaged, of another format or without a usable row.
    """
    manifest = kb_build.build(dump, out)
    counts = manifest["counts"]
    logging.info("%s: %s", out, ", ".join(f"{value} {key}" for key, value in counts.items()))
    if counts["rejected"]:
        logging.warning("%d lines could not be used: see rejects.parquet", counts["rejected"])
    result = {"knowledge_base": manifest["outputs"], "counts": counts}
    engine.write_durably(epath.Path(out) / "result.json", json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    cli.run(main)
