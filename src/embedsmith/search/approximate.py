"""Nearest vectors by an index of the FAISS library, for corpora too large to be scored whole: in blocks, which any
number of processes build and search.

FOLDER/trained.faiss        what all blocks share, without vectors: cells, codes; trained on a sample of the corpus
FOLDER/block-000000.faiss   the vectors of the first block,
FOLDER/block-000000.json    its size and theirs: a block without it is not whole

What a block holds depends on the corpus alone, so that whoever builds one builds the same. The lists of cells of all
blocks (`IVF...`) are searched as those of one index, where they lie on the disk; other kinds, such as graphs, block by
block, in memory.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from embedsmith.core.errors import MissingExtraError, SearchError
from embedsmith.core.files import atomic_file
from embedsmith.core.reps import Dense, Representation
from embedsmith.search.exact import FloatArray, IndexArray
from embedsmith.search.top_k import merged_top_k

_BLOCK_BYTES = 2**29
"""Of the vectors of a block, as numbers of 32 bits."""
_RUN = 2048
"""Vectors that lie side by side in a sample; blocks begin at multiples of it."""
_SAMPLE, _PER_CELL = 2**18, 40
"""Vectors to train on: so many, or so many a cell where that is more (FAISS asks for 39)."""
COMPARED = 100
"""Queries on which an approximate search is compared with an exact one, or fewer where there are fewer."""

Rows = Callable[[int, int], Representation]
"""Gives the vectors of some places, from the first to before the last."""


@dataclass
class ApproximateIndex:
    """`count` dense vectors under inner product. `factory` is FAISS's description of an index: `IVF4096,Flat` (cells),
    `IVF4096,PQ64` (cells of compressed vectors), `HNSW32,Flat` (a graph). `effort`: how many candidates a query looks
    at (nprobe of cells, efSearch of a graph). `rows` gives the vectors while the index is built."""

    folder: Path
    factory: str
    count: int
    rows: Rows
    effort: int = 128
    width: int = field(default=0, init=False)
    _open: dict[tuple[int, ...], list[tuple[int, Any]]] = field(default_factory=dict, init=False, repr=False)
    _held: list[Any] = field(default_factory=list, init=False, repr=False)

    def train(self) -> None:
        """Make what all blocks share, unless it is there. Of several processes one works, and the others wait.

        Errors: `MissingExtraError`; `SearchError` for a factory FAISS does not know, or representations that are not
        dense.
        """
        faiss, path = _faiss(), self.folder / "trained.faiss"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "trained.lock"):
            if not path.exists():
                if self.count == 0:
                    raise SearchError("no vectors for an index")
                first_ND = self._vectors(0, min(_RUN, self.count))
                with self._told():
                    index = faiss.index_factory(first_ND.shape[1], self.factory, faiss.METRIC_INNER_PRODUCT)
                    if not index.is_trained:
                        cells = faiss.try_extract_index_ivf(index)
                        index.train(self._sample(max(_SAMPLE, _PER_CELL * (cells.nlist if cells else 0))))
                _write(index, path)
        self.width = self._read(path).d

    def _sample(self, wanted: int) -> FloatArray:
        """Runs of vectors, evenly spaced over the corpus."""
        runs = range(0, self.count, _RUN)
        chosen = runs if self.count <= wanted else runs[:: -(-len(runs) * _RUN // wanted)]
        return np.concatenate([self._vectors(start, min(start + _RUN, self.count)) for start in chosen])

    @property
    def starts(self) -> range:
        """The first place of every block."""
        return range(0, self.count, max(_BLOCK_BYTES // (4 * self.width) // _RUN * _RUN, _RUN))

    def build(self, blocks: Sequence[int]) -> None:
        """Make those of the blocks that are not there. Errors: those of `train`; `CheckpointError` (full disk)."""
        for block in blocks:
            if self._whole(block):
                continue
            start, stop = self._span(block)
            index = self._read(self.folder / "trained.faiss")
            vector_ND = self._vectors(start, stop)
            with self._told():
                if _faiss().try_extract_index_ivf(index) is None:
                    index.add(vector_ND)
                else:
                    index.add_with_ids(vector_ND, np.arange(start, stop))
            path = self._path(block)
            _write(index, path)
            with atomic_file(path.with_suffix(".json")) as file:
                json.dump([stop - start, path.stat().st_size], file)

    def top(self, query: Representation, k: int, blocks: Sequence[int] | None = None) -> tuple[FloatArray, IndexArray]:
        """score_Qk, index_Qk of the best of some blocks (`None`: of all), best first, ties to the lower place; index -1
        where fewer were found. Errors: `SearchError` for queries of another kind or width, and a damaged block."""
        if type(query) is not Dense or query.vector_ND.shape[1] != self.width:
            raise SearchError("queries are not vectors of the index's dimension", expected=f"[N, {self.width}]")
        vector_QD = np.ascontiguousarray(query.vector_ND.float().cpu().numpy())
        empty = np.zeros((len(vector_QD), 0), np.float32), np.zeros((len(vector_QD), 0), np.int64)
        found = [empty, empty]  # of two or more, the merge puts ties into order
        for first, index in self._opened(tuple(range(len(self.starts)) if blocks is None else blocks)):
            score_Qk, index_Qk = index.search(vector_QD, k)
            found.append((score_Qk, np.where(index_Qk >= 0, index_Qk + first, -1)))
        score_Qk, index_Qk = merged_top_k(found, k)
        return np.asarray(score_Qk, np.float32), np.asarray(index_Qk, np.int64)

    def _opened(self, blocks: tuple[int, ...]) -> list[tuple[int, Any]]:
        """Indexes to search, each with the place from which it counts. Cells of all blocks stand behind one another,
        so that a query chooses its cells once."""
        if blocks not in self._open:
            faiss = _faiss()
            whole = self._read(self.folder / "trained.faiss")
            found: list[tuple[int, Any]] = []
            for block in blocks:
                path = self._path(block)
                if not self._whole(block):
                    what = "a part of an index is not there, or not whole"
                    raise SearchError(what, where=path, fix=f"delete {self.folder}")
                found.append((self._span(block)[0], self._read(path, faiss.IO_FLAG_MMAP)))  # lists stay on the disk
            cells = faiss.try_extract_index_ivf(whole)
            if cells is not None and found:
                lists = faiss.InvertedListsPtrVector()
                for _, index in found:
                    lists.push_back(faiss.extract_index_ivf(index).invlists)
                stacked = faiss.HStackInvertedLists(lists.size(), lists.data())
                cells.replace_invlists(stacked, False)
                whole.ntotal = cells.ntotal = sum(index.ntotal for _, index in found)
                self._held += [stacked, *(index for _, index in found)]  # which it reads from
                found = [(0, whole)]
            for _, index in found:
                _set_effort(index, self.effort)
            self._open[blocks] = found
        return self._open[blocks]

    def _whole(self, block: int) -> bool:
        path, (start, stop) = self._path(block), self._span(block)
        try:
            return bool(json.loads(path.with_suffix(".json").read_bytes()) == [stop - start, path.stat().st_size])
        except (OSError, ValueError):
            return False

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:06d}.faiss"

    def _span(self, block: int) -> tuple[int, int]:
        start = self.starts[block]
        return start, min(start + self.starts.step, self.count)

    def _read(self, path: Path, flags: int = 0) -> Any:
        try:
            return _faiss().read_index(str(path), flags)
        except RuntimeError as error:
            what = f"not an index that can be read ({str(error).splitlines()[0][:160]})"
            raise SearchError(what, where=path, fix=f"delete {self.folder}") from error

    def _vectors(self, start: int, stop: int) -> FloatArray:
        found = self.rows(start, stop)
        if type(found) is not Dense:  # its kinds that are compared by distances are none either
            raise SearchError(
                f"an approximate index holds dense vectors, not {type(found).__name__}",
                expected="vectors compared by inner products",
                fix="leave index out: every document is then scored",
            )
        return np.ascontiguousarray(found.vector_ND.float().cpu().numpy())

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors: `SearchError` in place of what FAISS says of a factory."""
        try:
            yield
        except RuntimeError as error:
            raise SearchError(
                f"FAISS cannot make an index {self.factory!r} of {self.count} vectors "
                f"({str(error).splitlines()[0][:160]})",
                expected="a factory string such as IVF1024,Flat or HNSW32,Flat, with fewer cells than vectors",
            ) from error


def found_share(exact_Qk: IndexArray, found_Qk: IndexArray) -> float:
    """Recall: which share of the exact neighbours an approximate search has found, over all queries."""
    pairs = zip(exact_Qk.tolist(), found_Qk.tolist(), strict=True)
    return sum(len(set(wanted) & set(found)) for wanted, found in pairs) / max(exact_Qk.size, 1)


def _set_effort(index: Any, effort: int) -> None:
    cells = _faiss().try_extract_index_ivf(index)
    if cells is not None:
        cells.nprobe = effort
    elif "hnsw" in type(index).__name__.lower():
        index.hnsw.efSearch = effort


def _write(index: Any, path: Path) -> None:
    with atomic_file(path, "wb") as file:
        file.write(_faiss().serialize_index(index).data)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("faiss-cpu", "search") from error
    return faiss
