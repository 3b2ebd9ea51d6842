"""What all configs share: the parser of the text behind the colon, and shared fragments."""

import ast
import dataclasses
import os
from typing import Any

import ml_collections

from mofi_jax.common.errors import BadInput

# The pairs, evaluation sets and knowledge base that come with the project.
SAMPLE = os.path.normpath(os.path.join(os.path.dirname(__file__), "..", "data_prep", "sample"))


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """Parses ``"task=multitask,res=224,sample"`` into typed values.

    Values are Python literals where they can be read as such and have the type of the default; a
    name alone means True.

    Raises:
      BadInput: a name that is not among the defaults, or a value of another type.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, equals, text = part.partition("=")
        if name not in defaults:
            raise BadInput(
                f"Unknown config argument {name!r} in {arg!r}: choose from {', '.join(defaults)}."
            )
        if not equals:
            value: Any = True
        elif isinstance(defaults[name], str):
            value = text
        else:
            try:
                value = ast.literal_eval(text)
            except (SyntaxError, ValueError):
                value = text
        expected = type(defaults[name])
        if expected is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            raise BadInput(
                f"Config argument {name}={text} in {arg!r} is not a {expected.__name__}."
            )
        values[name] = value
    return ml_collections.ConfigDict(values)


TASKS = ("supervised", "contrastive", "multitask")


def model(
    variant: str, *, image_size: int, context_length: int, family: str = "clip"
) -> ml_collections.ConfigDict:
    """The shape of a named variant, every number spelled out so that each can be overridden.

    A variant is the same in either family, "clip" or "siglip", but for what SigLIP has instead of
    CLIP's class token, projection of pictures, and activation.
    """
    from mofi_jax.model import mofi  # here, so that configs of data preparation load no jax

    if variant not in mofi.VARIANTS:
        raise BadInput(
            f"Unknown variant {variant!r}: choose from {', '.join(sorted(mofi.VARIANTS))}."
        )
    shape, siglip = mofi.VARIANTS[variant], family == "siglip"
    return ml_collections.ConfigDict(
        {
            "family": family,  # clip or siglip, whose arithmetic the towers have
            "image_size": image_size,  # pixels of a side, a multiple of patch_size
            "patch_size": shape["patch_size"],  # pixels of a side
            "image": tower(shape["image"]),  # the image tower
            "text": tower(shape["text"]),  # the text tower
            # Length of an embedding; SigLIP's is the width of its image tower.
            "embed_dim": shape["image"].width if siglip else shape["embed_dim"],
            "context_length": context_length,  # tokens of a text; what is longer is cut
            # gelu (exact), gelu_tanh or quick_gelu.  OpenCLIP's H/14: gelu; SigLIP: gelu_tanh.
            "activation": "gelu_tanh" if siglip else "gelu",
            # Added to the variance in a LayerNorm.  axlearn vision/clip.py: 1e-5; SigLIP: 1e-6.
            "layer_norm_eps": 1e-6 if siglip else 1e-5,
            # Of matrix products, bfloat16 or float32; parameters are always float32.  auto: float32
            # on CPUs, which multiply bfloat16 slowly, bfloat16 on accelerators.
            "dtype": "auto",
            # What each block keeps for its backward pass: none everything, dots the results of its
            # matrix products (attention is computed again, 1.4 %), full its input alone (a third
            # of it is).  dots needs 9 times the memory of full: 128 pictures a chip take 5 GiB for
            # B/16 with its texts, 15 for L/14 and 27 for H/14, too much for a v6e.
            "remat": "full" if variant == "H/14" else "dots",
            # auto: cudnn on NVIDIA GPUs, pallas on TPUs, else xla (`mofi_jax.model.attention`).
            # split: on NVIDIA GPUs too, cudnn with the class token apart where the patches fill
            # tiles of 128, as in L/14 and H/14 at 224 pixels; no GPU has run it yet.
            "attention": "auto",
        }
    )


def tower(shape: Any) -> dict[str, int]:
    """The keys of a tower of this shape, a `mofi.TowerConfig`."""
    return {
        "width": shape.width,  # of the residual stream
        "layers": shape.layers,  # transformer blocks
        "heads": shape.heads,  # of attention; they divide the width
        "mlp_width": shape.mlp_width,  # hidden width of the MLPs; 0: four times the width
    }


def model_of(folder: str) -> tuple[ml_collections.ConfigDict, str]:
    """`config.model` of a trained model, for a run that begins with it, and its preprocessing.

    A config is made before hosts know of one another: each reads the folder by itself.

    Raises BadInput: a folder that is no model.
    """
    from mofi_jax.common import files
    from mofi_jax.interop import from_hub, huggingface, open_clip
    from mofi_jax.model import mofi
    from mofi_jax.training import run_folder

    path = files.input_folder(from_hub.model(folder), "model")
    if (path / run_folder.MODEL_FILE).exists():
        values = run_folder.read_model(path)
        found, preprocess = run_folder.model_config(values).to_dict(), values["preprocess"]
    else:
        reader = open_clip if open_clip.is_folder(path) else huggingface
        if reader is huggingface and not (path / "config.json").exists():
            raise BadInput(
                f"model={folder} is neither a training run ({run_folder.MODEL_FILE}) nor a folder "
                "of the Hugging Face hub (config.json) or of open_clip: name the folder of one."
            )
        clip = reader.read(path)
        found, preprocess = clip.config.to_dict(), clip.preprocess
        if "text" not in clip.params:  # for one that is trained on it
            found |= {"text": dataclasses.asdict(mofi.VARIANTS["B/16"]["text"])}
            found |= {"context_length": 77}
    # Those are the data set's.
    for name in ("vocab_size", "eos_id"):
        del found[name]
    return ml_collections.ConfigDict(found | {"dtype": "auto", "remat": "dots"}), preprocess


def losses(task: str, *, scale: float, margin: float) -> dict[str, dict[str, Any]]:
    """Task name -> weighted losses.

    Multitask weighs them 0.9 to 0.1, by `python -m experiments.claim --parts ablations`: on the
    sample unseen mAP without self falls as the contrastive loss gets more.  What the paper took is
    not public.
    """
    if task not in TASKS:
        raise BadInput(f"Unknown task {task!r}: choose from {', '.join(TASKS)}.")
    entity = {
        "weight": 1.0,  # in the sum of the losses
        "scale": scale,  # of the cosines; where it is learned, at the start
        "learn_scale": False,  # True: `scale` is learned, up to 100
        "margin": margin,  # that a picture's own entity has to be ahead
        "margin_kind": "cosface",  # taken off the cosine; arcface: added to the angle
        "sample_rate": 1.0,  # share of the classes that a step sees; 1: the exact softmax
        "block_size": 0,  # classes at a time; 0: chosen from the shapes
    }
    contrastive = {
        "weight": 1.0,  # in the sum of the losses
        "kind": "softmax",  # as CLIP; sigmoid: as SigLIP
        # What texts about an entity that the picture shows are to it beside its own: off (negatives
        # like all others), masked (no negatives) or positive.
        "same_entity": "masked",
    }
    if task == "supervised":
        return {"entity": entity}
    if task == "contrastive":
        return {"contrastive": contrastive}
    return {"entity": {**entity, "weight": 0.9}, "contrastive": {**contrastive, "weight": 0.1}}


def mesh() -> dict[str, int]:
    """Parameters split over all devices of a slice (`mofi_jax.distributed.meshes.make_mesh`)."""
    return {
        # Whole copies of the parameters, of which each sees a part of the batch; -1: what the
        # others leave, or where that is fsdp one for each TPU slice.
        "replica": -1,
        "fsdp": -1,  # devices that share the parameters and a copy's batch; -1: all that are left
        "tensor": 1,  # devices that share each wide matrix product
    }


def extra_sets(text: str) -> dict[str, dict[str, Any]]:
    """``NAME@DIR@WEIGHT+NAME@DIR@WEIGHT`` -> ``config.data.extra``: labelled sets to mix in.

    Raises:
      BadInput: what cannot be read so, or a name that comes twice.
    """
    sets: dict[str, dict[str, Any]] = {}
    for part in filter(None, text.split("+")):
        name, _, rest = part.partition("@")
        folder, _, weight = rest.rpartition("@")
        try:
            if not name or not folder or name in sets:
                raise ValueError(part)
            sets[name] = {"dir": folder, "name": "i2e", "weight": float(weight)}
        except ValueError:
            raise BadInput(
                f"extra={text} cannot be read at {part!r}: write NAME@DIR@WEIGHT, several with + "
                "between them, each name once."
            ) from None
    return sets


def stages(text: str) -> tuple[dict[str, Any], ...]:
    """``PIXELS@DROPOUT@LENGTH+PIXELS@DROPOUT@LENGTH`` -> ``config.stages``.

    Raises:
      BadInput: what cannot be read so.
    """
    found = []
    for part in filter(None, text.split("+")):
        try:
            pixels, dropout, length = part.split("@")
            found.append(
                {"length": length, "image_size": int(pixels), "patch_dropout": float(dropout)}
            )
        except ValueError:
            raise BadInput(
                f"stages={text} cannot be read at {part!r}: write PIXELS@DROPOUT@LENGTH, as "
                "112@0.5@80 percent, several with + between them."
            ) from None
    return tuple(found)
