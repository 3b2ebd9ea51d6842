"""MOFI on web-scale I2E shards: supervised, contrastive or multi-task; B/16, L/14 or H/14.

    mofi train --config mofi:task=multitask,variant=B/16,res=224 \\
        --config.data.dir=DATA --workdir W

The paper does not publish its optimisation settings.  Each number below names the public source it
comes from: CLOC (arXiv 2410.02746, Table A: same team, same data lineage), axlearn (the code base
MOFI names), UNICOM and Partial FC (margin softmax over a million classes and more); what has no
source has no citation.  The scores to
reach are those of the released checkpoints on GPR1200: B/16 83.41, L/14 86.14, H/14 86.75 mAP.  No
one has run this file at full length: on 256 TPU v5e chips the encoder's arithmetic alone takes
about 137 ms a step for B/16 at half of peak.
"""

import ml_collections

from configs import common
from mofi_jax.common import processes


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """task=supervised|contrastive|multitask, variant=B/16|L/14|H/14|S/16|Ti/16, res=pixels.

    family=clip|siglip: the towers' arithmetic, and with siglip the sigmoid loss.
    gpr1200=PATH measures retrieval on a folder or tar of {class}_{name}.jpg while it trains.
    extra=NAME@DIR@WEIGHT+... mixes in the sets DIR/i2e, each WEIGHT examples for one of the primary
    set.  stages=112@0.5@80 percent+... begins with smaller pictures and patch dropout.
    """
    arg = common.parse_arg(
        arg,
        task="multitask",
        variant="B/16",
        res=224,
        family="clip",
        gpr1200="",
        extra="",
        stages="",
    )
    cores = processes.cores()
    config = ml_collections.ConfigDict()
    config.seed = 0  # of parameters, order of the examples and what is drawn
    config.distributed = False  # True on pods: one process a host, jax.distributed
    # Folder of compiled programs inside the workdir, so that the next start is fast; "" for none.
    config.compile_cache = "programs"
    config.start_timeout = 300  # seconds to wait for the other processes of a run
    config.mesh = common.mesh()  # of all devices

    # Pictures of a step, on all devices together; 32,768 in CLOC Table A.
    config.batch_size = 32_768
    # How long to train: "N steps", "N examples" or "N epochs".  CLOC Table A: 439,087 steps of
    # 32,768, about 14 billion pictures.
    config.total = "439087 steps"

    # The two towers.  77 tokens: CLOC Table A; it also reproduces the published text tower sizes.
    config.model = common.model(
        arg.variant, image_size=arg.res, context_length=77, family=arg.family
    )

    # Stages of the run, one after the other, each a dictionary: `length`; `image_size`, in pixels;
    # `patch_dropout`, the share of a picture's patches that a step does not look at (FLIP); and
    # `learning_rate_multiplier`.  What they leave of the run is trained as the model is, and it is
    # at the model's size that a run is evaluated and saved at any time.  Percentages are of
    # `total`: where that is raised later, the stages change later.
    config.stages = common.stages(arg.stages)

    config.data = {
        "dir": "data",  # holds i2e/1.0.0/, as data_prep.build_i2e writes it
        "name": "i2e",  # or i2t, the raw pairs
        # Sets that are mixed in, NAME -> {dir, name, weight}; the weight of the set above is 1.  It
        # alone defines vocabulary, tokenizer and epoch (each of its examples once); labels of the
        # others are matched by QID, and dropped where its vocabulary lacks them.
        "extra": common.extra_sets(arg.extra),
        # What happens to a picture, one operation after the other (`mofi_jax.data.ops`); {size} is
        # the model's, or the stage's.  axlearn vision/input_image.py: random crop, flip, no
        # RandAugment ("|randaugment(2, 9)").
        "train_ops": "decode|random_resized_crop({size})|flip",
        # The same where pictures are embedded: evaluation, search, export.  apple/ml-mofi
        # eval/utils.py: short side, bilinear without antialiasing, centre crop.
        "eval_ops": f"decode|resize_short({arg.res}, 'bilinear')|center_crop({arg.res})",
        # Text of an example: its alt-text or one of an entity's, drawn each time with these
        # weights; the paper's mixing rule is not public.
        "text_sources": {"alt_text": 0.5, "name_and_description": 0.5, "name": 0.0},
        "max_labels": 4,  # entities of a picture that are learned; further ones are left out
        # Consecutive records that are shuffled as one, so that up to 32 examples are one request to
        # a bucket: 32 to 40 requests for 1,000 examples, with blocks of 32 up to 62, and no loss of
        # accuracy that shows (benchmarks/block_order.py).  1 shuffles single records.
        "block": 128,
        # Threads that read and decode, of each worker; by default one for each core, up to 8: more
        # wait for one another, since an eighth of a picture's time is Python's.
        "threads": min(cores, 8),
        # Processes that prepare pictures, on each host; 0 for none beside the main one.  By default
        # one for 8 cores of the machine.
        "workers": cores // 8,
        "prefetch": 2,  # batches that wait on the devices, so that no step waits for their way
    }

    # What a run begins with in place of random weights.  Positions are resampled, entities matched
    # by QID.
    config.init = {
        "model": "",  # a run, or a folder that Hugging Face or open_clip loads
        "parts": (),  # of it, as ("image",); none named takes all that fit
    }

    # The losses of the task.  CosFace margin 0.3 at scale 32, as UNICOM on a million noisy web
    # clusters; the "pfc" pair of Partial FC at two million clean classes is 0.4 at 64.  Exact
    # (sample_rate 1): with 2 million entities that is 8 % of a B/16 image tower's arithmetic.
    config.losses = common.losses(arg.task, scale=32.0, margin=0.3)
    if arg.family == "siglip" and "contrastive" in config.losses:
        config.losses.contrastive.kind = "sigmoid"
    # Parts in which the towers see a batch: more of them need less memory and some more time, and
    # change neither the losses nor their global batch.
    config.microbatches = 1

    config.optimizer = {
        "kind": "adamw",  # or "adafactor": second moments take next to no memory
        "learning_rate": 5e-4,  # the highest; CLOC Table A: 5e-4
        # Rises to it linearly in this time, then falls by a cosine; CLOC Table A: 2,000 steps.
        "warmup": "2000 steps",
        "final_fraction": 0.0,  # of the highest rate, at the last step
        "b1": 0.9,  # decay of the first moment, the mean of gradients
        "b2": 0.98,  # decay of the second moment, the mean of their squares; CLOC Table A: 0.98
        "eps": 1e-6,  # added to the root of the second moment; SuperClass: 1e-6
        # Times the learning rate, not on norms, biases and class table; CLOC Table A: 0.2.
        "weight_decay": 0.2,
        # Longest gradient of the towers, longer ones are scaled; 0: any.  Partial FC: 5.
        "clip_norm": 5.0,
        # or "float32": twice the memory of the first moment, most of which is the class table's.
        "first_moment_dtype": "bfloat16",
        # Below 1: smaller steps for lower blocks, for fine-tuning.
        "layer_decay": 1.0,
        # Parts that stay as they are, by the beginning of their path: ("image",) is LiT.
        "frozen": (),
        # The class table's own AdamW, without weight decay.
        "table": {
            "learning_rate_multiplier": 1.0,  # times the towers'; UNICOM: 5 when fine-tuning
            "clip_norm": 5.0,  # longest gradient of the table; 0: any
            "second_moment": "full",  # row: one value for each entity, not one for each weight
        },
    }

    # The moving average of the parameters, which is then evaluated and exported; 0 for none.
    config.ema = {"decay": 0.0}

    # What is measured while it trains, NAME -> {kind, every, ...}: `kind` is a file of
    # mofi_jax/evaluators, whose class has the other keys as arguments; `every` as "2 percent".
    config.evaluators = {}
    if arg.gpr1200:
        config.evaluators.gpr1200 = {
            "kind": "retrieval",
            "images": arg.gpr1200,
            "every": "2 percent",
        }
    config.log_every = "50 steps"  # a row of metrics.jsonl
    # Checkpoints.  The end of the run is saved in any case.
    config.checkpoint = {
        "every": "2000 steps",  # "0 steps" for none before the end
        "keep": 3,  # so many of the last stay
        "keep_every": "0 steps",  # and these for ever: a multiple of `every`
        # A metric, as "gpr1200/map"; when an evaluation gives more than all before it, the run is
        # saved and that checkpoint stays (`--step=best`).  "" for none.
        "keep_best": "",
        # Host 0 reads what was saved once more to write its checksums, and a run that goes on
        # checks them; False where that takes longer than it is worth.
        "verify": True,
    }
    config.telemetry = {
        # Minutes without progress until a host prints its stacks; it is not killed.  0 for never.
        "hang_minutes": 20.0,
        "wandb": "",  # project of Weights & Biases; needs pip install wandb
    }
    return config
