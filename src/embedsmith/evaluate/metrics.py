"""Figures of similarities, with the conventions of mteb: correlations through scipy, average precision, thresholds.
Those of rankings are in `ranking.py`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_FLAT = 1e-9  # below this spread of similarities a model does not tell the pairs apart: what is left is rounding


def cosines(left_ND: npt.NDArray[np.floating], right_ND: npt.NDArray[np.floating]) -> Floats:
    """Row by row, in float64, as 1 - |a - b|^2 / 2 of the unit vectors: exactly 1 for equal vectors, so that pairs of
    equal texts stay tied. A zero vector has cosine 0 with everything."""
    left, right = (side.astype(np.float64) for side in (left_ND, right_ND))
    norms = [np.linalg.norm(side, axis=1, keepdims=True) for side in (left, right)]
    left, right = (side / np.where(norm > 0, norm, 1.0) for side, norm in zip((left, right), norms, strict=True))
    cosine_N: Floats = 1.0 - 0.5 * np.square(left - right).sum(axis=1)
    cosine_N[(norms[0] * norms[1])[:, 0] == 0.0] = 0.0
    return cosine_N


def correlations(similarity_N: Floats, label_N: Floats) -> tuple[float, float]:
    """Spearman (ties share their mean rank) and Pearson; NaN where a side is constant, as they are undefined there."""
    from scipy.stats import pearsonr, spearmanr

    if len(label_N) < 2 or float(np.ptp(similarity_N)) <= _FLAT or float(np.ptp(label_N)) == 0.0:
        return float("nan"), float("nan")
    return float(spearmanr(similarity_N, label_N)[0]), float(pearsonr(similarity_N, label_N)[0])


def average_precision(similarity_N: Floats, label_N: npt.NDArray[np.integer]) -> float:
    """sum_n (R_n - R_{n-1}) P_n over the distinct thresholds, as scikit-learn defines it; tied pairs count together."""
    last_M, hits_M = _at_thresholds(similarity_N, label_N)
    recall_M, precision_M = hits_M / hits_M[-1], hits_M / (last_M + 1)
    return float(np.sum(np.diff(recall_M, prepend=0.0) * precision_M))


def best_thresholds(similarity_N: Floats, label_N: npt.NDArray[np.integer]) -> dict[str, float]:
    """Accuracy at its best threshold; F1, precision and recall at that of the best F1. A threshold lies between two
    different similarities, so it cannot separate tied pairs, nor put all pairs on one side (mteb's rule)."""
    last_M, hits_M = (part[:-1] for part in _at_thresholds(similarity_N, label_N))
    positives, count = int(label_N.sum()), len(label_N)
    if len(last_M) == 0:
        return {"accuracy": 0.0, "f1": 0.0, "precision": 0.0, "recall": 0.0}
    above_M = last_M + 1
    accuracy_M = (hits_M + (count - positives) - (above_M - hits_M)) / count
    precision_M, recall_M = hits_M / above_M, hits_M / positives
    f1_M = 2 * hits_M / (above_M + positives)
    best = int(f1_M.argmax())
    values = {"f1": f1_M[best], "precision": precision_M[best], "recall": recall_M[best]}
    return {"accuracy": float(accuracy_M.max()), **{name: float(value) for name, value in values.items()}}


def _at_thresholds(similarity_N: Floats, label_N: npt.NDArray[np.integer]) -> tuple[Floats, Floats]:
    """For every distinct similarity from the highest down: the place of its last pair, and the positives so far."""
    order = np.argsort(-similarity_N, kind="stable")
    ranked, hits_N = similarity_N[order], np.cumsum(label_N[order]).astype(np.float64)
    last_M = np.append(np.nonzero(np.diff(ranked))[0], len(ranked) - 1)
    return last_M.astype(np.float64), hits_N[last_M]
