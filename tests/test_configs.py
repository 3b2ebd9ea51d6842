"""Configs: every variant and task builds, every key is read, arguments are typed."""

import functools
import math
import pathlib
import re

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import common, i2e, mofi, quickstart
from configs import eval as eval_config
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import sharding
from mofi_jax.training import cadence, settings, setup, state, step

REPOSITORY = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("task", common.TASKS)
@pytest.mark.parametrize("variant", ["B/16", "L/14", "H/14"])
def test_every_variant_and_task_builds_abstractly(variant, task, mesh_of):
    """Shapes of state, batch and one update, on eight devices, without a single array."""
    mesh = mesh_of["2x2x2"]
    config = mofi.get_config(f"task={task},variant={variant},res=224")
    settings.validate(config)
    built = setup.make(
        config,
        mesh,
        # The vocabulary that the released text towers fit, OPT's.
        vocab_size=50_272,
        eos_id=50_271,
        num_entities=2_000_003,
        examples_per_epoch=1_000_000_000,
    )
    assert built.clock.total_steps == 439_087
    structs, _ = state.abstract(built.init, mesh)
    loss = step.make_loss(built.context)
    batch = setup.batch_structs(config, mesh)
    value, metrics = jax.eval_shape(loss, structs.params, batch)
    assert value.shape == ()
    assert {f"loss_{name}" for name in config.losses} <= metrics.keys()
    # Nothing wide may be whole on every device.
    for path, leaf in jax.tree_util.tree_flatten_with_path(structs.params)[0]:
        name = sharding.path_name(path)
        if leaf.size > 4e6 and "token_embedding" not in name:
            assert not leaf.sharding.is_fully_replicated, name


def test_defaults_are_the_cited_ones():
    config = mofi.get_config()
    assert (config.batch_size, config.optimizer.learning_rate) == (32_768, 5e-4)
    assert (config.losses.entity.scale, config.losses.entity.margin) == (32.0, 0.3)
    assert (config.losses.entity.weight, config.losses.contrastive.weight) == (0.9, 0.1)


def keys_of(config, prefix=""):
    for name, value in config.items():
        yield name
        if hasattr(value, "items"):
            yield from keys_of(value)


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (quickstart.get_config("task=multitask"), ("mofi_jax",)),
        (i2e.get_config("sample"), ("data_prep",)),
        (eval_config.get_config("sample"), ("mofi_jax",)),
    ],
)
def test_every_key_is_read_somewhere(config, where):
    """A key nobody reads is a promise nobody keeps."""
    files = []
    for place in where:
        path = REPOSITORY / place
        files += list(path.rglob("*.py")) if path.is_dir() else [path]
    code = "\n".join(f.read_text() for f in files)
    instances = set(config.get("evaluators", {})) | set(config.get("losses", {}))
    instances |= set(config.get("kb", {}).get("drop_types", {}))
    for name in set(keys_of(config)) - instances:
        assert re.search(rf"\b{name}\b", code), f"config key {name} is read nowhere in {where}"


def test_quickstart_differs_from_mofi_in_values_alone():
    big, small = mofi.get_config("task=multitask"), quickstart.get_config("task=multitask")
    big.evaluators, small.evaluators = {}, {}
    assert set(keys_of(big)) == set(keys_of(small))


def test_parse_arg_types():
    arg = common.parse_arg("task=x,res=384,lr=1,flag", task="", res=224, lr=0.5, flag=False)
    assert (arg.task, arg.res, arg.lr, arg.flag) == ("x", 384, 1.0, True)


@pytest.mark.parametrize("text", ["unknown=1", "res=abc", "res=1.5", "flag=3"])
def test_parse_arg_refuses(text):
    with pytest.raises(BadInput):
        common.parse_arg(text, res=224, flag=False)


@given(st.text(max_size=30))
def test_parse_arg_never_fails_otherwise(text):
    message = ""
    try:
        arg = common.parse_arg(text, task="a", res=1, flag=False)
        assert isinstance(arg.res, int)
    except BadInput as error:
        message = str(error)
    assert message == "" or "onfig argument" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 16.0),
        ("batch_size", "16"),
        ("seed", -1),
        ("mesh.fsdp", 0),
        ("mesh.tensor", 2.0),
        ("seed", 2**32),
        ("data.block", 0),
        ("data.max_labels", 0),
        ("data.prefetch", 0),
        ("data.text_sources", {"alt_text": 2.0, "name": -1.0}),
        ("data.text_sources", {"alt_text": "much"}),
        ("data.text_sources", 1.0),
        ("init.parts", None),
        ("optimizer.frozen", "image"),
        ("optimizer.learning_rate", math.nan),
        ("optimizer.learning_rate", math.inf),
        ("optimizer.clip_norm", -1.0),
        ("optimizer.table.clip_norm", -1.0),
        ("optimizer.first_moment_dtype", "half"),
        ("losses.entity.scale", 0.0),
        ("losses.entity.margin", math.nan),
        ("losses", {}),
        ("losses", {"captions": {"weight": 1.0}}),
        ("losses.entity.learn_scale", "x"),
        ("seed", 10**310),
        ("data.dir", None),
        ("data.name", 3),
        ("data.extra", None),
        ("data.train_ops", None),
        ("data.eval_ops", ["decode"]),
        ("model.context_length", "16"),
        ("evaluators", None),
        ("init.model", 3),
    ],
)
def test_validate_names_the_key(key, value):
    config = quickstart.get_config("task=multitask")
    *parts, last = key.split(".")
    inner = functools.reduce(lambda inner, part: inner[part], parts, config)
    with inner.ignore_type():
        inner[last] = value
    with pytest.raises(BadInput, match=f"config.{key} must be"):
        settings.validate(config)


def test_validate_names_a_key_that_is_missing():
    with pytest.raises(BadInput, match=r"config.seed is missing: add it"):
        settings.validate(eval_config.get_config("sample"))
    config = quickstart.get_config("task=multitask")
    del config.losses.entity["margin"]
    with pytest.raises(BadInput, match=r"config.losses.entity.margin is missing"):
        settings.validate(config)


def test_a_learned_scale_may_begin_at_its_cap():
    config = quickstart.get_config("task=supervised")
    config.losses.entity.update({"scale": 100.0, "learn_scale": True})
    settings.validate(config)
    config.losses.entity.scale = 101.0
    with pytest.raises(BadInput, match=r"losses.entity.scale must be a number at most 100, its"):
        settings.validate(config)


def test_settings_that_are_seldom_meant_are_warned_about():
    def warnings(task="multitask", *, total="100 steps", eos_id=300, every="10 steps"):
        config = quickstart.get_config(f"task={task}")
        config.optimizer.warmup = "20 steps"
        config.checkpoint.every = every
        clock = cadence.make_clock(total, batch_size=10, examples_per_epoch=1000)
        return settings.warnings(config, clock, eos_id=eos_id)

    assert warnings() == warnings("supervised", eos_id=2) == []
    [sentence] = warnings(total="20 steps")
    assert "warmup='20 steps' is 20 steps and the run has 20" in sentence
    [sentence] = warnings(every="0 epochs")
    assert "config.checkpoint.every='0 epochs' saves nothing before the run ends" in sentence
    [sentence] = warnings(eos_id=2)
    assert "EOS has the id 2" in sentence
    assert "cannot be exported" in sentence


def test_sets_to_mix_in():
    config = mofi.get_config("task=multitask,extra=cc12m@/data/cc@0.5+laion@/mnt/a@b@2")
    assert config.data.extra.to_dict() == {
        "cc12m": {"dir": "/data/cc", "name": "i2e", "weight": 0.5},
        "laion": {"dir": "/mnt/a@b", "name": "i2e", "weight": 2.0},
    }
    assert mofi.get_config().data.extra.to_dict() == {}


@pytest.mark.parametrize("text", ["a", "a@b", "a@b@c", "@b@1", "a@@1", "a@b@1+a@c@1"])
def test_sets_to_mix_in_that_cannot_be_read(text):
    with pytest.raises(BadInput, match=r"extra=.* cannot be read at .*write NAME@DIR@WEIGHT"):
        mofi.get_config(f"extra={text}")


def test_unknown_variant():
    with pytest.raises(BadInput, match="Unknown variant 'B/32': choose from B/16"):
        mofi.get_config("variant=B/32")
