"""The weights of CLIPModel under the names and in the layout of open_clip.

Queries, keys and values lie in one array there, and projections are transposed.
"""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from mofi_jax.interop import clip_weights
from mofi_jax.interop.folder import weights
from mofi_jax.model import mofi

# CLIPModel's names and open_clip's, applied from top to bottom.
NAMES = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_projection.weight", "text_projection"),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
TRANSPOSED = ("visual_projection.weight", "text_projection.weight")
QUERY_KEY_VALUE = re.compile(r"\.self_attn\.([qkv])_proj\.")


def to_open_clip(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray | weights.Rows]:
    """CLIPModel's state dict -> open_clip's."""
    renamed: dict[str, np.ndarray | weights.Rows] = {}
    for name, array in state.items():
        found = QUERY_KEY_VALUE.search(name)
        if not found:
            renamed[_renamed(name)] = array.T if name in TRANSPOSED else array
        elif found[1] == "q":
            parts = [state[_of_part(name, part)] for part in "qkv"]
            shape = (3 * array.shape[0], *array.shape[1:])
            renamed[_renamed(name)] = weights.Rows(shape, parts)
    return renamed


def _of_part(name: str, part: str) -> str:
    return QUERY_KEY_VALUE.sub(f".self_attn.{part}_proj.", name)


def _renamed(name: str) -> str:
    for theirs, ours in NAMES:
        name = name.replace(theirs, ours)
    return QUERY_KEY_VALUE.sub(".attn.in_proj_", name)


class State(Mapping[str, np.ndarray]):
    """open_clip's arrays under CLIPModel's names, each read when it is asked for."""

    def __init__(self, arrays: weights.Arrays, config: mofi.MofiConfig):
        # As wrapped for training, and of CustomTextCLIP.
        canonical = {re.sub(r"^(module\.)?(text\.)?", "", name): name for name in arrays}
        self._arrays, self._names = arrays, {}
        for weight in clip_weights.weights(config):
            for i in range(weight.layers or 1):
                name = weight.name.format(i)
                if _renamed(name) in canonical:
                    self._names[name] = canonical[_renamed(name)]
        unexpected = arrays.keys() - self._names.values()
        self._names |= {name: name for name in unexpected if name not in clip_weights.OF_LOSSES}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._arrays.shapes
        return {name: self._shape(name, shapes[theirs]) for name, theirs in self._names.items()}

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if name == "logit_scale" and shape == (1,):
            return ()
        if QUERY_KEY_VALUE.search(name) and shape and shape[0] % 3 == 0:
            return (shape[0] // 3, *shape[1:])
        return shape[::-1] if name in TRANSPOSED else shape

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._arrays[self._names[name]]
        if found := QUERY_KEY_VALUE.search(name):
            return np.split(array, 3)["qkv".index(found[1])]
        if name == "logit_scale":
            return array.reshape(())
        return array.T if name in TRANSPOSED else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
