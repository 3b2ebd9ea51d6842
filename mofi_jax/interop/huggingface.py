"""Hugging Face CLIPModel folders, both directions: what each file holds and how it is read back.

Weights are mapped by `clip_weights`, config.json by `clip_config`. Neither PyTorch nor transformers
is needed in either direction.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import safetensors
import tokenizers
from absl import logging
from etils import epath
from safetensors import numpy as safetensors_numpy

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops, records
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.distributed import sharding
from mofi_jax.interop import clip_config, clip_weights, model_card
from mofi_jax.losses import class_order
from mofi_jax.model import image as image_lib
from mofi_jax.model import mofi

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ENTITY_TABLE_FILE = "entity_table.safetensors"
PREPROCESS = "preprocess.json"

COPY_AGAIN = "copy the whole CLIPModel folder again"


@dataclasses.dataclass(frozen=True)
class Clip:
    """What a folder holds, in our terms."""

    config: mofi.MofiConfig  # with dtype float32, that of the weights; choose another for speed
    params: mofi.Params  # numpy float32 as of `mofi.create`, with `entity_table` if classified
    tokenizer: tokenizer_lib.Tokenizer | None
    entities: records.Entities | None
    preprocess: str  # picture operations (`data.ops`) from bytes to uint8 [s, s, 3]


# ----------------------------------------------------------------------------------- preprocessing


def _to_preprocessor(preprocess: str, image_size: int, family: str) -> dict[str, Any]:
    """preprocessor_config.json: the nearest that CLIPImageProcessor can express.

    It always antialiases; the exact operations are in preprocess.json beside it.
    """
    mean, std = image_lib.pixel_statistics(family)
    resize = re.search(r"resize(_short)?\((\d+)", preprocess)
    side = int(resize[2]) if resize else image_size
    square = resize is not None and not resize[1]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side} if square else {"shortest_edge": side},
        "resample": 2 if "bilinear" in preprocess else 3,  # Pillow's numbers: bilinear, bicubic
        "do_center_crop": not square,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def _close(actual: Any, expected: Sequence[float]) -> bool:
    try:
        actual = np.array(actual, np.float64)
    except (TypeError, ValueError, OverflowError):
        return False
    return actual.shape == np.shape(expected) and np.allclose(actual, expected, rtol=0, atol=1e-4)


def _read_preprocess(folder: epath.Path, image_size: int, family: str) -> str:
    """The picture operations: preprocess.json if ours, else nearest to preprocessor_config.json.

    A folder with neither (weights alone) gets the short side and centre crop of every CLIP.
    """
    if (folder / PREPROCESS).exists():
        spec = files.read_json_object(folder / PREPROCESS, COPY_AGAIN).get("preprocess")
        if not isinstance(spec, str):
            raise BadInput(
                f"{folder / PREPROCESS} lacks the key preprocess: export the model again."
            )
        ops.parse(ops.expand(spec, image_size))
        return spec
    path = folder / "preprocessor_config.json"
    if not path.exists():
        logging.warning("%s has no preprocessing file: short side to %d.", folder, image_size)
        return ops.expand("clip_hf", image_size)
    values = files.read_json_object(path, COPY_AGAIN)
    statistics = image_lib.pixel_statistics(family)
    for key, expected in zip(("image_mean", "image_std"), statistics, strict=True):
        if not _close(values.get(key, expected), expected):
            raise BadInput(
                f"{path} normalises with {key} {values[key]} and this model with "
                f"{list(expected)}: fold the difference into the weights or use another model."
            )
    size, crop = values.get("size", image_size), values.get("crop_size", image_size)
    resize = size.get("shortest_edge") if isinstance(size, dict) else size
    cropped = crop.get("height") if isinstance(crop, dict) else crop
    fits = type(resize) is int and image_size <= resize <= mofi.LIMITS["image_size"][1]
    if not fits or cropped != image_size:
        raise BadInput(
            f"{path} has size {size} and crop_size {crop}: only a short side (shortest_edge) "
            f"and centre crop to the model's {image_size} pixels can be read: add {PREPROCESS}."
        )
    # Pillow's number for bicubic, which they take by default; of the others none is exactly ours.
    method = "bicubic" if values.get("resample", 3) == 3 else "area"
    return f"decode|resize_short({resize}, {method!r})|center_crop({image_size}, 'floor')"


# ------------------------------------------------------------------------------------------ folder


def read(folder: epath.PathLike) -> Clip:
    """Reads a CLIPModel folder: ours, or any with config.json and safetensors weights.

    float16 and bfloat16 weights become float32; sharded weights are read by their index.

    Raises:
      BadInput: a file or field missing or damaged, or weights that do not fit the configuration.
    """
    folder = epath.Path(folder)
    path = folder / "config.json"
    values = files.read_json_object(path, COPY_AGAIN)
    tokenizer = None
    if (folder / records.TOKENIZER_FILE).exists():
        length = clip_config.field(values, path, "text_config", "max_position_embeddings")
        tokenizer = tokenizer_lib.Tokenizer(folder / records.TOKENIZER_FILE, length)
    config = clip_config.from_config(values, path, tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise BadInput(
            f"{tokenizer.path} has {tokenizer.vocab_size} ids and the model {config.vocab_size}: "
            "put the tokenizer of this model beside it."
        )
    state = _load(
        _weight_files(folder), lambda shapes: clip_weights.check_shapes(config, shapes, folder)
    )
    params = clip_weights.from_state_dict(config, state)
    entities = None
    path = folder / ENTITY_TABLE_FILE
    if path.exists():
        entities = records.read_entities(folder / records.ENTITIES_FILE)
        table = _load([path]).get(sharding.ENTITY_TABLE)
        if table is None or table.shape != (len(entities), config.embed_dim):
            raise BadInput(
                f"{path} is not a table of {len(entities)} entities x {config.embed_dim}: export "
                "the model again."
            )
        ids = class_order.table_entities(np.arange(len(table)), len(table))
        params[sharding.ENTITY_TABLE] = table[ids]
    preprocess = _read_preprocess(folder, config.image_size, config.family)
    return Clip(config, params, tokenizer, entities, preprocess)


def write(folder: epath.PathLike, clip: Clip) -> None:
    """Writes the folder that `transformers.CLIPModel.from_pretrained` and `read` load.

    Files: model.safetensors (float32), config.json, tokenizer files, preprocessor_config.json and
    preprocess.json, README.md (model card), and for a classified model entities.parquet with
    entity_table.safetensors (real rows only).

    Raises:
      BadInput: what CLIPModel cannot express: a missing tower or tokenizer, an EOS with the id 2.
    """
    folder = epath.Path(folder)
    state = clip_weights.to_state_dict(clip.config, clip.params)
    if clip.tokenizer is None:
        raise BadInput(
            "The model has no tokenizer, without which its text tower is of no use: put its "
            f"{records.TOKENIZER_FILE} into the folder of the model."
        )
    config = clip_config.to_config(clip.config, clip.tokenizer)
    preprocess = ops.expand(clip.preprocess, clip.config.image_size)
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / WEIGHTS, state)
    files.write_json(folder / "config.json", config)
    files.write_json(
        folder / "preprocessor_config.json",
        _to_preprocessor(preprocess, clip.config.image_size, clip.config.family),
    )
    files.write_json(folder / PREPROCESS, {"preprocess": preprocess})
    _write_tokenizer(folder, clip.tokenizer)
    table = clip.params.get(sharding.ENTITY_TABLE)
    if table is not None and clip.entities is not None:
        # In the file row i is entity i, as in entities.parquet.
        ids = np.arange(len(clip.entities))
        rows = np.asarray(table, np.float32)[class_order.table_rows(ids, len(ids))]
        _save(folder / ENTITY_TABLE_FILE, {sharding.ENTITY_TABLE: rows})
        records.write_entities(folder / records.ENTITIES_FILE, clip.entities)
    card = model_card.text(clip.config, preprocess, clip.entities)
    (folder / "README.md").write_text(card)


def _write_tokenizer(folder: epath.Path, tokenizer: tokenizer_lib.Tokenizer) -> None:
    """tokenizer.json as it is, unless it does not frame texts with BOS and EOS by itself."""
    text = tokenizer.path.read_text()
    backend = tokenizers.Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    names = {k: tokenizer.token(getattr(tokenizer, f"{k}_id")) for k in ("bos", "eos", "pad")}
    pieces = backend.encode("a", add_special_tokens=False).ids
    if backend.encode("a").ids != [tokenizer.bos_id, *pieces, tokenizer.eos_id]:
        backend = tokenizers.Tokenizer.from_str(text)
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[names["bos"], "$A", names["eos"]],
            special_tokens=[
                (names["bos"], tokenizer.bos_id),
                (names["eos"], tokenizer.eos_id),
            ],
        )
        text = backend.to_str(pretty=True)
    (folder / records.TOKENIZER_FILE).write_text(text)
    special = {f"{kind}_token": name for kind, name in names.items()}
    files.write_json(folder / "special_tokens_map.json", special)
    files.write_json(
        folder / "tokenizer_config.json",
        {
            # The generic class: transformers' CLIPTokenizer would rebuild CLIP's own pipeline.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "model_max_length": tokenizer.context_length,
            "padding_side": "right",
            "truncation_side": "right",
            "clean_up_tokenization_spaces": False,
            # A caption that spells a special token stays text, as in `data.tokenizer`.
            "split_special_tokens": True,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )


def _weight_files(folder: epath.Path) -> list[epath.Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        index = files.read_json_object(folder / INDEX, COPY_AGAIN).get("weight_map")
        names = set(index.values()) if isinstance(index, dict) else {None}
        # A name is that of a file beside the index, and of nothing else on this machine.
        if not all(isinstance(name, str) and name == epath.Path(name).name for name in names):
            raise BadInput(
                f"{folder / INDEX} has no weight_map from arrays to files beside it: {COPY_AGAIN}."
            )
        return [folder / name for name in sorted(names)]
    raise BadInput(
        f"{folder} has no weights in safetensors format ({WEIGHTS} or {INDEX}): save the model "
        "with safe_serialization=True."
    )


def _load(
    paths: Sequence[epath.Path],
    check_shapes: Callable[[dict[str, tuple[int, ...]]], None] = lambda shapes: None,
) -> dict[str, np.ndarray]:
    """All arrays of safetensors files as float32; their shapes are checked before any is read."""
    place: dict[str, tuple[epath.Path, Any]] = {}
    arrays = {}
    try:
        for path in paths:
            file = safetensors.safe_open(path, "np")
            place |= dict.fromkeys(file.keys(), (path, file))
        check_shapes({n: tuple(f.get_slice(n).get_shape()) for n, (_, f) in place.items()})
        for name in place:
            path, file = place[name]
            # bfloat16 is a numpy type here because ml_dtypes (with jax) registers it.
            arrays[name] = file.get_tensor(name).astype(np.float32)
    except BadInput:
        raise
    except (OSError, ValueError, AttributeError, safetensors.SafetensorError) as error:
        # numpy has not every type (float8) that the format has.
        raise BadInput(
            f"The weights {path} cannot be read ({error}): copy the file again."
        ) from error
    return arrays


def _save(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    # transformers refuses a file that does not name its layout.
    safetensors_numpy.save_file(arrays, path, metadata={"format": "pt"})
    os.chmod(path, 0o644)  # safetensors makes it private to its owner
