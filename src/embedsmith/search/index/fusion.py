"""How the scores of several heads become one order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from embedsmith.core.errors import SearchError

HeadScores = Mapping[str, Mapping[str, float]]
"""Head -> document -> score, for the candidates of one query. A head may not know a document."""


@dataclass(frozen=True)
class WeightedSum:
    """score(d) = sum_h weight_h score_h(d), a head that does not know d counting 0 (M3-Embedding, section 4)."""

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        _check(self.weights)

    def __call__(self, scores: HeadScores) -> dict[str, float]:
        found: dict[str, float] = {}
        for head, of_document in scores.items():
            for document, score in of_document.items():
                found[document] = found.get(document, 0.0) + self.weights[head] * score
        return found


@dataclass(frozen=True)
class ReciprocalRank:
    """score(d) = sum_h weight_h / (k + rank_h(d)), ranks from 1 (Cormack et al. 2009). Needs no comparable scores."""

    weights: Mapping[str, float]
    k: int = 60

    def __post_init__(self) -> None:
        _check(self.weights)
        if self.k < 0:
            raise SearchError(f"k of the reciprocal ranks is {self.k}", expected="0 or more")

    def __call__(self, scores: HeadScores) -> dict[str, float]:
        found: dict[str, float] = {}
        for head, of_document in scores.items():
            for rank, document in enumerate(ordered(of_document), start=1):
                found[document] = found.get(document, 0.0) + self.weights[head] / (self.k + rank)
        return found


Fusion = WeightedSum | ReciprocalRank


def ordered(scores: Mapping[str, float]) -> list[str]:
    """Best first; ties by name, so that the same scores always give the same order."""
    return sorted(scores, key=lambda document: (-scores[document], document))


def _check(weights: Mapping[str, float]) -> None:
    if not any(weight > 0 for weight in weights.values()) or any(not 0 <= w < float("inf") for w in weights.values()):
        raise SearchError(
            f"the weights are {dict(weights)}", expected="0 or more for every head, above 0 for one of them at least"
        )
