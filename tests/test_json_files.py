"""Files that describe a model, damaged in every way: one sentence, or what they say."""

import contextlib
import copy
import json

import hypothesis
import pytest
from etils import epath
from hypothesis import strategies as st

from mofi_jax import grow, telemetry
from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.interop import clip_config, huggingface
from mofi_jax.interop.folder import weights
from mofi_jax.model import mofi
from mofi_jax.training import run_folder

CONFIG = mofi.MofiConfig(
    image_size=16,
    patch_size=8,
    image=mofi.TowerConfig(16, 1, 2),
    text=mofi.TowerConfig(16, 1, 2),
    vocab_size=300,
    context_length=8,
    eos_id=299,
    embed_dim=8,
)
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
CLIP = {
    "model_type": "clip",
    "projection_dim": 8,
    "text_config": {
        **TOWER,
        "vocab_size": 300,
        "max_position_embeddings": 8,
        "eos_token_id": 299,
    },
    "vision_config": {**TOWER, "image_size": 16, "patch_size": [8, 8]},
}
JUNK = [None, True, -1, 0, 3, 10**9, 10**400, 2.5, float("inf"), float("nan"), "", "x", [], [1], {}]


def places(values, path=()):
    """The paths of all values in nested objects."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def damaged(values):
    """The same values with one or two of them replaced or taken out."""
    change = st.tuples(st.sampled_from(list(places(values))), st.sampled_from([*JUNK, "take out"]))

    def apply(changes):
        hurt = copy.deepcopy(values)
        for path, junk in changes:
            node = hurt
            for key in path[:-1]:
                node = node.get(key) if isinstance(node, dict) else None
            if isinstance(node, dict):
                node[path[-1]] = junk
                if junk == "take out":
                    del node[path[-1]]
        return hurt

    return st.lists(change, min_size=1, max_size=2).map(apply)


DESCRIPTION = run_folder.describe_model(CONFIG, "decode|resize_short(16)|center_crop(16)")


@hypothesis.settings(deadline=None, derandomize=True, max_examples=150)
@hypothesis.given(values=damaged(DESCRIPTION), clip=damaged(CLIP))
def test_any_damage_to_a_description_is_one_sentence(tmp_path_factory, values, clip):
    folder = epath.Path(tmp_path_factory.getbasetemp())
    for read, name, content in (
        (lambda: run_folder.read_model(folder), "model.json", values),
        (lambda: huggingface.read(folder), "config.json", clip),
    ):
        (folder / name).write_text(json.dumps(content))
        with contextlib.suppress(BadInput):
            read()


def test_descriptions_that_are_whole_are_read(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(DESCRIPTION))
    assert run_folder.read_model(tmp_path) == DESCRIPTION
    # Earlier versions wrote how the run used memory, too.
    more = {**DESCRIPTION, "remat": "dots", "attention": "cudnn"}
    (tmp_path / "model.json").write_text(json.dumps(more))
    assert run_folder.read_model(tmp_path) == more
    # And had no families and one width of MLPs.
    tower = {"width": 16, "layers": 1, "heads": 2}
    less = {k: v for k, v in DESCRIPTION.items() if k != "family"} | {"image": tower, "text": tower}
    (tmp_path / "model.json").write_text(json.dumps(less))
    assert run_folder.read_model(tmp_path) == DESCRIPTION
    found = clip_config.from_config(clip_config.resolve(CLIP, "config.json"), "config.json")
    assert found == mofi.MofiConfig.from_dict({**CONFIG.to_dict(), "dtype": "float32"})


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": 1']
)
def test_what_is_no_object_is_one_sentence(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    (tmp_path / telemetry.METRICS_FILE).write_bytes(b'{"step": 1}\n' + content)
    for read in (
        lambda: files.read_json_object(path, "copy it"),
        lambda: huggingface.read(tmp_path),
        lambda: grow.read_config(epath.Path(tmp_path)),
        lambda: tokenizer_lib._config(epath.Path(tmp_path / "tokenizer.json")),
    ):
        with pytest.raises(BadInput, match=f"^{tmp_path}/.*"):
            read()
    assert telemetry.read_metrics(tmp_path) == [{"step": 1}]


@pytest.mark.parametrize("values", [{}, {"losses": 3}, {"losses": {"entity": None}}])
def test_a_config_that_is_none_does_not_grow(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(BadInput, match="is no training config"):
        grow.read_config(epath.Path(tmp_path))


@pytest.mark.parametrize(
    "content", ["[1]", "[" * 100_000, '{"seconds": {}}', '{"seconds": 3}', "NaN", "1e999"]
)
def test_a_damaged_goodput_file_costs_only_the_time_before(tmp_path, content, caplog):
    (tmp_path / telemetry.GOODPUT_FILE).write_text(content)
    goodput = telemetry.Goodput()
    goodput.resume(tmp_path, {})
    goodput.close()
    assert "goodput.json cannot be read" in caplog.text
    huge = dict.fromkeys(telemetry.PHASES, float("inf"))
    broken = {"first_start": 0, "finished": False, "seconds": huge}
    (tmp_path / telemetry.GOODPUT_FILE).write_text(json.dumps(broken))
    goodput = telemetry.Goodput()
    goodput.resume(tmp_path, {})
    assert sum(goodput.seconds().values()) < 3600
    goodput.close()


@pytest.mark.parametrize("names", [[1], {"a": 5}, {"a": "../secret.safetensors"}, 3])
def test_an_index_leads_nowhere_else(tmp_path, names):
    (tmp_path / "config.json").write_text(json.dumps(CLIP))
    (tmp_path / (weights.WEIGHTS + weights.INDEX)).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(BadInput, match="has no weight_map from arrays to files beside it"):
        huggingface.read(tmp_path)
