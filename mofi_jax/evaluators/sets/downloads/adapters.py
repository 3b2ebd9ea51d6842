"""Published layouts of evaluation sets -> pictures with class numbers, and what is asked of them.

Each adapter reads the ground truth of one download and says which pictures it needs under which
names; `mofi_jax.make_eval_sets` copies them.  Class numbers are those of the publishers where they
have any.
"""

import csv
import dataclasses
import io
import json
import posixpath
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.sets.downloads.archives import Download

NO_CLASS = 0  # of pictures that are told by their names alone


@dataclasses.dataclass
class Made:
    """An evaluation set: files of the download by their new names, ``{class}_{name}``."""

    pictures: dict[str, str | bytes] = dataclasses.field(default_factory=dict)
    classes: dict[int, tuple[str, str]] = dataclasses.field(default_factory=dict)  # label, id
    query_pictures: dict[str, str | bytes] = dataclasses.field(default_factory=dict)
    queries: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # `sets.query_index`
    text_queries: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # likewise
    captions: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # `sets.captions`


def gpr1200(download: Download) -> Made:
    """``images/{category}_{name}.jpg``; the names of categories where their file is there."""
    made = Made()
    for name in download.names:
        base = posixpath.basename(name)
        if base.partition("_")[0].isdecimal() and base.lower().endswith((".jpg", ".jpeg")):
            made.pictures[base] = name
    if download.ending("GPR1200_categoryNumber_to_text.json"):
        labels = json.loads(download.text("GPR1200_categoryNumber_to_text.json"))
        made.classes = {int(number): (str(label), "") for number, label in labels.items()}
    return made


def sop(download: Download) -> Made:
    """``Ebay_test.txt``: image_id class_id super_class_id path, below a line of these words."""
    made = Made()
    for line in _lines(download, "Ebay_test.txt")[1:]:
        _, number, _, path = line.split()
        _add(made, download, int(number), path)
    return made


def cub(download: Download) -> Made:
    """Classes 101 to 200 of ``images.txt``, ``image_class_labels.txt`` and ``classes.txt``."""
    made, numbers = Made(), dict(_pairs(download, "image_class_labels.txt"))
    names = dict(_pairs(download, "classes.txt"))
    for image, path in _pairs(download, "images.txt"):
        if (number := int(numbers[image])) > 100:
            _add(made, download, number, f"images/{path}")
            made.classes[number] = (names[str(number)].partition(".")[2].replace("_", " "), "")
    return made


def cars(download: Download) -> Made:
    """Classes 99 to 196 of ``cars_annos.mat``, which is for train and test together."""
    made, facts = Made(), _matlab(download, "cars_annos.mat")
    for row in np.atleast_1d(facts["annotations"]):
        if (number := int(row["class"])) > 98:
            _add(made, download, number, str(row["relative_im_path"]))
            made.classes[number] = (str(facts["class_names"][number - 1]), "")
    return made


def inat18(download: Download) -> Made:
    """``Inaturalist_test_set1.txt`` of Smooth-AP: train_val2018/{group}/{category}/{name}.jpg."""
    made = Made()
    for path in _lines(download, "Inaturalist_test_set1.txt"):
        _add(made, download, int(path.split("/")[-2]), path)
    return made


def roxford5k(download: Download) -> Made:
    """``gnd_roxford5k.mat``, rows counted from 1; its twin in pickle is code and not read."""
    return _revisited(download, "gnd_roxford5k.mat")


def rparis6k(download: Download) -> Made:
    """``gnd_rparis6k.mat``, as `roxford5k`."""
    return _revisited(download, "gnd_rparis6k.mat")


def _revisited(download: Download, file: str) -> Made:
    made, truth = Made(), _matlab(download, file)
    imlist, qimlist, rows = (np.atleast_1d(truth[key]) for key in ("imlist", "qimlist", "gnd"))
    index = [f"{NO_CLASS}_{name}.jpg" for name in imlist]
    for new, name in zip(index, imlist, strict=True):
        made.pictures[new] = download.find(f"{name}.jpg")
    for name, row in zip(qimlist, rows, strict=True):
        new = f"{NO_CLASS}_{name}.jpg"
        made.query_pictures[new] = download.find(f"{name}.jpg")
        easy, hard, junk = (
            [index[int(number) - 1] for number in np.atleast_1d(row[key])]
            for key in ("easy", "hard", "junk")
        )
        made.queries.append(
            {
                "image": new,
                "box": [float(side) for side in row["bbx"]],
                "positives": {"easy": easy, "medium": easy + hard, "hard": hard},
                "junk": {"easy": junk + hard, "medium": junk, "hard": junk + easy},
            }
        )
    return made


def gldv2(download: Download) -> Made:
    """``retrieval_solution_v2.1.csv`` (id, images, Usage), ``index.csv``; pictures a/b/c/{id}.jpg.

    Queries that the publishers ignore have nothing to find, and are left out with their pictures.
    """
    made = Made()
    for row in _table(download, "retrieval_solution_v2.1.csv"):
        if row["Usage"] == "Ignored":
            continue
        new = f"{NO_CLASS}_{row['id']}.jpg"
        made.query_pictures[new] = download.find(f"{row['id']}.jpg")
        positives = [f"{NO_CLASS}_{name}.jpg" for name in row["images"].split()]
        made.queries.append({"image": new, "positives": positives, "split": row["Usage"].lower()})
    for row in _table(download, "index.csv"):
        made.pictures[f"{NO_CLASS}_{row['id']}.jpg"] = download.find(f"{row['id']}.jpg")
    return made


def met(download: Download) -> Made:
    """``MET_database.json`` [id, path]; ``valset.json``, ``testset.json`` [path, MET_id or not]."""
    made = Made()
    for row in json.loads(download.text("MET_database.json")):
        _add(made, download, int(row["id"]), row["path"])
    for split in ("val", "test"):
        for row in json.loads(download.text(f"{split}set.json")):
            new = f"{NO_CLASS}_{row['path'].replace('/', '_')}"
            made.query_pictures[new] = download.find(row["path"])
            classes = [int(row["MET_id"])] if "MET_id" in row else []
            made.queries.append({"image": new, "classes": classes, "split": split})
    return made


# Of each part, where the index is.
_UNED = {
    **dict.fromkeys(("cars", "sop", "inat", "food2k", "rp2k"), "test"),
    **dict.fromkeys(("inshop", "met", "gldv2"), "index"),
}


def uned(download: Download) -> Made:
    """``{part}/test.json`` and, of inshop, met and gldv2, ``{part}/index.json`` [path, class_id].

    One index of all eight parts, as the published scores have it.  Where a part's queries are its
    index, each is taken out of it for itself.
    """
    made, numbers = Made(), {}

    def named(part: str, row: dict[str, Any]) -> tuple[str, list[int]]:
        ids = row["class_id"] if isinstance(row["class_id"], list) else [row["class_id"]]
        classes = [numbers.setdefault((part, int(i)), len(numbers)) for i in ids]
        return f"{classes[0]}_{part}_{row['path'].replace('/', '_')}", classes

    def stored(path: str) -> str:
        if not download.ending(path):  # as unzip writes the Chinese names of rp2k
            path = "".join(c if c.isascii() else f"#U{ord(c):04x}" for c in path)
        return download.find(path)

    for part, split in _UNED.items():
        for row in json.loads(download.text(f"{part}/{split}.json")):
            made.pictures[named(part, row)[0]] = stored(row["path"])
        for row in json.loads(download.text(f"{part}/test.json")):
            name, classes = named(part, row)
            made.query_pictures[name] = stored(row["path"])
            junk = {"junk": [name]} if split == "test" else {}
            made.queries.append({"image": name, "classes": classes, "domain": part, **junk})
    return made


_DISTRACTOR = 1000  # objects of ILIAS are numbered 0 to 999


def ilias(download: Download) -> Made:
    """``{object}_{number}/query`` with Q*.jpg and T*.txt, ``pos`` with P*.jpg; other .jpg distract.

    Boxes are not used, as in the published scores.
    """
    made, texts = Made(), []
    for name in download.names:
        *_, folder, part, base = ("", "", *name.split("/"))
        if not base.endswith((".jpg", ".txt")):
            continue
        if part == "query" and base.startswith("T"):
            texts.append(name)
        elif part == "query" and base.endswith(".jpg"):
            number = int(folder.rpartition("_")[2])
            made.query_pictures[f"{number}_{base}"] = name
            made.queries.append({"image": f"{number}_{base}", "classes": [number]})
        elif part == "pos" and base.endswith(".jpg"):
            made.pictures[f"{int(folder.rpartition('_')[2])}_{base}"] = name
        elif base.endswith(".jpg"):
            made.pictures[f"{_DISTRACTOR}_{name.replace('/', '_')}"] = name
    for name, data in sorted(download.read(texts)):  # all in one pass over the archives
        number = int(name.split("/")[-3].rpartition("_")[2])
        made.text_queries.append({"text": data.decode("utf-8").strip(), "classes": [number]})
    return made


def inquire(download: Download) -> Made:
    """``inquire_queries_{val,test}.csv``, ``inquire_annotations.csv``; the pictures of iNat24."""
    made, positives = Made(), {}
    for name in download.names:
        if name.endswith(".jpg"):
            made.pictures[f"{NO_CLASS}_{posixpath.basename(name)}"] = name
    for row in _table(download, "inquire_annotations.csv"):
        name = f"{NO_CLASS}_{posixpath.basename(row['image_path'])}"
        positives.setdefault(row["query_id"], []).append(name)
    for split in ("val", "test"):
        for row in _table(download, f"inquire_queries_{split}.csv"):
            found = positives.get(row["query_id"], [])
            made.text_queries.append(
                {"text": row["query_text"], "positives": found, "split": split}
            )
    return made


def coco_karpathy(download: Download) -> Made:
    """The split ``test`` of ``dataset_coco.json``, with the pictures of COCO 2014."""
    return _karpathy(download, "dataset_coco.json")


def flickr30k(download: Download) -> Made:
    """The split ``test`` of ``dataset_flickr30k.json``."""
    return _karpathy(download, "dataset_flickr30k.json")


def _karpathy(download: Download, file: str) -> Made:
    made = Made()
    for row in json.loads(download.text(file))["images"]:
        if row["split"] == "test":
            new = f"{NO_CLASS}_{row['filename']}"
            made.pictures[new] = download.find(
                posixpath.join(row.get("filepath", ""), row["filename"])
            )
            made.captions.append({"image": new, "captions": [s["raw"] for s in row["sentences"]]})
    return made


def imagenet(download: Download) -> Made:
    """ILSVRC2012 validation with the devkit's ``meta.mat`` and ground truth of IDs.

    Classes are numbered as everywhere, by the order of their WordNet ids.
    """
    made, by_id = _imagenet_classes(download)
    truth = _lines(download, "ILSVRC2012_validation_ground_truth.txt")
    for number, line in enumerate(truth, start=1):
        _add(made, download, by_id[int(line)], f"ILSVRC2012_val_{number:08d}.JPEG")
    return made


def imagenet_train(download: Download) -> Made:
    """ILSVRC2012 training: ``{WordNet id}_{number}.JPEG``, with the devkit's ``meta.mat``."""
    made, _ = _imagenet_classes(download)
    numbers = {wnid: number for number, (_, wnid) in made.classes.items()}
    for name in download.names:
        base = posixpath.basename(name)
        if (wnid := base.partition("_")[0]) in numbers and base.endswith(".JPEG"):
            made.pictures[f"{numbers[wnid]}_{base}"] = name
    return made


def _imagenet_classes(download: Download) -> tuple[Made, dict[int, int]]:
    synsets = [
        row
        for row in np.atleast_1d(_matlab(download, "meta.mat")["synsets"])
        if not int(row["num_children"])  # those above are no classes
    ]
    synsets.sort(key=lambda row: str(row["WNID"]))
    labels = [(str(row["words"]).partition(",")[0], str(row["WNID"])) for row in synsets]
    by_id = {int(row["ILSVRC2012_ID"]): number for number, row in enumerate(synsets)}
    return Made(classes=dict(enumerate(labels))), by_id


def cifar100(download: Download) -> Made:
    """``test.bin``: coarse and fine label, then 3,072 bytes of pixels by colour; here as PNG."""
    return _cifar(download, "test.bin")


def cifar100_train(download: Download) -> Made:
    """``train.bin``, as `cifar100`."""
    return _cifar(download, "train.bin")


def _cifar(download: Download, file: str) -> Made:
    names = _lines(download, "fine_label_names.txt")
    made = Made(classes={i: (name.replace("_", " "), "") for i, name in enumerate(names)})
    data = np.frombuffer(download.bytes(file), np.uint8)
    if len(data) % 3074:
        raise BadInput(f"{file} in {download.path} is cut short: fetch it again.")
    for number, row in enumerate(data.reshape(-1, 3074)):
        pixels = row[2:].reshape(3, 32, 32).transpose(1, 2, 0)
        png = cv2.imencode(".png", np.ascontiguousarray(pixels[..., ::-1]))[1].tobytes()
        made.pictures[f"{row[1]}_{number:05d}.png"] = png
    return made


ADAPTERS: dict[str, Callable[[Download], Made]] = {
    adapter.__name__: adapter
    for adapter in (
        *(gpr1200, sop, cub, cars, inat18, roxford5k, rparis6k),
        *(gldv2, met, uned, ilias, inquire),
        *(coco_karpathy, flickr30k, imagenet, imagenet_train, cifar100, cifar100_train),
    )
}


def _add(made: Made, download: Download, number: int, path: str) -> None:
    """One more picture of a class, the name of its folder in its own: those may repeat."""
    new = f"{number}_{path.replace('/', '_')}"
    if new in made.pictures:
        raise BadInput(f"The ground truth in {download.path} has {path} twice: fetch it again.")
    made.pictures[new] = download.find(path)


def _lines(download: Download, end: str) -> list[str]:
    return [line.strip() for line in download.text(end).splitlines() if line.strip()]


def _pairs(download: Download, end: str) -> Iterator[tuple[str, str]]:
    for line in _lines(download, end):
        key, _, value = line.partition(" ")
        yield key, value.strip()


def _table(download: Download, end: str) -> Iterator[dict[str, str]]:
    return csv.DictReader(io.StringIO(download.text(end)))


def _matlab(download: Download, end: str) -> dict[str, Any]:
    from scipy import io as scipy_io

    return scipy_io.loadmat(io.BytesIO(download.bytes(end)), simplify_cells=True)
