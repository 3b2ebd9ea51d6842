"""Trainings that begin with a model: own classes, another resolution, texts, new entities.

    mofi train --config finetune:recipe=classes,model=MODEL,data=W \\
        --workdir TUNED

MODEL is a run or a folder of the Hugging Face hub or of open_clip, W holds i2e/ as
`data_prep.build_i2e` writes it.  The towers' shapes and arithmetic are MODEL's, the other keys
those of `configs/mofi.py` with what the recipe's source says.

    classes     the image tower as a classifier; W of class folders (`data_prep.class_folders`), or
                any other with entities
    resolution  all of MODEL at `res` pixels; W with MODEL's tokenizer.json in i2e/1.0.0/
    lit         a text tower on MODEL's image tower, which stays as it is; any W, name=i2t too
    entities    MODEL, which `mofi_jax.grow` has made, in its own folder; W is what it was grown to
"""

import re

import ml_collections

from configs import common, mofi
from mofi_jax.common import files
from mofi_jax.common.errors import BadInput

RECIPES = ("classes", "resolution", "lit", "entities")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """recipe=classes|resolution|lit|entities, model=FOLDER, data=FOLDER.

    task=supervised|contrastive|multitask for resolution; res=pixels, MODEL's own if left out; total
    for how long, as in "10 epochs"; name=i2e|i2t; retrieval=PATH measures retrieval on a set of
    pictures while it trains.
    """
    defaults = {"recipe": "classes", "model": "", "data": "data", "name": "i2e", "res": 0}
    defaults |= {"task": "multitask", "total": "", "retrieval": ""}
    arg = common.parse_arg(arg, **defaults)
    if arg.recipe not in RECIPES:
        raise BadInput(f"Unknown recipe {arg.recipe!r}: choose from {', '.join(RECIPES)}.")
    if not arg.model:
        raise BadInput("configs/finetune.py has no model to begin with: write model=FOLDER.")
    if arg.recipe == "entities":
        return _entities(arg)
    task = {"classes": "supervised", "lit": "contrastive"}.get(arg.recipe, arg.task)
    model, preprocess = common.model_of(arg.model)
    size = arg.res or model.image_size
    config = mofi.get_config(f"task={task},family={model.family}")
    config.model = model
    config.data.update({"dir": arg.data, "name": arg.name})
    config.data.eval_ops = at_size(preprocess, model.image_size, size)
    config.data.update({"block": 1, "workers": 0})  # small sets on local disks
    config.model.image_size = size
    config.batch_size = 256
    config.optimizer.warmup = "5 percent"
    config.checkpoint.every = "10 percent"
    config.init = {"model": arg.model, "parts": () if arg.recipe == "resolution" else ("image",)}
    if arg.recipe == "classes":
        # classes: as WiSE-FT (arXiv 2109.01903, section 4), with AdamW at 3e-5.
        config.total = "10 epochs"
        config.optimizer.update({"learning_rate": 3e-5, "weight_decay": 0.1})
        # classes: WiSE-FT's classifier begins with texts of the classes; ours begins at random, and
        # learns faster: on 60 classes of 6 drawings of the sample it gets 70 % of its last batch
        # right, with factors of 30 and 10 64 and 47 %.
        config.optimizer.table.learning_rate_multiplier = 100.0
        config.losses.entity.update({"scale": 16.0, "margin": 0.0})
    elif arg.recipe == "resolution":
        # resolution: as CLIP at 336 pixels: one more epoch (arXiv 2103.00020, section 2.5).
        config.total = "1 epochs"
        config.optimizer.update({"learning_rate": 2e-5, "weight_decay": 0.2})
    else:
        # lit: as LiT (arXiv 2111.07991): the image tower locked, a text tower from scratch at 1e-3.
        config.total = "20 epochs"
        config.optimizer.update({"learning_rate": 1e-3, "weight_decay": 1e-4})
        config.optimizer.frozen = ("image",)
    config.total = arg.total or config.total
    if arg.retrieval:
        config.evaluators.retrieval = {
            "kind": "retrieval",
            "images": arg.retrieval,
            "every": "10 percent",
        }
    return config


def at_size(operations: str, old: int, new: int) -> str:
    """Picture operations of a model of `old` pixels for `new` ones."""
    return re.sub(rf"\b{old}\b", str(new), operations)


def _entities(arg: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config that a run was trained with, for the data that `mofi_jax.grow` took it to."""
    remedy = "name a run that `mofi grow` has grown"
    values = files.read_json_object(files.local_input(arg.model, "the run") / "config.json", remedy)
    config = mofi.get_config("task=multitask")
    with config.ignore_type():
        config.update(ml_collections.ConfigDict(values))
    config.losses = values["losses"]
    config.data.update({"dir": arg.data, "name": arg.name})
    if not arg.total:
        raise BadInput(
            f"recipe=entities trains on from where {arg.model} is: write total=DURATION, longer "
            f"than its {config.total}."
        )
    config.total = arg.total
    return config
