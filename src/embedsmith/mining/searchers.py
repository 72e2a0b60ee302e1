"""Searchers: who proposes candidates and who scores them. A model is known here only as an `Encoder`."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from embedsmith.core.collectives import objects_of_all_ranks, on_first_rank, rank, world_size
from embedsmith.core.encoder import Encoder, Role, hash_of_model, represent
from embedsmith.core.errors import DataError, EmbedsmithError, MissingExtraError, ModelError, SearchError
from embedsmith.core.progress import progress_bar
from embedsmith.core.reps import MultiVector, Representation, Reps, concatenate
from embedsmith.mining.config import Bm25Search, CrossEncoder, EmbeddingSearch, Tokens
from embedsmith.search.approximate import ApproximateIndex
from embedsmith.search.exact import FloatArray, IndexArray, TopK
from embedsmith.search.hybrid import Hybrid

# BM25 through the library bm25s, for scripts with and without spaces.

# Scripts written without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_RUN = re.compile(rf"[{_UNSPACED}]+|[^\W{_UNSPACED}]+")


def tokenize(text: str, tokens: Tokens = "mixed") -> list[str]:
    """Words in lower case. `mixed`: a run of a script without spaces gives its characters and their pairs;
    `characters`: every run does; `words`: none does."""
    found: list[str] = []
    for match in _RUN.finditer(unicodedata.normalize("NFKC", text).casefold()):
        run = match[0]
        if tokens == "words" or (tokens == "mixed" and not _unspaced(run)):
            found.append(run)
        else:
            found.extend(run)
            found.extend(run[place : place + 2] for place in range(len(run) - 1))
    return found


def _unspaced(run: str) -> bool:
    return re.match(f"[{_UNSPACED}]", run) is not None


class Bm25:
    """An index over a corpus. Scores of a query are computed for the whole corpus at a time, [K] numbers.

    Errors: `MissingExtraError`; `DataError` for a corpus without a single token.
    """

    def __init__(self, config: Bm25Search, corpus: Sequence[str]) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise MissingExtraError("bm25s", "search") from error
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # the library sets it to talk about every step
        self._tokens, self._size = config.tokens, len(corpus)
        rows = [tokenize(text, config.tokens) for text in corpus]
        if not any(rows):
            raise DataError("no text of the corpus has a word in it", expected="tokens that fit its script")
        self._index: Any = bm25s.BM25(k1=config.k1, b=config.b)
        self._index.index(rows, show_progress=False)
        self._vocabulary: dict[str, int] = self._index.vocab_dict

    def top(self, queries: Sequence[str], k: int) -> tuple[FloatArray, IndexArray]:
        """score_Qk and index_Qk, ties to the lower index."""
        k = min(k, self._size)
        score_Qk, index_Qk = np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)
        for row, query in enumerate(queries):
            score_K = self.scores(query)
            floor = np.partition(score_K, len(score_K) - k)[len(score_K) - k]
            kept = np.flatnonzero(score_K >= floor)
            order = kept[np.argsort(-score_K[kept], kind="stable")][:k]
            score_Qk[row], index_Qk[row] = score_K[order], order
        return score_Qk, index_Qk

    def scores(self, query: str) -> npt.NDArray[np.float32]:
        """score_K of every document; zeros for a query without a known word."""
        known = [token for token in tokenize(query, self._tokens) if token in self._vocabulary]
        if not known:
            return np.zeros(self._size, np.float32)
        return np.asarray(self._index.get_scores(known), np.float32)


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


# A model that reads query and document together, as a teacher: sentence-transformers' CrossEncoder.

_SCORERS = ("ForSequenceClassification", "ForCausalLM")
"""How the classes end whose weights hold what a score is made of; any other would be given a random classifier."""


@dataclass(frozen=True)
class CrossEncoderModel:
    """A cross-encoder with one output. Its scores are the library's: a sigmoid of the output unless the model's own
    settings name another function."""

    library: Any
    batch_size: int = 32

    @staticmethod
    def load(config: CrossEncoder) -> CrossEncoderModel:
        """Errors: `MissingExtraError`; `ModelError` for a model that cannot be loaded, has no head that was trained to
        score, or gives more than one number a pair."""
        try:
            from sentence_transformers import CrossEncoder as Library
        except ImportError as error:
            raise MissingExtraError("sentence-transformers", "eval") from error
        _refuse_without_scores(config.model)
        try:
            model = Library(config.model)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"sentence-transformers cannot load it: {error}", where=config.model) from error
        if model.num_labels != 1:
            raise ModelError(
                f"the cross-encoder gives {model.num_labels} scores a pair",
                where=config.model,
                expected="one score a pair",
            )
        return CrossEncoderModel(model, config.batch_size)

    def scores(self, pairs: Sequence[tuple[str, str]]) -> FloatArray:
        """score_E of pairs (query, document), in batches of similar length."""
        if not pairs:
            return np.zeros(0, np.float32)
        return np.asarray(self.library.predict(pairs, batch_size=self.batch_size, show_progress_bar=False), np.float32)

    def fingerprint(self) -> str:
        """A hash of the weights, the modules and what is done to their output."""
        return hash_of_model(self.library, repr(self.library), repr(self.library.activation_fn))


def _refuse_without_scores(path: str) -> None:
    """sentence-transformers gives a model without a classifier a random one, whose scores mean nothing."""
    from transformers import AutoConfig

    folder = Path(path).expanduser()
    if folder.is_dir() and (folder / "modules.json").exists() and not (folder / "config.json").exists():
        return  # its first module lies in a folder of its own, as only sentence-transformers writes it
    try:
        classes = AutoConfig.from_pretrained(str(folder) if folder.is_dir() else path).architectures or []
    except (OSError, ValueError) as error:
        raise ModelError(f"its settings cannot be read: {str(error).splitlines()[0]}", where=path) from error
    if classes and not any(name.endswith(_SCORERS) for name in classes):
        raise ModelError(
            f"{classes[0]} has no head that scores pairs",
            where=path,
            expected="a cross-encoder (its config.json names a ...ForSequenceClassification or ...ForCausalLM)",
            fix="for an embedding model as teacher set type: embedding",
        )


@dataclass(frozen=True)
class CrossEncoderScorer:
    """Scores of pairs of given texts; all pairs of a part go through the model together."""

    model: CrossEncoderModel
    queries: Sequence[str]
    corpus: Sequence[str]

    def pairs(self, row_E: IndexArray, index_E: IndexArray) -> FloatArray:
        """score_E of query `row_E[e]` with document `index_E[e]`."""
        return self.model.scores(
            [(self.queries[int(row)], self.corpus[int(index)]) for row, index in zip(row_E, index_E, strict=True)]
        )
