"""Search in the index of a served model, with an explanation of every hit where it is asked for."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from embedsmith.core.encoder import Role
from embedsmith.core.errors import SearchError
from embedsmith.core.reps import Reps
from embedsmith.index import (
    Document,
    Filter,
    Fusion,
    Hit,
    HitExplanation,
    HybridIndex,
    ReciprocalRank,
    Store,
    WeightedSum,
    Written,
    open_index,
    reranked_hits,
)
from embedsmith.index.vector_store import conditions
from embedsmith.serve.batching import RetiredError
from embedsmith.serve.failures import RequestError
from embedsmith.serve.model import Model, ServedReranker

T = TypeVar("T")

_THREADS = 8
"""Searches at a time: their queries meet in one batch of the model."""
_OPTIMIZED = 10_000
"""Documents that are written before the engine builds anew what makes searching fast."""


@dataclass(frozen=True)
class Question:
    """What is looked for. `weights`: of the heads (`None`: M3's). `rrf`: fuse ranks instead of scores. `candidates`:
    documents that each head proposes. `rerank`: let the reranker order as many of the best hits."""

    query: str
    k: int = 10
    weights: Mapping[str, float] | None = None
    rrf: bool = False
    candidates: int = 100
    filter: Filter = field(default_factory=dict)
    explain: bool = False
    rerank: bool = False


@dataclass(frozen=True)
class TokenMatch:
    """A token of the document that met one of the query, and what the pair adds to the head's score."""

    head: str
    token: str
    query_token: str
    weight: float


@dataclass(frozen=True)
class Found:
    """A hit, and which tokens matched."""

    hit: Hit
    matches: Sequence[TokenMatch] = ()


class ServedIndex:
    """An index and the model that made it. Errors: those of `HybridIndex.search` and `add`."""

    def __init__(self, index: HybridIndex, model: Model) -> None:
        self.index, self.model = index, model
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"search {model.name}")
        self._writing, self._written = threading.Lock(), 0

    def submit(self, question: Question, reranker: ServedReranker | None) -> "Future[list[Found]]":
        """The hits of a question, best first. Errors: `RequestError` for what the index cannot be asked; `RetiredError`
        after `close`."""
        try:
            fusion = self._fusion(question)
            conditions(question.filter)
        except SearchError as error:
            raise RequestError(error.what, expected=error.expected) from error
        return self._in_pool(lambda: self._search(question, fusion, reranker))

    def add(self, documents: Sequence[Document]) -> "Future[Written]":
        """Write documents; durable when the future has a result. Errors: `RetiredError` after `close`."""

        def write() -> Written:
            with self._writing:
                written = self.index.add(documents, show=False, optimize=False)
                self._written += written.new + written.changed
                if self._written >= _OPTIMIZED:
                    self.index.store.optimize()
                    self._written = 0
                return written

        return self._in_pool(write)

    def delete(self, ids: Sequence[str]) -> "Future[None]":
        """Delete documents; those that are not there are none the less gone."""

        def work() -> None:
            with self._writing:
                self.index.delete(ids)

        return self._in_pool(work)

    def _in_pool(self, work: Callable[[], T]) -> "Future[T]":
        try:
            return self._pool.submit(work)
        except RuntimeError as error:
            raise RetiredError from error

    def close(self, store: bool = True) -> None:
        """Wait for the searches that run, then let go of the index."""
        self._pool.shutdown(wait=True)
        if store:
            self.index.store.close()

    def _fusion(self, question: Question) -> Fusion | None:
        weights, heads = question.weights, self.index.heads
        if unknown := [head for head in weights or () if head not in heads]:
            raise RequestError(
                f"this index has no head {unknown[0]!r}", param="weights", expected=f"some of {', '.join(heads)}"
            )
        if question.rrf:
            return ReciprocalRank(weights or dict.fromkeys(heads, 1.0))
        return None if weights is None else WeightedSum(weights)

    def _search(self, question: Question, fusion: Fusion | None, reranker: ServedReranker | None) -> list[Found]:
        count = max(question.k, question.candidates) if reranker is not None else question.k
        (hits,) = self.index.search(
            [question.query],
            count,
            fusion=fusion,
            candidates=question.candidates,
            filter=question.filter,
            show=False,
        )
        if reranker is not None and hits:
            relevance_N = reranker.submit(question.query, [hit.text for hit in hits]).result().relevance_N
            hits = reranked_hits(hits, relevance_N.tolist())
        hits = hits[: question.k]
        if not question.explain:
            return [Found(hit) for hit in hits]
        query = self._read(question.query, "query")
        return [Found(hit, self._matches(query, self._read(hit.text, "document"))) for hit in hits]

    def _read(self, text: str, role: Role) -> tuple[Reps, list[str]]:
        """A text by itself, under the heads whose scores are made of tokens; and its tokens."""
        heads = [head for head in self.index.heads if head != "dense"]
        if self.model.tokens is None or not heads:
            return {}, []
        reps = self.model.submit([text], role, heads, alone=True).result().reps
        return reps, self.model.tokens_of(text, role)

    def _matches(self, query: tuple[Reps, list[str]], document: tuple[Reps, list[str]]) -> list[TokenMatch]:
        if self.model.tokens is None:
            return []
        words = self.model.tokens.tokenizer.convert_ids_to_tokens
        told = HitExplanation.of(query[0], document[0], query[1], document[1], words)
        return [
            TokenMatch(head, one.document_token, one.query_token, one.score)
            for head, found in told.matches.items()
            for one in found
        ]


def open_served(store: Store, models: Sequence[Model], create: bool = False) -> ServedIndex:
    """The index in a store with the model, of those that are served, that made it. With `create` an empty one of the
    first model, where there is none.

    Errors: `SearchError` where there is no index, or none of the models made it.
    """
    settings = store.settings()
    made_by = None if settings is None else settings["fingerprint"]
    model = next((one for one in models if one.fingerprint() == made_by), models[0])
    heads = model.heads if settings is None else None
    return ServedIndex(open_index(model, store, heads=heads, model=model.name, create=create), model)
