"""One pass over the rows of a source: which rows make which batch.

How many batches a pass has, and of how many rows, depends on the source and the recipe alone: so the place of a step
in its pass is arithmetic. Which rows meet is drawn anew for every pass. Nothing here depends on the number of ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from embedsmith.core.seeds import derive_seed
from embedsmith.core.tokens import IntArray
from embedsmith.data.plan.config import PlanConfig
from embedsmith.data.plan.separate import Ints, RowFacts, Seating, Shared

GROWTH = 1.15
"""From one edge of automatic length groups to the next: texts of a group differ in length by 15 % at most."""
BATCHES_OF_A_GROUP = 4
"""An automatic group with fewer batches is put together with the next: its rows would meet each other every epoch."""
TRIED, ATTEMPTS = 4, 8
"""Passes that a reduced batch is tried on before it is taken, and how often the rows of such a pass are seated anew
where so few clash (`ATTEMPTS` at most): where all batches must hold all texts, not every order finds a place for all.
"""
SMALL = 20_000
"""Rows of a source up to which its batches are reduced: every size that is tried seats all rows anew."""
RowsOfLength = Callable[[int], int]
Order = Callable[[np.random.Generator], Ints]
"""A permutation of all rows, drawn with a generator alone: of records that do not come in any order alike."""


@dataclass(frozen=True)
class Pass:
    """The rows of a pass: batch b is `row_P[start[b]:start[b] + kept[b]]`, as many more up to `start[b + 1]` share a
    text with one of those, and rows from `start[-1]` on fill no batch. `sequence`: the order in which batches come."""

    row_P: Ints
    start: IntArray
    kept: Ints
    sequence: Ints

    @property
    def clashing(self) -> int:
        """Rows that are left out because they share a text with another of their batch."""
        return int(self.start[-1]) - int(np.sum(self.kept))


@dataclass(frozen=True)
class Cut:
    """The shape of every pass over N rows: groups from short to long, `batches_G[g]` batches of `rows_G[g]` rows.

    What does not fill a batch of a group goes to the next group; what the last group has left over is left out of
    the pass (other rows each time). `group_N` is `None` where there is one group. `small`: there are fewer rows than a
    batch should have, and the one batch has what there is, or (`padded`) repeats rows. `instead_of`: the rows that
    the largest batch should have had, where too many share a text for that (`fitted`).
    """

    size: int
    rows_G: tuple[int, ...]
    batches_G: tuple[int, ...]
    group_N: npt.NDArray[np.int16] | None = None
    shared: Shared | None = None
    small: bool = False
    padded: bool = False
    order: Order | None = None
    instead_of: int | None = None

    @cached_property
    def batches(self) -> int:
        return sum(self.batches_G)

    def draw(self, seed: int, source: int, visit: int) -> Pass:
        """The batches of one pass: a function of the arguments alone."""
        chance = np.random.default_rng(derive_seed(seed, "rows", source, visit))
        rows_B = np.repeat(self.rows_G, self.batches_G)
        start = np.concatenate([[0], np.cumsum(rows_B)]).astype(np.int64)
        row_P, kept = self._seated(rows_B, start, chance)
        for _ in range(ATTEMPTS if self.instead_of else 0):
            if not 0 < start[-1] - kept.sum() <= ATTEMPTS:
                break
            row_P, kept = max((row_P, kept), self._seated(rows_B, start, chance), key=lambda one: int(one[1].sum()))
        sequence = np.arange(len(rows_B)) if self.group_N is None else chance.permutation(len(rows_B))
        return Pass(row_P, start, kept, sequence)

    def _seated(self, rows_B: Ints, start: IntArray, chance: np.random.Generator) -> tuple[Ints, Ints]:
        """(rows in the order of batches, how many of each batch are kept): all of them in a new order."""
        if self.order is None:  # row numbers in four bytes where they fit: a permutation is kept for every source
            order_N: Ints = np.arange(self.size, dtype=np.int32 if self.size < 2**31 else np.int64)
            chance.shuffle(order_N)
        else:
            order_N = self.order(chance)
        if self.padded:
            order_N = np.resize(order_N, int(start[-1]))
        row_P, stop_X = self._by_group(order_N)
        kept = rows_B
        if self.shared is not None and self.shared.texts:
            batch_P = np.full(len(row_P), len(rows_B), np.int32)
            batch_P[: start[-1]] = np.repeat(np.arange(len(rows_B), dtype=np.int32), rows_B)
            seating = Seating(row_P, batch_P, len(rows_B), stop_X)
            row_P, kept = _set_apart(seating, rows_B, seating.separate(self.shared, chance))
        return row_P, kept

    def _by_group(self, order_N: Ints) -> tuple[Ints, IntArray]:
        """(rows in the order of groups, where the rows of each group end). What a group has left over comes first in
        the next, so that only one batch mixes both; the last group ends with what is left out."""
        if self.group_N is None:
            return order_N, np.asarray([len(order_N)])
        pieces: list[Ints] = []
        carried = order_N[:0]
        in_order = self.group_N[order_N]
        for group, (rows, batches) in enumerate(zip(self.rows_G, self.batches_G, strict=True)):
            pool = np.concatenate([carried, order_N[in_order == group]])
            pieces.append(pool[: rows * batches])
            carried = pool[rows * batches :]
        pieces[-1] = np.concatenate([pieces[-1], carried])
        return np.concatenate(pieces), np.cumsum([len(piece) for piece in pieces])


def cut(
    size: int,
    batch_size: int | None,
    texts: int,
    config: PlanConfig,
    facts: RowFacts | None,
    apart: bool,
    at_most: int | None = None,
) -> Cut:
    """The shape of the passes over a source. `batch_size=None`: from the token budget; `texts`: those of a row;
    `apart`: rows of a batch share no text; `at_most`: of which a batch has so many. Lengths are those of `facts`, cut
    by the caller at the model's maximum."""
    shared = Shared.of(facts) if facts is not None and apart else None
    if facts is None or not config.by_length:
        assert batch_size is not None
        return _whole(size, min(batch_size, at_most or batch_size), config, shared)
    rows_of = _rows_of_length(batch_size, texts, config, at_most)
    edges = config.lengths if isinstance(config.lengths, tuple) else _auto_edges(facts.length_N)
    least = 1 if isinstance(config.lengths, tuple) else BATCHES_OF_A_GROUP
    group_N, longest_G = _groups(facts.length_N, edges, rows_of, least)
    while True:
        rows_G = tuple(rows_of(longest) for longest in longest_G)
        batches_G, carried = [], 0
        for own, rows in zip(np.bincount(group_N, minlength=len(longest_G)), rows_G, strict=True):
            count, carried = divmod(int(own) + carried, rows)
            batches_G.append(count)
        if batches_G[-1] > 0 or len(longest_G) == 1:
            break
        longest_G = [*longest_G[:-2], longest_G[-1]]  # otherwise the longest rows would never be seen
        group_N = np.minimum(group_N, len(longest_G) - 1)
    if batches_G[-1] == 0:
        return _whole(size, rows_G[-1], config, shared)
    return Cut(size, rows_G, tuple(batches_G), group_N.astype(np.int16) if len(rows_G) > 1 else None, shared)


def _whole(size: int, batch_size: int, config: PlanConfig, shared: Shared | None) -> Cut:
    """One group. A source smaller than its batch makes one batch: of what it has, or padded with repeated rows."""
    if size >= batch_size:
        return Cut(size, (batch_size,), (size // batch_size,), None, shared)
    if config.small == "pad":
        return Cut(size, (batch_size,), (1,), small=True, padded=True)
    return Cut(size, (size,), (1,), None, shared, small=True)


def fitted(whole: Cut, clashing: int, reduced: Callable[[int], Cut], seed: int, source: int) -> Cut:
    """The shape of the passes over a source whose rows share texts: `whole`, the first pass of which leaves out so many
    rows as `clashing` for their texts; or `reduced(rows)`, of smaller batches.

    They are reduced where no batch of that size can be without a text that repeats, or more than half of the rows
    would be left out of a pass: to the most rows of which no pass tried leaves one out for its texts; where there is
    no such number above 1 (a text is in too many rows), to the most of which half of the rows are seen. It stays
    `whole` where nothing helps, and for a source of more rows than `SMALL`. It depends on the source and the seed
    alone, so all ranks agree.
    """
    assert whole.shared is not None
    wanted, most = max(whole.rows_G), whole.shared.most
    if whole.size > SMALL or (wanted <= most and clashing <= whole.size / 2):
        return whole
    most_repeated = int(np.bincount(whole.shared.text_E).max())
    second: Cut | None = None
    rows = min(wanted, most)
    while rows > 1:
        shape = replace(reduced(rows), instead_of=wanted)
        in_a_batch = int(np.dot(shape.rows_G, shape.batches_G))
        at_least = most_repeated - shape.batches - (whole.size - in_a_batch)
        if at_least <= (0 if second else whole.size / 2):
            clashing = shape.draw(seed, source, 0).clashing
            if clashing == 0 and not any(shape.draw(seed, source, visit).clashing for visit in range(1, TRIED)):
                return shape
            if second is None and clashing <= whole.size / 2:
                second = shape
        rows -= max(rows // 8, 1)
    return second or whole


def _rows_of_length(batch_size: int | None, texts: int, config: PlanConfig, at_most: int | None) -> RowsOfLength:
    """Rows of a batch whose longest text has so many tokens."""
    if at_most is not None:
        rows_of = _rows_of_length(batch_size, texts, config, None)
        return lambda length: min(rows_of(length), at_most)
    if config.batch_sizes is not None and isinstance(config.lengths, tuple):
        edges, table = np.asarray(config.lengths), config.batch_sizes
        return lambda length: table[int(np.searchsorted(edges, length, side="right"))]
    if batch_size is not None:
        return lambda length: batch_size
    assert config.batch_tokens is not None
    budget, multiple = config.batch_tokens, config.multiple
    return lambda length: _shareable(budget // (max(length, 1) * texts), multiple)


def _shareable(rows: int, multiple: int) -> int:
    """The most rows, up to those given, that are a multiple of `multiple`, or else divide it; 1 at least."""
    if rows >= multiple:
        return rows // multiple * multiple
    return max(count for count in range(1, max(rows, 1) + 1) if multiple % count == 0)


def _auto_edges(length_N: npt.NDArray[np.int32]) -> tuple[int, ...]:
    edges, edge, longest = [], 8.0, int(length_N.max(initial=1))
    while edge <= longest:
        edges.append(round(edge))
        edge = max(edge * GROWTH, edge + 1)
    return tuple(edges)


def _groups(
    length_N: npt.NDArray[np.int32], edges: tuple[int, ...], rows_of: RowsOfLength, least: int
) -> tuple[Ints, list[int]]:
    """(group of each row, longest length of each group); a group with fewer than `least` batches joins the next."""
    place_N = np.searchsorted(np.asarray(edges, np.int64), length_N, side="right")
    count_X = np.bincount(place_N, minlength=len(edges) + 1)
    longest_X = np.zeros(len(count_X), np.int64)
    np.maximum.at(longest_X, place_N, length_N)
    group_X = np.zeros(len(count_X), np.int64)
    longest_G: list[int] = []
    waiting = 0
    for place in np.flatnonzero(count_X):
        group_X[place] = len(longest_G)
        waiting += int(count_X[place])
        if waiting >= (least * rows_of(int(longest_X[place])) if least > 1 else 1):
            longest_G.append(int(longest_X[place]))
            waiting = 0
    if waiting and longest_G:
        group_X = np.minimum(group_X, len(longest_G) - 1)
        longest_G[-1] = int(longest_X.max())
    # Groups that joined the next carry its number, because it was given before the number was used up.
    return group_X[place_N], longest_G or [int(longest_X.max())]


def _set_apart(seating: Seating, rows_B: Ints, clashing: Ints) -> tuple[Ints, Ints]:
    """Rows that clash go to the end of their batch, and do not count as kept."""
    if len(clashing) == 0:
        return seating.row_P, rows_B
    clashing_N = np.zeros(len(seating.row_P), bool)
    clashing_N[clashing] = True
    clashing_P = clashing_N[seating.row_P]
    order_P = np.lexsort((clashing_P, seating.batch_P))
    seated_P = clashing_P & (seating.batch_P < seating.batches)
    return seating.row_P[order_P], rows_B - np.bincount(seating.batch_P[seated_P], minlength=seating.batches)
