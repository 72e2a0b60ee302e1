"""Labelled texts as contrastive records, for classification and clustering."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.seeds import derive_seed
from embedsmith.core.shelf import curation_steps
from embedsmith.curate.step import Ledger, Tools
from embedsmith.data.record import Record, text_id


@curation_steps.register(
    "labels_to_pairs",
    formula="positives: texts of the same class; negatives: texts of other classes",
    source="Conan-embedding (arXiv 2408.15710), F2LLM: same label positive, other label negative; how many of each "
    "class are drawn is not published, so that part is reconstructed",
)
@dataclass(frozen=True)
class LabelsToPairs:
    """Give each labelled text positives of its class and negatives of other classes.

    With `with_names` the class's name is the positive and other classes' names are the negatives (the file must name
    its classes); otherwise they are texts. Negatives come from a class drawn first and a text drawn from it, so large
    classes do not crowd out small ones. Draws depend on the seed and the text alone. `pool` bounds how many texts of
    each class are held in memory, a fair sample. `task` of the result: `retrieval` for losses over queries and
    documents, `None` leaves it. Labels stay: mind that other rows of a batch may be of the same class. A text alone in
    its class leaves. Records without a label pass as they are. Reads the records twice.

    F2LLM: 1 negative for classification, 9 for clustering.
    """

    positives: int = 1
    negatives: int = 1
    with_names: bool = False
    task: Literal["retrieval", "classification", "clustering"] | None = "retrieval"
    pool: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.positives < 1 or self.negatives < 0 or self.pool < 2:
            raise RecipeError("labels_to_pairs needs positives >= 1, negatives >= 0, pool >= 2")

    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        pools = _Pools(self.pool, self.seed)
        for record in records:
            if record.label is not None:
                pools.add(record.label, record.query)
        ledger.notes["classes"] = len(pools.texts)
        for record in records:
            ledger.taken += 1
            if record.label is None:
                yield record
                continue
            made = self._named(record, tools.labels) if self.with_names else self._drawn(record, pools)
            if not made.positives:
                ledger.record_left("alone in its class", record)
            else:
                yield made

    def _drawn(self, record: Record, pools: _Pools) -> Record:
        assert record.label is not None
        chance = random.Random(derive_seed(self.seed, text_id(record.query)))
        mine = text_id(record.query)
        own = [text for id_, text in pools.texts[record.label] if id_ != mine]
        positives = chance.sample(own, min(self.positives, len(own)))
        others = [label for label in pools.order if label != record.label]
        known = {mine, *map(text_id, positives)}
        negatives: dict[int, str] = {}
        for _ in range(4 * self.negatives if others else 0):  # a text drawn twice is drawn again, a few times
            id_, text = chance.choice(pools.texts[chance.choice(others)])
            if len(negatives) < self.negatives and id_ not in known:
                negatives.setdefault(id_, text)
        return self._made(record, positives, list(negatives.values()))

    def _named(self, record: Record, names: Sequence[str]) -> Record:
        assert record.label is not None
        if record.label >= len(names):
            raise DataError("the file does not name its classes", fix="give labels as names, or with_names: false")
        chance = random.Random(derive_seed(self.seed, text_id(record.query)))
        others = [name for place, name in enumerate(names) if place != record.label]
        return self._made(record, [names[record.label]], chance.sample(others, min(self.negatives, len(others))))

    def _made(self, record: Record, positives: list[str], negatives: list[str]) -> Record:
        return replace(record, positives=tuple(positives), negatives=tuple(negatives), task=self.task or record.task)


@dataclass
class _Pools:
    """A fair sample of each class's texts, with their ids (reservoir sampling)."""

    size: int
    seed: int
    texts: dict[int, list[tuple[int, str]]] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)

    @property
    def order(self) -> list[int]:
        return sorted(self.texts)

    def add(self, label: int, text: str) -> None:
        held = self.texts.setdefault(label, [])
        self.seen[label] = count = self.seen.get(label, 0) + 1
        if len(held) < self.size:
            held.append((text_id(text), text))
        elif (place := random.Random(derive_seed(self.seed, label, count)).randrange(count)) < self.size:
            held[place] = (text_id(text), text)
