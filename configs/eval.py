"""What to measure on finished models.

    mofi evaluate --config eval:sample --model W
    mofi evaluate --config eval:gpr1200=PATH --model W
    mofi evaluate --config eval:sets=FOLDER --models W raw_pixels --out D

``sample``: the two picture sets of data_prep/sample, new views of things that were trained on
(`seen`) and of others (`unseen`), with entity top-k and zero-shot by name; 20 s on two CPU cores.
``raw_pixels`` has an mAP of 0.249 unseen and 0.529 seen there.

``gpr1200=PATH``: PATH is the folder with the 12,000 pictures (visual-computing.com, for
non-commercial research).  The released MOFI models reach 0.834 (B/16), 0.861 (L/14) and 0.868
(H/14) by their own preprocessing (apple/ml-mofi README and eval/utils.py), which is

    --config.preprocess=mofi

Add ``,classes=FILE`` with the GPR1200_categoryNumber_to_text.json of its authors for names in the
gallery, retrieval by the names of categories and zero-shot classification.

``sets=FOLDER``: FOLDER/NAME is what ``mofi eval-sets NAME`` wrote; of each set
that is there, all that is published of it: retrieval, captions, zero-shot, k-NN and linear probes.
ImageNet's names of classes are those of its devkit: published zero-shot scores have OpenAI's list.
Tars right in FOLDER are sets of one's own, whose class numbers FOLDER/classes.jsonl may name, as in
the sample: retrieval, zero-shot, and entity top-k where classes have ids; with captions of its
pictures in NAME.captions.jsonl (`mofi_jax.evaluators.sets.captions`) also image-text retrieval.
FOLDER+MORE measures several folders, which are then part of the names.
"""

from collections.abc import Sequence

import ml_collections
from etils import epath

from configs import common
from mofi_jax.common.errors import BadInput


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """sample | gpr1200=PATH[,classes=FILE] | sets=FOLDER[+FOLDER...]."""
    arg = common.parse_arg(arg, sample=False, gpr1200="", classes="", sets="")
    if [arg.sample, bool(arg.gpr1200), bool(arg.sets)].count(True) != 1:
        raise BadInput(
            "configs/eval.py needs one of `sample`, `gpr1200=PATH` and `sets=FOLDER` behind the "
            "colon: write --config eval:sample."
        )
    config = ml_collections.ConfigDict()
    config.distributed = False  # True on pods: one process a host, jax.distributed
    config.start_timeout = 300  # seconds to wait for the other processes
    config.mesh = common.mesh()  # of all devices
    # Picture operations in place of the model's own, or a name for some (`data.ops`:
    # mofi, clip_torchvision, clip_hf, siglip, dino); "" for its own.
    config.preprocess = ""
    config.batch_size = 64  # pictures or texts on each device at a time
    # Pixels of a side at which the baseline raw_pixels looks at pictures, as the quick start's
    # towers do.
    config.raw_pixels_size = 40
    # What is measured, NAME -> {kind, ...}: `kind` is a file of mofi_jax/evaluators/, whose class
    # has the other keys as arguments.
    config.evaluators = {}
    if arg.gpr1200:
        config.evaluators = _gpr1200(arg.gpr1200, arg.classes)
    else:
        config.evaluators = of_folders((common.SAMPLE if arg.sample else arg.sets).split("+"))
    return config


def of_folders(names: Sequence[epath.PathLike]) -> dict[str, dict]:
    """Evaluators of all sets in some folders."""
    evaluators: dict[str, dict] = {}
    for folder in map(epath.Path, names):
        if not folder.is_dir():
            raise BadInput(f"There is no folder {folder}: give sets=FOLDER one with sets in it.")
        before = f"{folder.name}_" if len(names) > 1 else ""
        found = _own(before, folder)
        found |= {f"{before}{name}": options for name, options in _sets(folder).items()}
        if not found:
            raise BadInput(
                f"{folder} has no evaluation set: name the folder of those that "
                "`mofi eval-sets` wrote, each under its own name, or one with "
                "tars of {class}_{name}.jpg."
            )
        if double := evaluators.keys() & found.keys():
            given = "+".join(map(str, names))
            raise BadInput(f"{min(double)} comes twice in sets={given}: rename a folder.")
        evaluators |= found
    return evaluators


def _own(before: str, folder: epath.Path) -> dict:
    """Tars of one's own, with the class table beside them."""
    table, unseen = folder / "classes.jsonl", folder / "unseen.tar"
    classes = {"classes": str(table)} if table.exists() else {}
    with_ids = classes and '"id"' in table.read_text().partition("\n")[0]
    evaluators = {}
    for path in sorted(folder.iterdir()):
        if path.suffix != ".tar" or path.name.startswith("."):
            continue
        name, named = f"{before}{path.stem}", {"images": str(path), **classes}
        evaluators[f"retrieval_{name}"] = {"kind": "retrieval", **named}
        if classes:
            evaluators[f"zeroshot_{name}"] = {"kind": "zeroshot", **named}
        # Things never trained on are in no class table; the others are to be told from them.
        if with_ids and path != unseen:
            others = {"unseen": str(unseen)} if unseen.exists() else {}
            evaluators[f"entity_{name}"] = {"kind": "classification", **named, **others}
        captions = folder / f"{path.stem}.captions.jsonl"
        if captions.exists():
            pair = {"images": str(path), "captions": str(captions)}
            evaluators[f"captions_{name}"] = {"kind": "image_text", **pair}
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
    """What `make_eval_sets` has written."""
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
    return evaluators
