"""The parameters of both towers under the names and in the layout of Hugging Face CLIPModel.

Our parameterisation is CLIPModel's: a weight moves by transposing and reshaping alone, and the way
there and back is exact to the bit. One table, `weights`, serves both directions; its names are
those of transformers' modeling_clip.py. This file knows nothing of files.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import sharding
from mofi_jax.model import mofi

ENTITY_TABLE = sharding.ENTITY_TABLE
NAMED = 10  # arrays of one kind that an error names
# Parameters of the training losses that are no part of CLIPModel.
OF_LOSSES = (ENTITY_TABLE, "entity_log_scale", "logit_bias")


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter under both names.

    `name` has a {} for the layer number where our array is stacked over `layers`. `shape` is one
    layer's in our layout; `kind` says how it turns into theirs.
    """

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    kind: str  # "plain", "matrix" or "patches"
    layers: int | None = None
    inputs: int = 1  # a matrix: how many leading dimensions of `shape` are input

    def their_shape(self) -> tuple[int, ...]:
        if self.kind == "matrix":
            rows = int(np.prod(self.shape[self.inputs :]))
            return rows, int(np.prod(self.shape[: self.inputs]))
        if self.kind == "patches":
            return tuple(self.shape[i] for i in (3, 2, 0, 1))
        # Biases of separate heads are merged; embeddings keep their two dimensions.
        return self.shape if self.name.endswith("embedding.weight") else _merged(self.shape)

    def theirs(self, array: np.ndarray) -> np.ndarray:
        if self.kind == "matrix":
            array = array.reshape(self.their_shape()[::-1]).T
        elif self.kind == "patches":
            array = array.transpose(3, 2, 0, 1)
        return np.array(array.reshape(self.their_shape()), np.float32, order="C")

    def ours(self, array: np.ndarray) -> np.ndarray:
        if self.kind == "matrix":
            array = array.T
        elif self.kind == "patches":
            array = array.transpose(2, 3, 1, 0)
        return np.array(array.reshape(self.shape), order="C")


def _merged(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (int(np.prod(shape)),) if shape else ()


def weights(config: mofi.MofiConfig) -> Iterator[Weight]:
    """All parameters of both towers (names: transformers, modeling_clip.py)."""
    d, p = config.embed_dim, config.patch_size
    w, t = config.image.width, config.text.width
    positions = 1 + (config.image_size // p) ** 2
    yield Weight(("logit_scale",), "logit_scale", (), "plain")

    vision = "vision_model."
    name = vision + "embeddings."
    yield Weight(("image", "class_embedding"), name + "class_embedding", (w,), "plain")
    path = ("image", "patch_embedding", "kernel")
    yield Weight(path, name + "patch_embedding.weight", (p, p, 3, w), "patches")
    path = ("image", "position_embedding")
    yield Weight(path, name + "position_embedding.weight", (positions, w), "plain")
    yield from _norm(("image", "pre_norm"), vision + "pre_layrnorm", w)  # sic
    yield from _blocks("image", vision, config.image)
    yield from _norm(("image", "post_norm"), vision + "post_layernorm", w)
    yield Weight(("image", "projection", "kernel"), "visual_projection.weight", (w, d), "matrix")

    name = "text_model.embeddings."
    path, shape = ("text", "token_embedding"), (config.vocab_size, t)
    yield Weight(path, name + "token_embedding.weight", shape, "plain")
    path, shape = ("text", "position_embedding"), (config.context_length, t)
    yield Weight(path, name + "position_embedding.weight", shape, "plain")
    yield from _blocks("text", "text_model.", config.text)
    yield from _norm(("text", "final_norm"), "text_model.final_layer_norm", t)
    yield Weight(("text", "projection", "kernel"), "text_projection.weight", (t, d), "matrix")


def _norm(path: tuple[str, ...], name: str, w: int, layers: int | None = None) -> Iterator[Weight]:
    yield Weight((*path, "scale"), name + ".weight", (w,), "plain", layers)
    yield Weight((*path, "bias"), name + ".bias", (w,), "plain", layers)


def _blocks(tower: str, prefix: str, config: mofi.TowerConfig) -> Iterator[Weight]:
    w, heads, n = config.width, config.heads, config.layers
    split = (heads, w // heads)
    path, name = (tower, "blocks"), prefix + "encoder.layers.{}."
    yield from _norm((*path, "norm1"), name + "layer_norm1", w, n)
    yield from _norm((*path, "norm2"), name + "layer_norm2", w, n)
    for ours, theirs, inputs, outputs in (
        (("attention", "query"), "self_attn.q_proj", (w,), split),
        (("attention", "key"), "self_attn.k_proj", (w,), split),
        (("attention", "value"), "self_attn.v_proj", (w,), split),
        (("attention", "out"), "self_attn.out_proj", split, (w,)),
        (("mlp", "fc1"), "mlp.fc1", (w,), (4 * w,)),
        (("mlp", "fc2"), "mlp.fc2", (4 * w,), (w,)),
    ):
        kernel = (*path, *ours, "kernel")
        shape = inputs + outputs
        yield Weight(kernel, name + theirs + ".weight", shape, "matrix", n, len(inputs))
        yield Weight((*path, *ours, "bias"), name + theirs + ".bias", outputs, "plain", n)


def to_state_dict(config: mofi.MofiConfig, params: mofi.Params) -> dict[str, np.ndarray]:
    """Our parameters -> CLIPModel's state dict (float32, torch layout).

    The class table and other parameters of the losses are no part of CLIPModel and are left out.

    Raises:
      BadInput: a tower is missing, or the parameters are not those of `config`.
    """
    missing = [name for name in ("image", "text") if name not in params]
    if missing:
        raise BadInput(
            f"The model has no {' and no '.join(missing)} tower, and Hugging Face CLIPModel needs "
            "both an image and a text tower: train with task=multitask or task=contrastive."
        )
    left = _flatten({k: v for k, v in params.items() if k not in OF_LOSSES})
    state, problems = {}, []
    for weight in weights(config):
        array = left.pop(weight.path, None)
        shape = weight.shape if weight.layers is None else (weight.layers, *weight.shape)
        if array is None or tuple(array.shape) != shape:
            found = "missing" if array is None else f"{list(array.shape)}"
            problems.append(f"{'/'.join(weight.path)} is {found} where {list(shape)} is expected")
            continue
        array = np.asarray(array)
        if weight.layers is None:
            state[weight.name] = weight.theirs(array)
        else:
            for i in range(weight.layers):
                state[weight.name.format(i)] = weight.theirs(array[i])
    problems += [f"{'/'.join(path)} has no place in CLIPModel" for path in left]
    if problems:
        raise BadInput(f"The parameters do not fit model.json, use a matching pair: {problems}.")
    return state


def from_state_dict(
    config: mofi.MofiConfig, state: Mapping[str, np.ndarray], where: epath.PathLike
) -> mofi.Params:
    """CLIPModel's state dict -> our float32 parameters; `where` names the source in errors.

    Raises:
      BadInput: names all keys that are missing, unexpected or of another shape, at once.
    """
    # Buffers of old transformers, not weights.
    left = {k: v for k, v in state.items() if not k.endswith(".position_ids")}
    params: dict[str, Any] = {}
    missing, misshapen = [], []
    for weight in weights(config):
        arrays = []
        for i in range(1 if weight.layers is None else weight.layers):
            name, shape = weight.name.format(i), weight.their_shape()
            array = left.pop(name, None)
            if array is None:
                missing.append(name)
            elif tuple(array.shape) != shape:
                misshapen.append(f"{name} {list(array.shape)} instead of {list(shape)}")
            else:
                arrays.append(weight.ours(np.asarray(array, np.float32)))
        if arrays and not (missing or misshapen):
            node = params
            for key in weight.path[:-1]:
                node = node.setdefault(key, {})
            node[weight.path[-1]] = arrays[0] if weight.layers is None else np.stack(arrays)
    if missing or misshapen or left:
        found = {"missing": missing, "unexpected": sorted(left), "of another shape": misshapen}
        told = "; ".join(
            f"{kind}: {', '.join(names[:NAMED])}" + (", ..." if len(names) > NAMED else "")
            for kind, names in found.items()
            if names
        )
        raise BadInput(
            f"The weights in {where} are not those its config.json describes ({told}): use a "
            "complete CLIPModel folder."
        )
    return params


def _flatten(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flatten(value, (*path, key)) if isinstance(value, Mapping) else {(*path, key): value}
        )
    return flat
