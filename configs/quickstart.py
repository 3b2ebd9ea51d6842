"""The whole recipe at a size that trains in minutes on a laptop's CPU, on the bundled sample.

    mofi train --config quickstart:task=multitask --workdir W

`make quickstart` runs it twice: ``task=contrastive,data=i2t`` is the CLIP model that chooses labels
(trained on the raw pairs), ``task=multitask`` the MOFI model (trained on the chosen labels).  The
keys are those of `configs/mofi.py`, the values those of a small model and a small data set.
"""

import ml_collections

from configs import common, mofi


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """task=supervised|contrastive|multitask, data=i2e|i2t."""
    arg = common.parse_arg(arg, task="multitask", data="i2e")
    config = mofi.get_config(f"task={arg.task},variant=B/16,res=40")

    config.batch_size = 128
    config.total = "850 steps" if arg.data == "i2e" else "500 steps"
    config.model.update(
        {
            "patch_size": 8,
            "image": {"width": 128, "layers": 3, "heads": 4},
            "text": {"width": 64, "layers": 2, "heads": 2},
            "embed_dim": 128,
            "context_length": 16,
            "activation": "quick_gelu",  # the cheapest of the three on a CPU
            "remat": "none",
        }
    )
    config.data.update(
        {
            "dir": "runs/quickstart/data",
            "name": arg.data,
            "train_ops": (
                "decode|new_view({size}, scale=(0.55, 1.0), rotate=25.0)|flip"
                "|light(0.25, 0.25, 0.25)"
            ),
            "eval_ops": "decode|resize_short(40)|center_crop(40)",
            "text_sources": {"alt_text": 0.5, "name_and_description": 0.25, "name": 0.25},
            "max_labels": 2,
            "block": 1,  # the sample is small and on the local disk
            "workers": 0,  # its pictures are small
        }
    )
    config.optimizer.update(
        {
            "learning_rate": 1e-3,
            "warmup": "5 percent",
            "weight_decay": 0.1,
            "first_moment_dtype": "float32",
        }
    )
    if "entity" in config.losses:
        config.losses.entity.update({"scale": 16.0, "margin": 0.1})
        config.optimizer.table.learning_rate_multiplier = 5.0

    classes = f"{common.SAMPLE}/classes.jsonl"
    every = "25 percent"
    config.evaluators = {
        f"retrieval_{name}": {
            "kind": "retrieval",
            "images": f"{common.SAMPLE}/{name}.tar",
            "every": every,
        }
        for name in ("seen", "unseen")
    }
    if "entity" in config.losses:
        config.evaluators.entity_seen = {
            "kind": "classification",
            "images": f"{common.SAMPLE}/seen.tar",
            "classes": classes,
            "every": every,
        }
    if "contrastive" in config.losses:
        config.evaluators.zeroshot_unseen = {
            "kind": "zeroshot",
            "images": f"{common.SAMPLE}/unseen.tar",
            "classes": classes,
            "every": every,
        }
    config.log_every = "10 steps"
    config.checkpoint.every = "20 percent"
    config.checkpoint.keep = 1
    return config
