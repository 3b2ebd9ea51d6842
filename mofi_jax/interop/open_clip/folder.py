"""Writes and reads an open_clip folder."""

from etils import epath

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops, records
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.interop import clip_weights, huggingface, model_card
from mofi_jax.interop.folder import processor, weights
from mofi_jax.interop.open_clip import config as config_lib
from mofi_jax.interop.open_clip import weights as weights_lib
from mofi_jax.model import mofi

WEIGHTS = "open_clip_model.safetensors"
# In the order in which open_clip looks for them.
WEIGHT_FILES = (WEIGHTS, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


def write(folder: epath.PathLike, clip: huggingface.Clip) -> None:
    """Writes the folder that open_clip opens as `local-dir:FOLDER`, and `read`.

    Raises BadInput: a model of another family than CLIP's, or without one of its towers.
    """
    folder = epath.Path(folder)
    config, tokenizer = clip.config, clip.tokenizer
    missing = [name for name in mofi.TOWERS if name not in clip.params]
    if missing or tokenizer is None:
        what = f"{' and no '.join(missing)} tower" if missing else "tokenizer"
        raise BadInput(
            f"The model has no {what}, without which open_clip opens none: use --format=hf."
        )
    if config.family != "clip":
        raise BadInput(
            f"The model is of the family {config.family}, which open_clip takes from timm's own "
            "code: use --format=hf."
        )
    state = weights_lib.to_open_clip(clip_weights.to_state_dict(config, clip.params))
    preprocess = ops.expand(clip.preprocess, config.image_size)
    folder.mkdir(parents=True, exist_ok=True)
    weights.save(folder / WEIGHTS, state)
    pixels = config_lib.to_preprocess(preprocess, config)
    files.write_json(
        folder / config_lib.CONFIG,
        {"model_cfg": config_lib.to_model(config, tokenizer), "preprocess_cfg": pixels},
    )
    if config.layer_norm_eps == config_lib.TIMM_EPSILON:
        files.write_json(folder / "config.json", config_lib.to_timm(config, pixels))
    files.write_json(folder / processor.PREPROCESS, {"preprocess": preprocess})
    huggingface.write_tokenizer(folder, tokenizer)
    huggingface.write_entities(folder, clip)
    card = model_card.text(config, preprocess, clip.entities, library="open_clip")
    (folder / "README.md").write_text(card)


def is_folder(folder: epath.Path) -> bool:
    """Whether a folder is open_clip's, and not also a CLIPModel that can be read as such."""
    if not (folder / config_lib.CONFIG).exists():
        return False
    path = folder / "config.json"  # timm's, where it names an architecture and no model_type
    return not path.exists() or "model_type" not in files.read_json_object(
        path, config_lib.COPY_AGAIN
    )


def read(folder: epath.PathLike) -> huggingface.Clip:
    """Reads an open_clip folder of a ViT and open_clip's own text tower.

    Raises BadInput: a file or field missing or damaged, an architecture that is not CLIP's, or
      weights that do not fit the configuration.
    """
    folder = epath.Path(folder)
    path = folder / config_lib.CONFIG
    values = files.read_json_object(path, config_lib.COPY_AGAIN)
    tokenizer = None
    reader = config_lib.Fields(values.get("model_cfg"), path)
    text = reader.part("text_cfg")
    if (folder / records.TOKENIZER_FILE).exists():
        length = text.number("context_length", 77)
        tokenizer = tokenizer_lib.Tokenizer(folder / records.TOKENIZER_FILE, length)
    config = config_lib.from_model(reader, tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise BadInput(
            f"{tokenizer.path} has {tokenizer.vocab_size} ids and the model {config.vocab_size}: "
            "put the tokenizer of this model beside it."
        )
    found = [folder / name for name in WEIGHT_FILES if (folder / name).exists()]
    if not found:
        raise BadInput(
            f"{folder} has no weights ({', '.join(WEIGHT_FILES)}): {config_lib.COPY_AGAIN}."
        )
    state = weights_lib.State(weights.open_files(found[:1]), config)
    clip_weights.check_shapes(config, state.shapes, found[0])
    params = clip_weights.from_state_dict(config, state)
    pixels = config_lib.from_preprocess(folder, values.get("preprocess_cfg") or {}, config)
    huggingface.fold(params["image"], pixels, config.family)
    entities = huggingface.read_entities(folder, config, params)
    return huggingface.Clip(config, params, tokenizer, entities, pixels.operations)
