"""Who proposes candidates (searchers) and who scores them (searchers and teachers). A model is known here only as an
`Encoder`.

What a recipe names, such as `{type: bm25, k1: 1.2}`, is a frozen dataclass of settings on the shelf `searchers` or
`teachers`. Its `open` gives what works: a `Searcher`, or for a teacher a `PairScorer`. A package of your own may add
one.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from embedsmith.core.collectives import (
    FailedElsewhereError,
    objects_of_all_ranks,
    on_every_rank,
    on_first_rank,
    rank,
    world_size,
)
from embedsmith.core.encoder import Encoder, Role, fingerprint, main_head, represent
from embedsmith.core.errors import DataError, MissingExtraError, ModelError, RecipeError, SearchError
from embedsmith.core.progress import progress_bar
from embedsmith.core.reps import MultiVector, Representation
from embedsmith.core.reranker import Reranker
from embedsmith.core.settings import Count, Positive, Share, Weights, Word
from embedsmith.core.sharing import Sharing
from embedsmith.core.shelf import searchers, teachers
from embedsmith.core.words import folded, letters, runs
from embedsmith.data.record import text_id
from embedsmith.search.approximate import ApproximateIndex
from embedsmith.search.cached import CachedEncoder
from embedsmith.search.exact import FloatArray, IndexArray, TopK, on_device, search_device
from embedsmith.search.given_pairs import one_to_one
from embedsmith.search.hybrid import M3_WEIGHTS, HybridEncoder, join
from embedsmith.search.top_k import merged_top_k

T = TypeVar("T")

PIECE = 2048
"""Texts a file of cached vectors holds, and documents scored at once."""
_BLOCK = 256
"""Scores of which the highest is looked at, where the best of very many are sought."""


def no_reranker(path: str) -> Reranker:
    raise ModelError(
        "no reranker can be opened here",
        where=path,
        fix="pass open_reranker, the function load_reranker of this package",
    )


@dataclass(frozen=True)
class SearchTexts:
    """What a searcher or teacher is opened on. `instructions`: the queries' own, or `None`. `open_model` gives the
    encoder of a path or id, the same one each time, `open_reranker` the reranker. `vectors`: the folder where vectors
    are cached. `sharing`: which share of the work this process has (`None`: that of its rank)."""

    queries: Sequence[str]
    corpus: Sequence[str]
    instructions: Sequence[str | None]
    task: str
    open_model: Callable[[str], Encoder]
    vectors: Path
    open_reranker: Callable[[str], Reranker] = no_reranker
    sharing: Sharing | None = None


class PairScorer(Protocol):
    """Scores of given pairs of a query and a document of the corpus, both by their places."""

    def models(self) -> dict[str, str]:
        """Hashes of the models it reads, by name: with other weights nothing of an earlier run is used."""
        return {}

    def prepare(self, folder: Path) -> None:
        """Compute what all parts of the run need, such as an index; `folder` is the run's own. A collective."""
        return None

    def pairs(self, row_E: IndexArray, index_E: IndexArray) -> FloatArray:
        """score_E of query `row_E[e]` with document `index_E[e]`."""
        ...


class Searcher(PairScorer, Protocol):
    """A scorer that also finds candidates in the whole corpus."""

    def top(self, start: int, stop: int, k: int) -> tuple[FloatArray, IndexArray]:
        """score_Qk, index_Qk of queries `start` to `stop - 1`, best first; index -1 where fewer were found."""
        ...


class SearcherSettings(Protocol):
    """What stands on the shelf `searchers`."""

    def open(self, texts: SearchTexts) -> Searcher: ...


class TeacherSettings(Protocol):
    """What stands on the shelf `teachers`."""

    def open(self, texts: SearchTexts) -> PairScorer: ...


# By an embedding model.


@dataclass(frozen=True)
class TextReps:
    """The representations of a list of texts under one head, in pieces. With a
    `search.cached.CachedEncoder` no piece is computed twice, by whatever process. `instructions`: the texts' own
    (`None`: the prompt of role and task)."""

    encoder: Encoder
    texts: Sequence[str]
    role: Role
    task: str | None
    head: str
    instructions: Sequence[str | None] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def pieces(self) -> Iterator[Representation]:
        for start in range(0, len(self.texts), PIECE):
            yield self.piece(start)

    def piece(self, start: int) -> Representation:
        part = self.part(slice(start, start + PIECE))
        role, task, own = self.role, self.task, part.instructions
        reps = represent(self.encoder, part.texts, role=role, task=task, outputs=(self.head,), instruction=own)
        if self.head not in reps:
            raise ModelError(f"the model gave no {self.head!r} output", expected=", ".join(reps))
        if len(reps[self.head]) != len(part):
            raise ModelError(f"the model gave {len(reps[self.head])} rows for {len(part)} texts")
        return reps[self.head]

    def part(self, rows: slice) -> TextReps:
        """Some of the texts, each with its instruction."""
        own = None if self.instructions is None else self.instructions[rows]
        return replace(self, texts=self.texts[rows], instructions=own)

    def rows(self, index_E: IndexArray) -> Representation:
        """Representations of the given texts, in that order."""
        piece_E = index_E // PIECE
        parts = [self.piece(int(p) * PIECE).rows(torch.from_numpy(index_E[piece_E == p] % PIECE)) for p in set(piece_E)]
        place_E = np.concatenate([np.flatnonzero(piece_E == p) for p in set(piece_E)])
        return join(parts).rows(torch.from_numpy(np.argsort(place_E)))

    def compute(self, label: str, sharing: Sharing | None = None) -> None:
        """Let every rank or shard compute its share of the pieces. On ranks a collective; an error on one is one on
        all."""
        mine, count = (rank(), world_size()) if sharing is None else (sharing.index, sharing.count)

        def act() -> None:
            starts = range(0, len(self.texts), PIECE)[mine::count]
            with progress_bar(label, len(starts)) as bar:
                for start in starts:
                    self.piece(start)
                    bar.advance()

        on_every_rank(act, label, group=None if sharing is None else sharing.group)

    def top_of_share(self, query: Representation, k: int, mine: int, count: int) -> tuple[FloatArray, IndexArray]:
        """score_Qk and index_Qk of the best `k` of one of `count` shares of the pieces (see `compute`), with places in
        the whole corpus."""
        starts = range(0, len(self), PIECE)[mine::count]
        if not starts:
            return np.zeros((len(query), 0), np.float32), np.zeros((len(query), 0), np.int64)
        score_Qk, local_Qk = top_of_pieces(query, (self.piece(start) for start in starts), k)
        return score_Qk, np.asarray(starts, np.int64)[local_Qk // PIECE] + local_Qk % PIECE


def top_of_pieces(
    query: Representation, pieces: Iterator[Representation], k: int, device: torch.device | str | None = None
) -> tuple[FloatArray, IndexArray]:
    """The k best of all pieces, exactly, on a GPU where there is one (`search.exact.search_device`); only one piece is
    held at a time (on a GPU as many as fill it)."""
    best = TopK(query, k, device=device)
    waiting: list[Representation] = []
    for piece in pieces:
        waiting.append(piece)
        if best.device.type == "cpu" or sum(map(len, waiting)) >= best.block_rows(piece):
            # A piece of vectors is a block as it is; token vectors are cut further.
            rows = None if isinstance(piece, MultiVector) else max(best.block_rows(piece), len(piece))
            best.add_in_blocks(join(waiting), rows)
            waiting = []
    if waiting:
        best.add_in_blocks(join(waiting))
    return best.result()


@teachers.register("embedding")
@searchers.register("embedding")
@dataclass(frozen=True, kw_only=True)
class EmbeddingSearch:
    """Candidates and scores by an embedding model.

    model: its folder or hub id.
    head: the output that is compared: `dense`, `sparse`, `multivector`, `hybrid`; `None` is what the model is made for.
    weights: of the heads in a hybrid score (`None`: M3's).
    index: `exact`, or a FAISS factory string (`HNSW32,Flat`, `IVF4096,Flat`) for dense vectors.
    effort: how many candidates a query looks at in such an index (efSearch or nprobe).
    task: whose prompts are used (`None`: that of the data).
    instructions: a record's own instruction takes the place of the query's prompt, as in training; false for a model
        that was not trained with any.
    """

    model: Word
    head: Word | None = None
    weights: Weights | None = None
    index: Word = "exact"
    effort: Count = 128
    task: str | None = None
    instructions: bool = True

    def __post_init__(self) -> None:
        if self.weights is not None and self.head != "hybrid":
            raise RecipeError("weights are those of a hybrid score", fix="set head: hybrid")
        if self.index != "exact" and self.head not in (None, "dense"):
            raise RecipeError(f"an approximate index holds dense vectors, not {self.head}", fix="set index: exact")

    def open(self, texts: SearchTexts) -> Searcher:
        cached = CachedEncoder.of(texts.open_model(self.model), texts.vectors)
        encoder: Encoder = cached
        if self.head == "hybrid":
            encoder = HybridEncoder(cached, self.weights or dict(M3_WEIGHTS))
        task, own = self.task or texts.task, texts.instructions if self.instructions else None
        head = self.head or main_head(cached)
        queries = TextReps(encoder, texts.queries, "query", task, head, own)
        documents = TextReps(encoder, texts.corpus, "document", task, head)
        alone = EmbeddingSearcher(queries, documents, self, {self.model: cached.fingerprint()}, None, texts.sharing)
        if self.index == "exact" and texts.sharing is not None and texts.sharing.mode == "ranks":
            return SharedSearcher(alone, texts.sharing)
        return alone


@dataclass
class EmbeddingSearcher(Searcher):
    """Neighbours by a model's representations: exact in blocks, or from an approximate index."""

    queries: TextReps
    documents: TextReps
    settings: EmbeddingSearch | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    index: ApproximateIndex | None = None
    sharing: Sharing | None = None

    def models(self) -> dict[str, str]:
        return self.fingerprints

    def prepare(self, folder: Path) -> None:
        """Compute what is missing, each rank or shard its share; shards wait for one another here. An approximate index
        is built once and stays in `folder`."""
        self.queries.compute("encode queries", self.sharing)
        self.documents.compute("encode corpus", self.sharing)
        if self.sharing is not None:
            about = f"{self.fingerprints} {self.queries.role} {self.documents.task} {self.documents.head}"
            self.sharing.meet(folder / f"encoded-{text_id(about):016x}")
        if self.settings is None or self.settings.index == "exact":
            return
        factory, effort = self.settings.index, self.settings.effort
        what = f"{sorted(self.fingerprints.values())} {self.documents.task} {self.documents.head}"
        path = folder / f"{factory.replace(',', '-')}-{text_id(what):016x}.faiss"

        def build() -> None:
            try:
                ApproximateIndex.load(path, effort, len(self.documents))
            except SearchError:  # absent, or not whole
                ApproximateIndex.build(self.documents.pieces(), factory, effort).save(path)

        on_first_rank(build)
        self.index = ApproximateIndex.load(path, effort, len(self.documents))

    def top(self, start: int, stop: int, k: int) -> tuple[FloatArray, IndexArray]:
        query = self.queries.rows(np.arange(start, stop))
        if self.index is not None:
            return self.index.top(query, k)
        return top_of_pieces(query, self.documents.pieces(), k)

    def pairs(self, row_E: IndexArray, index_E: IndexArray) -> FloatArray:
        """Piece by piece of the corpus, so that each is read once, on a GPU where there is one."""
        score_E = np.zeros(len(row_E), np.float32)
        if len(row_E) == 0:
            return score_E
        rows, place_E = np.unique(row_E, return_inverse=True)
        query = self.queries.rows(rows)
        device = search_device(query)
        query = on_device(query, device)
        order = np.argsort(index_E, kind="stable")
        cuts = np.flatnonzero(np.diff(index_E[order] // PIECE)) + 1
        found: list[torch.Tensor] = []
        for entries in np.split(order, cuts):
            piece = on_device(self.documents.piece(int(index_E[entries[0]]) // PIECE * PIECE), device)
            found += one_to_one(query, piece, place_E[entries], index_E[entries] % PIECE)
        score_E[order] = torch.cat(found).cpu().numpy()  # the one wait for a GPU
        return score_E


@dataclass
class SharedSearcher(Searcher):
    """The same on all ranks together: each searches and scores the documents of its own share, those that it has
    encoded, for the queries of all ranks, and gives each rank the answers to its own.

    Every call of `top` and `pairs` is a collective: all ranks make the same calls, each with queries of its own.
    """

    alone: EmbeddingSearcher
    sharing: Sharing

    def models(self) -> dict[str, str]:
        return self.alone.models()

    def prepare(self, folder: Path) -> None:
        self.alone.prepare(folder)

    def top(self, start: int, stop: int, k: int) -> tuple[FloatArray, IndexArray]:
        mine, count = self.sharing.index, self.sharing.count

        def found(start: int, stop: int, k: int) -> tuple[FloatArray, IndexArray]:
            query = self.alone.queries.rows(np.arange(start, stop))
            return self.alone.documents.top_of_share(query, k, mine, count)

        return merged_top_k(self._answered((start, stop, k), found), k)

    def pairs(self, row_E: IndexArray, index_E: IndexArray) -> FloatArray:
        count, score_E = self.sharing.count, np.zeros(len(row_E), np.float32)

        def scored(row_E: IndexArray, index_E: IndexArray) -> FloatArray:
            held = index_E // PIECE % count == self.sharing.index
            return self.alone.pairs(row_E[held], index_E[held])

        for holder, answer in enumerate(self._answered((row_E, index_E), scored)):
            score_E[index_E // PIECE % count == holder] = answer
        return score_E

    def _answered(self, asked: tuple[Any, ...], act: Callable[..., T]) -> list[T]:
        """What all ranks say to this one's question, in rank order."""
        group = self.sharing.group
        everyones = objects_of_all_ranks(asked, group)
        for other in everyones:
            if isinstance(other, str):  # it has failed since, and told all
                raise FailedElsewhereError(f"another rank failed: {other}", fix="the same command goes on")
        answers = self.sharing.every(lambda: [act(*one) for one in everyones])
        mine: list[Any] = [None] * len(answers)
        for place, answer in enumerate(answers):
            dist.gather_object(answer, mine if place == self.sharing.index else None, dst=place, group=group)
        return mine


# By BM25, for scripts with and without spaces.

Tokens = Literal["mixed", "characters", "words"]


@searchers.register("bm25", source="the library bm25s")
@dataclass(frozen=True, kw_only=True)
class Bm25Search:
    """Candidates by BM25, through the library bm25s.

    tokens: what a text is cut into: `mixed` takes words, and single characters and pairs of them where a script has no
        spaces (Chinese, Japanese, Thai, ...); `characters` the latter everywhere; `words` only words.
    k1: how soon a word that comes again stops counting more.
    b: how much long documents are held against theirs, from 0 (not at all) to 1.
    """

    tokens: Tokens = "mixed"
    k1: Positive = 1.5
    b: Share = 0.75

    def words(self, text: str) -> list[str]:
        """The words of a text, in lower case. `mixed`: a run of a script without spaces gives its characters and their
        pairs; `characters`: every run does; `words`: none does."""
        found: list[str] = []
        for run, unspaced in runs(folded(text)):
            if self.tokens == "words" or (self.tokens == "mixed" and not unspaced):
                found.append(run)
            else:
                single = letters(run)
                found += single + [left + right for left, right in pairwise(single)]
        return found

    def open(self, texts: SearchTexts) -> Searcher:
        return Bm25(self, texts.queries, texts.corpus)


@dataclass
class _WordNumbers(Sequence[list[int]]):
    """The words of documents as numbers, all in one array: as lists of words they would take many times the texts'
    memory."""

    word_S: array[int] = field(default_factory=lambda: array("i"))
    end_K: array[int] = field(default_factory=lambda: array("q"))

    def append(self, words: Sequence[int]) -> None:
        self.word_S.extend(words)
        self.end_K.append(len(self.word_S))

    def __len__(self) -> int:
        return len(self.end_K)

    def __getitem__(self, place: Any) -> Any:
        return self.word_S[self.end_K[place - 1] if place else 0 : self.end_K[place]].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.__getitem__, range(len(self)))


class Bm25(Searcher):
    """A BM25 index over a corpus, of the words that the queries have: all others count only for the length of their
    documents, as one word that no query asks for. Scores of a query are computed for the whole corpus at a time, [K]
    numbers."""

    def __init__(self, settings: Bm25Search, queries: Sequence[str], corpus: Sequence[str]) -> None:
        self.settings, self.queries, self.corpus = settings, queries, corpus

    def prepare(self, folder: Path) -> None:
        """Index the corpus. Errors: `MissingExtraError`; `DataError` for a corpus without a single token."""
        try:
            import bm25s
        except ImportError as error:
            raise MissingExtraError("bm25s", "search") from error
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # the library sets it to talk about every step
        known = dict.fromkeys(word for query in self.queries for word in self.settings.words(query))
        vocabulary = {word: number for number, word in enumerate(("", *known))}
        rows = _WordNumbers()
        for text in self.corpus:
            rows.append([vocabulary.get(word, 0) for word in self.settings.words(text)])
        if not rows.word_S:
            raise DataError("no text of the corpus has a word in it", expected="tokens that fit its script")
        self._index: Any = bm25s.BM25(k1=self.settings.k1, b=self.settings.b)
        self._index.index(bm25s.tokenization.Tokenized(rows, vocabulary), show_progress=False)

    def top(self, start: int, stop: int, k: int) -> tuple[FloatArray, IndexArray]:
        """score_Qk and index_Qk, ties to the lower index. A document that shares no word with the query is none."""
        queries, k = self.queries[start:stop], min(k, len(self.corpus))
        score_Qk, index_Qk = np.zeros((len(queries), k), np.float32), np.full((len(queries), k), -1, np.int64)
        for row, query in enumerate(queries):
            score_K = self.scores(query)
            reached = np.flatnonzero((score_K >= _floor(score_K, k)) & (score_K > 0))
            order = reached[np.argsort(-score_K[reached], kind="stable")][:k]
            score_Qk[row, : len(order)], index_Qk[row, : len(order)] = score_K[order], order
        return score_Qk, index_Qk

    def pairs(self, row_E: IndexArray, index_E: IndexArray) -> FloatArray:
        """Only the given documents are looked up, and words are added in the same order as for the whole corpus."""
        score_E = np.zeros(len(row_E), np.float32)
        weight_P, document_P, start_V = (self._index.scores[name] for name in ("data", "indices", "indptr"))
        for row in np.unique(row_E):
            mine = np.flatnonzero(row_E == row)
            for word in self._index.get_tokens_ids(self.settings.words(self.queries[int(row)])):
                column = slice(start_V[word], start_V[word + 1])
                place_E = np.searchsorted(document_P[column], index_E[mine])
                found_E = np.append(document_P[column], -1)[place_E] == index_E[mine]
                score_E[mine[found_E]] += weight_P[column][place_E[found_E]]
        return score_E

    def scores(self, query: str) -> FloatArray:
        """score_K of every document; zeros for a query without a known word."""
        known = [token for token in self.settings.words(query) if token in self._index.vocab_dict]
        if not known:
            return np.zeros(len(self.corpus), np.float32)
        return np.asarray(self._index.get_scores(known), np.float32)


def _floor(score_K: FloatArray, k: int) -> float:
    """The k-th highest score, or a little less where that is found faster: the k-th of the highest in k or more blocks,
    which k scores reach."""
    rows = len(score_K) // _BLOCK
    if rows >= k:
        score_K = score_K[: rows * _BLOCK].reshape(rows, _BLOCK).max(1)
    return float(np.partition(score_K, len(score_K) - k)[len(score_K) - k])


# By a model that reads query and document together.


@teachers.register("cross-encoder")
@dataclass(frozen=True, kw_only=True)
class CrossEncoderTeacher:
    """Scores by a reranker, which reads query and document together (docs/rerankers.md).

    model: its folder or hub id: one that was trained here, or any public cross-encoder with one output.
    """

    model: Word

    def open(self, texts: SearchTexts) -> PairScorer:
        """Errors: those of `embedsmith.load_reranker`."""
        return CrossEncoderScorer(texts.open_reranker(self.model), texts.queries, texts.corpus)


@dataclass(frozen=True)
class CrossEncoderScorer(PairScorer):
    """A reranker; all pairs of a part go through it together. Its scores are as its folder has them: a sigmoid of the
    output unless it names another function."""

    model: Reranker
    queries: Sequence[str]
    corpus: Sequence[str]

    def models(self) -> dict[str, str]:
        """A hash of the weights, the tokenizer and what is done to their output."""
        return {"teacher": fingerprint(self.model)}

    def pairs(self, row_E: IndexArray, index_E: IndexArray) -> FloatArray:
        queries, documents = (
            [side[place] for place in places.tolist()]
            for side, places in ((self.queries, row_E), (self.corpus, index_E))
        )
        return np.asarray(self.model.score(queries, documents), np.float32)
