"""Labelled texts as contrastive records, for classification and clustering."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field

from embedsmith.core.errors import DataError
from embedsmith.core.seeds import derive_seed
from embedsmith.core.settings import Count
from embedsmith.core.shelf import curation_steps
from embedsmith.curate.ledger import Ledger, PerRecord, Tools
from embedsmith.data.record import Record, text_id


@curation_steps.register(
    "labels_to_pairs",
    formula="positives: texts of the same class; negatives: texts of other classes",
    source="Conan-embedding (arXiv 2408.15710), F2LLM: same label positive, other label negative; how many of each "
    "class are drawn is not published, so that part is reconstructed",
)
@dataclass(frozen=True)
class LabelsToPairs(PerRecord):
    """Give each labelled text positives of its class and negatives of other classes.

    Negatives come from a class drawn first and a text drawn from it, so large classes do not crowd out small ones.
    Draws depend on the seed and the text alone. Labels stay: mind that other rows of a batch may be of the same class.
    A text alone in its class leaves. Records without a label pass as they are. Reads the records twice.

    `positives`: texts of its class for each text.
    `negatives`: texts of other classes for each text; F2LLM takes 1 for classification, 9 for clustering.
    `with_names`: the class's name is the positive and other classes' names are the negatives (the file must name its
    classes), instead of texts.
    `task`: of the result: `retrieval` for losses over queries and documents, `None` leaves it.
    `pool`: how many texts of each class are held in memory, a fair sample.
    `seed`: of all draws.
    """

    positives: Count = 1
    negatives: Annotated[int, Field(ge=0)] = 1
    with_names: bool = False
    task: Literal["retrieval", "classification", "clustering"] | None = "retrieval"
    pool: Annotated[int, Field(ge=2)] = 2000
    seed: int = 0

    @property
    def surveyed(self) -> bool:
        return True

    def survey(self, records: Iterable[Record], tools: Tools) -> _Pools:
        pools = _Pools(self.pool, self.seed)
        for record in records:
            if record.label is not None:
                pools.add(record.label, record.query)
        return pools

    def prepare(self, ledger: Ledger, tools: Tools, surveys: Sequence[_Pools]) -> _Pools:
        pools = _Pools(self.pool, self.seed)
        for survey in surveys:
            pools.merge(survey)
        ledger.notes["classes"] = len(pools.sample)
        return pools

    def over(self, records: Iterable[Record], ledger: Ledger, tools: Tools, known: _Pools) -> Iterator[Record]:
        for record in records:
            ledger.taken += 1
            if record.label is None:
                yield record
                continue
            draw = self._names if self.with_names else self._texts
            positives, negatives = draw(record, record.label, known, tools.labels)
            if not positives:
                ledger.record_left("alone in its class", record)
                continue
            task = self.task or record.task
            yield replace(record, positives=tuple(positives), negatives=tuple(negatives), task=task)

    def _texts(self, record: Record, label: int, pools: _Pools, names: Sequence[str]) -> tuple[list[str], list[str]]:
        mine = text_id(record.query)
        chance = random.Random(derive_seed(self.seed, mine))
        own = [text for id_, text in pools.texts[label] if id_ != mine]
        positives = chance.sample(own, min(self.positives, len(own)))
        others = [other for other in pools.order if other != label]
        known = {mine, *map(text_id, positives)}
        negatives: dict[int, str] = {}
        for _ in range(4 * self.negatives if others else 0):  # a text drawn twice is drawn again, a few times
            id_, text = chance.choice(pools.texts[chance.choice(others)])
            if len(negatives) < self.negatives and id_ not in known:
                negatives.setdefault(id_, text)
        return positives, list(negatives.values())

    def _names(self, record: Record, label: int, pools: _Pools, names: Sequence[str]) -> tuple[list[str], list[str]]:
        if label >= len(names):
            raise DataError("the file does not name its classes", fix="give labels as names, or with_names: false")
        chance = random.Random(derive_seed(self.seed, text_id(record.query)))
        others = [name for place, name in enumerate(names) if place != label]
        return [names[label]], chance.sample(others, min(self.negatives, len(others)))


@dataclass
class _Pools:
    """A fair sample of each class's different texts, with their ids: those with the lowest hashes, in that order,
    whatever the order in which they came."""

    size: int
    seed: int
    sample: defaultdict[int, dict[int, tuple[int, str]]] = field(default_factory=lambda: defaultdict(dict))

    @cached_property
    def texts(self) -> dict[int, list[tuple[int, str]]]:
        """By class. To be asked for when all are in."""
        return {label: [held[rank] for rank in sorted(held)] for label, held in self.sample.items()}

    @cached_property
    def order(self) -> list[int]:
        return sorted(self.sample)

    def add(self, label: int, text: str) -> None:
        id_ = text_id(text)
        self.sample[label].setdefault(derive_seed(self.seed, label, id_), (id_, text))
        if len(self.sample[label]) > 2 * self.size:
            self._keep(label)

    def merge(self, other: _Pools) -> None:
        for label, held in other.sample.items():
            self.sample[label] = held | self.sample[label]
            self._keep(label)

    def _keep(self, label: int) -> None:
        held = self.sample[label]
        self.sample[label] = {rank: held[rank] for rank in sorted(held)[: self.size]}
