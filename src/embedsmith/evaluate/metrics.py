"""Figures of similarities, with the conventions of mteb: correlations through scipy, average precision, thresholds.
Those of rankings are in `ranking.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


# Rankings and their figures, with the definitions of trec_eval, computed for all queries at once.
# trec_eval itself wants every score as an entry of a dictionary of dictionaries, and making those took longer than the
# search. Tests hold every figure to trec_eval's.
Ints = npt.NDArray[np.int64]
Qrels = Mapping[str, Mapping[str, int]]

CUTS = (1, 3, 5, 10, 20, 100)
_FLAT_SCORES = 1e-6  # of a score: what fp32 leaves of a difference that is none


@dataclass(frozen=True)
class Ranking:
    """What was found for Q queries, best first: `score_Qk` and `index_Qk`, the numbers of the documents. A place that
    is not filled has the index -1 and the score -inf; such places stand at the end."""

    score_Qk: npt.NDArray[np.float32]
    index_Qk: Ints

    @staticmethod
    def of(rows: Sequence[tuple[npt.NDArray[np.float32], Ints]]) -> Ranking:
        """Queries that may have different numbers of documents: score and index of each."""
        width = max(len(score) for score, _ in rows)
        score_Qk = np.full((len(rows), width), -np.inf, dtype=np.float32)
        index_Qk = np.full((len(rows), width), -1, dtype=np.int64)
        for row, (score, index) in enumerate(rows):
            score_Qk[row, : len(score)], index_Qk[row, : len(score)] = score, index
        return Ranking(score_Qk, index_Qk)

    def without(self, index_Q: Ints) -> Ranking:
        """The ranking of every query without one document; what stands behind it moves up."""
        removed_Qk = self.index_Qk == index_Q[:, None]
        order_Qk = np.argsort(removed_Qk, axis=1, kind="stable")
        score_Qk = np.where(removed_Qk, -np.inf, self.score_Qk).astype(np.float32)
        index_Qk = np.where(removed_Qk, -1, self.index_Qk)
        return Ranking(np.take_along_axis(score_Qk, order_Qk, 1), np.take_along_axis(index_Qk, order_Qk, 1))

    def first(self, count: int) -> Ranking:
        return Ranking(self.score_Qk[:, :count], self.index_Qk[:, :count])

    def best(self, among_Qk: npt.NDArray[np.bool_]) -> tuple[Floats, Ints]:
        """Score and index of the first document of every query among those marked; NaN and -1 where there is none."""
        place_Q1 = among_Qk.argmax(axis=1)[:, None]
        found_Q = np.take_along_axis(among_Qk, place_Q1, 1)[:, 0]
        score_Q, index_Q = (np.take_along_axis(each, place_Q1, 1)[:, 0] for each in (self.score_Qk, self.index_Qk))
        return np.where(found_Q, score_Q.astype(np.float64), np.nan), np.where(found_Q, index_Q, -1)

    @property
    def flat(self) -> bool:
        """Whether every query gives all its documents the same score, but for rounding."""
        best_Q, least_Q = self.score_Qk[:, 0], np.where(self.index_Qk < 0, np.inf, self.score_Qk).min(axis=1)
        return bool((best_Q - least_Q <= _FLAT_SCORES * np.abs(best_Q)).all())


@dataclass(frozen=True)
class Judgements:
    """J graded judgements of `queries` queries, by query and from the highest grade down. A document that is not in
    the corpus has the index -1: it counts as not found."""

    queries: int
    query_J: Ints
    index_J: Ints
    grade_J: Ints

    @staticmethod
    def of(qrels: Qrels, query_ids: Sequence[str], place: Mapping[str, int]) -> Judgements:
        """Those of `query_ids`; `place` numbers the documents."""
        rows = [
            (row, place.get(d, -1), grade) for row, query in enumerate(query_ids) for d, grade in qrels[query].items()
        ]
        query_J, index_J, grade_J = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        order_J = np.lexsort((-grade_J, query_J))
        return Judgements(len(query_ids), query_J[order_J], index_J[order_J], grade_J[order_J])

    def grades(self, ranking: Ranking) -> Ints:
        """grade_Qk of what was found; 0 for a document that was not judged."""
        index_Qk = ranking.index_Qk
        known = self.index_J >= 0
        wide = 1 + max(int(index_Qk.max(initial=0)), int(self.index_J.max(initial=0)))
        key_J = self.query_J[known] * wide + self.index_J[known]
        if len(key_J) == 0:
            return np.zeros_like(index_Qk)
        order_J = np.argsort(key_J)
        key_J, grade_J = key_J[order_J], self.grade_J[known][order_J]
        asked_Qk = np.where(index_Qk < 0, -1, np.arange(self.queries)[:, None] * wide + index_Qk)
        place_Qk = np.searchsorted(key_J, asked_Qk).clip(max=len(key_J) - 1)
        return np.where(key_J[place_Qk] == asked_Qk, grade_J[place_Qk], 0)

    def relevant(self) -> Ints:
        """relevant_Q: how many documents have a grade of 1 or more."""
        return np.bincount(self.query_J[self.grade_J >= 1], minlength=self.queries)

    def ideal(self, k: int) -> Floats:
        """DCG of the best order of all judged documents, cut at k."""
        first_Q = np.searchsorted(self.query_J, np.arange(self.queries))
        place_J = np.arange(len(self.query_J)) - first_Q[self.query_J]
        gain_J = np.where(place_J < k, self.grade_J.clip(min=0) / np.log2(place_J + 2), 0.0)
        return np.bincount(self.query_J, weights=gain_J, minlength=self.queries).astype(np.float64)


def ranking_scores(grade_Qk: Ints, judged: Judgements, cuts: Sequence[int] = CUTS) -> dict[str, Floats]:
    """Values of every query, from the grades of what was found (`Judgements.grades`): `ndcg_at_k`, `map_at_k`,
    `recall_at_k`, `precision_at_k`, `accuracy_at_k` (is any of the first k relevant) and `mrr_at_k`.

    nDCG takes the grade itself as gain, discounted by log2(1 + rank); the others count a grade of 1 or more as
    relevant. Recall and MAP divide by all relevant documents, retrieved or not. A query without a relevant document
    scores 0 everywhere.
    """
    rank_k = np.arange(1, grade_Qk.shape[1] + 1)
    hit_Qk = grade_Qk >= 1
    found_Qk = hit_Qk.cumsum(axis=1)
    gain_Qk = (grade_Qk.clip(min=0) / np.log2(rank_k + 1)).cumsum(axis=1)
    precision_Qk = np.where(hit_Qk, found_Qk / rank_k, 0.0).cumsum(axis=1)
    first_Q = np.where(hit_Qk.any(axis=1), hit_Qk.argmax(axis=1) + 1, np.inf)
    relevant_Q = judged.relevant()
    values: dict[str, Floats] = {}
    for k in cuts:
        at = min(k, len(rank_k)) - 1
        values[f"ndcg_at_{k}"] = _share(gain_Qk[:, at], judged.ideal(k))
        values[f"map_at_{k}"] = _share(precision_Qk[:, at], relevant_Q)
        values[f"recall_at_{k}"] = _share(found_Qk[:, at], relevant_Q)
        values[f"precision_at_{k}"] = found_Qk[:, at] / k
        values[f"accuracy_at_{k}"] = (found_Qk[:, at] > 0).astype(np.float64)
        values[f"mrr_at_{k}"] = np.where(first_Q <= k, 1.0 / first_Q, 0.0)
    return {f"{name}_at_{k}": values[f"{name}_at_{k}"] for name in _NAMES for k in cuts}


_NAMES = ("ndcg", "map", "recall", "precision", "accuracy", "mrr")


def _share(part_Q: npt.NDArray[np.generic], whole_Q: npt.NDArray[np.generic]) -> Floats:
    """part / whole, 0 where there is nothing."""
    part, whole = part_Q.astype(np.float64), whole_Q.astype(np.float64)
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
