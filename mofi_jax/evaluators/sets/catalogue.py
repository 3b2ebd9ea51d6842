"""Where public evaluation sets are to be had: facts for people, by which nothing is downloaded."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Origin:
    """A set as its publishers give it out."""

    title: str
    source: str  # where it is to be had
    size: str  # of the download, where its publishers or TFDS say it
    licence: str
    pictures: int  # of the set that is measured on, or of its index
    queries: int = 0  # where they are apart
    tfds: str = ""  # its name there

    def __str__(self) -> str:
        return f"{self.title}: {self.source}; {self.size}; {self.licence}"


_EBAY = "research; the pictures belong to their sellers"
_FLICKR = "the pictures under the terms of Flickr"
_IMAGENET = ("image-net.org, with an account", "non-commercial research and education")

ORIGINS: dict[str, Origin] = {
    "gpr1200": Origin(
        "GPR1200",
        "visual-computing.com, the zip; names of categories in Visual-Computing/GPR1200 on GitHub",
        "12,000 pictures",
        "non-commercial research and education; sources keep theirs, faces among them",
        12_000,
    ),
    "sop": Origin(
        "Stanford Online Products",
        "cvgl.stanford.edu, Stanford_Online_Products.zip",
        "3.1 GB",
        _EBAY,
        60_502,
        tfds="stanford_online_products",
    ),
    "cub": Origin(
        "CUB-200-2011, classes 101-200",
        "data.caltech.edu/records/65de6-vp158, CUB_200_2011.tgz",
        "1.2 GB",
        "non-commercial research",
        5_924,
        tfds="caltech_birds2011",
    ),
    "cars": Origin(
        "Cars-196, classes 99-196",
        "car_ims.tgz and cars_annos.mat (ai.stanford.edu/~jkrause/cars, at times only in copies)",
        "2.0 GB",
        "non-commercial research",
        8_131,
        tfds="cars196",
    ),
    "inat18": Origin(
        "iNaturalist 2018, test split of Smooth-AP",
        "github.com/visipedia/inat_comp, train_val2018.tar.gz; Inat_dataset_splits from "
        "github.com/Andrew-Brown1/Smooth_AP",
        "120 GB",
        "of each picture, a part CC BY-NC",
        136_093,
        tfds="i_naturalist2018",
    ),
    "roxford5k": Origin(
        "Revisited Oxford",
        "robots.ox.ac.uk/~vgg/data/oxbuildings, oxbuild_images.tgz; "
        "cmp.felk.cvut.cz/revisitop, gnd_roxford5k.mat",
        "5,063 pictures; those given out now have faces blurred",
        _FLICKR,
        4_993,
        70,
    ),
    "rparis6k": Origin(
        "Revisited Paris",
        "robots.ox.ac.uk/~vgg/data/parisbuildings, paris_1.tgz and paris_2.tgz; "
        "cmp.felk.cvut.cz/revisitop, gnd_rparis6k.mat",
        "6,392 pictures; those given out now have faces blurred",
        _FLICKR,
        6_322,
        70,
    ),
    "gldv2": Origin(
        "Google Landmarks v2, retrieval",
        "github.com/cvdfoundation/google-landmark: index and test tars, index.csv, "
        "retrieval_solution_v2.1.csv",
        "120 tars of about 1 GB",
        "annotations CC BY 4.0; index and test pictures CC0 or public domain",
        761_757,
        1_129,
    ),
    "met": Origin(
        "The Met",
        "cmp.felk.cvut.cz/met: pictures and ground truth",
        "397,121 pictures and 19,000 queries",
        "Open Access of the museum",
        397_121,
    ),
    "uned": Origin(
        "UnED",
        "the page of Universal-Image-Embeddings (nikosips on GitHub): info_files, eight sources",
        "1.6 M pictures",
        "eight licences",
        1_397_126,
        241_986,
    ),
    "ilias": Origin(
        "ILIAS",
        "vrg.fel.cvut.cz/ilias_data: ilias_core.tar, and shards of YFCC100M as distractors",
        "6.3 TB, or a part of the shards",
        "captured pictures CC BY 4.0, others of each picture",
        0,  # 4,715 and as many distractors as were downloaded
        1_232,
    ),
    "inquire": Origin(
        "INQUIRE",
        "inquire-benchmark.github.io: queries and annotations; iNat24, train.tar.gz",
        "441 GB",
        "of each picture",
        5_000_000,
    ),
    "coco_karpathy": Origin(
        "COCO, Karpathy's test split",
        "cocodataset.org, val2014.zip; dataset_coco.json from cs.stanford.edu/people/karpathy",
        "5,000 pictures of 40,504",
        "annotations CC BY 4.0; " + _FLICKR,
        5_000,
        tfds="coco_captions",
    ),
    "flickr30k": Origin(
        "Flickr30k, Karpathy's test split",
        "shannon.cs.illinois.edu/DenotationGraph, by a form; dataset_flickr30k.json from "
        "cs.stanford.edu/people/karpathy",
        "1,000 pictures of 31,783",
        "research; " + _FLICKR,
        1_000,
    ),
    "imagenet": Origin(
        "ImageNet 2012, validation",
        f"{_IMAGENET[0]}: ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz",
        "6.7 GB",
        _IMAGENET[1],
        50_000,
        tfds="imagenet2012",
    ),
    "imagenet_train": Origin(
        "ImageNet 2012, training",
        f"{_IMAGENET[0]}: ILSVRC2012_img_train.tar and ILSVRC2012_devkit_t12.tar.gz",
        "148 GB",
        _IMAGENET[1],
        1_281_167,
        tfds="imagenet2012",
    ),
    "cifar100": Origin(
        "CIFAR-100, test",
        "cs.toronto.edu/~kriz/cifar.html, cifar-100-binary.tar.gz",
        "169 MB",
        "none stated",
        10_000,
        tfds="cifar100",
    ),
    "cifar100_train": Origin(
        "CIFAR-100, training",
        "cs.toronto.edu/~kriz/cifar.html, cifar-100-binary.tar.gz",
        "169 MB",
        "none stated",
        50_000,
        tfds="cifar100",
    ),
}


def origin_of_tfds(name: str) -> str:
    """`` (where it is to be had)`` for a data set of TFDS; "" for one that is not in the table."""
    return next((f" ({origin})" for origin in ORIGINS.values() if name and origin.tfds == name), "")
