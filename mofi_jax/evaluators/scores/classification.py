"""Scores of classifiers from their answers; NumPy alone."""

import numpy as np
from jaxtyping import Bool, Float, Int


def mean_per_class(right: Bool[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> float:
    """Mean over the classes that occur of the share of their pictures that are right."""
    _, places = np.unique(labels, return_inverse=True)
    return float(np.mean(np.bincount(places, right) / np.bincount(places)))


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
