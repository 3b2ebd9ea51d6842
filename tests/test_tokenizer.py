"""Rows of ids: one EOS each, found alike by every pooling rule, whatever the text."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import transformers
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.dataset import files as dataset_files
from mofi_jax.common import errors
from mofi_jax.data import tokenizer as tokenizer_lib

CAPTIONS = [
    "A black poodle on the grass",
    "a photo of a husky, Siberian Husky puppy for sale",
    "Kitty playing; ﬁne Ümlaute und Großes",
    "富士山と桜 (Mount Fuji)",
] * 5
CONTEXT = 16


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    dataset_files.train_bpe(CAPTIONS, 320, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(path):
    return tokenizer_lib.Tokenizer(path, CONTEXT)


def _pooled(rows, tokenizer):
    """Where each rule pools: Hugging Face's EOS, open_clip's argmax, axlearn's last token."""
    by_eos = (rows == tokenizer.eos_id).argmax(1)
    by_largest = rows.argmax(1)
    by_last = (rows != tokenizer.pad_id).cumsum(1).argmax(1)
    return by_eos, by_largest, by_last


def _check_rows(rows, tokenizer):
    assert rows.dtype == np.int32
    assert rows.shape[1] == tokenizer.context_length
    assert rows.min() >= 0
    assert rows.max() < tokenizer.vocab_size
    assert (rows[:, 0] == tokenizer.bos_id).all()
    np.testing.assert_array_equal((rows == tokenizer.eos_id).sum(1), 1)
    by_eos, by_largest, by_last = _pooled(rows, tokenizer)
    np.testing.assert_array_equal(by_eos, by_largest)
    np.testing.assert_array_equal(by_eos, by_last)


def _pieces(tokenizer, text):
    """Length of the text in tokens, without BOS and EOS."""
    long = tokenizer_lib.Tokenizer(tokenizer.path, 4096)
    return int((long([text])[0] == long.eos_id).argmax()) - 1


def test_special_ids(tokenizer):
    assert tokenizer.eos_id == tokenizer.vocab_size - 1
    assert tokenizer.eos_id != 2
    assert len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}) == 3


def test_lengths_around_the_context(tokenizer):
    one = "q"  # not merged with anything in the captions, but for its leading space
    texts = ["", one, *(" ".join([one] * n) for n in range(1, 12)), one * 5000]
    lengths = [_pieces(tokenizer, text) for text in texts[:-1]]
    room = CONTEXT - 2
    assert lengths[0] == 0
    assert {room, room + 2} <= set(lengths)  # exactly full, and too long
    rows = tokenizer(texts)
    _check_rows(rows, tokenizer)
    ends = (rows == tokenizer.eos_id).argmax(1)
    np.testing.assert_array_equal(ends, [min(n, room) + 1 for n in lengths] + [CONTEXT - 1])


def test_spelt_special_tokens_are_text(tokenizer):
    texts = [f"a {name} b" for name in ("<|endoftext|>", "<|pad|>", "<|startoftext|>")]
    texts += ["<|endoftext|>", "<|endoftext|>" * 50, "<|ENDOFTEXT|>"]
    _check_rows(tokenizer(texts), tokenizer)


def test_case_form_and_spaces_do_not_matter(tokenizer):
    same = ["Großes ﬁne  Ümlaut", " großes fine u\u0308mlaut\n", "GROßES fine ÜMLAUT"]
    rows = tokenizer(same)
    np.testing.assert_array_equal(rows[1:], rows[:1].repeat(2, 0))


def test_first_word_is_tokenized_as_any_other(tokenizer):
    alone, after = tokenizer(["poodle", "a poodle"])
    n = int((alone == tokenizer.eos_id).argmax()) - 1
    end = int((after == tokenizer.eos_id).argmax())
    np.testing.assert_array_equal(alone[1 : 1 + n], after[end - n : end])


@settings(deadline=None, max_examples=100)
@given(texts=st.lists(st.text(st.characters(codec=None), max_size=40), min_size=1, max_size=4))
def test_any_unicode(tokenizer, texts):
    rows = tokenizer(texts)
    _check_rows(rows, tokenizer)
    np.testing.assert_array_equal(rows, np.concatenate([tokenizer([text]) for text in texts]))


def test_lone_surrogates(tokenizer):
    rows = tokenizer(["caf\udce9 a", "caf? a"])
    np.testing.assert_array_equal(rows[0], rows[1])


def test_no_text(tokenizer):
    assert tokenizer([]).shape == (0, CONTEXT)


def test_pickled_for_data_workers(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    texts = ["<|endoftext|> a", "husky"]
    np.testing.assert_array_equal(again(texts), tokenizer(texts))
    assert again.fingerprint == tokenizer.fingerprint


def test_training_is_deterministic_across_processes(path, tmp_path):
    other = tmp_path / "other.json"
    code = (
        "import sys, json; from data_prep.dataset import files as dataset_files;"
        "dataset_files.train_bpe(json.loads(sys.argv[1]), 320, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(CAPTIONS), str(other)], check=True)
    assert other.read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["other.json"]


def _foreign(tmp_path, names, config=None):
    """A word-level tokenizer.json with `names` added as special tokens."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "a", "cat", "dog"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(names)
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer_lib.Tokenizer(path, 6)


def test_clip_like_pads_with_its_eos(tmp_path):
    config = {
        "bos_token": {"content": "<|startoftext|>"},
        "eos_token": {"content": "<|endoftext|>"},
        "pad_token": "<|endoftext|>",
    }
    tokenizer = _foreign(tmp_path, ["<|startoftext|>", "<|endoftext|>"], config)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (4, 5, 0)
    rows = tokenizer(["a cat", "a cat a dog a cat"])
    np.testing.assert_array_equal(rows, [[4, 1, 2, 5, 0, 0], [4, 1, 2, 1, 3, 5]])


def test_opt_like_names_one_token_for_both(tmp_path):
    config = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = _foreign(tmp_path, ["<s>", "<pad>", "</s>"], config)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (4, 6, 5)
    np.testing.assert_array_equal(tokenizer(["a dog"]), [[4, 1, 3, 6, 5, 5]])


@pytest.mark.parametrize(("pad", "pad_id"), [("</s>", 6), ("<pad>", 5)])
def test_texts_without_bos_where_the_file_frames_them_so(tmp_path, pad, pad_id):
    """As SigLIP's, whose first release pads with its EOS; its own BOS, if any, is never used."""
    _foreign(tmp_path, ["<s>", "<pad>", "</s>"])
    path = tmp_path / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", 6)]
    )
    backend.save(str(path))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": pad}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizer_lib.Tokenizer(path, 5)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 6, pad_id)
    texts = ["", "a dog", "a cat a dog a cat"]
    rows = [[6, *[pad_id] * 4], [1, 3, 6, pad_id, pad_id], [1, 2, 1, 3, 6]]
    np.testing.assert_array_equal(tokenizer(texts), rows)


@pytest.mark.parametrize(
    ("kind", "same"),
    [
        ("SiglipTokenizer", "a cat dog"),
        ("Siglip2Tokenizer", " a  cat, dog! "),
        ("PreTrainedTokenizerFast", " A  Cat, Dog! "),
    ],
)
def test_texts_are_prepared_as_in_training(tmp_path, path, kind, same):
    """By transformers' class, and then in the tokenizer.json itself, for everyone to read."""
    plain = tokenizers.Tokenizer.from_file(str(path))
    plain.normalizer = None
    plain.save(str(tmp_path / "tokenizer.json"))
    before = tokenizer_lib.Tokenizer(tmp_path / "tokenizer.json", 16)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": kind}))
    tokenizer = tokenizer_lib.Tokenizer(tmp_path / "tokenizer.json", 16)
    text = " A  Cat, Dog! "
    np.testing.assert_array_equal(tokenizer([text]), before([same]))
    (tmp_path / "tokenizer.json").write_text(tokenizer.serialized)
    config.unlink()
    again = tokenizer_lib.Tokenizer(tmp_path / "tokenizer.json", 16)
    assert again.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(again([text]), before([same]))


def test_names_of_its_own_need_a_config(tmp_path):
    names = ["<begin>", "<end>"]
    with pytest.raises(errors.BadInput, match="bos_token and eos_token"):
        _foreign(tmp_path, names)
    tokenizer = _foreign(tmp_path, names, {"bos_token": "<begin>", "eos_token": "<end>"})
    np.testing.assert_array_equal(tokenizer(["a"]), [[4, 1, 5, 0, 0, 0]])


def test_bad_input(tmp_path, path):
    with pytest.raises(errors.BadInput, match="259"):
        dataset_files.train_bpe(CAPTIONS, 258, tmp_path / "small.json")
    with pytest.raises(errors.BadInput, match="at least one caption"):
        dataset_files.train_bpe([], 300, tmp_path / "none.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(errors.BadInput, match="no tokenizer at"):
        tokenizer_lib.Tokenizer(tmp_path / "tokenizer.json", CONTEXT)
    cut = tmp_path / "tokenizer.json"
    cut.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(errors.BadInput, match=r"not a tokenizer\.json"):
        tokenizer_lib.Tokenizer(cut, CONTEXT)
    with pytest.raises(errors.BadInput, match="context_length=2"):
        tokenizer_lib.Tokenizer(path, 2)


# --------------------------------------------------------------- CLIP's vocab.json with merges.txt


@pytest.fixture
def clip_files(tmp_path):
    """As a slow CLIPTokenizer saves itself, and transformers' own reading of it."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(a + "</w>" for a in letters), "do", "dog</w>", tokenizer_lib.BOS]
    words.append(tokenizer_lib.EOS)
    vocabulary = {word: i for i, word in enumerate(words)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")
    merges = [("d", "o"), ("do", "g</w>")]
    return tmp_path, transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)


def test_clips_vocabulary_and_merges(clip_files):
    folder, theirs = clip_files
    found = tokenizer_lib.find(epath.Path(folder))
    assert found.name == "vocab.json"
    ours = tokenizer_lib.Tokenizer(found, 77)
    texts = ["a dog!", "", "Dog's  Ümläut 3 !!", "x" * 40, "日本 123 don't\n\tdog", "!"]
    for row, ids in zip(ours(texts), theirs(texts)["input_ids"], strict=True):
        np.testing.assert_array_equal(row[: len(ids)], ids)
    again = folder / "tokenizer.json"
    again.write_text(ours.serialized)
    assert tokenizer_lib.find(epath.Path(folder)).name == "tokenizer.json"
    np.testing.assert_array_equal(tokenizer_lib.Tokenizer(again, 77)(texts), ours(texts))


def test_a_vocabulary_of_another_kind_is_no_tokenizer_of_ours(clip_files):
    folder, _ = clip_files
    (folder / "merges.txt").write_text("#version: 0.2\nd o\n")  # GPT-2's
    assert tokenizer_lib.find(epath.Path(folder)) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [("vocab.json", "[1]"), ("vocab.json", "{"), ("vocab.json", "{}"), ("merges.txt", "a b c")],
)
def test_damaged_vocabularies_and_merges(clip_files, name, content):
    folder, _ = clip_files
    (folder / name).write_text(content)
    with pytest.raises(errors.BadInput, match=r"vocab\.json"):
        tokenizer_lib.Tokenizer(folder / "vocab.json", 77)


def test_a_normalizer_that_would_fill_the_memory(path, tmp_path):
    values = json.loads(path.read_text())
    longer = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 60}
    values["normalizer"] = {"type": "Sequence", "normalizers": [longer, longer]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(errors.BadInput, match="more than 100 times as long"):
        tokenizer_lib.Tokenizer(tmp_path / "tokenizer.json", 77)
