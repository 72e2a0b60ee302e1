"""The texts data methods look at: small samples of training sources, drawn once, with frozen candidates."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from embedsmith.core.encoder import Role
from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import section
from embedsmith.core.seeds import derive_seed
from embedsmith.data import Record, RecordSet, Source, read_source, text_id

ROLES: tuple[Role, ...] = ("query", "document")
ALIKE = 0.8
"""A graded pair from this score on counts as a query and its answer, where a method needs some."""


@section
@dataclass(frozen=True, kw_only=True)
class Probe:
    """Which texts, and how many.

    `sources`: where they come from: for methods that look at every parent on its own task, one a parent in the
    parents' order, or a single one for all. `examples`: of each source. `negatives`: K, candidates of a query beside
    its own document: its own negatives first, then other records' documents.
    """

    sources: tuple[Source, ...]
    examples: int = 512
    negatives: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise RecipeError("probe.sources: at least one source is needed")
        if self.examples < 1 or self.negatives < 1:
            raise RecipeError(f"examples {self.examples}, negatives {self.negatives}", expected="at least 1")

    def read(self) -> list[RecordSet]:
        """A sample of every source, the same for the same seed."""
        return [sample(read_source(source), self.examples, self.seed) for source in self.sources]

    def of_parents(self, parents: int) -> list[RecordSet]:
        """One sample a parent. Errors: `RecipeError` when the numbers do not fit."""
        sets = self.read()
        if len(sets) not in (1, parents):
            raise RecipeError(f"{len(sets)} probe sources for {parents} parents", expected=f"1 or {parents}")
        return sets * parents if len(sets) == 1 else sets


def sample(records: RecordSet, count: int, seed: int) -> RecordSet:
    """At most `count` records, in the order of the file."""
    if len(records.records) <= count:
        return records
    rows = random.Random(derive_seed("probe", seed, records.name)).sample(range(len(records.records)), count)
    return replace(records, records=[records.records[row] for row in sorted(rows)])


@dataclass(frozen=True)
class Candidates:
    """One query, its instruction, and its frozen list of documents: the right one first."""

    query: str
    documents: tuple[str, ...]
    instruction: str | None = None


def frozen_candidates(records: RecordSet, negatives: int, seed: int) -> list[Candidates]:
    """The candidate lists of the per-query losses: d+ and K others, drawn once.

    Scored pairs take part from a score of 0.8 on. A text that is one of the query's positives is never a negative; a
    pool with fewer than K others gives shorter lists.
    Errors: `RecipeError` for records without any query and document.
    """
    usable = [record for record in records.records if record.positives and _is_answer(record)]
    pool = list({text_id(record.positives[0]): record.positives[0] for record in usable}.items())
    if len(pool) < 2:
        raise RecipeError(
            f"{records.name} has {len(pool)} documents that answer a query",
            expected="at least 2: retrieval records, or scored pairs of which some are alike",
            fix="use a definition that needs no labels: definition=embedding",
        )
    return [
        _candidates(record, pool, negatives, random.Random(derive_seed("candidates", seed, n)))
        for n, record in enumerate(usable)
    ]


def _is_answer(record: Record) -> bool:
    if record.task != "sts":
        return True
    score = record.positive_scores[0] if record.positive_scores else None
    return score is not None and score >= ALIKE


def _candidates(record: Record, pool: Sequence[tuple[int, str]], count: int, chance: random.Random) -> Candidates:
    taken = {text_id(text) for text in (*record.positives, record.query)}
    chosen: list[str] = []
    others = (pool[place] for place in chance.sample(range(len(pool)), len(pool)))
    for id_, text in (*((text_id(text), text) for text in record.negatives), *others):
        if len(chosen) == count:
            break
        if id_ not in taken:
            taken.add(id_)
            chosen.append(text)
    return Candidates(record.query, (record.positives[0], *chosen), record.instruction)


def texts_of(records: RecordSet) -> list[tuple[str, Role]]:
    """Every distinct text with its role, for methods that need no labels. Both sides of a scored pair are queries."""
    found: dict[tuple[str, Role], None] = {}
    for record in records.records:
        found[record.query, "query"] = None
        for text in record.positives:
            found[text, "query" if record.task == "sts" else "document"] = None
    return list(found)
