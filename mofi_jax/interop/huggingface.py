"""Hugging Face folders of CLIPModel and SiglipModel, both directions: what each file holds.

Weights are mapped by `clip_weights`, config.json by `clip_config`, or SigLIP's files of these
kinds; pixels and the arrays' files by `folder`. A model without text tower is a
CLIPVisionModelWithProjection or SiglipVisionModel. Neither PyTorch nor transformers is needed in
either direction, save for weights that PyTorch pickled.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator

import numpy as np
import tokenizers
from absl import logging
from etils import epath

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops, records
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.distributed import sharding
from mofi_jax.interop import clip_config, clip_weights, model_card, siglip_config, siglip_weights
from mofi_jax.interop.folder import processor, weights
from mofi_jax.losses import class_order, mapped_table
from mofi_jax.model import mofi

ENTITY_TABLE_FILE = "entity_table.safetensors"
COPY_AGAIN = "copy the whole folder again"
TABLE_BLOCK = 8_192  # rows of the class table that are put in order at a time


@dataclasses.dataclass(frozen=True)
class Clip:
    """What a folder holds, in our terms."""

    config: mofi.MofiConfig  # with dtype float32, that of the weights; choose another for speed
    # numpy float32 as of `mofi.create`, with `entity_table` if classified; that of a folder lies in
    # its file until it is asked for (`losses.mapped_table`)
    params: mofi.Params
    tokenizer: tokenizer_lib.Tokenizer | None
    entities: records.Entities | None
    preprocess: str  # picture operations (`data.ops`) from bytes to uint8 [s, s, 3]


def read(folder: epath.PathLike) -> Clip:
    """Reads a folder of CLIPModel, CLIPVisionModelWithProjection or CLIPVisionModel, or of SigLIP.

    SigLIP's are SiglipModel, SiglipVisionModel and, for square pictures, Siglip2Model (NaFlex).
    What config.json and the preprocessing file leave out is as transformers has it; another
    normalisation of pixels than the family's is folded into the weights. float16 and bfloat16
    weights become float32. CLIPVisionModel, which has no projection, gets the identity.

    Raises:
      BadInput: a file or field missing or damaged, or weights that do not fit the configuration.
    """
    folder = epath.Path(folder)
    path = folder / "config.json"
    values = files.read_json_object(path, COPY_AGAIN)
    siglip = values.get("model_type") in siglip_config.MODEL_TYPES
    configs = siglip_config if siglip else clip_config
    values = configs.resolve(values, path)
    has_text = "text_config" in values
    tokenizer = None
    tokenizer_path = tokenizer_lib.find(folder)
    if has_text and tokenizer_path is not None:
        length = clip_config.field(values, path, "text_config", "max_position_embeddings")
        tokenizer = tokenizer_lib.Tokenizer(tokenizer_path, length)
    config = configs.from_config(values, path, tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise BadInput(
            f"{tokenizer.path} has {tokenizer.vocab_size} ids and the model {config.vocab_size}: "
            "put the tokenizer of this model beside it."
        )
    pixels = processor.read(folder, config.image_size, config.family)
    state = weights.open_folder(folder)
    table = _table(config)
    if siglip:
        naflex = "num_patches" in values["vision_config"]
        table = functools.partial(table, naflex=naflex)
        if not has_text:
            state = state.below("vision_model.")
    elif not has_text and clip_weights.PROJECTION not in state:
        logging.info("%s has no projection: embeddings are as wide as the tower.", folder)
        config = dataclasses.replace(config, embed_dim=config.image.width)
        state = state.below("vision_model.")  # which one that was made alone is saved without
        state = state.with_array(clip_weights.PROJECTION, np.eye(config.embed_dim))
    clip_weights.check_shapes(config, state.shapes, folder, text=has_text, table=table)
    params = clip_weights.from_state_dict(config, state, text=has_text, table=table)
    fold(params["image"], pixels, config.family)
    entities = read_entities(folder, config, params)
    return Clip(config, params, tokenizer, entities, pixels.operations)


def read_entities(
    folder: epath.Path, config: mofi.MofiConfig, params: mofi.Params
) -> records.Entities | None:
    """The vocabulary of a folder that has one, whose class table becomes one of `params`."""
    path = folder / ENTITY_TABLE_FILE
    if not path.exists():
        return None
    entities = records.read_entities(folder / records.ENTITIES_FILE)
    table = mapped_table.MappedTable.open(path, sharding.ENTITY_TABLE)
    if table.shape != (len(entities), config.embed_dim):
        raise BadInput(
            f"{path} is not a table of {len(entities)} entities x {config.embed_dim}: export the "
            "model again."
        )
    params[sharding.ENTITY_TABLE] = table
    return entities


def fold(tower: mofi.Params, pixels: processor.Processor, family: str) -> None:
    """Makes the image tower take pixels as the family normalises them, in place of the folder's."""
    kernel, bias = pixels.folded(tower["patch_embedding"]["kernel"], family)
    tower["patch_embedding"]["kernel"] = kernel
    if family == "siglip":
        tower["patch_embedding"]["bias"] += bias
    else:
        # Every position but the class token's, which sees no pixels.
        tower["position_embedding"][1:] += bias


def _table(config: mofi.MofiConfig) -> clip_weights.Table:
    return siglip_weights.weights if config.family == "siglip" else clip_weights.weights


def write(folder: epath.PathLike, clip: Clip) -> None:
    """Writes the folder that transformers' CLIPModel or SiglipModel and `read` load.

    A model without text tower makes one for CLIPVisionModelWithProjection or SiglipVisionModel.
    Files:
    model.safetensors (float32), config.json, tokenizer files, preprocessor_config.json and
    preprocess.json, README.md (model card), and for a classified model entities.parquet with
    entity_table.safetensors (real rows only).

    Raises:
      BadInput: what these cannot express: no image tower, a text tower without tokenizer, an EOS
        with the id 2.
    """
    folder = epath.Path(folder)
    state = clip_weights.to_state_dict(clip.config, clip.params, _table(clip.config))
    tokenizer = clip.tokenizer if "text" in clip.params else None
    if tokenizer is None and "text" in clip.params:
        raise BadInput(
            "The model has no tokenizer, without which its text tower is of no use: put its "
            f"{records.TOKENIZER_FILE} into the folder of the model."
        )
    configs = siglip_config if clip.config.family == "siglip" else clip_config
    config = configs.to_config(clip.config, tokenizer)
    preprocess = ops.expand(clip.preprocess, clip.config.image_size)
    folder.mkdir(parents=True, exist_ok=True)
    weights.save(folder / weights.WEIGHTS, state)
    files.write_json(folder / "config.json", config)
    files.write_json(
        folder / processor.PREPROCESSOR,
        processor.to_config(preprocess, clip.config.image_size, clip.config.family),
    )
    files.write_json(folder / processor.PREPROCESS, {"preprocess": preprocess})
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, clip.config.family)
    write_entities(folder, clip)
    towers = [name for name in mofi.TOWERS if name in clip.params]
    card = model_card.text(clip.config, preprocess, clip.entities, towers=towers)
    (folder / "README.md").write_text(card)


def write_entities(folder: epath.Path, clip: Clip) -> None:
    """The vocabulary and its class table, of a model that has them."""
    table = clip.params.get(sharding.ENTITY_TABLE)
    if table is None or clip.entities is None:
        return
    if isinstance(table, mapped_table.MappedTable):
        rows = weights.read_rows(table.path, sharding.ENTITY_TABLE)
    elif isinstance(table, weights.Scattered):
        rows = table
    else:
        blocks = ((i, table[i : i + TABLE_BLOCK]) for i in range(0, len(table), TABLE_BLOCK))
        rows = by_entity(blocks, (len(clip.entities), table.shape[1]))
    weights.save(folder / ENTITY_TABLE_FILE, {sharding.ENTITY_TABLE: rows})
    records.write_entities(folder / records.ENTITIES_FILE, clip.entities)


def by_entity(
    blocks: Iterable[tuple[int, np.ndarray]], shape: tuple[int, int]
) -> weights.Scattered:
    """The class table [e, d] as it lies in a folder, row i that of entity i.

    Args:
      blocks: (number of the first row, rows) in the order of `class_order`.
    """

    def scattered() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first, rows in blocks:
            # Rows after those of entities pad the table to a mesh.
            numbers = np.arange(first, min(first + len(rows), shape[0]))
            rows = rows[: len(numbers)]
            if not np.isfinite(rows).all():
                raise BadInput(
                    "The class table holds values that are not finite: take an earlier checkpoint."
                )
            yield class_order.table_entities(numbers, shape[0]), rows

    return weights.Scattered(shape, scattered)


def write_tokenizer(
    folder: epath.Path, tokenizer: tokenizer_lib.Tokenizer, family: str = "clip"
) -> None:
    """tokenizer.json as it is, unless it does not frame texts as `Tokenizer` does by itself."""
    text = tokenizer.serialized
    backend = tokenizers.Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    names = {kind: tokenizer.token(i) for kind, i in ids.items() if i is not None}
    first = [] if tokenizer.bos_id is None else [names["bos"]]
    pieces = backend.encode("a", add_special_tokens=False).ids
    framed = [*(ids["bos"] for _ in first), *pieces, tokenizer.eos_id]
    if backend.encode("a").ids != framed:
        backend = tokenizers.Tokenizer.from_str(text)
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[*first, "$A", names["eos"]],
            special_tokens=[
                (name, backend.token_to_id(name)) for name in dict.fromkeys([*first, names["eos"]])
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
            # transformers 4 gives the pre-tokenizer this, False where nothing is said.
            "add_prefix_space": (json.loads(text)["pre_tokenizer"] or {}).get(
                "add_prefix_space", False
            ),
            # A caption that spells a special token stays text, as in `data.tokenizer`.
            "split_special_tokens": True,
            # SigLIP reads its padding: a mask would hide it.
            "model_input_names": ["input_ids", "attention_mask"]
            if family == "clip"
            else ["input_ids"],
        },
    )
