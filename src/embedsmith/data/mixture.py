"""Records of one source or several as one sequence, without copying: a share of the rows, or sources put together."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.tokens import IntArray
from embedsmith.data.plan.separate import RowFacts, row_facts
from embedsmith.data.record import OneByOne, Record, Text, typed_for_source
from embedsmith.data.source import RecordSet
from embedsmith.data.stream import HasOrder

_ONE = float(2**63)
"""Text ids lie below it."""


@dataclass(frozen=True)
class Selected(OneByOne[Text]):
    """Some rows of other records, in the order of `rows`."""

    records: Sequence[Record[Text]]
    rows: IntArray
    known: RowFacts

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, place: int) -> Record[Text]:
        return self.records[int(self.rows[place])]

    def facts(self) -> RowFacts:
        return self.known


@dataclass(frozen=True)
class Joined(OneByOne[Text]):
    """The rows of several sequences, one after the other; `names` are those of their sources."""

    pieces: tuple[Sequence[Record[Text]], ...]
    names: tuple[str, ...]

    @cached_property
    def stop(self) -> IntArray:
        """Where the rows of each piece end."""
        return np.cumsum([len(piece) for piece in self.pieces])

    def __len__(self) -> int:
        return int(self.stop[-1])

    def row(self, place: int) -> Record[Text]:
        piece = int(np.searchsorted(self.stop, place, side="right"))
        return self.pieces[piece][place - int(self.stop[piece]) + len(self.pieces[piece])]

    def facts(self) -> RowFacts:
        return RowFacts.concatenate([row_facts(piece) for piece in self.pieces])


def part_of(found: RecordSet[Text], part: tuple[float, float] | None) -> RecordSet[Text]:
    """The rows whose query hashes into `part`, a range [from, to) of [0, 1): the same rows in every run, whatever
    their order; rows of one query stay together, so that no query is both trained on and validated on.

    Errors: `RecipeError` for a range that is none, or for a stream; `DataError` if no row falls into it.
    """
    if part is None:
        return found
    low, high = part
    if not 0 <= low < high <= 1:
        raise RecipeError(f"part {list(part)} of {found.name}", expected="[from, to] with 0 <= from < to <= 1")
    if isinstance(found.records, HasOrder):
        raise RecipeError(f"part of the stream {found.name}: it would be read whole", fix="leave streaming or part out")
    facts = row_facts(found.records)
    share_N = facts.query_id_N / _ONE
    rows = np.flatnonzero((share_N >= low) & ((share_N < high) | (high == 1)))
    if len(rows) == 0:
        raise DataError(
            f"no row falls into part {list(part)}",
            where=found.name,
            fix=f"widen it {typed_for_source('part=[0, 0.5]')}, or evaluate.validation.N.part where it validates",
        )
    digest = hashlib.blake2b(f"{found.fingerprint} {low} {high}".encode(), digest_size=16).hexdigest()
    return replace(found, records=Selected(found.records, rows, facts.take(rows)), fingerprint=digest)


def joined(sets: Sequence[RecordSet[Text]]) -> RecordSet[Text]:
    """Sources of one task as one, named after all of them; those that were joined before are taken apart."""
    digest = hashlib.blake2b(" ".join(one.fingerprint for one in sets).encode(), digest_size=16).hexdigest()
    pieces: list[Sequence[Record[Text]]] = []
    names: list[str] = []
    for one in sets:
        pieces += one.records.pieces if isinstance(one.records, Joined) else [one.records]
        names += one.records.names if isinstance(one.records, Joined) else [one.name]
    return replace(
        sets[0],
        name="+".join(names),
        records=Joined(tuple(pieces), tuple(names)),
        fingerprint=digest,
        tokens=next((one.tokens for one in sets if one.tokens is not None), None),
        skipped=tuple(skipped for one in sets for skipped in one.skipped),
    )
