"""What the claim is measured on, for `python -m experiments.claim`.

By default the bundled sample and the quick start's towers.  `photos=DIR,kb=KB` takes a set of small
photos instead: DIR holds train/ (img2dataset's tars), truth.jsonl.gz (lines of key, qid and says,
see `data_prep.quality.truth`), seen.tar and unseen.tar, and KB is their knowledge base.  Their
towers are the quick start's too, or with `gpu` ViT-S/8 at 64 pixels.
"""

import os

import ml_collections

from configs import common, quickstart


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """photos=DIR,kb=KB and gpu for towers of a GPU; by default the sample."""
    arg = common.parse_arg(arg, photos="", kb="", gpu=False)
    config = ml_collections.ConfigDict()
    # The recipe: it has both losses, of which the runs take one or both.
    config.train = quickstart.get_config("task=multitask")
    config.train.total = "500 steps"
    config.train.log_every = "50 steps"
    config.train.checkpoint.every = "100 percent"
    config.train.checkpoint.verify = False
    config.train.evaluators = {}
    sample = common.SAMPLE
    # Folder of img2dataset's tars of noisy pairs.
    config.pairs = os.path.join(arg.photos or sample, "train" if arg.photos else "pairs")
    config.truth = os.path.join(arg.photos or sample, "truth.jsonl.gz")  # of the pairs
    # What the numbers of the truth's classes are, where it has such.
    config.classes = None if arg.photos else os.path.join(sample, "classes.jsonl")
    config.knowledge_base = arg.kb or os.path.join(sample, "knowledge_base.jsonl.gz")  # of both
    # Keys of configs/i2e.py for the data sets.
    config.i2e = {"min_images": 2, "max_side": 128, "shard_examples": 500, "vocab_size": 2_000}
    # What finished runs are measured by.
    config.evaluators = {
        name: {"kind": "retrieval", "images": os.path.join(arg.photos or sample, f"{name}.tar")}
        for name in ("unseen", "seen")
    }
    if arg.photos:
        _photos(config, arg.gpu)
        return config
    for name, kind in (("zeroshot_seen", "zeroshot"), ("entity_seen", "classification")):
        images = config.evaluators.seen.images
        config.evaluators[name] = {"kind": kind, "images": images, "classes": config.classes}
    return config


def _photos(config: ml_collections.ConfigDict, gpu: bool) -> None:
    """Photos are not turned as drawings are; of 35,000 these steps are four to six epochs."""
    config.i2e.update({"min_images": 5, "shard_examples": 5_000, "vocab_size": 8_000})
    train = config.train
    train.data.train_ops = "decode|random_resized_crop({size}, (0.5, 1.0))|flip"
    train.total = "1200 steps"
    if gpu:
        train.batch_size, train.total = 256, "800 steps"
        train.model = common.model("S/16", image_size=64, context_length=16)
        train.model.patch_size = 8
        train.model.remat = "none"
        train.data.eval_ops = "decode|resize_short(64)|center_crop(64)"
