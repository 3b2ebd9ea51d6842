"""What to measure on a finished model.

    python -m mofi_jax.evaluate --config configs/eval.py:sample --model W
    python -m mofi_jax.evaluate --config configs/eval.py:gpr1200=PATH --model W
    python -m mofi_jax.evaluate --config configs/eval.py:sets=FOLDER --model W

``sample``: the two picture sets of data_prep/sample, new views of things that were trained on
(`seen`) and of others (`unseen`), with entity top-k and zero-shot by name; 20 s on two CPU cores.
With ``--model raw_pixels`` its mAP is 0.249 unseen and 0.529 seen.

``gpr1200=PATH``: PATH is the folder with the 12,000 pictures (visual-computing.com, for
non-commercial research).  The released MOFI models reach 0.834 (B/16), 0.861 (L/14) and 0.868
(H/14) by their own preprocessing (apple/ml-mofi README and eval/utils.py), which is

    --config.preprocess="decode|resize_short(224, method='bilinear')|center_crop(224)"

Add ``,classes=FILE`` with the GPR1200_categoryNumber_to_text.json of its authors for names in the
gallery, retrieval by the names of categories and zero-shot classification.

``sets=FOLDER``: FOLDER/NAME is what ``python -m mofi_jax.make_eval_sets NAME`` wrote; of each set
that is there, all that is published of it: retrieval, captions, zero-shot, k-NN and linear probes.
ImageNet's names of classes are those of its devkit: published zero-shot scores have OpenAI's list.
"""

import ml_collections
from etils import epath

from configs import common
from mofi_jax.common.errors import BadInput

SAMPLE = "data_prep/sample"


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """sample | gpr1200=PATH[,classes=FILE] | sets=FOLDER."""
    arg = common.parse_arg(arg, sample=False, gpr1200="", classes="", sets="")
    if [arg.sample, bool(arg.gpr1200), bool(arg.sets)].count(True) != 1:
        raise BadInput(
            "configs/eval.py needs one of `sample`, `gpr1200=PATH` and `sets=FOLDER` behind the "
            "colon: write --config configs/eval.py:sample."
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
    if arg.sets:
        config.evaluators = _sets(epath.Path(arg.sets))
    else:
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
        evaluators["gpr1200_text"] = {"kind": "image_text", **named}
        evaluators["gpr1200_zeroshot"] = {
            "kind": "zeroshot",
            **named,
            "templates": ("a photo of {}.",),
        }
    return evaluators


# What is measured on a set that `make_eval_sets` knows by this name.
LEAVE_ONE_OUT = ("sop", "cub", "cars", "inat18")
CAPTIONS = ("coco_karpathy", "flickr30k")
QUERY_INDEX = {  # the protocol
    **{"roxford5k": "revisited", "rparis6k": "revisited", "gldv2": "gldv2", "met": "met"},
    **{"uned": "uned", "ilias": "ilias", "inquire": "inquire"},
}
CLASSIFICATION = {"imagenet": "openai_imagenet", "cifar100": "openai_cifar"}  # the templates


def _sets(folder: epath.Path) -> dict:
    evaluators = {}

    def there(name: str, **keys: str) -> dict[str, str]:
        """Keys whose files a set has, with their paths."""
        paths = {key: folder / name / file for key, file in keys.items()}
        return {key: str(path) for key, path in paths.items() if path.exists()}

    if found := there("gpr1200", images="images.tar", classes="classes.jsonl"):
        evaluators |= _gpr1200(found["images"], found.get("classes", ""))
    for name in LEAVE_ONE_OUT:
        if found := there(name, images="images.tar", classes="classes.jsonl"):
            evaluators[name] = {"kind": "retrieval", "protocol": "leave_one_out", **found}
    for name, protocol in QUERY_INDEX.items():
        index = {"kind": "query_index", "protocol": protocol, **there(name, index="images.tar")}
        found = there(name, queries="queries.jsonl", images="queries.tar")
        if "queries" in found:
            evaluators[name] = {**index, **found}
        if found := there(name, queries="text_queries.jsonl"):
            evaluators[f"{name}_text"] = {**index, **found}
    for name in CAPTIONS:
        if found := there(name, images="images.tar", captions="captions.jsonl"):
            evaluators[name] = {"kind": "image_text", **found}
    for name, templates in CLASSIFICATION.items():
        images = there(name, images="images.tar")
        if images:
            named = {**images, **there(name, classes="classes.jsonl")}
            evaluators[f"{name}_zeroshot"] = {"kind": "zeroshot", "templates": templates, **named}
        train = there(f"{name}_train", train="images.tar")
        if images and train:
            evaluators[f"{name}_knn"] = {"kind": "knn", **images, **train}
            evaluators[f"{name}_few_shot"] = {"kind": "few_shot", **images, **train}
            for form in ("clip_lbfgs", "clip_benchmark_adamw"):
                probe = {"kind": "linear_probe", "form": form, **images, **train}
                evaluators[f"{name}_{form}"] = probe
    if not evaluators:
        raise BadInput(
            f"{folder} has no evaluation set: name the folder of those that "
            "`python -m mofi_jax.make_eval_sets` wrote, each under its own name."
        )
    return evaluators
