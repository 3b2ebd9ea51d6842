"""Removes records from a published data set: the next patch version, without them.

    mofi remove --dataset W/i2e/1.0.0 --keys KEYS.txt
    mofi remove --dataset W/i2e/1.0.0 --keys KEYS.txt --max_hamming 0 --out W/i2e/1.0.1

KEYS.txt has one key in each line; in the work directory that made the data set also sha256:HEX or
phash:HEX of pictures. There copies of the pictures go too (`--max_hamming`: by how many bits of the
perceptual hash they may differ), and every later build leaves all of them out (`W/removed/`). A
data set elsewhere needs nothing but its own folder; its removed_keys.txt can be given to
`build_i2e` as `--config.removed`. See `data_prep.dataset.remove` for what is written. The same
command run again, after a kill too, does what is missing, or nothing.

The old version is not touched: delete it once nobody reads it any more. Until then, linked shards
take no room.
"""

from absl import logging

from data_prep.dataset import remove
from mofi_jax.common import cli, errors


def main(dataset: str, keys: str, out: str | None = None, max_hamming: str = "4") -> None:
    """The command: `remove`, and what it did for people to read.

    Args:
      dataset: folder of the published version.
      keys: the file of what is removed, a line each.
      out: folder of the new version; by default the next one beside `dataset`.
      max_hamming: bits of the perceptual hash by which copies may differ, 0 to 6.
    """
    if max_hamming not in [*"0123456"]:
        raise errors.BadInput(f"--max_hamming={max_hamming} cannot be used: give 0 to 6.")
    result = remove.remove(dataset, keys, out, int(max_hamming))
    unknown, version = result["unknown"], result["version"]
    if unknown:
        shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        logging.warning("%d keys are not in the data set: %s", len(unknown), shown)
    if not result["removed"]:
        logging.info("%s holds none of the keys: no new version is needed", dataset)
        return
    logging.info(
        "version %s: %d records removed (%d of them copies), %d shards written again, %d records"
        " left; delete %s to remove the pictures from this disk",
        *(version, result["removed"], result["copies"], result["shards_rewritten"]),
        *(result["records"], dataset),
    )


if __name__ == "__main__":
    cli.run(main)
