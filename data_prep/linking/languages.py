"""The language of a caption, among those in which the knowledge base has names."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

ANY = 0xFFFF
_SHORT = 20  # characters; shorter captions are undecided
_SURE = 0.9  # probability among the base's languages


def of(texts: Sequence[str], codes: Sequence[str]) -> np.ndarray:
    """uint16 [n]: the bits of the language of each text, as `cand_languages.npy`; ANY: undecided.

    Args:
      texts: n captions.
      codes: the base's languages. With fewer than two, "mul" not counted, all texts are undecided,
        and so they are where the library does not know one of them.
    """
    found = np.full(len(texts), ANY, np.uint16)
    bits = dict[str, int]()
    for i, code in enumerate(codes):
        if code != "mul":  # "pt" and "pt-br" are not told apart
            language = code.partition("-")[0]
            bits[language] = bits.get(language, 0) | 1 << i
    classify = _classifier(tuple(bits)) if len(bits) > 1 else None
    if classify is not None:
        for number, text in enumerate(texts):
            if len(text) >= _SHORT:
                found[number] = bits.get(classify(text)[0], ANY)
    return found


@functools.lru_cache(maxsize=1)
def _classifier(codes: tuple[str, ...]):
    """A function from a text to the code of its language, "und" where it is not sure."""
    from py3langid import langid

    identifier = langid.LanguageIdentifier.from_model_file(
        langid.MODEL_FILE, norm_probs=True, min_confidence=_SURE
    )
    if not set(codes) <= set(identifier.labels):
        return None
    identifier.set_languages(codes)
    return identifier.classify
