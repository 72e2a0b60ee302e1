"""Records that are like earlier ones: what makes them alike is said once, and found by one process that sees all in
their order, or by many that each see those which could be alike.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsmith.curate.ledger import Ledger, Tools
from embedsmith.data.record import Record

Keys = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]
"""Of records, in an order that is theirs among all."""


class ComparingStep(ABC):
    """A step that takes away records which are like earlier ones that stay.

    Whether one leaves depends on the sketches before it of which one shares a key with it, or with one that shares a
    key with it, and so on: such records are compared in one place, in their order.
    """

    @abstractmethod
    def sketch(self, record: Record) -> Any:
        """What is compared in place of the record; `None` for one that is like no other. It can be pickled."""

    @abstractmethod
    def keys(self, sketch: Any) -> Sequence[int]:
        """Numbers of 64 bits. Records that share none are never alike."""

    @abstractmethod
    def memory(self) -> Callable[[Any], str | None]:
        """A function that is shown one sketch after the other, and says of each which it is like, or `None`: it
        stays."""

    @abstractmethod
    def leave(self, record: Record, like: str, ledger: Ledger) -> None:
        """Write down that a record leaves."""

    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        like_earlier = self.memory()
        for record in records:
            ledger.taken += 1
            sketch = self.sketch(record)
            like = None if sketch is None else like_earlier(sketch)
            if like is None:
                yield record
            else:
                self.leave(record, like, ledger)


def linked(keys: Keys, places: Places) -> tuple[Places, Places]:
    """Pairs of places that share a key: each with the first that has it. `keys` are some, with all who have them."""
    order = np.lexsort((places, keys))
    keys, places = keys[order], places[order]
    first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, np.int64)
    heads = np.repeat(places[first], np.diff(np.r_[first, len(keys)]))
    pairs = np.unique(np.stack([heads, places])[:, heads != places], axis=1)
    return pairs[0], pairs[1]


def linked_groups(ones: Places, others: Places) -> tuple[Places, Places]:
    """The places that are linked to any, ascending, and the number of the group of each: its first place."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    places, numbers = np.unique(np.concatenate([ones, others]), return_inverse=True)
    if not len(places):
        return places, places
    links = coo_array((np.ones(len(ones), bool), (numbers[: len(ones)], numbers[len(ones) :])), (len(places),) * 2)
    _, group = connected_components(links, directed=False)
    _, first = np.unique(group, return_index=True)
    return places, places[first][group]


def leaving(
    comparison: ComparingStep, group_N: Sequence[int], place_N: Sequence[int], sketch_N: Sequence[Any]
) -> Iterator[tuple[int, str]]:
    """(place, what it is like) of the records of whole groups that leave, whatever their order here."""
    rows = sorted(zip(group_N, place_N, range(len(sketch_N)), strict=True))
    for _, members in groupby(rows, key=lambda row: row[0]):
        like_earlier = comparison.memory()
        for _, place, row in members:
            if (like := like_earlier(sketch_N[row])) is not None:
                yield place, like
