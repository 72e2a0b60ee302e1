"""The texts that calibrated merges read: small samples of training sources, drawn once, with frozen candidates."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from embedsmith.core.encoder import Role
from embedsmith.core.errors import RecipeError
from embedsmith.core.seeds import derive_seed
from embedsmith.core.settings import Count, section
from embedsmith.data import Record, RecordSet, Source, read_source, text_id
from embedsmith.merge.method import Base, Method
from embedsmith.merge.recipe import MergeRecipe

ROLES: tuple[Role, ...] = ("query", "document")
ALIKE = 0.8
"""A graded pair from this score on counts as a query and its answer, where a method needs some."""


@section
@dataclass(frozen=True, kw_only=True)
class Probe:
    """Which texts, and how many.

    `sources`: where they come from. For methods that read every parent on its own task: one a parent in the
    parents' order, or a single one for all. `examples`: at most so many of each source. `negatives`: K, candidates of
    a query beside its own document: its own negatives first, then other records' documents. `seed`: of the sample.
    """

    sources: tuple[Source, ...]
    examples: Count = 512
    negatives: Count = 7
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise RecipeError("probe.sources: at least one source is needed")

    @staticmethod
    def of_recipe(recipe: MergeRecipe, files: Sequence[str]) -> Probe | None:
        """The files named on the command line, else the texts that the recipe's own method reads."""
        if files:
            return Probe(sources=tuple(Source(path=file) for file in files))
        own = getattr(recipe.method, "probe", None)
        return own if isinstance(own, Probe) else None

    def read(self) -> list[RecordSet]:
        """A sample of every source, the same for the same seed."""
        return [
            sample(read_source(source).texts_only("a merge that reads data", source.path), self.examples, self.seed)
            for source in self.sources
        ]

    def of_parents(self, parents: int) -> list[RecordSet]:
        """One sample a parent. Errors: `RecipeError` when the numbers do not fit."""
        sets = self.read()
        if len(sets) not in (1, parents):
            raise RecipeError(f"{len(sets)} probe sources for {parents} parents", expected=f"1 or {parents}")
        return sets * parents if len(sets) == 1 else sets


@dataclass(frozen=True, kw_only=True)
class ProbedMethod(Method):
    """What every merging method that reads texts has.

    `probe`: the texts it reads.
    """

    base: ClassVar[Base] = "optional"

    probe: Probe


def sample(records: RecordSet, count: int, seed: int) -> RecordSet:
    """At most `count` records, in the order of the file."""
    if len(records.records) <= count:
        return records
    rows = random.Random(derive_seed("probe", seed, records.name)).sample(range(len(records.records)), count)
    return replace(records, records=[records.records[row] for row in sorted(rows)])


def texts_of(records: RecordSet) -> list[tuple[str, Role]]:
    """Every distinct text with its role, for methods that need no labels. Both sides of a scored pair are queries."""
    found: dict[tuple[str, Role], None] = {}
    for record in records.records:
        found[record.query, "query"] = None
        for text in record.positives:
            found[text, "query" if record.task == "sts" else "document"] = None
    return list(found)


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
            fix="use a definition that needs no labels: method.definition=embedding",
        )
    lists = []
    for place, record in enumerate(usable):
        chance = random.Random(derive_seed("candidates", seed, place))
        taken = {text_id(text) for text in (*record.positives, record.query)}
        chosen: list[str] = []
        own = [(text_id(text), text) for text in record.negatives]
        for id_, text in [*own, *chance.sample(pool, len(pool))]:
            if len(chosen) == negatives:
                break
            if id_ not in taken:
                taken.add(id_)
                chosen.append(text)
        lists.append(Candidates(record.query, (record.positives[0], *chosen), record.instruction))
    return lists


def _is_answer(record: Record) -> bool:
    """Whether a record's first document answers its query: of scored pairs only those that are alike."""
    score = record.positive_scores[0] if record.positive_scores else None
    return record.task != "sts" or (score is not None and score >= ALIKE)
