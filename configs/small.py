"""Some thousands of pairs of one's own, on a laptop: 5,000 on two CPU cores in five minutes.

    mofi labels --config i2e:folder=PAIRS,small,dataset=i2t --workdir W
    mofi train --config small:task=contrastive,data=W --workdir CLIP
    mofi labels --config i2e:folder=PAIRS,small,kb=wordnet \\
        --workdir W --config.clip=CLIP
    mofi train --config small:data=W --workdir RUN

W/evaluation then holds pairs that were held out, to measure RUN on.  Towers, losses, texts and
optimizer are the quick start's, the length follows from the size of the data set, and dtype,
threads and workers from the machine: they may be others where a run goes on elsewhere.
"""

import math

import ml_collections

from configs import common, quickstart
from configs import eval as eval_config
from mofi_jax.common import files
from mofi_jax.common.errors import BadInput

PAIRS = 5_000  # of a data set that is not there yet


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """task=supervised|contrastive|multitask, data=FOLDER, where `data_prep.build_i2e` has written.

    name=i2e|i2t, by default i2t for contrastive and i2e for the others.
    """
    arg = common.parse_arg(arg, task="multitask", data="data", name="")
    name = arg.name or ("i2t" if arg.task == "contrastive" else "i2e")
    config = quickstart.get_config(f"task={arg.task},data={name}")
    config.data.dir = arg.data
    # Twice as long for four times the pairs: for the quick start's 1,449 labelled pictures 1,000
    # steps, for 4,500 raw pairs 800.
    config.total = (
        f"{round((12 if name == 'i2t' else 27) * math.sqrt(_pairs(arg.data, name)))} steps"
    )
    # Photos, which are not turned as the quick start's drawings are.
    config.data.train_ops = (
        "decode|random_resized_crop({size}, (0.4, 1.0))|flip|light(0.25, 0.25, 0.25)"
    )
    # Those of the pairs that were held out, where there are any.
    config.evaluators = {}
    held_out = files.local_input(arg.data, "the data set") / "evaluation"
    if (held_out / "held_out.tar").exists():
        config.evaluators = eval_config.of_folders([held_out])
        for options in config.evaluators.values():
            options.every = "25 percent"
    return config


def _pairs(folder: str, name: str) -> int:
    """How many the data set has, `PAIRS` where there is none yet."""
    from mofi_jax.data import metadata  # here, so that listing the configs does not load TFDS

    try:
        directory = metadata.find_directory(folder, name)
    except BadInput:
        return PAIRS
    return sum(part.examples_in_shard for part in metadata.shard_parts(directory, "train"))
