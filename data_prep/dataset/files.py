"""What a data set holds beside its shards: TFDS's metadata and the tokenizer of its captions."""

import itertools
import tempfile
from collections.abc import Iterable, Sequence

import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import metadata, records
from mofi_jax.data import tokenizer as tokenizer_lib

_BYTES = 256


def write_metadata(
    directory: epath.PathLike,
    *,
    name: str,
    version: str = records.VERSION,
    split: str = "train",
    shard_lengths: Sequence[int],
    num_bytes: int,
    description: str = "",
) -> None:
    """Writes features.json and dataset_info.json, which make `directory` a TFDS data set.

    Args:
      directory: the folder of the version, for its shards.
      name: data set name, which is the shards' prefix.
      version: three numbers, the name of `directory`.
      shard_lengths: records of each shard.
      num_bytes: sum of the records' sizes.
      description: one paragraph for people.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info, naming, splits

    directory = epath.Path(directory)
    identity = dataset_info.DatasetIdentity(
        name, tfds.core.Version(version), str(directory), "mofi_jax.data.records"
    )
    info = dataset_info.DatasetInfo(
        builder=identity, description=description, features=records.features()
    )
    info.set_file_format("array_record")
    split_info = splits.SplitInfo(
        name=split,
        shard_lengths=[int(length) for length in shard_lengths],
        num_bytes=int(num_bytes),
        filename_template=naming.ShardedFileTemplate(
            data_dir=directory, dataset_name=name, split=split, filetype_suffix="array_record"
        ),
    )
    info.set_splits(splits.SplitDict([split_info]))
    # A data set is there once dataset_info.json is: that comes last, and whole.
    with tempfile.TemporaryDirectory(dir=directory, prefix=".metadata-") as temporary:
        temporary = epath.Path(temporary)
        info.write_to_directory(temporary)
        for file in (metadata.FEATURES_FILE, metadata.INFO_FILE):
            (temporary / file).rename(directory / file)


def train_bpe(texts: Iterable[str], vocab_size: int, path: epath.PathLike) -> None:
    """Trains a byte-level BPE and writes it as a Hugging Face tokenizer.json.

    Text is brought to NFKC, lower case and single spaces. The three special tokens get the highest
    ids, the EOS the very highest. The bytes written depend on `texts` and `vocab_size` alone; the
    file appears complete or not at all.

    Args:
      texts: in any order.
      vocab_size: ids wanted, special tokens included; a small corpus may give fewer.

    Raises:
      BadInput: no text at all, or a vocabulary too small for the 256 bytes and 3 special tokens.
    """
    specials = [tokenizer_lib.PAD, tokenizer_lib.BOS, tokenizer_lib.EOS]
    if vocab_size < _BYTES + len(specials):
        raise BadInput(
            f"vocab_size={vocab_size} is too small for a byte-level tokenizer: set it to "
            f"{_BYTES + len(specials)} (every byte and {len(specials)} special tokens) or more."
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    # The leading space makes the first word of a text the same pieces as in the middle of one.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    texts = iter(texts)
    if (first := next(texts, None)) is None:
        raise BadInput(f"There is no text to train {path} on: give at least one caption.")
    tokenizer.train_from_iterator(
        map(tokenizer_lib.encodable, itertools.chain([first], texts)),
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(specials),
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    # Added after training, because the trainer would give them the lowest ids (and EOS the 2 that
    # transformers reads as "pool at the largest id").
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(s, special=True, normalized=False) for s in specials]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer_lib.BOS} $A {tokenizer_lib.EOS}",
        special_tokens=[(s, tokenizer.token_to_id(s)) for s in specials[1:]],
    )
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, tokenizer.to_str(pretty=True))
