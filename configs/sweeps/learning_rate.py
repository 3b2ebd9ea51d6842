"""Learning rate and margin of the quick start's recipe, for `mofi sweep`.

    mofi sweep --config sweeps/learning_rate --workdir SWEEP

Needs the data of `make quickstart` (runs/quickstart/data).  Nine trainings, each as long as the
quick start's own: about 25 minutes on two CPU cores; ``short`` takes a tenth of the steps.
"""

import itertools
from typing import Any

import ml_collections

from configs import common, quickstart

METRIC = "retrieval_unseen/map"  # things the model was never trained on; higher is better


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """task=supervised|multitask; short for a tenth of the steps."""
    arg = common.parse_arg(arg, task="supervised", short=False)
    config = quickstart.get_config(f"task={arg.task}")
    if arg.short:
        config.total = "85 steps"
    return config


def get_hyper(arg: str | None = None) -> list[dict[str, Any]]:
    """The points in the order in which they run; the quick start's own is in the middle."""
    del arg
    return [
        {"optimizer.learning_rate": rate, "losses.entity.margin": margin}
        for rate, margin in itertools.product((3e-4, 1e-3, 3e-3), (0.0, 0.1, 0.3))
    ]
