"""A hybrid index: every document under every head of one model, found by all of them together."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsmith.core.encoder import Encoder, fingerprint, main_head
from embedsmith.core.errors import DataError, SearchError
from embedsmith.core.progress import progress_bar
from embedsmith.core.reps import MaxSim, MultiVector, Reps
from embedsmith.data.formats.texts import read_texts
from embedsmith.data.record import text_faults
from embedsmith.data.writers import batched
from embedsmith.index.hits import Fusion, HeadScores, WeightedSum, ordered
from embedsmith.index.vector_store import (
    FieldSpec,
    Filter,
    Request,
    Store,
    StoredPoint,
    Vector,
    check_finite,
    point_key,
    vectors_of,
)
from embedsmith.search.hybrid import M3_WEIGHTS
from embedsmith.search.quantised import RESCORE, SearchPrecision

_QUERIES = 64
"""Queries in one call of the engine."""


@dataclass(frozen=True)
class Document:
    """A text with an id, and metadata to filter by."""

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Changes with the text and the metadata."""
        content = json.dumps([self.text, self.metadata], ensure_ascii=False, sort_keys=True)
        return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def read_documents(path: str | Path, *, empty: bool = False) -> Iterator[Document]:
    """The documents of a BEIR folder's corpus or of a file of any kind that the data room reads, one after another.

    `_id` or `id` names a document, `text` is its text with `title`, where there is one, in front; all other fields are
    metadata. `empty`: documents without a text are among them; without it such a document is an error.
    Errors: `DataError` naming file and line for a row that is not like that, or whose id came before.
    """
    for one in read_texts(path, ids="unique", metadata=True):
        text = one.text.strip()
        if text or not empty:
            for fault in text_faults("text", [text]):
                raise fault.at(one.where)
        yield Document(str(one.id), text, one.metadata)


@dataclass(frozen=True)
class Hit:
    """A document that was found: its fused score, and the score of every head that knows it."""

    id: str
    score: float
    scores: Mapping[str, float]
    text: str
    metadata: Mapping[str, Any]


def reranked_hits(hits: Sequence[Hit], scores: Iterable[float]) -> list[Hit]:
    """Hits by a reranker's scores, in the order that they have where these are equal. What was a hit's score stands
    among the others as `first`."""
    scored = [
        replace(hit, score=score, scores={**hit.scores, "first": hit.score})
        for hit, score in zip(hits, scores, strict=True)
    ]
    return sorted(scored, key=lambda hit: -hit.score)


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
    precision: SearchPrecision = "float32"

    def add(
        self,
        documents: Iterable[Document],
        *,
        batch: int = 256,
        total: int | None = None,
        show: bool | None = None,
        optimize: bool = True,
    ) -> Written:
        """Write documents, replacing those whose id is there with another text or other metadata.

        Every `batch` is durable when it is written, and what is there unchanged is not encoded again: a call that was
        stopped is continued by giving it the same documents. `optimize=False`: for a few documents at a time, where
        `store.optimize` is called now and then. Errors: `DataError` for an id that comes again.
        """
        new = changed = unchanged = 0
        seen: set[str] = set()
        with progress_bar("index", total, visible=show) as bar:
            for block in batched(documents, batch):
                for document in block:
                    if document.id in seen:
                        raise DataError(
                            f"the id {document.id!r} comes twice", fix="give every document an id of its own"
                        )
                    seen.add(document.id)
                hashes = self._hashes(block)
                fresh = [document for document in block if hashes.get(point_key(document.id)) != document.hash]
                if fresh:
                    self.store.upsert(self._points(fresh))
                replaced = sum(point_key(document.id) in hashes for document in fresh)
                new, changed = new + len(fresh) - replaced, changed + replaced
                unchanged += len(block) - len(fresh)
                bar.advance(len(block))
        if optimize:
            self.store.optimize()
        return Written(new, changed, unchanged)

    def lacking(self, documents: Sequence[Document]) -> list[bool]:
        """For each document whether `add` would write it: it is not here with this text and these metadata."""
        hashes = self._hashes(documents)
        return [hashes.get(point_key(document.id)) != document.hash for document in documents]

    def _hashes(self, documents: Sequence[Document]) -> dict[str, Any]:
        """Those of the documents that are here under the same ids, by key."""
        known = self.store.payloads([point_key(document.id) for document in documents], ["hash"])
        return {key: payload.get("hash") for key, payload in known.items()}

    def delete(self, ids: Sequence[str]) -> None:
        self.store.delete([point_key(id_) for id_ in ids])

    def __len__(self) -> int:
        return self.store.count()

    def sample(self, head: str, limit: int) -> tuple[list[Document], npt.NDArray[np.float32]]:
        """Documents as if drawn by chance, the same every time, and vector_ND of a dense head."""
        rows = self.store.sample(head, limit)
        found = [Document(payload["id"], payload["text"], payload["metadata"]) for _, payload in rows]
        return found, np.array([vector for vector, _ in rows], np.float32)

    def texts(self, ids: Sequence[str]) -> dict[str, str]:
        """By their ids, the texts of those documents that are here."""
        payloads = self.store.payloads([point_key(id_) for id_ in ids], ["id", "text"])
        return {payload["id"]: payload["text"] for payload in payloads.values()}

    def search(
        self,
        queries: Sequence[str],
        k: int = 10,
        *,
        fusion: Fusion | None = None,
        candidates: int = 100,
        filter: Filter | None = None,
        ef: int | None = None,
        rescore: int = RESCORE,
        show: bool | None = None,
    ) -> list[list[Hit]]:
        """The best `k` documents of every query.

        Dense and sparse heads propose `candidates` documents each (token vectors only where they are the only head);
        every candidate is then scored exactly by every head, and `fusion` orders them (by default the weighted sum
        with M3's weights of the heads there are). In an index with codes, the dense candidates are the best by their
        full vectors of `rescore` times as many by codes (0: the codes choose them).
        """
        if k < 1 or candidates < 1 or rescore < 0:
            raise SearchError(f"k is {k}, candidates is {candidates}, rescore is {rescore}", expected="1 or more")
        fusion = fusion or WeightedSum({head: M3_WEIGHTS.get(head, 1.0) for head in self.heads})
        heads = tuple(head for head, weight in fusion.weights.items() if weight > 0)
        if unknown := [head for head in heads if head not in self.heads]:
            raise SearchError(f"this index has no head {unknown[0]!r}", expected=f"some of {', '.join(self.heads)}")
        found: list[list[Hit]] = []
        with progress_bar("search", len(queries), visible=show) as bar:
            for block in batched(queries, _QUERIES):
                reps = self.encoder.represent(block, role="query", outputs=heads)
                check_finite(reps, [f"the query {text[:80]!r}" for text in block])
                asked = vectors_of(reps, len(block))
                union = self._candidates(asked, max(candidates, k), filter or {}, ef, rescore)
                scored = self._exact(asked, union, reps)
                found += self._hits(scored, [fusion(scores) for scores in scored], k)
                bar.advance(len(block))
        return found

    def _points(self, documents: Sequence[Document]) -> list[StoredPoint]:
        reps = self.encoder.represent([document.text for document in documents], role="document", outputs=self.heads)
        check_finite(reps, [f"the document {document.id!r}" for document in documents])
        rows = zip(documents, vectors_of(reps, len(documents)), strict=True)
        return [
            StoredPoint(point_key(document.id), vectors, asdict(document) | {"hash": document.hash})
            for document, vectors in rows
        ]

    def _candidates(
        self, queries: list[dict[str, Vector]], count: int, filter_: Filter, ef: int | None, rescore: int
    ) -> list[frozenset[str]]:
        """The documents worth an exact score, for every query."""
        requests: list[tuple[int, Request]] = []
        for row, vectors in enumerate(queries):
            proposing = [head for head in vectors if head != "multivector"] or list(vectors)
            for head in proposing:
                codes = rescore if head == "dense" and self.precision != "float32" else None
                requests.append((row, Request(head, vectors[head], count, filter_, ef=ef, rescore=codes)))
        union: list[set[str]] = [set() for _ in queries]
        answers = self.store.search([request for _, request in requests]) if requests else []
        for (row, _), answer in zip(requests, answers, strict=True):
            union[row] |= {key for key, _ in answer}
        return [frozenset(keys) for keys in union]

    def _exact(self, queries: list[dict[str, Vector]], union: list[frozenset[str]], reps: Reps) -> list[HeadScores]:
        """Every head's score of every candidate. The engine sums over query tokens, as ColBERT; M3 takes the mean."""
        requests = [
            (row, Request(head, vector, len(union[row]), among=union[row]))
            for row, vectors in enumerate(queries)
            for head, vector in vectors.items()
            if union[row]
        ]
        rep = reps.get("multivector")
        by_mean = isinstance(rep, MultiVector) and not isinstance(rep, MaxSim)
        tokens = rep.mask_NT.sum(1).tolist() if isinstance(rep, MultiVector) else []
        found: list[dict[str, dict[str, float]]] = [{} for _ in queries]
        answers = self.store.search([request for _, request in requests]) if requests else []
        for (row, request), answer in zip(requests, answers, strict=True):
            scale = 1 / tokens[row] if request.head == "multivector" and by_mean else 1.0
            found[row][request.head] = {key: score * scale for key, score in answer}
        return list(found)

    def _hits(self, scored: Sequence[HeadScores], fused: Sequence[Mapping[str, float]], k: int) -> list[list[Hit]]:
        """The best k of every query, with their texts."""
        best = [ordered(scores)[:k] for scores in fused]
        keys = sorted({key for row in best for key in row})
        payload = self.store.payloads(keys, ["id", "text", "metadata"]) if keys else {}
        found: list[list[Hit]] = []
        for chosen, of_heads, scores in zip(best, scored, fused, strict=True):
            hits = []
            for key in chosen:
                if key in payload:
                    known = {head: by_key[key] for head, by_key in of_heads.items() if key in by_key}
                    one = payload[key]
                    hits.append(Hit(one["id"], scores[key], known, one["text"], one["metadata"]))
            found.append(hits)
        return found


def open_index(
    encoder: Encoder,
    store: Store,
    *,
    heads: Sequence[str] | None = None,
    precision: SearchPrecision | None = None,
    model: str = "",
    create: bool = False,
) -> HybridIndex:
    """The index in `store`, made now if `create` and there is none.

    `heads`: those of a new index (by default the one that the encoder is made for), or those that the index must have.
    `precision`: of a new index (`float32` by default), or what the index must have; int8 and binary look for dense
    vectors by such codes, kept in memory, and leave the full ones on the disk. `model`: its name, for messages.
    Errors: `SearchError` where there is no index, or it was made by another model, with other heads or in another
    precision.
    """
    mine, settings = fingerprint(encoder), store.settings()
    if settings is None:
        if not create:
            raise SearchError("there is no index here", fix="make one: embedsmith index MODEL DOCUMENTS --to FOLDER")
        names = tuple(heads or (main_head(encoder),))
        reps = encoder.represent(["a"], role="document", outputs=names)
        if precision not in (None, "float32") and "dense" not in names:
            raise SearchError(f"{precision} codes are of dense vectors", fix="leave --precision out")
        fields = {name: FieldSpec.of(reps[name], precision or "float32") for name in names}
        settings = {"format": 1, "model": model, "fingerprint": mine, "heads": list(names)}
        settings["precision"] = precision or "float32"
        store.create(fields, settings)
    made_by: str = settings["fingerprint"]
    if made_by != mine:
        raise SearchError(
            f"the index was made by another model or with other prompts: {settings['model']} ({made_by[:12]})",
            expected=f"this one: {model} ({mine[:12]})",
            fix="search with the model that made the index, or index the documents again in a new place",
        )
    if heads is not None and set(heads) != set(settings["heads"]):
        raise SearchError(
            f"the index has the heads {', '.join(settings['heads'])}",
            expected=", ".join(heads),
            fix="leave --head out, or index the documents again in a new place",
        )
    kept = settings.get("precision", "float32")  # an index of an earlier version does not say
    if precision not in (None, kept):
        raise SearchError(
            f"the index was made with precision {kept}",
            expected=precision,
            fix="leave --precision out, or index the documents again in a new place",
        )
    return HybridIndex(encoder, store, tuple(settings["heads"]), kept)
