"""Which trainings there are: on which data, by which losses, with which changes."""

import copy
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

CAPTIONS = {"alt_text": 1.0}


class Run(NamedTuple):
    """One training, to be done with several seeds.

    Attributes:
      says: what it is, in the words of the tables.
      data: the data set, LABELS (`experiments.claim.data`) or LABELS@SHARE of wrong captions.
      losses: of config.train.losses.
      changes: dotted keys of config.train.
    """

    says: str
    data: str
    losses: tuple[str, ...]
    changes: Mapping[str, Any] = types.MappingProxyType({})


CONTRASTIVE, SUPERVISED = ("contrastive",), ("entity",)
MULTITASK = (*SUPERVISED, *CONTRASTIVE)
# No label decides which texts are negatives where captions alone are read.
CAPTIONS_ALONE = {"data.text_sources": CAPTIONS, "losses.contrastive.same_entity": "off"}

MAIN = {
    "clip": Run("contrastive, captions, all pairs", "raw", CONTRASTIVE, CAPTIONS_ALONE),
    "clip_same": Run("contrastive, captions, I2E's pictures", "clip", CONTRASTIVE, CAPTIONS_ALONE),
    "clip_i2e": Run("contrastive, I2E", "clip", CONTRASTIVE),
    "supervised": Run("supervised, I2E", "clip", SUPERVISED),
    "multitask": Run("multi-task, I2E", "clip", MULTITASK),
    "multitask_text": Run("multi-task, labels by text alone", "text", MULTITASK),
    "multitask_true": Run("multi-task, true labels", "true", MULTITASK),
    "multitask_shuffled": Run("multi-task, shuffled labels", "shuffled", MULTITASK),
}
COMPARED = (
    ("multitask", "clip"),  # the claim
    ("multitask", "clip_same"),  # on the same pictures
    ("supervised", "clip"),
    ("clip_same", "clip"),
    ("clip_i2e", "clip_same"),
    ("multitask", "clip_i2e"),
    ("multitask", "supervised"),
    ("multitask", "multitask_text"),
    ("multitask_true", "multitask"),
    ("multitask", "multitask_shuffled"),
)

SHARES = (0.0, 0.2, 0.4, 0.6)  # of captions that are another thing's
NOISE = {
    f"{name}@{share:g}": MAIN[name]._replace(data=f"{MAIN[name].data}@{share:g}")
    for share in SHARES
    for name in ("clip", "multitask_text", "multitask")
}

_WEIGHTS = ("losses.entity.weight", "losses.contrastive.weight")
_ENTITY_TEXTS = {"alt_text": 0.0, "name_and_description": 0.5, "name": 0.5}


def _weighed(contrastive: float, **changes: Any) -> dict[str, Any]:
    return dict(zip(_WEIGHTS, (1 - contrastive, contrastive), strict=True)) | changes


ABLATIONS = {
    name: Run(says, "clip", losses, changes)
    for name, says, losses, changes in (
        *(
            (f"contrastive_{w:g}", f"multi-task, contrastive weight {w:g}", MULTITASK, _weighed(w))
            for w in (0.25, 0.5, 0.75)
        ),
        *(
            (
                f"entity_texts_{w:g}",
                f"multi-task, contrastive weight {w:g}, entity texts alone",
                MULTITASK,
                _weighed(w) | {"data.text_sources": _ENTITY_TEXTS},
            )
            for w in (0.1, 0.25, 0.5)
        ),
        *(
            (f"margin_{m:g}", f"supervised, margin {m:g}", SUPERVISED, {"losses.entity.margin": m})
            for m in (0.0, 0.3)
        ),
        *(
            (f"scale_{s:g}", f"supervised, scale {s:g}", SUPERVISED, {"losses.entity.scale": s})
            for s in (8.0, 32.0)
        ),
    )
}
PARTS = {"main": MAIN, "noise": NOISE, "ablations": ABLATIONS}


def config_of(run: Run, base: Any, seed: int, data: tuple[str, str], programs: str) -> Any:
    """The training config of one run.

    Args:
      base: config.train, which has both losses.
      data: folder that holds the data set, and the data set's name.
      programs: folder of the compiled programs, which all runs share.
    """
    own = copy.deepcopy(base)
    with own.unlocked():
        own.seed, own.compile_cache = seed, programs
        own.data.dir, own.data.name = data
        own.losses = {name: base.losses[name].to_dict() for name in run.losses}
        if len(run.losses) == 1:
            own.losses[run.losses[0]].weight = 1.0
        for key, value in run.changes.items():
            *path, last = key.split(".")
            place = own
            for name in path:
                place = place[name]
            place[last] = value
    return own
