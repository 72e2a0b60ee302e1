"""What a plan must know of every row, and nothing else: who it shares a text with, and how long it is."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from embedsmith.core.tokens import IntArray
from embedsmith.data.record import Record, text_id

BYTES_PER_TOKEN = 4
"""Of UTF-8: about right for English word pieces, and for Chinese, where a character is three bytes and a token."""


@dataclass(frozen=True)
class RowFacts:
    """Facts of N rows, in their order.

    - `query_id_N`: text id of each query;
    - `positive_id_P[offset_N1[n]:offset_N1[n + 1]]`: text ids of the positives of row n; `offset_N1` has N + 1 entries;
    - `length_N`: tokens of the longest text of the row (query, positives, negatives), as M3 groups rows: counted
      where a token cache knows them, otherwise estimated by `estimated_tokens`. Not cut at any maximum.
    """

    query_id_N: IntArray
    positive_id_P: IntArray
    offset_N1: IntArray
    length_N: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.query_id_N)

    def take(self, rows: IntArray) -> RowFacts:
        """The facts of some rows, in the order given."""
        count_N = np.diff(self.offset_N1)[rows]
        offset_N1 = np.concatenate([[0], np.cumsum(count_N)]).astype(np.int64)
        within_P = np.arange(offset_N1[-1]) - np.repeat(offset_N1[:-1], count_N)
        positive_id_P = self.positive_id_P[np.repeat(self.offset_N1[:-1][rows], count_N) + within_P]
        return RowFacts(self.query_id_N[rows], positive_id_P, offset_N1, self.length_N[rows])

    @staticmethod
    def concatenate(parts: Sequence[RowFacts]) -> RowFacts:
        counts = np.concatenate([np.diff(part.offset_N1) for part in parts])
        return RowFacts(
            np.concatenate([part.query_id_N for part in parts]),
            np.concatenate([part.positive_id_P for part in parts]),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            np.concatenate([part.length_N for part in parts]),
        )


@runtime_checkable
class HasFacts(Protocol):
    """Records that come with their facts, from a store that kept them or a view of several."""

    def facts(self) -> RowFacts: ...


def row_facts(records: Sequence[Record]) -> RowFacts:
    """The facts of all rows: those that the records bring, otherwise from one pass over the texts."""
    if isinstance(records, HasFacts):
        return records.facts()
    return facts_of(records)


def facts_of(records: Iterable[Record]) -> RowFacts:
    """The facts of rows, read once in their order."""
    query_ids, positive_ids, ends, lengths = array("q"), array("q"), array("q", [0]), array("i")
    for record in records:
        query_ids.append(text_id(record.query))
        for text in record.positives:
            positive_ids.append(text_id(text))
        ends.append(len(positive_ids))
        lengths.append(max(map(estimated_tokens, (record.query, *record.positives, *record.negatives))))
    return RowFacts(np.asarray(query_ids), np.asarray(positive_ids), np.asarray(ends), np.asarray(lengths, np.int32))


def estimated_tokens(text: str) -> int:
    """Tokens of a text with its two special ones, guessed from its size: UTF-8 bytes / 4, rounded up, plus 2."""
    size = len(text) if text.isascii() else len(text.encode())
    return -(-size // BYTES_PER_TOKEN) + 2
