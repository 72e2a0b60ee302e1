"""The texts that negatives are drawn from, each once: in memory; or where they are many in a file, from which each is
read when it is asked for.

FOLDER/texts.utf8       all texts, one behind another, those that come again too
FOLDER/start_K.npy      where the text of each place begins in it, and
FOLDER/end_K.npy        ends
FOLDER/loose_K.npy      its loose id (`selection.loose_id`), shifted into the signed range
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from filelock import FileLock

from embedsmith.core.errors import DataError
from embedsmith.core.files import disk_errors
from embedsmith.core.outputs import atomic_folder, recover
from embedsmith.data import Record
from embedsmith.data.formats.texts import read_texts
from embedsmith.mining.config import Corpus
from embedsmith.mining.selection import loose_id
from embedsmith.search.exact import IndexArray

_ARRAYS = ("start_K", "end_K", "loose_K")


def each_text(records: Iterable[Record], more: Iterable[Corpus]) -> Iterator[str]:
    """The records' positives and negatives, then the files' texts; also those that come again.

    Errors: `DataError` for a file without any.
    """
    for record in records:
        yield from record.positives
        yield from record.negatives
    for corpus in more:
        none = True
        for one in read_texts(corpus.path, column=corpus.column):
            if text := one.text.strip():
                none = False
                yield text
        if none:
            raise DataError("no text in this corpus", where=corpus.path, fix="name another file, or leave it out")


def corpus_texts(records: Iterable[Record], more: Iterable[Corpus]) -> list[str]:
    """The texts in memory. Errors: those of `each_text`."""
    return list(dict.fromkeys(each_text(records, more)))


class StoredTexts(Sequence[str]):
    """The same in a folder; the memory they take is the system's, which takes it back when it needs it."""

    def __init__(self, folder: Path) -> None:
        self._text_S: Any = np.memmap(folder / "texts.utf8", np.uint8, mode="r")
        self._start_K, self._end_K, self.loose_K = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)

    def __len__(self) -> int:
        return len(self._start_K)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        content: bytes = self._text_S[self._start_K[place] : self._end_K[place]].tobytes()
        return content.decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


def stored_texts(records: Iterable[Record], more: Iterable[Corpus], folder: Path) -> StoredTexts:
    """The texts in a folder, written now if they are not there. Of several processes one writes, and the others wait.

    Errors: those of `each_text`; `CheckpointError` for a full disk.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            recover(folder)
            with atomic_folder(folder) as made, disk_errors(folder):
                _write(each_text(records, more), made)
    return StoredTexts(folder)


def _write(texts: Iterable[str], folder: Path) -> None:
    """Texts are told apart by 128 bits of a hash: that two have the same is less likely than that the machine errs."""
    digests, end_N, loose_N = bytearray(), array("q"), array("q")
    size = 0
    with (folder / "texts.utf8").open("wb") as file:
        for text in texts:
            content = text.encode("utf-8", "surrogatepass")
            digests += hashlib.blake2b(content, digest_size=16).digest()
            size += file.write(content)
            end_N.append(size)
            loose_N.append(loose_id(text) >> 1)
        file.write(b"\n")  # an empty file cannot be mapped
    high_N, low_N = np.frombuffer(digests, np.uint64).reshape(-1, 2).T
    order_N = np.lexsort((low_N, high_N))  # stable: equal texts stand in the order in which they came
    again_N = (np.diff(high_N[order_N]) == 0) & (np.diff(low_N[order_N]) == 0)
    kept_K: IndexArray = np.sort(order_N[np.concatenate([[True], ~again_N])]) if len(order_N) else order_N
    end, loose = np.frombuffer(end_N, np.int64), np.frombuffer(loose_N, np.int64)
    start = np.concatenate([np.zeros(1, np.int64), end[:-1]])
    for name, values in zip(_ARRAYS, (start, end, loose), strict=True):
        np.save(folder / f"{name}.npy", values[kept_K])
