"""The quick start's recipe with ViT-S/8 on small photos, for `python -m experiments.claim_photos`.

The base of all its runs: the experiment takes one or both of the losses, and sets the seeds.  All
see as many pictures, 800 x 256, which is 8 epochs of 25,000.  Raw captions teach slowest: with the
quick start's towers on such photos unseen mAP without self was 0.090 after 128,000 pictures and
0.097 after 256,000, by both losses on I2E 0.096 after 51,000 and 0.104 after 102,000.  What a
longer run adds is about the same for both.
"""

import ml_collections

from configs import common, quickstart


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """data=DIR that holds i2e/, seen=SET, unseen=SET; by default those of `make quickstart`."""
    sample = {name: f"{common.SAMPLE}/{name}.tar" for name in ("seen", "unseen")}
    arg = common.parse_arg(arg, data="runs/quickstart/data", **sample)
    config = quickstart.get_config("task=multitask")
    config.batch_size = 256
    config.total = "800 steps"
    config.model = common.model("S/16", image_size=64, context_length=16)
    config.model.patch_size = 8
    config.model.remat = "none"
    config.data.update(
        {
            "dir": arg.data,
            "train_ops": "decode|random_resized_crop(64, (0.5, 1.0))|flip",
            "eval_ops": "decode|resize_short(64)|center_crop(64)",
        }
    )
    # The experiment measures finished runs, query by query.
    config.evaluators = {
        name: {"kind": "retrieval", "images": arg[name], "every": "0 steps"} for name in sample
    }
    config.log_every = "50 steps"
    config.checkpoint.every = "100 percent"
    config.checkpoint.verify = False
    return config
