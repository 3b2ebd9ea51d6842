"""Text to token ids by any Hugging Face tokenizer.json (`data_prep.dataset.files` trains one).

A row of ids is ``bos, pieces..., eos, pad...``, or without the BOS where the tokenizer.json itself
puts an EOS alone around a text (SigLIP's). The EOS appears exactly once, so that every pooling rule
in use finds the same position: "first EOS" (ours, Hugging Face), "largest id" (OpenAI, open_clip;
it needs an EOS with the highest id) and "last token that is no padding" (axlearn). Only a tokenizer
without BOS may pad with its EOS: SigLIP's does, whose model reads the padding and has to get it.
"""

import contextlib
import hashlib
import json
import math
import re
import string
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int32

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput

VOCABULARY, MERGES = "vocab.json", "merges.txt"
PIECES = "spiece.model"
# How CLIP splits a text into words, and each of them into bytes (openai/CLIP simple_tokenizer.py).
CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
# How many times as long a tokenizer may make a text before it is split.
MAX_GROWTH = 100

PAD, BOS, EOS = "<|pad|>", "<|startoftext|>", "<|endoftext|>"

# For a tokenizer.json without a tokenizer_config.json beside it: the names in common use.
KNOWN_NAMES = {
    "bos": (BOS, "<s>", "<bos>", "[CLS]", "[BOS]"),
    "eos": (EOS, "</s>", "<eos>", "[SEP]", "[EOS]"),
    "pad": (PAD, "<pad>", "[PAD]"),
}

# What was done to the texts that models were trained with, by the tokenizer_class of their
# tokenizer_config.json: transformers' classes do it, a tokenizer.json of these models need not.
# The hub's SigLIP 2 folders name Gemma's class.
_LOWER = [tokenizers.normalizers.Lowercase()]
_CANONICAL = [
    *_LOWER,
    tokenizers.normalizers.Replace(tokenizers.Regex(f"[{re.escape(string.punctuation)}]"), ""),
    tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
    tokenizers.normalizers.Strip(),
]
PREPARATIONS = {
    "SiglipTokenizer": _CANONICAL,
    **dict.fromkeys(("Siglip2Tokenizer", "GemmaTokenizer", "GemmaTokenizerFast"), _LOWER),
}


class Tokenizer:
    """A tokenizer.json, CLIP's vocab.json with merges.txt, or SigLIP's spiece.model: texts -> ids.

    The others are how transformers saves slow tokenizers: CLIP's before version 5, SigLIP's still.

    Special tokens are those that a tokenizer_config.json beside the file names (`bos_token`,
    `eos_token`, `pad_token`), else those of names in common use. Where a foreign tokenizer with a
    BOS pads with its EOS (OpenAI CLIP), id 0 is used instead, as open_clip does: with causal
    attention what stands after the EOS changes nothing, and each row keeps exactly one EOS.
    `bos_id` is None where texts begin with none; `vocab_size` is the highest id in use, plus one;
    `serialized` the tokenizer.json's text, with the `PREPARATIONS` of its class if it has any, and
    `fingerprint` its sha256.
    """

    def __init__(self, path: epath.PathLike, context_length: int):
        """Raises BadInput: no such file, not a tokenizer, no special tokens, or a context shorter
        than BOS, one piece and EOS."""
        if context_length < 3:
            raise BadInput(
                f"context_length={context_length} leaves no room for text between BOS and EOS: "
                "set it to 3 or more."
            )
        self.path = epath.Path(path)
        self.context_length = context_length
        try:
            self.serialized = _serialized(self.path)
            self._tokenizer = tokenizers.Tokenizer.from_str(self.serialized)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise BadInput(
                f"There is no tokenizer at {self.path}: give the path of a tokenizer.json."
            ) from error
        except BadInput:
            raise
        except Exception as error:  # `tokenizers` raises plain Exception for a file it cannot read.
            raise BadInput(
                f"{self.path} is not a tokenizer.json ({error}): write it again or copy it anew."
            ) from error
        normalizer = self._tokenizer.normalizer
        if normalizer is not None and _growth(json.loads(normalizer.__getstate__())) > MAX_GROWTH:
            raise BadInput(
                f"The normalizer of {self.path} makes texts more than {MAX_GROWTH} times as long: "
                "use another tokenizer."
            )
        config = _config(self.path)
        if preparation := PREPARATIONS.get(str(config.get("tokenizer_class"))):
            steps = [*preparation, *([normalizer] if normalizer is not None else [])]
            self._tokenizer.normalizer = tokenizers.normalizers.Sequence(steps)
            self.serialized = self._tokenizer.to_str()
        self.fingerprint = hashlib.sha256(self.serialized.encode()).hexdigest()
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        with _told(self.path):
            framed, pieces = (
                self._tokenizer.encode("a", add_special_tokens=special).ids
                for special in (True, False)
            )
        # A caption that spells "<|endoftext|>" is text like any other, not a second EOS.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        ids = _named_ids(config, vocabulary)
        if ids["eos"] is not None and framed == [*pieces, ids["eos"]]:
            pad = ids["eos"] if ids["pad"] is None else ids["pad"]
            self.bos_id, self.eos_id, self.pad_id = None, ids["eos"], pad
        else:
            self.bos_id, self.eos_id, self.pad_id = _distinct_ids(self.path, vocabulary, ids)

    def __reduce__(self):
        return Tokenizer, (str(self.path), self.context_length)

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "n t"]:
        """Rows ``pieces, eos, pad...`` behind a BOS, if any; long texts lose their end."""
        rows = np.full((len(texts), self.context_length), self.pad_id, np.int32)
        with _told(self.path):
            encodings = self._tokenizer.encode_batch_fast(
                [encodable(t) for t in texts], add_special_tokens=False
            )
        special = (self.bos_id, self.eos_id)
        first = [] if self.bos_id is None else [self.bos_id]
        room = self.context_length - len(first) - 1
        for row, encoding in zip(rows, encodings, strict=True):
            # A foreign model may spell its special tokens through merges; ours never does.
            pieces = [i for i in encoding.ids if i not in special][:room]
            row[: len(first) + len(pieces) + 1] = [*first, *pieces, self.eos_id]
        return rows

    def token(self, token_id: int) -> str:
        """The spelling of one id, e.g. of `eos_id`."""
        return self._tokenizer.id_to_token(token_id)


@contextlib.contextmanager
def _told(path: epath.Path) -> Iterator[None]:
    """What a damaged tokenizer makes of a text, in one sentence."""
    try:
        yield
    except BaseException as error:  # as plain Exception, or the panic of its Rust, which is none
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise BadInput(
            f"{path} reads no text ({error}): write it again or copy it anew."
        ) from error


def find(folder: epath.Path) -> epath.Path | None:
    """The tokenizer's file of a model's folder, if it has one that `Tokenizer` reads."""
    if (folder / "tokenizer.json").exists():
        return folder / "tokenizer.json"
    if all((folder / name).exists() for name in (VOCABULARY, MERGES)):
        # GPT-2's, which other models have, lie in files of the same names.
        clip = b"</w>" in (folder / MERGES).read_bytes()
        return folder / VOCABULARY if clip else None
    return folder / PIECES if (folder / PIECES).exists() else None


def _serialized(path: epath.Path) -> str:
    """The text of a tokenizer.json, or the same made of CLIP's or SigLIP's older files."""
    if path.name == PIECES:
        return _of_pieces(path.read_bytes()).to_str()
    text = path.read_bytes().decode()
    if path.name != VOCABULARY:
        return text
    vocabulary = files.read_json_object(path, "copy it anew")
    lines = (path.parent / MERGES).read_bytes().decode().splitlines()
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    model = tokenizers.models.BPE(
        vocabulary,
        merges,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        unk_token=EOS,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.NFC(),
            tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            tokenizers.normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), "removed", invert=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    return tokenizer.to_str()


def _of_pieces(data: bytes) -> tokenizers.Tokenizer:
    """A SentencePiece model, of which SigLIP's first release has one, with an EOS after each text.

    Raises ValueError or IndexError for what is none, or no unigram model.
    """
    # Fields of sentencepiece_model.proto: pieces (spelling, score, kind), kind of model, normalizer
    # (character map).
    fields = list(_protobuf(data))
    parts = [dict(_protobuf(value)) for number, value in fields if number == 1]
    model, normalizer = (
        dict(_protobuf(next((value for number, value in fields if number == i), b"")))
        for i in (2, 3)
    )
    if not parts or model.get(3, 1) != 1:
        raise ValueError("not the unigram model of SentencePiece")
    unknown = next(i for i, part in enumerate(parts) if part.get(3) == 2)
    vocabulary = [(part[1].decode(), *struct.unpack("<f", part.get(2, bytes(4)))) for part in parts]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unknown, False))
    maps = [tokenizers.normalizers.Precompiled(normalizer[2])] if normalizer.get(2) else []
    spaces = tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    tokenizer.normalizer = tokenizers.normalizers.Sequence([*maps, spaces])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens([part[1].decode() for part in parts if part.get(3) == 3])
    eos = KNOWN_NAMES["eos"][1]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=["$A", eos], special_tokens=[(eos, tokenizer.token_to_id(eos))]
    )
    return tokenizer


def _protobuf(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of the fields of a message: whole numbers, or bytes."""
    at = 0

    def whole() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a damaged SentencePiece model")

    while at < len(data):
        number, kind = divmod(whole(), 8)
        if kind == 0:
            yield number, whole()
            continue
        size = {1: 8, 5: 4}.get(kind) or whole()
        if kind not in (1, 2, 5) or at + size > len(data):
            raise ValueError("a damaged SentencePiece model")
        yield number, data[at : at + size]
        at += size


def _growth(normalizer: Mapping[str, Any]) -> int:
    """At most how many times as long a text becomes: a stranger's file could fill the memory."""
    parts = normalizer.get("normalizers", [])
    return max(1, len(normalizer.get("content", ""))) * math.prod(map(_growth, parts))


def encodable(text: str) -> str:
    """Lone surrogates (file names, non-UTF-8 captions) have no UTF-8 form: they become '?'."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _config(path: epath.Path) -> dict[str, Any]:
    """The tokenizer_config.json beside a tokenizer, if any."""
    path = path.parent / "tokenizer_config.json"
    return files.read_json_object(path, "write it again, or remove it") if path.exists() else {}


def _named_ids(config: Mapping[str, Any], vocabulary: dict[str, int]) -> dict[str, int | None]:
    """BOS, EOS and PAD ids by the names of a tokenizer_config.json, else by known names."""
    ids = {}
    for kind, known in KNOWN_NAMES.items():
        name = config.get(f"{kind}_token")
        name = name.get("content") if isinstance(name, dict) else name
        names = (name, *known) if isinstance(name, str) else known
        ids[kind] = next((vocabulary[n] for n in names if n in vocabulary), None)
    return ids


def _distinct_ids(
    path: epath.Path, vocabulary: dict[str, int], ids: dict[str, int | None]
) -> tuple[int, int, int]:
    """BOS, EOS and PAD of a tokenizer whose texts begin with a BOS, EOS unlike the other two."""
    eos = ids["eos"]
    if eos is not None and ids["bos"] in (None, eos):
        # OPT and GPT-2 name one token for both; pooling at the first EOS needs two different ones.
        others = (vocabulary.get(name, eos) for name in KNOWN_NAMES["bos"])
        ids["bos"] = next((i for i in others if i != eos), None)
    if ids["bos"] is None or eos is None:
        raise BadInput(
            f"{path} has no distinct tokens for begin and end of text: name them as bos_token and "
            f"eos_token in {path.parent / 'tokenizer_config.json'}."
        )
    if ids["pad"] in (None, eos):
        ids["pad"] = 0 if eos != 0 else ids["bos"]
    return ids["bos"], eos, ids["pad"]
