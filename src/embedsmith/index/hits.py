"""How the scores of several heads become one order, and why a document was found: which tokens matched, and what they
gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from embedsmith.core.errors import SearchError
from embedsmith.core.reps import MaxSim, MultiVector, Reps, Sparse
from embedsmith.index.vector_store import lexical_weights

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


@dataclass(frozen=True)
class Match:
    """One token of the query with the token of the document that it met. `score` is what the pair adds to the head's
    score; the scores of all matches of a head sum to it."""

    query_token: str
    document_token: str
    score: float


@dataclass(frozen=True)
class HitExplanation:
    """The score of every head, and the matches behind it, best first; none for `dense`, which has no parts."""

    scores: Mapping[str, float]
    matches: Mapping[str, Sequence[Match]]

    @staticmethod
    def of(
        query: Reps,
        document: Reps,
        query_tokens: Sequence[str],
        document_tokens: Sequence[str],
        vocabulary: Callable[[list[int]], list[str]],
    ) -> HitExplanation:
        """The scores of one query with one document, taken apart.

        `query` and `document` have one row each, without padding; the tokens are those of their token axis, and
        `vocabulary` names the coordinates of sparse heads, among which may be words that no token of the text is.
        Errors: `SearchError` where the numbers of tokens do not match.
        """
        scores: dict[str, float] = {}
        matches: dict[str, list[Match]] = {}
        for head in query:
            left, right = query[head], document[head]
            for rep, tokens in ((left, query_tokens), (right, document_tokens)):
                if isinstance(rep, MultiVector) and rep.token_count != len(tokens):
                    raise SearchError(f"{len(tokens)} tokens for {rep.token_count} places of the head {head!r}")
            scores[head] = float(left.paired(right)[0, 0])
            if isinstance(left, Sparse) and isinstance(right, Sparse):
                (mine,), (theirs,) = lexical_weights(left), lexical_weights(right)
                shared = [coordinate for coordinate in mine if coordinate in theirs]
                named = zip(shared, vocabulary(shared), strict=True)
                matches[head] = [Match(name, name, mine[each] * theirs[each]) for each, name in named]
            elif isinstance(left, MultiVector) and isinstance(right, MultiVector):
                matches[head] = _token_matches(left, right, query_tokens, document_tokens)
            if head in matches:
                matches[head].sort(key=lambda match: -match.score)
        return HitExplanation(scores, matches)


def _token_matches(
    query: MultiVector, document: MultiVector, query_tokens: Sequence[str], document_tokens: Sequence[str]
) -> list[Match]:
    """Every query token with its nearest document token, and its part of the score."""
    score_TS = query.vector_NTD[0] @ document.vector_NTD[0].T
    best = score_TS.masked_fill(~document.mask_NT[0], float("-inf")).max(dim=1)
    mask_T = query.mask_NT[0].tolist()
    count = 1 if isinstance(query, MaxSim) else max(sum(mask_T), 1)
    rows = zip(query_tokens, mask_T, best.values.tolist(), best.indices.tolist(), strict=True)
    return [Match(token, document_tokens[place], score / count) for token, real, score, place in rows if real]
