"""Metrics: figures of rankings, with the definitions of trec_eval, and of pairs, with the conventions of mteb.

Each is a function on the shelf `metrics`, and what it is computed of decides which tasks show it. A package of your own
may add one (docs/evaluation.md):

    @metric("gain_of_first", of="rankings")
    def gain_of_first(found: Graded, k: int) -> Floats: ...
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import EvaluationError
from embedsmith.core.shelf import metrics

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Qrels = Mapping[str, Mapping[str, int]]
Of = Literal["rankings", "scored pairs", "labelled pairs"]
F = TypeVar("F", bound=Callable[..., Any])

CUTS = (1, 3, 5, 10, 20, 100)
_ORDER = ("ndcg", "map", "recall", "precision", "accuracy", "mrr", "spearman", "pearson", "ap", "best_threshold")
_FLAT = 1e-9  # below this spread of similarities a model does not tell the pairs apart: what is left is rounding
_FLAT_SCORES = 1e-6  # of a score: what rounding in fp32 makes of equal scores


def metric(name: str, of: Of, *, formula: str = "", source: str = "") -> Callable[[F], F]:
    """Decorator that puts a function on the shelf of metrics. `of` says what it is given and which tasks show it.

    - `rankings`: `(found: Graded, k: int) -> value_Q`, one value a query. Retrieval and reranking show the mean at
      every cut, as `NAME_at_K`.
    - `scored pairs` (kind `sts`): `(similarity_N, score_N)`, and `labelled pairs` (kind `pair_classification`):
      `(similarity_N, label_N)` with labels 0 and 1, give a number, or several by name. They are computed of the model's
      own similarity, and of the cosine of dense vectors as `cosine_NAME`.
    """

    def add(function: F) -> F:
        function.computed_of = of  # type: ignore[attr-defined]
        return metrics.register(name, formula=formula, source=source)(function)  # type: ignore[no-any-return]

    return add


def metrics_of(of: Of) -> dict[str, Callable[..., Any]]:
    """embedsmith's own in the order in which results list them, then those of other packages by name."""
    found = [entry for entry in metrics.entries() if getattr(entry.thing, "computed_of", None) == of]
    own = {name: place for place, name in enumerate(_ORDER)}
    return {entry.name: entry.thing for entry in sorted(found, key=lambda entry: own.get(entry.name, len(own)))}


def added_metrics() -> list[str]:
    """Names of the metrics that other packages brought."""
    return [name for name in metrics.names() if name not in _ORDER]


# Rankings. All queries are computed at once: trec_eval itself wants every score as an entry of a dictionary of
# dictionaries, and making those took longer than the search. Tests hold every figure to trec_eval's.


@dataclass(frozen=True)
class Ranking:
    """What was found for Q queries, best first: `score_Qk` and `index_Qk`, the numbers of the documents. A place that
    is not filled has the index -1 and the score -inf; such places stand at the end."""

    score_Qk: npt.NDArray[np.float32]
    index_Qk: Ints

    @classmethod
    def of(cls, rows: Sequence[tuple[npt.NDArray[np.float32], Ints]]) -> Self:
        """Queries that may have different numbers of documents: score and index of each."""
        width = max(len(score) for score, _ in rows)
        score_Qk = np.full((len(rows), width), -np.inf, dtype=np.float32)
        index_Qk = np.full((len(rows), width), -1, dtype=np.int64)
        for row, (score, index) in enumerate(rows):
            score_Qk[row, : len(score)], index_Qk[row, : len(score)] = score, index
        return cls(score_Qk, index_Qk)

    def without(self, index_Q: Ints) -> Self:
        """The ranking of every query without one document; what stands behind it moves up."""
        removed_Qk = self.index_Qk == index_Q[:, None]
        order_Qk = np.argsort(removed_Qk, axis=1, kind="stable")
        score_Qk = np.where(removed_Qk, -np.inf, self.score_Qk).astype(np.float32)
        index_Qk = np.where(removed_Qk, -1, self.index_Qk)
        return type(self)(np.take_along_axis(score_Qk, order_Qk, 1), np.take_along_axis(index_Qk, order_Qk, 1))

    def first(self, count: int) -> Self:
        return type(self)(self.score_Qk[:, :count], self.index_Qk[:, :count])

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
class Graded:
    """A ranking with J judgements, by query and from the highest grade down: what a metric of rankings is given. nDCG
    takes the grade itself as gain; the others count a grade of 1 or more as relevant. A judged document that is not in
    the corpus has the index -1: it counts as not found."""

    ranking: Ranking
    query_J: Ints
    index_J: Ints
    grade_J: Ints

    @classmethod
    def of(cls, ranking: Ranking, qrels: Qrels, query_ids: Sequence[str], place: Mapping[str, int]) -> Self:
        """With the judgements of `query_ids`; `place` numbers the documents."""
        rows = [
            (row, place.get(d, -1), grade) for row, query in enumerate(query_ids) for d, grade in qrels[query].items()
        ]
        query_J, index_J, grade_J = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        order_J = np.lexsort((-grade_J, query_J))
        return cls(ranking, query_J[order_J], index_J[order_J], grade_J[order_J])

    @property
    def queries(self) -> int:
        return len(self.ranking.index_Qk)

    @cached_property
    def grade_Qk(self) -> Ints:
        """The grades of what was found, best first; 0 where there is no judgement."""
        index_Qk = self.ranking.index_Qk
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

    @cached_property
    def hits_Qk(self) -> Ints:
        """How many relevant documents are among the first, second, ... of every query."""
        return (self.grade_Qk >= 1).cumsum(axis=1)

    @cached_property
    def relevant_Q(self) -> Ints:
        """How many documents are relevant, found or not."""
        return np.bincount(self.query_J[self.grade_J >= 1], minlength=self.queries)

    def hits(self, k: int) -> Ints:
        """hits_Q among the first k."""
        return self.hits_Qk[:, min(k, self.hits_Qk.shape[1]) - 1]

    def ideal(self, k: int) -> Floats:
        """DCG of the best order of all judged documents, cut at k."""
        first_Q = np.searchsorted(self.query_J, np.arange(self.queries))
        place_J = np.arange(len(self.query_J)) - first_Q[self.query_J]
        gain_J = np.where(place_J < k, self.grade_J.clip(min=0) / np.log2(place_J + 2), 0.0)
        return np.bincount(self.query_J, weights=gain_J, minlength=self.queries).astype(np.float64)

    def scores(self, cuts: Sequence[int] = CUTS) -> dict[str, Floats]:
        """Every metric of rankings at every cut, as `NAME_at_K`: value_Q. A query without a relevant document scores 0.

        Errors: `EvaluationError` for a metric that does not give one number a query.
        """
        values: dict[str, Floats] = {}
        for name, function in metrics_of("rankings").items():
            for k in cuts:
                value_Q = np.asarray(function(self, k), dtype=np.float64)
                if value_Q.shape != (self.queries,):
                    raise EvaluationError(
                        f"the metric {name!r} gave the shape {value_Q.shape}",
                        expected=f"one value for each of {self.queries} queries",
                    )
                values[f"{name}_at_{k}"] = value_Q
        return values


@metric(
    "ndcg", of="rankings", formula="sum_{i <= k} g_i / log2(1 + i), over that of the best order", source="trec_eval"
)
def ndcg(found: Graded, k: int) -> Floats:
    """Discounted gain of the first k documents, over that of the best order of all judged ones."""
    gain_Qk = found.grade_Qk[:, :k].clip(min=0)
    gain_Qk = (gain_Qk / np.log2(np.arange(1, gain_Qk.shape[1] + 1) + 1)).cumsum(axis=1)
    return _share(gain_Qk[:, -1], found.ideal(k))


@metric("map", of="rankings", formula="sum_{i <= k, i relevant} precision_i / relevant", source="trec_eval")
def mean_average_precision(found: Graded, k: int) -> Floats:
    """Precision at every relevant document among the first k, summed, over all relevant documents."""
    hits_Qk = found.hits_Qk[:, :k]
    precision_Qk = np.where(found.grade_Qk[:, :k] >= 1, hits_Qk / np.arange(1, hits_Qk.shape[1] + 1), 0.0)
    return _share(precision_Qk.cumsum(axis=1)[:, -1], found.relevant_Q)


@metric("recall", of="rankings", formula="hits_k / relevant", source="trec_eval")
def recall(found: Graded, k: int) -> Floats:
    """Share of all relevant documents that are among the first k."""
    return _share(found.hits(k), found.relevant_Q)


@metric("precision", of="rankings", formula="hits_k / k", source="trec_eval")
def precision(found: Graded, k: int) -> Floats:
    """Share of the first k documents that are relevant."""
    return found.hits(k) / k


@metric("accuracy", of="rankings", formula="hits_k > 0", source="mteb; trec_eval calls it success")
def accuracy(found: Graded, k: int) -> Floats:
    """Whether any of the first k documents is relevant; called hit rate elsewhere."""
    return (found.hits(k) > 0).astype(np.float64)


@metric("mrr", of="rankings", formula="1 / rank of the first relevant document, where that is <= k", source="trec_eval")
def mean_reciprocal_rank(found: Graded, k: int) -> Floats:
    """One over the rank of the first relevant document; 0 where none is among the first k."""
    hit_Qk = found.grade_Qk >= 1
    first_Q = np.where(hit_Qk.any(axis=1), hit_Qk.argmax(axis=1) + 1, np.inf)
    return np.where(first_Q <= k, 1.0 / first_Q, 0.0)


def _share(part_Q: npt.NDArray[np.generic], whole_Q: npt.NDArray[np.generic]) -> Floats:
    """part / whole, 0 where there is nothing."""
    part, whole = part_Q.astype(np.float64), whole_Q.astype(np.float64)
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


# Pairs.


def paired_cosines(left_ND: npt.NDArray[np.floating], right_ND: npt.NDArray[np.floating]) -> Floats:
    """Row by row, in float64, as 1 - |a - b|^2 / 2 of the unit vectors: exactly 1 for equal vectors, so that pairs of
    equal texts stay tied. A zero vector has cosine 0 with everything."""
    left, right = (side.astype(np.float64) for side in (left_ND, right_ND))
    norms = [np.linalg.norm(side, axis=1, keepdims=True) for side in (left, right)]
    left, right = (side / np.where(norm > 0, norm, 1.0) for side, norm in zip((left, right), norms, strict=True))
    cosine_N: Floats = 1.0 - 0.5 * np.square(left - right).sum(axis=1)
    cosine_N[(norms[0] * norms[1])[:, 0] == 0.0] = 0.0
    return cosine_N


def pair_scores(of: Of, similarity_N: Floats, label_N: npt.NDArray[Any], prefix: str = "") -> dict[str, float]:
    """Every metric of pairs, by name."""
    scores: dict[str, float] = {}
    for name, function in metrics_of(of).items():
        value = function(similarity_N, label_N)
        scores |= value if isinstance(value, Mapping) else {name: float(value)}
    return {f"{prefix}{name}": value for name, value in scores.items()}


@metric("spearman", of="scored pairs", source="scipy")
def spearman(similarity_N: Floats, score_N: Floats) -> float:
    """Correlation of the ranks (ties share their mean rank); NaN where a side is constant: it is undefined there."""
    from scipy.stats import spearmanr

    return float(spearmanr(similarity_N, score_N)[0]) if _vary(similarity_N, score_N) else float("nan")


@metric("pearson", of="scored pairs", source="scipy")
def pearson(similarity_N: Floats, score_N: Floats) -> float:
    """Linear correlation; NaN where a side is constant, as it is undefined there."""
    from scipy.stats import pearsonr

    return float(pearsonr(similarity_N, score_N)[0]) if _vary(similarity_N, score_N) else float("nan")


def _vary(similarity_N: Floats, score_N: Floats) -> bool:
    return len(score_N) > 1 and float(np.ptp(similarity_N)) > _FLAT and float(np.ptp(score_N)) != 0.0


@metric("ap", of="labelled pairs", formula="sum_n (R_n - R_{n-1}) P_n", source="scikit-learn")
def average_precision(similarity_N: Floats, label_N: npt.NDArray[np.integer]) -> float:
    """sum_n (R_n - R_{n-1}) P_n over the distinct thresholds, as scikit-learn defines it; tied pairs count together."""
    last_M, hits_M = _at_thresholds(similarity_N, label_N)
    recall_M, precision_M = hits_M / hits_M[-1], hits_M / (last_M + 1)
    return float(np.sum(np.diff(recall_M, prepend=0.0) * precision_M))


@metric("best_threshold", of="labelled pairs", source="mteb")
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
