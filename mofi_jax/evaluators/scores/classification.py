"""Scores of how sure classifiers are; NumPy alone."""

import numpy as np
from jaxtyping import Bool, Float


def calibration_error(
    confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int = 15
) -> float:
    """Expected calibration error (Guo et al., arXiv 1706.04599), 0..1.

    Over `bins` equal widths of confidence, open below and closed above: the mean distance between
    accuracy and mean confidence, weighted by the number of pictures.
    """
    places = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = right.astype(np.float64) - confidence
    return float(np.abs(np.bincount(places, gap, minlength=bins)).sum() / len(gap))


def auroc(positive: Float[np.ndarray, " p"], negative: Float[np.ndarray, " n"]) -> float:
    """Area under the ROC curve: chance that a positive scores above a negative, ties half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    not_above = np.searchsorted(ordered, positive, side="right")
    return float((below + not_above).mean() / (2 * len(negative)))
