"""Nearest vectors by an index of the FAISS library, for corpora too large to be scored whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from embedsmith.core.errors import MissingExtraError, SearchError
from embedsmith.core.files import atomic_file
from embedsmith.core.reps import Dense, Representation
from embedsmith.search.exact import FloatArray, IndexArray

_TRAINING_ROWS = 2**18


class ApproximateIndex:
    """Dense vectors under inner product. `factory` is FAISS's description of an index: `HNSW32,Flat` (a graph),
    `IVF4096,Flat` (cells), `IVF4096,PQ64` (cells of compressed vectors). `effort`: how many candidates a query looks
    at (efSearch of a graph, nprobe of cells)."""

    def __init__(self, index: Any, effort: int) -> None:
        self._index = index
        if "hnsw" in type(index).__name__.lower():
            index.hnsw.efSearch = effort
        elif "ivf" in type(index).__name__.lower():
            index.nprobe = effort

    @staticmethod
    def build(pieces: Iterable[Representation], factory: str, effort: int = 128) -> ApproximateIndex:
        """Trains on the first 262,144 vectors, then adds piece by piece.

        Errors: `MissingExtraError`; `SearchError` for a factory FAISS does not know, or representations that are not
        dense.
        """
        faiss = _faiss()
        index: Any = None
        waiting: list[FloatArray] = []
        for piece in pieces:
            if type(piece) is not Dense:  # its kinds that are compared by distances are none either
                raise SearchError(
                    f"an approximate index holds dense vectors, not {type(piece).__name__}",
                    expected="vectors compared by inner products",
                    fix="leave index out: every document is then scored",
                )
            waiting.append(np.ascontiguousarray(piece.vector_ND.float().numpy()))
            if index is not None or sum(map(len, waiting)) >= _TRAINING_ROWS:
                index = _filled(faiss, index, waiting, factory)
                waiting = []
        if waiting or index is None:
            index = _filled(faiss, index, waiting, factory)
        return ApproximateIndex(index, effort)

    def top(self, query: Representation, k: int) -> tuple[FloatArray, IndexArray]:
        """score_Qk, index_Qk, best first; -1 where fewer were found."""
        if not isinstance(query, Dense) or query.vector_ND.shape[1] != self._index.d:
            raise SearchError("queries are not vectors of the index's dimension", expected=f"[N, {self._index.d}]")
        vector_QD = np.ascontiguousarray(query.vector_ND.float().numpy())
        score_Qk, index_Qk = self._index.search(vector_QD, k)
        return np.asarray(score_Qk, np.float32), np.asarray(index_Qk, np.int64)

    def save(self, path: Path) -> None:
        with atomic_file(path, "wb") as file:
            file.write(_faiss().serialize_index(self._index).tobytes())

    @staticmethod
    def load(path: Path, effort: int = 128, count: int | None = None) -> ApproximateIndex:
        """Errors: `SearchError` for what is no index, or not one of `count` vectors."""
        faiss = _faiss()
        try:
            index = faiss.deserialize_index(np.fromfile(path, np.uint8))
        except (OSError, RuntimeError) as error:
            raise SearchError(f"not an index that can be read ({error})", where=path, fix="delete it") from error
        if count is not None and index.ntotal != count:
            raise SearchError(f"an index of {index.ntotal} vectors", where=path, expected=str(count), fix="delete it")
        return ApproximateIndex(index, effort)


def _filled(faiss: Any, index: Any, vectors: list[FloatArray], factory: str) -> Any:
    if not vectors:
        raise SearchError("no vectors for an index")
    vector_ND = np.concatenate(vectors)
    try:
        if index is None:
            index = faiss.index_factory(vector_ND.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(vector_ND)
        index.add(vector_ND)
    except RuntimeError as error:
        raise SearchError(
            f"FAISS cannot make an index {factory!r} of {len(vector_ND)} vectors ({str(error).splitlines()[0][:160]})",
            expected="a factory string such as HNSW32,Flat or IVF1024,Flat, with fewer cells than vectors",
        ) from error
    return index


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("faiss-cpu", "search") from error
    return faiss
