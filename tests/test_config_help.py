"""What is told of config keys: comments in the sources, wherever the keys come from."""

import importlib.util

import ml_collections
import pytest

from configs import claim, common, finetune, i2e, kb, mofi, quickstart
from configs import eval as eval_config
from configs.sweeps import learning_rate
from mofi_jax.common import config_help

OWN = """
import ml_collections

from configs import common, quickstart


def get_config(arg=None):
    config = quickstart.get_config()
    config.batch_size = 7  # not many
    # Heading of a paragraph, whose
    # second line this is.
    config.total = (
        "3 steps"
    )
    inner = config.inner = ml_collections.ConfigDict()
    # Of inner.
    inner.one = 1
    if arg:
        inner.two = 2  # only with an argument
    config.update({
        "group": {  # the group's
            "a": 1, "b": 2,  # of neither alone
            "c": 3,  # its own
            # Above.
            "d": {"e": 5},
        },
    })
    config.own = own()
    config.named = {f"x{i}": {
        "y": i,  # of each
    } for i in range(2)}
    config["with"] = {**common.mesh(), "z": 0}  # beside all of it
    config.bare = "# no comment"
    return config


def own():
    shared = {
        "first": 1,  # in a variable
    }
    return {"deep": shared, **shared}
"""


def test_comments_are_found_wherever_keys_come_from(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    spec = importlib.util.spec_from_file_location("own_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    told = {key.name: (key.default, key.comment) for key in config_help.describe(str(path), config)}
    assert told["batch_size"][1].endswith(" in CLOC Table A. Here: not many")
    assert told["total"][1].endswith(". Here: Heading of a paragraph, whose second line this is.")
    assert told["inner.one"] == (1, "Of inner.")
    assert "inner.two" not in told
    assert told["group.a"] == (1, "the group's")
    assert told["group.c"] == (3, "its own")
    assert told["group.d.e"] == (5, "Above.")
    assert told["own.deep.first"] == told["own.first"] == (1, "in a variable")
    assert told["named.x1.y"] == (1, "of each")
    assert told["with.z"] == (0, "beside all of it")
    assert told["bare"] == ("# no comment", "")
    # Of another file, and of the file that one takes it from.
    block, text = told["data.block"]
    assert block == 1
    assert text.startswith("Consecutive records that are shuffled as one")
    assert text.endswith(". Here: the sample is small and on the local disk")
    assert told["microbatches"][1].startswith("Parts in which the towers see a batch")


def test_no_file_has_no_comments(tmp_path):
    config = ml_collections.ConfigDict({"a": {}, "b": {"c": None}})
    told = config_help.describe(str(tmp_path / "none.py"), config)
    assert [(key.name, key.default, key.comment) for key in told] == [
        ("a", config.a, ""),
        ("b.c", None, ""),
    ]


@pytest.mark.parametrize(
    ("module", "arg"),
    [
        (mofi, "task=multitask,gpr1200=PATH"),
        (quickstart, ""),
        (claim, ""),
        (i2e, "sample"),
        (i2e, "classes=PATH"),
        (kb, ""),
        (eval_config, "sample"),
        (eval_config, "gpr1200=PATH,classes=FILE"),
        (finetune, "recipe=classes,model=MODEL,retrieval=PATH"),
        (learning_rate, ""),
    ],
)
def test_every_key_of_every_config_is_explained(module, arg, monkeypatch):
    model = common.model("S/16", image_size=64, context_length=16)
    monkeypatch.setattr(common, "model_of", lambda folder: (model, "decode"))
    keys = config_help.describe(module.__file__, module.get_config(arg))
    assert [key.name for key in keys if not key.comment] == []
