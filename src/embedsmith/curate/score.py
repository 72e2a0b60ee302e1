"""Conan's score filter: a pair stays if an embedding model finds its texts alike enough."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsmith.core.encoder import Encoder
from embedsmith.core.errors import DataError, ModelError, RecipeError
from embedsmith.core.reps import Dense
from embedsmith.core.shelf import curation_steps
from embedsmith.curate.ask import Cache, key_of, open_cache
from embedsmith.curate.step import Ledger, Tools, check_range, in_windows, without
from embedsmith.data.record import Record

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

    One of `threshold` (a cosine; a pair exactly at it stays) and `quantile` (the share of pairs that leaves, lowest
    first) is set. A threshold belongs to one scorer: Conan's 0.4 is for bge-large-zh-v1.5 and lets others' noise
    through or cuts good pairs, so look at the histogram in the report first, or use `quantile`. Queries and positives
    get the scorer's own prompts for their roles. Scores are cached by model and texts: filtering again is free. With
    `keep_scores` they are written into records that have none, as `teacher_positive_scores`. Records for similarity
    and those without positives pass unscored.

    Errors: `ModelError` if the model has no dense vectors or gives values that are not finite.
    """

    model: str
    threshold: float | None = None
    quantile: float | None = None
    keep_scores: bool = True
    batch_size: int = 256

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.quantile is None):
            raise RecipeError("score_filter needs one of threshold and quantile", expected="for example threshold: 0.4")
        check_range("threshold", self.threshold, -1, 1)
        check_range("quantile", self.quantile, 0, 1)
        if self.batch_size < 1:
            raise RecipeError(f"batch_size is {self.batch_size}", expected="1 or more")

    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        if tools.encoder is None:
            raise ModelError("score_filter has no model", fix="pass Tools(encoder=...), which loads a model by name")
        scorer = _Scorer(*tools.encoder(self.model))
        with open_cache(tools.folder, "scores") as cache:
            threshold = self.threshold
            if threshold is None:
                assert self.quantile is not None
                every = np.array(
                    [score for _, scores in self._scored(records, scorer, cache) for score in scores or ()]
                )
                threshold = float(np.quantile(every, self.quantile, method="lower")) if len(every) else -1.0
            counts: npt.NDArray[np.int64] = np.zeros(BINS, dtype=np.int64)
            unscored = 0
            for record, scores in self._scored(records, scorer, cache):
                ledger.taken += 1
                if scores is None:
                    unscored += 1
                    yield record
                    continue
                counts += np.histogram(scores, bins=BINS, range=(-1, 1))[0]
                kept = self._kept(record, scores, threshold, ledger)
                if kept is not None:
                    yield kept
            ledger.notes |= {
                "threshold": round(threshold, 4),
                "histogram": histogram(counts),
                "records passed unscored": unscored,
                "pairs scored anew": scorer.scored,
            }

    def _kept(self, record: Record, scores: Floats, threshold: float, ledger: Ledger) -> Record | None:
        if self.keep_scores and record.teacher_positive_scores is None:
            record = replace(record, teacher_positive_scores=tuple(round(float(score), 4) for score in scores))
        low = [f"score below {threshold:.2f}" if score < threshold else None for score in scores]
        why = f"cosine {max(scores):.3f}" if all(low) else ""
        if why:
            ledger.record_left(f"score below {threshold:.2f}", record, why)
            return None
        return without(record, low, [None] * len(record.negatives), ledger)

    def _scored(
        self, records: Iterable[Record], scorer: _Scorer, cache: Cache
    ) -> Iterator[tuple[Record, Floats | None]]:
        for batch in in_windows(records, self.batch_size):
            yield from zip(batch, scorer(batch, cache), strict=True)


@dataclass
class _Scorer:
    """Cosines of queries and positives, from the cache where they are known."""

    encoder: Encoder
    key: str
    scored: int = 0

    def __call__(self, records: Iterable[Record], cache: Cache) -> list[Floats | None]:
        pairs = [
            [(record.query, text) for text in record.positives] if _scorable(record) else None for record in records
        ]
        wanted = {key_of(self.key, *pair): pair for some in pairs for pair in some or ()}
        known: dict[bytes, Any] = cache.get(list(wanted))
        new = {key: pair for key, pair in wanted.items() if key not in known}
        if new:
            fresh = dict(zip(new, self._cosines(list(new.values())), strict=True))
            cache.put(fresh)
            known |= fresh
        return [None if some is None else np.array([known[key_of(self.key, *pair)] for pair in some]) for some in pairs]

    def _cosines(self, pairs: list[tuple[str, str]]) -> list[float]:
        self.scored += len(pairs)
        queries, documents = (list(dict.fromkeys(side)) for side in zip(*pairs))
        left_ND, right_ND = self._vectors(queries, "query"), self._vectors(documents, "document")
        place_q = {text: place for place, text in enumerate(queries)}
        place_d = {text: place for place, text in enumerate(documents)}
        return [round(float(left_ND[place_q[q]] @ right_ND[place_d[d]]), 6) for q, d in pairs]

    def _vectors(self, texts: list[str], role: Any) -> Floats:
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


def _scorable(record: Record) -> bool:
    if record.task == "sts" or not record.positives:
        return False
    if not record.query:
        raise DataError("a record without a query cannot be scored", fix="let a step make queries before score_filter")
    return True


def histogram(counts: npt.NDArray[np.int64]) -> dict[str, int]:
    """Counts by range of cosine, from the first that is not empty to the last."""
    filled = np.flatnonzero(counts)
    if not len(filled):
        return {}
    edges = np.linspace(-1, 1, BINS + 1)
    return {f"{edges[b]:+.2f}": int(counts[b]) for b in range(filled[0], filled[-1] + 1)}
