"""The weighted mean of two models' parameters, between which good ones lie.

    mofi interpolate --models CLIP TUNED --out BETWEEN
    mofi interpolate --models CLIP TUNED --weight 0.3 --entities second --out BETWEEN

Between a model and what was fine-tuned from it lie models that keep much of what the first can do
beside what the second has learned (WiSE-FT, arXiv 2109.01903); `mofi evaluate --models CLIP BETWEEN
TUNED` shows them side by side.  The mean is in float32: a weight of 0 is the first model and 1 the
second, to the bit.  Towers, class tables and scales that only one of the two has are taken over as
they are: a classifier tuned from a CLIP model keeps that model's text tower.  Of two vocabularies
--entities takes one.  BETWEEN is a Hugging Face folder, written and compared as by `mofi export`.

It runs on one host, on its CPU.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from absl import logging

from mofi_jax import export, inference
from mofi_jax.common import cli
from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import sharding
from mofi_jax.interop import huggingface
from mofi_jax.model import mofi

# What a model's config says of its text tower alone, and what decides no parameter.
_OF_TEXT = ("text", "vocab_size", "context_length", "eos_id")
_ANY = ("dtype", "remat", "attention")
ORDER = ("first", "second")


def main(out: str, models: tuple[str, ...] = (), weight: str = "0.5", entities: str = "") -> None:
    """Writes the model between two.

    Args:
      out: the new folder.
      models: folders of two models of one shape, as `mofi_jax.evaluate` takes them.
      weight: of the second one, from 0 to 1.
      entities: first or second, whose class table to take where vocabularies differ.

    Raises:
      BadInput: not two models; models of different shapes, tokenizers or vocabularies.
    """
    if len(models) != 2:
        raise BadInput(f"--models names {len(models)} models: name two, as --models A B.")
    try:
        share = float(weight)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise BadInput(f"--weight={weight} is not a number from 0 to 1: give the second's share.")
    if entities not in ("", *ORDER):
        raise BadInput(f"--entities={entities}: choose first or second.")
    target = export.target_folder(out)
    jax.config.update("jax_platforms", "cpu")
    pair = [inference.read(model) for model in models]
    if entities:
        place = 1 - ORDER.index(entities)
        params = {k: v for k, v in pair[place].params.items() if k != sharding.ENTITY_TABLE}
        pair[place] = dataclasses.replace(pair[place], params=params, entities=None)
    mean = interpolate(*pair, share)
    export.write(mean, target, "hf", {"models": [str(m) for m in models], "weight": share})


def interpolate(
    first: huggingface.Clip, second: huggingface.Clip, weight: float
) -> huggingface.Clip:
    """(1 - weight) first + weight second; preprocessing is the second's.

    Raises BadInput: names what differs.
    """
    problems = []
    texts = [clip for clip in (first, second) if "text" in clip.params]
    described = [_described(clip, text=len(texts) == 2) for clip in (first, second)]
    for name, value in described[0].items():
        if value != described[1][name]:
            other = described[1][name]
            problems.append(f"{name} is {value} in the first and {other} in the second")
    tokenizers = {clip.tokenizer.fingerprint for clip in texts if clip.tokenizer}
    if len(tokenizers) > 1:
        problems.append("their tokenizers differ")
    vocabularies = [clip.entities for clip in (first, second) if clip.entities is not None]
    if len(vocabularies) == 2 and vocabularies[0].qids != vocabularies[1].qids:
        problems.append("their vocabularies differ, of which --entities=first or second takes one")
    if problems:
        raise BadInput(
            f"These models have no mean ({'; '.join(problems)}): name two of one shape, as a model "
            "and what was tuned from it."
        )
    if first.preprocess != second.preprocess:
        logging.warning(
            "the first model's preprocessing is %r, the second's %r, which is taken",
            *(first.preprocess, second.preprocess),
        )

    def mean(a: Any, b: Any) -> np.ndarray:
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        return np.asarray(np.float32(1 - weight) * a + np.float32(weight) * b)

    one, other = (_without_padding(clip) for clip in (first, second))
    params = {**one, **other}
    for name in one.keys() & other.keys():
        params[name] = jax.tree.map(mean, one[name], other[name])
    single = sorted(one.keys() ^ other.keys())
    logging.info("of one model alone, taken as they are: %s", ", ".join(single) or "nothing")
    return huggingface.Clip(
        config=(texts or [first])[0].config,
        params=params,
        tokenizer=next((clip.tokenizer for clip in texts if clip.tokenizer), None),
        entities=vocabularies[0] if vocabularies else None,
        preprocess=second.preprocess,
    )


def _described(clip: huggingface.Clip, *, text: bool) -> dict[str, Any]:
    """The fields of a config that both have to have alike."""
    ignored = _ANY + (() if text else _OF_TEXT)
    fields = dataclasses.asdict(clip.config)
    return {name: value for name, value in fields.items() if name not in ignored}


def _without_padding(clip: huggingface.Clip) -> mofi.Params:
    """The parameters; a run's class table is padded for its devices."""
    table = clip.params.get(sharding.ENTITY_TABLE)
    if table is None:
        return clip.params
    return clip.params | {sharding.ENTITY_TABLE: np.asarray(table)[: len(clip.entities)]}


if __name__ == "__main__":
    cli.run(main)
