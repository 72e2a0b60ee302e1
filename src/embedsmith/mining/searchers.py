"""Searchers: who proposes candidates and who scores them. A model is known here only as an `Encoder`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from embedsmith.core.collectives import objects_of_all_ranks, on_first_rank, rank, world_size
from embedsmith.core.encoder import Encoder, Role, represent
from embedsmith.core.errors import EmbedsmithError, ModelError, SearchError
from embedsmith.core.progress import progress_bar
from embedsmith.core.reps import MultiVector, Representation, Reps, concatenate
from embedsmith.mining.bm25 import Bm25
from embedsmith.mining.config import EmbeddingSearch
from embedsmith.search.approximate import ApproximateIndex
from embedsmith.search.exact import FloatArray, IndexArray, TopK
from embedsmith.search.hybrid import Hybrid

PIECE = 2048
"""Texts a file of kept vectors holds, and documents scored at once."""
_PAIRS = 2**14


class PairScorer(Protocol):
    """Scores of given pairs."""

    def pairs(self, row_E: IndexArray, index_E: IndexArray) -> FloatArray:
        """score_E of query `row_E[e]` with document `index_E[e]`."""
        ...


class Searcher(PairScorer, Protocol):
    def top(self, start: int, stop: int, k: int) -> tuple[FloatArray, IndexArray]:
        """score_Qk, index_Qk of queries `start` to `stop - 1`, best first; index -1 where fewer were found."""
        ...


@dataclass(frozen=True)
class TextReps:
    """The representations of a list of texts under one head, in pieces. With an encoder that keeps what it made
    (`search.cached.CachedEncoder`) no piece is computed twice, by whatever process. `instructions`: the texts' own
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
        return checked(reps, self.head, len(part))

    def part(self, rows: slice) -> TextReps:
        """Some of the texts, each with its instruction."""
        own = None if self.instructions is None else self.instructions[rows]
        return replace(self, texts=self.texts[rows], instructions=own)

    def rows(self, index_E: IndexArray) -> Representation:
        """Representations of the given texts, in that order."""
        piece_E = index_E // PIECE
        parts = [self.piece(int(p) * PIECE).rows(torch.from_numpy(index_E[piece_E == p] % PIECE)) for p in set(piece_E)]
        place_E = np.concatenate([np.flatnonzero(piece_E == p) for p in set(piece_E)])
        return joined(parts).rows(torch.from_numpy(np.argsort(place_E)))

    def compute(self, label: str) -> None:
        """Let every rank compute its share of the pieces. A collective; an error on one rank is one on all."""
        starts = range(0, len(self.texts), PIECE)[rank() :: world_size()]
        failed: EmbedsmithError | None = None
        try:
            with progress_bar(label, len(starts)) as bar:
                for start in starts:
                    self.piece(start)
                    bar.advance()
        except EmbedsmithError as error:
            failed = error
        messages = [message for message in objects_of_all_ranks(None if failed is None else str(failed)) if message]
        if failed is not None:
            raise failed
        if messages:
            raise SearchError(f"another rank failed: {messages[0]}", where=label)


def checked(reps: Reps, head: str, count: int) -> Representation:
    if head not in reps:
        raise ModelError(f"the model gave no {head!r} output", expected=", ".join(reps))
    if len(reps[head]) != count:
        raise ModelError(f"the model gave {len(reps[head])} rows for {count} texts")
    return reps[head]


def joined(parts: Sequence[Representation]) -> Representation:
    """Rows of all parts in order."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Hybrid):
        return Hybrid.join([part for part in parts if isinstance(part, Hybrid)])
    whole: Representation = concatenate([{"all": part} for part in parts])["all"]
    return whole


def fast_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class EmbeddingSearcher:
    """Neighbours by a model's representations: exact in blocks, or from an approximate index."""

    queries: TextReps
    documents: TextReps
    index: ApproximateIndex | None = None

    @staticmethod
    def of(queries: TextReps, documents: TextReps, config: EmbeddingSearch, folder: Path) -> EmbeddingSearcher:
        """Compute what is missing, on all ranks; an approximate index is built once and kept in `folder`."""
        queries.compute("encode queries")
        documents.compute("encode corpus")
        if config.index == "exact":
            return EmbeddingSearcher(queries, documents)
        path = folder / f"{config.index.replace(',', '-')}.faiss"

        def build() -> None:
            if not path.exists():
                ApproximateIndex.build(documents.pieces(), config.index, config.effort).save(path)

        on_first_rank(build)
        return EmbeddingSearcher(queries, documents, ApproximateIndex.load(path, config.effort))

    def top(self, start: int, stop: int, k: int) -> tuple[FloatArray, IndexArray]:
        query = self.queries.rows(np.arange(start, stop))
        if self.index is not None:
            return self.index.top(query, k)
        return top_of_pieces(query, self.documents.pieces(), k)

    def pairs(self, row_E: IndexArray, index_E: IndexArray) -> FloatArray:
        """Piece by piece of the corpus, so that each is read once."""
        score_E = np.zeros(len(row_E), np.float32)
        if len(row_E) == 0:
            return score_E
        rows, place_E = np.unique(row_E, return_inverse=True)
        query = self.queries.rows(rows)
        order = np.argsort(index_E, kind="stable")
        cuts = np.flatnonzero(np.diff(index_E[order] // PIECE)) + 1
        for entries in np.split(order, cuts):
            piece = self.documents.piece(int(index_E[entries[0]]) // PIECE * PIECE)
            for part in np.split(entries, range(_PAIRS, len(entries), _PAIRS)):
                left = query.rows(torch.from_numpy(place_E[part]))
                right = piece.rows(torch.from_numpy(index_E[part] % PIECE))
                score_E[part] = left.paired(right)[0].numpy()
        return score_E


def top_of_pieces(query: Representation, pieces: Iterator[Representation], k: int) -> tuple[FloatArray, IndexArray]:
    """The k best of all pieces, exactly, on the GPU where there is one; only one piece is held at a time (on a GPU as
    many as fill it)."""
    device = fast_device()
    best = TopK(query.map(lambda tensor: tensor.to(device)), k)
    waiting: list[Representation] = []
    for piece in pieces:
        waiting.append(piece)
        if device.type == "cpu" or sum(map(len, waiting)) >= best.block_rows(piece):
            best.add_in_blocks(joined(waiting), _rows(best, piece))
            waiting = []
    if waiting:
        best.add_in_blocks(joined(waiting))
    return best.result()


def _rows(best: TopK, piece: Representation) -> int | None:
    """A piece of vectors is a block as it is; token vectors are cut further."""
    return None if isinstance(piece, MultiVector) else max(best.block_rows(piece), len(piece))


@dataclass(frozen=True)
class Bm25Searcher:
    queries: Sequence[str]
    index: Bm25

    def top(self, start: int, stop: int, k: int) -> tuple[FloatArray, IndexArray]:
        return self.index.top(self.queries[start:stop], k)

    def pairs(self, row_E: IndexArray, index_E: IndexArray) -> FloatArray:
        score_E = np.zeros(len(row_E), np.float32)
        for row in np.unique(row_E):
            mine = row_E == row
            score_E[mine] = self.index.scores(self.queries[int(row)])[index_E[mine]]
        return score_E
