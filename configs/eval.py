"""What to measure on a finished model.

    python -m mofi_jax.evaluate --config configs/eval.py:sample --model W
    python -m mofi_jax.evaluate --config configs/eval.py:gpr1200=PATH --model W

``sample``: the two picture sets of data_prep/sample, new views of things that were trained on
(`seen`) and of others (`unseen`), with entity top-k and zero-shot by name; 20 s on two CPU cores.
With ``--model raw_pixels`` its mAP is 0.249 unseen and 0.529 seen.

``gpr1200=PATH``: PATH is the folder with the 12,000 pictures (visual-computing.com, for
non-commercial research).  The released MOFI models reach 0.834 (B/16), 0.861 (L/14) and 0.868
(H/14) by their own preprocessing (apple/ml-mofi README and eval/utils.py), which is

    --config.preprocess="decode|resize_short(224, method='bilinear')|center_crop(224)"

Add ``,classes=FILE`` with the GPR1200_categoryNumber_to_text.json of its authors for names in the
gallery and zero-shot classification.
"""

import ml_collections

from configs import common
from mofi_jax.common.errors import BadInput

SAMPLE = "data_prep/sample"


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """sample | gpr1200=PATH[,classes=FILE]."""
    arg = common.parse_arg(arg, sample=False, gpr1200="", classes="")
    if arg.sample == bool(arg.gpr1200):
        raise BadInput(
            "configs/eval.py needs one of `sample` and `gpr1200=PATH` behind the colon: write "
            "--config configs/eval.py:sample."
        )
    config = ml_collections.ConfigDict()
    config.distributed = False  # True on pods: one process a host, jax.distributed
    config.start_timeout = 300  # seconds to wait for the other processes
    config.mesh = common.mesh()
    # Picture operations in place of the model's own; "" for its own.
    config.preprocess = ""
    config.batch_size = 64  # pictures or texts on each device at a time
    # The size at which the baseline --model raw_pixels looks at pictures: as the quick start's
    # towers do.
    config.raw_pixels_size = 40
    config.evaluators = _sample() if arg.sample else _gpr1200(arg.gpr1200, arg.classes)
    return config


def _sample() -> dict:
    classes = f"{SAMPLE}/classes.jsonl"
    evaluators = {}
    for name in ("seen", "unseen"):
        images = {"images": f"{SAMPLE}/{name}.tar", "classes": classes}
        evaluators[f"retrieval_{name}"] = {"kind": "retrieval", **images}
        evaluators[f"zeroshot_{name}"] = {"kind": "zeroshot", **images}
    # Things never trained on are in no class table.
    evaluators["entity_seen"] = {
        "kind": "classification",
        "images": f"{SAMPLE}/seen.tar",
        "classes": classes,
    }
    return evaluators


def _gpr1200(images: str, classes: str) -> dict:
    named = {"images": images, "classes": classes}
    evaluators = {"gpr1200": {"kind": "retrieval", **named}}
    if classes:
        evaluators["gpr1200_zeroshot"] = {
            "kind": "zeroshot",
            **named,
            "templates": ("a photo of {}.",),
        }
    return evaluators
