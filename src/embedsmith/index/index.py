"""A hybrid index: every document under every head of one model, found by all of them together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from embedsmith.core.encoder import Encoder, fingerprint
from embedsmith.core.errors import SearchError
from embedsmith.core.progress import progress_bar
from embedsmith.core.reps import MultiVector, Reps
from embedsmith.data.writers import batched
from embedsmith.index.documents import Document, without_repeats
from embedsmith.index.hits import Fusion, HeadScores, WeightedSum, ordered
from embedsmith.index.store import Filter, Request, Store, StoredPoint, Vector, field_of, point_key, vectors_of
from embedsmith.search.hybrid import M3_WEIGHTS

_QUERIES = 64
"""Queries in one call of the engine."""


@dataclass(frozen=True)
class Hit:
    """A document that was found: its fused score, and the score of every head that knows it."""

    id: str
    score: float
    scores: Mapping[str, float]
    text: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Written:
    """What `add` did: documents that were new, that replaced another text, and that were there already."""

    new: int = 0
    changed: int = 0
    unchanged: int = 0


@dataclass(frozen=True)
class HybridIndex:
    """Documents of one model in one store. Made by `open_index`."""

    encoder: Encoder
    store: Store
    heads: tuple[str, ...]

    def add(
        self, documents: Iterable[Document], *, batch: int = 256, total: int | None = None, show: bool | None = None
    ) -> Written:
        """Write documents, replacing those whose id is there with another text or other metadata.

        Every `batch` is durable when it is written, and what is there unchanged is not encoded again: a call that was
        stopped is continued by giving it the same documents.
        """
        new = changed = unchanged = 0
        with progress_bar("index", total, visible=show) as bar:
            for block in batched(without_repeats(documents), batch):
                known = self.store.payloads([point_key(document.id) for document in block], ["hash"])
                kept = {key: payload.get("hash") for key, payload in known.items()}
                fresh = [document for document in block if kept.get(point_key(document.id)) != document.hash]
                if fresh:
                    self.store.upsert(self._points(fresh))
                replaced = sum(point_key(document.id) in kept for document in fresh)
                new, changed = new + len(fresh) - replaced, changed + replaced
                unchanged += len(block) - len(fresh)
                bar.advance(len(block))
        self.store.optimize()
        return Written(new, changed, unchanged)

    def delete(self, ids: Sequence[str]) -> None:
        self.store.delete([point_key(id_) for id_ in ids])

    def __len__(self) -> int:
        return self.store.count()

    def search(
        self,
        queries: Sequence[str],
        k: int = 10,
        *,
        fusion: Fusion | None = None,
        candidates: int = 100,
        filter: Filter | None = None,
        ef: int | None = None,
        show: bool | None = None,
    ) -> list[list[Hit]]:
        """The best `k` documents of every query.

        Dense and sparse heads propose `candidates` documents each (token vectors only where they are the only head);
        every candidate is then scored exactly by every head, and `fusion` orders them (by default the weighted sum
        with M3's weights of the heads there are).
        """
        if k < 1 or candidates < 1:
            raise SearchError(f"k is {k}, candidates is {candidates}", expected="1 or more")
        how = _Search(fusion or self._default(), max(candidates, k), filter or {}, ef)
        heads = self._heads(how.fusion)
        found: list[list[Hit]] = []
        with progress_bar("search", len(queries), visible=show) as bar:
            for block in batched(queries, _QUERIES):
                reps = self.encoder.represent(block, role="query", outputs=heads)
                found += self._search_block(reps, len(block), k, how)
                bar.advance(len(block))
        return found

    def _default(self) -> Fusion:
        return WeightedSum({head: M3_WEIGHTS.get(head, 1.0) for head in self.heads})

    def _heads(self, fusion: Fusion) -> tuple[str, ...]:
        heads = tuple(head for head, weight in fusion.weights.items() if weight > 0)
        if unknown := [head for head in heads if head not in self.heads]:
            raise SearchError(f"this index has no head {unknown[0]!r}", expected=f"some of {', '.join(self.heads)}")
        return heads

    def _points(self, documents: Sequence[Document]) -> list[StoredPoint]:
        reps = self.encoder.represent([document.text for document in documents], role="document", outputs=self.heads)
        columns = {head: vectors_of(reps[head]) for head in self.heads}
        return [
            StoredPoint(
                point_key(document.id),
                {head: vector for head, column in columns.items() if (vector := column[row]) is not None},
                asdict(document) | {"hash": document.hash},
            )
            for row, document in enumerate(documents)
        ]

    def _search_block(self, reps: Reps, count: int, k: int, how: _Search) -> list[list[Hit]]:
        columns = {head: vectors_of(rep) for head, rep in reps.items()}
        queries = [
            {head: vector for head, column in columns.items() if (vector := column[row]) is not None}
            for row in range(count)
        ]
        union = self._candidates(queries, how)
        scored = self._exact(queries, union, _query_tokens(reps, count))
        fused = [how.fusion(scores) for scores in scored]
        best = [ordered(scores)[:k] for scores in fused]
        keys = sorted({key for row in best for key in row})
        payload = self.store.payloads(keys, ["id", "text", "metadata"]) if keys else {}
        return [
            [_hit(payload[key], fused[row][key], key, scored[row]) for key in chosen if key in payload]
            for row, chosen in enumerate(best)
        ]

    def _candidates(self, queries: list[dict[str, Vector]], how: _Search) -> list[frozenset[str]]:
        """The documents worth an exact score, for every query."""
        requests: list[tuple[int, Request]] = []
        for row, vectors in enumerate(queries):
            proposing = [head for head in vectors if head != "multivector"] or list(vectors)
            requests += [(row, Request(h, vectors[h], how.candidates, how.filter, ef=how.ef)) for h in proposing]
        union: list[set[str]] = [set() for _ in queries]
        answers = self.store.search([request for _, request in requests]) if requests else []
        for (row, _), answer in zip(requests, answers, strict=True):
            union[row] |= {key for key, _ in answer}
        return [frozenset(keys) for keys in union]

    def _exact(
        self, queries: list[dict[str, Vector]], union: list[frozenset[str]], tokens: list[int]
    ) -> list[dict[str, dict[str, float]]]:
        """Every head's score of every candidate. The engine sums over query tokens, M3 takes the mean."""
        requests = [
            (row, Request(head, vector, len(union[row]), among=union[row]))
            for row, vectors in enumerate(queries)
            for head, vector in vectors.items()
            if union[row]
        ]
        found: list[dict[str, dict[str, float]]] = [{} for _ in queries]
        answers = self.store.search([request for _, request in requests]) if requests else []
        for (row, request), answer in zip(requests, answers, strict=True):
            scale = 1 / tokens[row] if request.head == "multivector" else 1.0
            found[row][request.head] = {key: score * scale for key, score in answer}
        return found


@dataclass(frozen=True)
class _Search:
    fusion: Fusion
    candidates: int
    filter: Filter = field(default_factory=dict)
    ef: int | None = None


def _hit(payload: Mapping[str, Any], score: float, key: str, scores: HeadScores) -> Hit:
    of_heads = {head: known[key] for head, known in scores.items() if key in known}
    return Hit(payload["id"], score, of_heads, payload["text"], payload["metadata"])


def _query_tokens(reps: Reps, count: int) -> list[int]:
    """Query tokens of every row under the multi-vector head."""
    rep = reps.get("multivector")
    return rep.mask_NT.sum(1).tolist() if isinstance(rep, MultiVector) else [1] * count


def open_index(
    encoder: Encoder, store: Store, *, heads: Sequence[str] | None = None, model: str = "", create: bool = False
) -> HybridIndex:
    """The index in `store`, made now if `create` and there is none.

    `heads`: those of a new index (`dense` by default), or those that the index must have. `model`: its name, for
    messages. Errors: `SearchError` where there is no index, or it was made by another model or with other heads.
    """
    mine, kept = fingerprint(encoder), store.settings()
    if kept is None:
        if not create:
            raise SearchError("there is no index here", fix="make one: embedsmith index MODEL DOCUMENTS --to FOLDER")
        names = tuple(heads or ("dense",))
        reps = encoder.represent(["a"], role="document", outputs=names)
        fields = {name: field_of(reps[name]) for name in names}
        kept = {"format": 1, "model": model, "fingerprint": mine, "heads": list(names)}
        store.create(fields, kept)
    if kept["fingerprint"] != mine:
        raise SearchError(
            f"the index was made by another model or with other prompts: {kept['model']} ({kept['fingerprint'][:12]})",
            expected=f"this one: {model} ({mine[:12]})",
            fix="search with the model that made the index, or index the documents again in a new place",
        )
    if heads is not None and set(heads) != set(kept["heads"]):
        raise SearchError(
            f"the index has the heads {', '.join(kept['heads'])}",
            expected=", ".join(heads),
            fix="leave --head out, or index the documents again in a new place",
        )
    return HybridIndex(encoder, store, tuple(kept["heads"]))
