"""Some thousands of pairs of one's own, on a laptop: 5,000 on two CPU cores in ten minutes.

    python -m data_prep.build_i2e --config configs/i2e.py:folder=PAIRS,small,dataset=i2t --workdir W
    python -m mofi_jax.train --config configs/small.py:task=contrastive,data=W --workdir CLIP
    python -m data_prep.build_i2e --config configs/i2e.py:folder=PAIRS,kb=wordnet,small \\
        --workdir W --config.clip=CLIP
    python -m mofi_jax.train --config configs/small.py:data=W --workdir RUN
    python -m mofi_jax.evaluate --config configs/eval.py:sets=W/evaluation \\
        --models RUN CLIP raw_pixels --out TABLE
    python -m mofi_jax.export --model RUN --format hf --out EXPORT

Losses, texts and optimizer are the quick start's.  What follows from the size of the data set is
the length of the run; what follows from the machine, dtype, threads and workers, may be another
when a run goes on elsewhere.
"""

import ml_collections

from configs import common, quickstart
from configs import eval as eval_config
from mofi_jax.common import files
from mofi_jax.common.errors import BadInput

PAIRS = 5_000  # of a data set that is not there yet


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """task=supervised|contrastive|multitask, data=FOLDER.

    name=i2e|i2t, by default i2t for contrastive and i2e for the others.
    """
    arg = common.parse_arg(arg, task="multitask", data="data", name="")
    name = arg.name or ("i2t" if arg.task == "contrastive" else "i2e")
    config = quickstart.get_config(f"task={arg.task},data={name}")
    config.data.dir = arg.data
    pairs = _examples(arg.data, name)

    # Seconds on two cores are steps x batch x patches: of 64 pixels in patches of 8 there are 64.
    config.batch_size = 128
    epochs = 16 if name == "i2t" else 25
    config.total = f"{max(epochs * pairs // config.batch_size, 200)} steps"
    config.model.image_size = 64
    config.data.train_ops = (
        "decode|random_resized_crop({size}, (0.4, 1.0))|flip|light(0.25, 0.25, 0.25)"
    )
    config.data.eval_ops = "decode|resize_short(64)|center_crop(64)"

    # W/evaluation holds pairs that were held out, where `configs/i2e.py` was told `small`.
    config.evaluators = {}
    held_out = files.local_input(arg.data, "the data") / "evaluation"
    if held_out.is_dir():
        config.evaluators = eval_config.get_config(f"sets={held_out}").evaluators
        for options in config.evaluators.values():
            options.every = "25 percent"
    return config


def _examples(folder: str, name: str) -> int:
    """How many records the data set has, `PAIRS` where there is none yet."""
    from mofi_jax.data import metadata  # here, so that no other config loads TFDS

    try:
        directory = metadata.find_directory(folder, name)
    except BadInput:
        return PAIRS
    return sum(part.examples_in_shard for part in metadata.shard_parts(directory, "train"))
