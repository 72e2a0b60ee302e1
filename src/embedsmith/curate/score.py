"""Conan's score filter: a pair stays if an embedding model finds its texts alike enough."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from embedsmith.core.encoder import Encoder, Role
from embedsmith.core.errors import DataError, ModelError, RecipeError
from embedsmith.core.reps import Dense
from embedsmith.core.settings import Count, Share
from embedsmith.core.shelf import curation_steps
from embedsmith.curate.ask import Cache, key_of
from embedsmith.curate.ledger import Ledger, Tools
from embedsmith.data.record import Record
from embedsmith.data.writers import batched

BINS = 40
"""Of the histogram, over cosines from -1 to 1."""

Floats = npt.NDArray[np.float64]


@curation_steps.register(
    "score_filter",
    formula="keep (q, p) iff cos(f(q), f(p)) >= threshold",
    source="Conan-embedding (arXiv 2408.15710), section 3.1: threshold 0.4 with bge-large-zh-v1.5",
)
@dataclass(frozen=True)
class ScoreFilter:
    """Drop positives that an embedding model finds unlike their query; a record without positives left leaves.

    A threshold belongs to one scorer: Conan's 0.4 is for bge-large-zh-v1.5 and lets others' noise through or cuts good
    pairs, so look at the histogram in the report first, or use a quantile. Queries and positives get the scorer's own
    prompts for their roles. Scores are cached by model and texts: filtering again is free. Records for similarity and
    those without positives pass unscored.

    `model`: path or hub id of the scorer.
    `threshold`: the least cosine of a pair that stays (a pair exactly at it does); this or `quantile` is set.
    `quantile`: the share of pairs that leaves, lowest first; that reads the records twice.
    `keep_scores`: write the scores into records that have none, as `teacher_positive_scores`.
    `batch_size`: records scored together.

    Errors: `ModelError` if the model has no dense vectors or gives values that are not finite.
    """

    model: str
    threshold: Annotated[float, Field(ge=-1, le=1)] | None = None
    quantile: Share | None = None
    keep_scores: bool = True
    batch_size: Count = 256

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.quantile is None):
            raise RecipeError("score_filter needs one of threshold and quantile", expected="for example threshold: 0.4")

    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        if tools.encoder is None:
            raise ModelError("score_filter has no model", fix="pass Tools(encoder=...), which loads a model by name")
        with Cache.open(tools.folder, "scores") as cache:
            scorer = _Scorer(*tools.encoder(self.model), cache)
            threshold = self.threshold
            if threshold is None:
                assert self.quantile is not None
                every = [score for _, scores in self._scored(records, scorer) for score in scores or ()]
                threshold = float(np.quantile(np.array(every), self.quantile, method="lower")) if every else -1.0
            counts: npt.NDArray[np.int64] = np.zeros(BINS, dtype=np.int64)
            unscored = 0
            for record, scores in self._scored(records, scorer):
                ledger.taken += 1
                if scores is None:
                    unscored += 1
                    yield record
                    continue
                counts += np.histogram(scores, bins=BINS, range=(-1, 1))[0]
                if (left := self._above(record, scores, threshold, ledger)) is not None:
                    yield left
            ledger.notes |= {
                "threshold": round(threshold, 4),
                "histogram": histogram(counts),
                "records passed unscored": unscored,
                "pairs scored anew": scorer.scored,
            }

    def _scored(self, records: Iterable[Record], scorer: _Scorer) -> Iterator[tuple[Record, list[float] | None]]:
        for batch in batched(records, self.batch_size):
            yield from zip(batch, scorer(batch), strict=True)

    def _above(self, record: Record, scores: list[float], threshold: float, ledger: Ledger) -> Record | None:
        if self.keep_scores and record.teacher_positive_scores is None:
            record = replace(record, teacher_positive_scores=tuple(round(score, 4) for score in scores))
        low = f"score below {threshold:.2f}"
        if max(scores) < threshold:
            ledger.record_left(low, record, f"cosine {max(scores):.3f}")
            return None
        below = [low if one < threshold else None for one in scores]
        return ledger.without(record, below, [None] * len(record.negatives))


@dataclass
class _Scorer:
    """Cosines of queries and positives, from the cache where they are known. `key` changes when the encoder does."""

    encoder: Encoder
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
            queries, documents = (list(dict.fromkeys(side)) for side in zip(*new.values()))
            query_of = dict(zip(queries, self._units(queries, "query")))
            document_of = dict(zip(documents, self._units(documents, "document")))
            fresh = {key: round(float(query_of[q] @ document_of[d]), 6) for key, (q, d) in new.items()}
            self.cache.put(fresh)
            known |= fresh
        return [None if keys is None else [float(known[key]) for key in keys] for keys in keys_N]

    def _units(self, texts: list[str], role: Role) -> Floats:
        """Vectors of length one."""
        reps = self.encoder.represent(texts, role=role, task="retrieval", outputs=("dense",))
        dense = reps.get("dense")
        if not isinstance(dense, Dense):
            raise ModelError("the scorer gives no dense vectors", fix="score with a model that has a dense head")
        vector_ND: Floats = dense.vector_ND.double().numpy()
        if not np.isfinite(vector_ND).all():
            raise ModelError("the scorer's vectors are not all finite", fix="check its weights")
        norm_N1 = np.linalg.norm(vector_ND, axis=1, keepdims=True)
        unit_ND: Floats = vector_ND / np.maximum(norm_N1, 1e-12)
        return unit_ND


def histogram(counts: npt.NDArray[np.int64]) -> dict[str, int]:
    """Counts by range of cosine, from the first that is not empty to the last."""
    filled = np.flatnonzero(counts)
    if not len(filled):
        return {}
    edges = np.linspace(-1, 1, BINS + 1)
    return {f"{edges[b]:+.2f}": int(counts[b]) for b in range(filled[0], filled[-1] + 1)}
