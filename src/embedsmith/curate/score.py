"""Conan's score filter: a pair stays if an embedding model finds its texts alike enough, or a reranker finds that the
one answers the other."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from embedsmith.core.encoder import Encoder
from embedsmith.core.errors import DataError, ModelError, RecipeError
from embedsmith.core.reps import Dense
from embedsmith.core.settings import Count, Finite, Share
from embedsmith.core.shelf import curation_steps
from embedsmith.curate.keeper import Cache, key_of
from embedsmith.curate.ledger import Ledger, PerRecord, Tools
from embedsmith.data.record import Record
from embedsmith.data.writers import batched

BINS = 40
"""Of the histogram."""

Floats = npt.NDArray[np.float64]
Scored = tuple["array[float]", int]
Scores = Callable[[list[str], list[str]], list[float]]
"""Of pairs of a query and a document."""


@curation_steps.register(
    "score_filter",
    formula="keep (q, p) iff cos(f(q), f(p)) >= threshold",
    source="Conan-embedding (arXiv 2408.15710), section 3.1: threshold 0.4 with bge-large-zh-v1.5",
)
@dataclass(frozen=True)
class ScoreFilter(PerRecord):
    """Drop positives that a model finds unlike their query; a record without positives left leaves.

    A threshold belongs to one scorer: Conan's 0.4 is for bge-large-zh-v1.5 and lets others' noise through or cuts good
    pairs, so look at the histogram in the report first, or use a quantile. Queries and positives get the scorer's own
    prompts for their roles. Scores are cached by model and texts: filtering again is free. Records for similarity and
    those without positives pass unscored.

    `model`: path or hub id of the embedding model whose cosines are the scores; this or `reranker` is set.
    `threshold`: the least score of a pair that stays (a pair exactly at it does); this or `quantile` is set.
    `quantile`: the share of pairs that leaves, lowest first; that reads the records twice.
    `keep_scores`: write the scores into records that have none, as `teacher_positive_scores`.
    `batch_size`: records scored together.
    `reranker`: path or hub id of a reranker, whose scores are as its folder has them.

    Errors: `ModelError` if the model has no dense vectors or gives values that are not finite.
    """

    holds_model: ClassVar[bool] = True

    model: str | None = None
    threshold: Finite | None = None
    quantile: Share | None = None
    keep_scores: bool = True
    batch_size: Count = 256
    reranker: str | None = None

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.quantile is None):
            raise RecipeError("score_filter needs one of threshold and quantile", expected="for example threshold: 0.4")
        if (self.model is None) == (self.reranker is None):
            raise RecipeError("score_filter needs one of model and reranker", fix="name the model whose scores count")
        if self.model is not None and self.threshold is not None and not -1 <= self.threshold <= 1:
            raise RecipeError(f"threshold is {self.threshold}", where="score_filter", expected="a cosine, from -1 to 1")

    @property
    def surveyed(self) -> bool:
        return self.quantile is not None

    def survey(self, records: Iterable[Record], tools: Tools) -> Scored:
        """The scores of all pairs, and how many of them were not known before."""
        with tools.cache("scores") as cache:
            scorer = _Scorer(*self._scores_by(tools), cache)
            every = array("d", (score for _, scores in self._scored(records, scorer) for score in scores or ()))
            return every, scorer.scored

    def prepare(self, ledger: Ledger, tools: Tools, surveys: Sequence[Scored]) -> float:
        """The threshold."""
        ledger.notes |= {"scores": array("d"), "records passed unscored": 0}
        ledger.notes["pairs scored anew"] = sum(scored for _, scored in surveys)
        if self.threshold is not None:
            threshold = self.threshold
        else:
            assert self.quantile is not None
            every = np.concatenate([np.array(scores) for scores, _ in surveys] or [np.zeros(0)])
            threshold = float(np.quantile(every, self.quantile, method="lower")) if len(every) else -1.0
        ledger.notes["threshold"] = round(threshold, 4)
        return threshold

    def over(self, records: Iterable[Record], ledger: Ledger, tools: Tools, known: float) -> Iterator[Record]:
        with tools.cache("scores") as cache:
            scorer = _Scorer(*self._scores_by(tools), cache)
            found, unscored = array("d"), 0
            for record, scores in self._scored(records, scorer):
                ledger.taken += 1
                if scores is None:
                    unscored += 1
                    yield record
                    continue
                found.extend(scores)
                if self.keep_scores and record.teacher_positive_scores is None:
                    record = replace(record, teacher_positive_scores=tuple(round(score, 4) for score in scores))
                low = f"score below {known:.2f}"
                if max(scores) < known:
                    ledger.record_left(low, record, f"score {max(scores):.3f}")
                    continue
                below = [low if one < known else None for one in scores]
                if (left := ledger.without(record, below, [None] * len(record.negatives))) is not None:
                    yield left
            more = {"scores": found, "records passed unscored": unscored, "pairs scored anew": scorer.scored}
            ledger.merge(Ledger(notes=more))

    def conclude(self, ledger: Ledger, tools: Tools) -> None:
        notes = ledger.notes
        bars = histogram(np.array(notes["scores"]), cosines=self.model is not None)
        shown = ("records passed unscored", "pairs scored anew")
        ledger.notes = {"threshold": notes["threshold"], "histogram": bars} | {name: notes[name] for name in shown}

    def _scores_by(self, tools: Tools) -> tuple[Scores, str]:
        """What scores pairs, and its key. Errors: `ModelError` where the tools cannot open the model."""
        if self.reranker is not None and tools.reranker is not None:
            reranker, key = tools.reranker(self.reranker)
            return lambda queries, documents: reranker.score(queries, documents).tolist(), key
        if self.model is not None and tools.encoder is not None:
            encoder, key = tools.encoder(self.model)
            return partial(_cosines, encoder), key
        name = "encoder" if self.reranker is None else "reranker"
        raise ModelError("score_filter has no model", fix=f"pass Tools({name}=...), which loads a model by name")

    def _scored(self, records: Iterable[Record], scorer: _Scorer) -> Iterator[tuple[Record, list[float] | None]]:
        for batch in batched(records, self.batch_size):
            yield from zip(batch, scorer(batch), strict=True)


@dataclass
class _Scorer:
    """Scores of queries and positives, from the cache where they are known. `key` changes when the model does."""

    scores: Scores
    key: str
    cache: Cache
    scored: int = 0

    def __call__(self, records: Iterable[Record]) -> list[list[float] | None]:
        keys_N: list[list[bytes] | None] = []
        wanted: dict[bytes, tuple[str, str]] = {}
        for record in records:
            if record.task == "sts" or not record.positives:
                keys_N.append(None)
                continue
            if not record.query:
                fix = "let a step make queries before score_filter"
                raise DataError("a record without a query cannot be scored", fix=fix)
            keys = [key_of(self.key, record.query, text) for text in record.positives]
            wanted |= {key: (record.query, text) for key, text in zip(keys, record.positives)}
            keys_N.append(keys)
        known: dict[bytes, Any] = self.cache.get(list(wanted))
        new = {key: pair for key, pair in wanted.items() if key not in known}
        if new:
            self.scored += len(new)
            queries, documents = (list(side) for side in zip(*new.values()))
            values = self.scores(queries, documents)
            fresh = {key: round(value, 6) for key, value in zip(new, values, strict=True)}
            self.cache.put(fresh)
            known |= fresh
        return [None if keys is None else [float(known[key]) for key in keys] for keys in keys_N]


def _cosines(encoder: Encoder, queries: list[str], documents: list[str]) -> list[float]:
    """Of pairs; a text that occurs more than once is encoded once."""
    query_of, document_of = (
        dict(zip(texts, _units(encoder, texts, role)))
        for side, role in ((queries, "query"), (documents, "document"))
        for texts in [list(dict.fromkeys(side))]
    )
    return [float(query_of[q] @ document_of[d]) for q, d in zip(queries, documents, strict=True)]


def _units(encoder: Encoder, texts: list[str], role: Any) -> Floats:
    """Vectors of length one."""
    reps = encoder.represent(texts, role=role, task="retrieval", outputs=("dense",))
    dense = reps.get("dense")
    if not isinstance(dense, Dense):
        raise ModelError("the scorer gives no dense vectors", fix="score with a model that has a dense head")
    vector_ND: Floats = dense.vector_ND.double().numpy()
    if not np.isfinite(vector_ND).all():
        raise ModelError("the scorer's vectors are not all finite", fix="check its weights")
    norm_N1 = np.linalg.norm(vector_ND, axis=1, keepdims=True)
    unit_ND: Floats = vector_ND / np.maximum(norm_N1, 1e-12)
    return unit_ND


def histogram(scores: Floats, cosines: bool) -> dict[str, int]:
    """Counts by range of the score, from the first that is not empty to the last: cosines from -1 to 1, others from the
    lowest to the highest."""
    if not len(scores):
        return {}
    counts, edges = np.histogram(scores, bins=BINS, range=(-1, 1) if cosines else None)
    filled = np.flatnonzero(counts)
    return {f"{edges[b]:+.2f}": int(counts[b]) for b in range(filled[0], filled[-1] + 1)}
