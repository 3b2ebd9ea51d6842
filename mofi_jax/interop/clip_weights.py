"""The parameters of both towers under the names and in the layout of Hugging Face CLIPModel.

Our parameterisation is CLIPModel's: a weight moves by transposing and reshaping alone, and the way
there and back is exact to the bit. One table, `weights`, serves both directions; its names are
those of transformers' modeling_clip.py. Other families bring a table of their own
(`siglip_weights`). This file knows nothing of files.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from etils import epath
from flax import traverse_util

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import sharding
from mofi_jax.model import mofi

PROJECTION = "visual_projection.weight"
NAMED = 10  # arrays of one kind that an error names
# Parameters of the training losses that a table may lack.
OF_LOSSES = (sharding.ENTITY_TABLE, "entity_log_scale", "logit_bias")


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter under both names; `kind` says how it turns into CLIPModel's."""

    path: str  # with a {} for the part where their array holds several `parts` of ours
    name: str  # with a {} for the layer number where our array is stacked over `layers`
    shape: tuple[int, ...]  # of one layer and part, in our layout
    kind: str = "plain"  # or "bias", "matrix", "patches", "query"
    layers: int | None = None
    inputs: int = 1  # a matrix: how many leading dimensions of `shape` are input
    parts: tuple[str, ...] = ()

    @property
    def paths(self) -> list[str]:
        return [self.path.format(part) for part in self.parts] or [self.path]

    def clip_shape(self) -> tuple[int, ...]:
        shape = self._part_shape()
        return (len(self.parts) * shape[0], *shape[1:]) if self.parts else shape

    def _part_shape(self) -> tuple[int, ...]:
        if self.kind == "query":
            return (1, 1, *self.shape)
        if self.kind == "matrix":
            return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])
        if self.kind == "patches":
            return tuple(self.shape[i] for i in (3, 2, 0, 1))
        # Biases of separate heads are merged.
        return (math.prod(self.shape),) if self.kind == "bias" else self.shape

    def to_clip(self, array: np.ndarray) -> np.ndarray:
        if self.kind == "matrix":
            array = array.reshape(self._part_shape()[::-1]).T
        elif self.kind == "patches":
            array = array.transpose(3, 2, 0, 1)
        return np.asarray(array.reshape(self._part_shape()), np.float32)

    def from_clip(self, array: np.ndarray) -> np.ndarray:
        if self.kind == "matrix":
            array = array.T
        elif self.kind == "patches":
            array = array.transpose(2, 3, 1, 0)
        return np.array(array.reshape(self.shape), order="C")


# A function of (config, text=...) that yields weights.
Table = Callable[..., Iterator[Weight]]


def weights(config: mofi.MofiConfig, *, text: bool = True) -> Iterator[Weight]:
    """All parameters of both towers, or without `text` of CLIPVisionModelWithProjection alone."""
    d, p = config.embed_dim, config.patch_size
    w, t = config.image.width, config.text.width
    positions = 1 + (config.image_size // p) ** 2

    vision = "vision_model."
    name = vision + "embeddings."
    yield Weight("image/class_embedding", name + "class_embedding", (w,))
    kernel = (p, p, 3, w)
    yield Weight("image/patch_embedding/kernel", name + "patch_embedding.weight", kernel, "patches")
    yield Weight("image/position_embedding", name + "position_embedding.weight", (positions, w))
    yield from norm("image/pre_norm", vision + "pre_layrnorm", w)  # sic
    yield from blocks("image/blocks/", vision, config.image)
    yield from norm("image/post_norm", vision + "post_layernorm", w)
    yield Weight("image/projection/kernel", PROJECTION, (w, d), "matrix")
    if not text:
        return

    yield Weight("logit_scale", "logit_scale", ())
    name = "text_model.embeddings."
    shape = (config.vocab_size, t)
    yield Weight("text/token_embedding", name + "token_embedding.weight", shape)
    shape = (config.context_length, t)
    yield Weight("text/position_embedding", name + "position_embedding.weight", shape)
    yield from blocks("text/blocks/", "text_model.", config.text)
    yield from norm("text/final_norm", "text_model.final_layer_norm", t)
    yield Weight("text/projection/kernel", "text_projection.weight", (t, d), "matrix")


def norm(path: str, name: str, w: int, layers: int | None = None) -> Iterator[Weight]:
    """Scale and bias of a LayerNorm of width w."""
    yield Weight(path + "/scale", name + ".weight", (w,), layers=layers)
    yield Weight(path + "/bias", name + ".bias", (w,), layers=layers)


def blocks(path: str, prefix: str, config: mofi.TowerConfig) -> Iterator[Weight]:
    """A tower's stack of blocks."""
    w, heads, n, hidden = config.width, config.heads, config.layers, config.hidden_width
    split = (heads, w // heads)
    name = prefix + "encoder.layers.{}."
    yield from norm(path + "norm1", name + "layer_norm1", w, n)
    yield from norm(path + "norm2", name + "layer_norm2", w, n)
    yield from projections(
        ("attention/query", "self_attn.q_proj", (w,), split),
        ("attention/key", "self_attn.k_proj", (w,), split),
        ("attention/value", "self_attn.v_proj", (w,), split),
        ("attention/out", "self_attn.out_proj", split, (w,)),
        ("mlp/fc1", "mlp.fc1", (w,), (hidden,)),
        ("mlp/fc2", "mlp.fc2", (hidden,), (w,)),
        path=path,
        name=name,
        layers=n,
    )


def projections(
    *modules: tuple[str, str, tuple[int, ...], tuple[int, ...]],
    path: str,
    name: str,
    layers: int | None = None,
) -> Iterator[Weight]:
    """Kernels and biases of modules: both names, inputs and outputs of each."""
    for module, their_module, inputs, outputs in modules:
        own, their, shape = path + module, name + their_module, inputs + outputs
        yield Weight(own + "/kernel", their + ".weight", shape, "matrix", layers, len(inputs))
        yield Weight(own + "/bias", their + ".bias", outputs, "bias", layers)


def to_state_dict(
    config: mofi.MofiConfig, params: mofi.Params, table: Table = weights
) -> dict[str, np.ndarray]:
    """Our parameters -> CLIPModel's state dict (float32, torch layout), views where they can be.

    Without a text tower it is that of CLIPVisionModelWithProjection. The class table and other
    parameters of the losses are no part of either and are left out.

    Raises BadInput: no image tower, or the parameters are not those of `config`.
    """
    if "image" not in params:
        raise BadInput(
            "The model has no image tower, which every format of Hugging Face needs: train "
            "it with another task."
        )
    left = traverse_util.flatten_dict(params, sep="/")
    state, problems = {}, []
    for weight in table(config, text="text" in params):
        arrays = {path: left.pop(path, None) for path in weight.paths}
        shape = weight.shape if weight.layers is None else (weight.layers, *weight.shape)
        wrong = {path: x for path, x in arrays.items() if x is None or tuple(x.shape) != shape}
        for path, array in wrong.items():
            found = "missing" if array is None else f"{list(array.shape)}"
            problems.append(f"{path} is {found} where {list(shape)} is expected")
        for i in range(0 if wrong else weight.layers or 1):
            pieces = [
                weight.to_clip(np.asarray(array if weight.layers is None else array[i]))
                for array in arrays.values()
            ]
            state[weight.name.format(i)] = np.concatenate(pieces) if weight.parts else pieces[0]
    problems += [f"{path} has no place in the format" for path in left if path not in OF_LOSSES]
    if problems:
        raise BadInput(f"The parameters do not fit model.json, use a matching pair: {problems}.")
    return state


def check_shapes(
    config: mofi.MofiConfig,
    shapes: Mapping[str, tuple[int, ...]],
    where: epath.PathLike,
    *,
    text: bool = True,
    table: Table = weights,
) -> None:
    """Raises BadInput with all keys of a state dict that the table lacks or shapes otherwise."""
    expected = {
        weight.name.format(i): weight.clip_shape()
        for weight in table(config, text=text)
        for i in range(weight.layers or 1)
    }
    problems = {
        "missing": [name for name in expected if name not in shapes],
        # Position ids are buffers of old transformers, not weights.
        "unexpected": sorted(
            n for n in shapes.keys() - expected if not n.endswith(".position_ids")
        ),
        "of another shape": [
            f"{name} {list(shapes[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ],
    }
    listed = "; ".join(
        f"{kind}: {', '.join(names[:NAMED])}" + (", ..." if len(names) > NAMED else "")
        for kind, names in problems.items()
        if names
    )
    if listed:
        raise BadInput(
            f"The weights in {where} are not those its config.json describes ({listed}): use a "
            "complete folder."
        )


def from_state_dict(
    config: mofi.MofiConfig,
    state: Mapping[str, np.ndarray],
    *,
    text: bool = True,
    table: Table = weights,
) -> mofi.Params:
    """CLIPModel's state dict, of the shapes that `check_shapes` asks for -> float32 parameters."""
    params = {}
    for weight in table(config, text=text):
        parts: list[list[np.ndarray]] = [[] for _ in weight.paths]
        for i in range(weight.layers or 1):
            array = np.asarray(state[weight.name.format(i)], np.float32)
            pieces = np.split(array, len(parts)) if weight.parts else [array]
            for part, piece in zip(parts, pieces, strict=True):
                part.append(weight.from_clip(piece))
        for path, layers in zip(weight.paths, parts, strict=True):
            params[path] = layers[0] if weight.layers is None else np.stack(layers)
    return traverse_util.unflatten_dict(params, sep="/")
