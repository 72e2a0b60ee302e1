"""What a plan must know of every row (who it shares a text with, and how long it is), and how rows change places with
others until no two rows of a batch share a text."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from embedsmith.core.progress import progress_bar
from embedsmith.core.tokens import IntArray
from embedsmith.data.record import Record, Text, TokenIds, text_id

BYTES_PER_TOKEN = 4
"""Of UTF-8: about right for English word pieces, and for Chinese, where a character is three bytes and a token."""


@dataclass(frozen=True)
class RowFacts:
    """Facts of N rows, in their order.

    - `query_id_N`: text id of each query;
    - `positive_id_P[offset_N1[n]:offset_N1[n + 1]]`: text ids of the positives of row n; `offset_N1` has N + 1 entries;
    - `length_N`: tokens of the longest text of the row (query, positives, negatives), as M3 groups rows: counted
      where a token cache knows them or a tokenizer is given, otherwise estimated by `estimated_tokens`, not cut at any
      maximum.
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


Lengths = Callable[[Sequence[Record[str]]], npt.NDArray[np.int32]]
"""Tokens of the longest text of each of some records."""
_COUNTED = 512  # records whose tokens are counted together


def row_facts(records: Sequence[Record[Text]], count: Lengths | None = None) -> RowFacts:
    """The facts of all rows: those that the records bring, otherwise from one pass over the texts. `count`: counts
    the tokens of records that are not tokens already; without it they are estimated."""
    if count is not None and len(records) and not isinstance(records[0].query, TokenIds):
        facts, texts = row_facts(records), cast(Sequence[Record[str]], records)
        counted: list[npt.NDArray[np.int32]] = []
        with progress_bar("count tokens", len(records), visible=None if len(records) > 10_000 else False) as bar:
            for start in range(0, len(records), _COUNTED):
                some = [texts[row] for row in range(start, min(start + _COUNTED, len(records)))]
                counted.append(count(some))
                bar.advance(len(some))
        return replace(facts, length_N=np.concatenate(counted))
    if isinstance(records, HasFacts):
        return records.facts()
    query_ids, positive_ids, ends, lengths = array("q"), array("q"), array("q", [0]), array("i")
    for record in records:
        query_ids.append(text_id(record.query))
        for text in record.positives:
            positive_ids.append(text_id(text))
        ends.append(len(positive_ids))
        lengths.append(max(map(estimated_tokens, (record.query, *record.positives, *record.negatives))))
    return RowFacts(np.asarray(query_ids), np.asarray(positive_ids), np.asarray(ends), np.asarray(lengths, np.int32))


def estimated_tokens(text: Text) -> int:
    """Tokens of a text with its two special ones, guessed from its size (UTF-8 bytes / 4, rounded up, plus 2), or
    counted where a token cache has them."""
    if isinstance(text, TokenIds):
        return len(text.ids)
    size = len(text) if text.isascii() else len(text.encode())
    return -(-size // BYTES_PER_TOKEN) + 2


Ints = npt.NDArray[np.integer]
ROUNDS = 100
PATIENCE, PATIENCE_FOR_FEW = 6, 30
"""Rounds without fewer clashes after which the rest is given up: there are more such rows than batches. A few rows
take more rounds to find a place, and their rounds are as cheap."""


@dataclass(frozen=True)
class Shared:
    """The texts that several of N rows have among their queries and positives, numbered from 0 to `texts` - 1.

    Row n has `text_E[offset_N1[n]:offset_N1[n + 1]]`, each once; `row_E` is the row of each entry. Queries and
    positives count alike: a query that is another row's positive would be contrasted with itself. `most`: no batch
    without a text that repeats has more rows, because there are no more distinct queries, or positives.
    """

    texts: int
    row_E: npt.NDArray[np.int32]
    text_E: npt.NDArray[np.int32]
    offset_N1: npt.NDArray[np.int32]
    most: int

    @staticmethod
    def of(facts: RowFacts) -> Shared:
        rows = np.arange(len(facts), dtype=np.int32)
        id_E = np.concatenate([facts.query_id_N, facts.positive_id_P])
        row_E = np.concatenate([rows, np.repeat(rows, np.diff(facts.offset_N1))])
        sorted_E = np.sort(id_E)
        repeated = np.unique(sorted_E[1:][sorted_E[1:] == sorted_E[:-1]])
        if len(repeated) == 0:
            return Shared(0, rows[:0], rows[:0], np.zeros(len(facts) + 1, np.int32), len(facts))
        place_E = np.searchsorted(repeated, id_E)
        found_E = repeated[np.minimum(place_E, len(repeated) - 1)] == id_E
        # One number a (row, text): `unique` leaves each once, rows ascending.
        pair_E = np.unique(row_E[found_E].astype(np.int64) * len(repeated) + place_E[found_E])
        row_E, text_E = (part.astype(np.int32) for part in np.divmod(pair_E, len(repeated)))
        several_E = np.bincount(text_E, minlength=len(repeated))[text_E] > 1  # not only twice in the same row
        row_E, text_E = row_E[several_E], text_E[several_E]
        offset_N1 = np.zeros(len(facts) + 1, np.int32)
        np.cumsum(np.bincount(row_E, minlength=len(facts)), out=offset_N1[1:])
        count_N = np.diff(facts.offset_N1)
        most = len(np.unique(facts.query_id_N))
        if count_N.all():
            most = min(most, len(np.unique(facts.positive_id_P)))
        return Shared(len(repeated) if len(row_E) else 0, row_E, text_E, offset_N1, most)

    def clashes(self, rows: Ints, batch_R: Ints, seated_E: IntArray) -> npt.NDArray[np.bool_]:
        """Whether each row would find one of its texts in the batch it goes to."""
        count_R = self.offset_N1[rows + 1] - self.offset_N1[rows]
        owner = np.repeat(np.arange(len(rows)), count_R)  # the place in `rows` that each entry belongs to
        first = np.cumsum(count_R) - count_R
        entry = np.arange(len(owner)) - first[owner] + self.offset_N1[rows][owner]
        code = batch_R[owner].astype(np.int64) * self.texts + self.text_E[entry]
        place = np.minimum(np.searchsorted(seated_E, code), len(seated_E) - 1)
        return np.bincount(owner, weights=seated_E[place] == code, minlength=len(rows)) > 0


@dataclass
class Seating:
    """Rows on positions: `row_P` is a permutation; `batch_P` the batch of a position, `batches` where it is in none;
    rows may change places within a section, which ends before the position `stop_X` and begins where the one before
    ends."""

    row_P: Ints
    batch_P: npt.NDArray[np.int32]
    batches: int
    stop_X: IntArray

    def separate(self, shared: Shared, chance: np.random.Generator) -> Ints:
        """Move rows until no batch holds a text twice; returns the rows that still clash with one that stays.

        Every round, each row that shares a text with an earlier one of its batch proposes to change places with a
        random row of its section; the change is made if both are free of clashes at their new places. A text of more
        rows than there are batches cannot be seated: then some rows are returned.
        """
        if shared.texts == 0:
            return np.zeros(0, np.int64)
        position_N = np.empty(len(self.row_P), np.int32)
        position_N[self.row_P] = np.arange(len(self.row_P), dtype=np.int32)
        by_chance_E = chance.permutation(len(shared.row_E))  # which of two clashing rows may stay
        row_E, text_E = shared.row_E[by_chance_E], shared.text_E[by_chance_E]
        fewest, since = len(row_E) + 1, 0
        clashing: Ints = np.zeros(0, np.int64)
        for _ in range(ROUNDS):
            code_E = self.batch_P[position_N[row_E]].astype(np.int64) * shared.texts + text_E
            clashing, seated_E = _clashing(code_E, row_E, self.batches * shared.texts)
            since = 0 if len(clashing) < fewest else since + 1
            fewest = min(fewest, len(clashing))
            if len(clashing) == 0 or since == (PATIENCE if len(clashing) > 100 else PATIENCE_FOR_FEW):
                break
            self._change_places(position_N, clashing, shared, seated_E, chance)
        return clashing

    def _change_places(
        self, position_N: Ints, rows: Ints, shared: Shared, seated_E: IntArray, chance: np.random.Generator
    ) -> None:
        here = position_N[rows].astype(np.int64)
        section = np.searchsorted(self.stop_X, here, side="right")
        start = np.concatenate([[0], self.stop_X])[section]
        there = start + (chance.random(len(rows)) * (self.stop_X[section] - start)).astype(np.int64)
        _, first = np.unique(there, return_index=True)
        free = np.zeros(len(rows), bool)
        free[first] = True
        free &= ~np.isin(there, here) & (self.batch_P[there] != self.batch_P[here])
        rows, here, there = rows[free], here[free], there[free]
        others = self.row_P[there]
        fits = ~shared.clashes(rows, self.batch_P[there], seated_E)
        fits &= ~shared.clashes(others, self.batch_P[here], seated_E)
        rows, others, here, there = rows[fits], others[fits], here[fits], there[fits]
        self.row_P[here], self.row_P[there] = others, rows
        position_N[others], position_N[rows] = here, there


def _clashing(code_E: IntArray, row_E: Ints, limit: int) -> tuple[Ints, IntArray]:
    """The rows with a (batch, text) that another row has before them; and all taken (batch, text), sorted."""
    order_E = np.argsort(code_E, kind="stable")
    sorted_E = code_E[order_E]
    seated = int(np.searchsorted(sorted_E, limit))
    again = sorted_E[1:seated] == sorted_E[: max(seated - 1, 0)]
    return np.unique(row_E[order_E[1:seated][again]]), sorted_E[:seated]
