"""Means of two models: exact at both ends, linear between, and none of models that differ."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import transformers

from mofi_jax import inference, interpolate
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import sharding
from mofi_jax.interop import huggingface
from mofi_jax.losses import class_order


@pytest.fixture(scope="module")
def first(trained):
    return inference.read(trained / "run")


@pytest.fixture(scope="module")
def second(first):
    """The first one moved: what a tuning from it may have made."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(x.dtype), first.params)
    return dataclasses.replace(first, params=params)


def table_in_memory(clip):
    return clip.params | {sharding.ENTITY_TABLE: np.asarray(clip.params[sharding.ENTITY_TABLE])}


def equal(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_both_ends_to_the_bit_and_the_middle(first, second):
    ends = [interpolate.interpolate(first, second, weight).params for weight in (0.0, 1.0)]
    equal(ends[0], first.params, rtol=0)
    equal(ends[1], second.params, rtol=0)
    middle = interpolate.interpolate(first, second, 0.25).params
    equal(middle, jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, first.params, second.params))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(middle))


def test_the_folder_is_one_that_others_open(trained, first, second, tmp_path):
    huggingface.write(tmp_path / "second", second)
    models = (str(trained / "run"), str(tmp_path / "second"))
    interpolate.main(str(tmp_path / "mean"), models, "0.5")
    result = json.loads((tmp_path / "mean" / "result.json").read_text())
    assert (result["models"], result["weight"]) == (list(models), 0.5)
    assert "transformers" in result["reader"]
    transformers.CLIPModel.from_pretrained(tmp_path / "mean")
    # Of the first model's table no row is in it.
    interpolate.main(str(tmp_path / "other"), models, "0.5", "second")
    table = table_in_memory(inference.read(tmp_path / "other"))[sharding.ENTITY_TABLE]
    np.testing.assert_array_equal(table, second.params[sharding.ENTITY_TABLE])
    found = inference.read(tmp_path / "mean")
    expected = interpolate.interpolate(first, second, 0.5)
    equal(table_in_memory(found), expected.params, atol=1e-6)
    assert found.entities.qids == first.entities.qids
    row = class_order.table_rows(np.arange(7), 7)[3]
    tables = [table_in_memory(c)[sharding.ENTITY_TABLE][row] for c in (found, first, second)]
    np.testing.assert_allclose(tables[0], (tables[1] + tables[2]) / 2, atol=1e-6)


def test_parts_of_one_model_alone_are_taken_over(first, second):
    """A CLIP model and a classifier that was tuned from it."""
    clip = {name: first.params[name] for name in ("image", "text", "logit_scale")}
    clip = dataclasses.replace(first, params=clip, entities=None)
    table = second.params[sharding.ENTITY_TABLE]
    padded = np.pad(table, ((0, 3), (0, 0)))  # as a run on several devices saves it
    tuned = {"image": second.params["image"], sharding.ENTITY_TABLE: padded}
    config = dataclasses.replace(first.config, vocab_size=9, eos_id=8)
    tuned = dataclasses.replace(second, config=config, params=tuned, tokenizer=None)
    mean = interpolate.interpolate(clip, tuned, 0.5)
    assert (mean.config, mean.tokenizer) == (clip.config, clip.tokenizer)
    assert mean.entities is tuned.entities
    equal(mean.params["text"], first.params["text"], rtol=0)
    np.testing.assert_array_equal(mean.params[sharding.ENTITY_TABLE], table)


def test_models_that_have_no_mean(first, second, tmp_path):
    wider = dataclasses.replace(second.config, embed_dim=13)
    entities = dataclasses.replace(second.entities, qids=[f"P{i}" for i in range(7)])
    path = tmp_path / "tokenizer.json"
    path.write_text(second.tokenizer.path.read_text() + "\n")
    tokenizer = type(second.tokenizer)(path, second.config.context_length)
    for changes, words in (
        ({"config": wider}, "embed_dim is 12 in the first and 13 in the second"),
        ({"entities": entities}, "their vocabularies differ"),
        ({"tokenizer": tokenizer}, "their tokenizers differ"),
    ):
        with pytest.raises(BadInput, match=words):
            interpolate.interpolate(first, dataclasses.replace(second, **changes), 0.5)


@pytest.mark.parametrize(
    ("models", "weight", "words"),
    [
        (("a",), "0.5", "names 1 models: name two"),
        (("a", "b"), "half", "--weight=half is not a number from 0 to 1"),
        (("a", "b"), "1.5", "--weight=1.5"),
        (("a", "b"), "nan", "--weight=nan"),
    ],
)
def test_flags_that_cannot_be(models, weight, words, tmp_path):
    with pytest.raises(BadInput, match=words):
        interpolate.main(str(tmp_path / "out"), models, weight)
    assert not (tmp_path / "out").exists()
