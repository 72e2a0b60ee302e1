"""What a curation runs on. Each engine is a value on the shelf of engines; `start` gives what divides the work."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

from embedsmith.curate.comparing import ComparingStep
from embedsmith.curate.ledger import Ledger, PerRecord, Tools
from embedsmith.curate.parts import Advance, PartWork, StageParts

T = TypeVar("T")


class Running(Protocol):
    """Divides the parts of a curation among whatever there is."""

    def equip(self, step: PerRecord, tools: Tools) -> tuple[PerRecord, Tools]:
        """The step and its tools as each of its workers has them."""
        ...

    def each(
        self, work: PartWork[T], parts: Iterable[int], advance: Advance, *, holds_model: bool = False
    ) -> Iterator[T]:
        """What the work makes of each part, in their order."""
        ...

    def without_like(
        self,
        comparison: ComparingStep,
        source: StageParts,
        target: StageParts,
        parts: Iterable[int],
        advance: Advance,
        examples: int,
    ) -> Iterator[Ledger]:
        """Write each part without the records that are like earlier ones, of any part; their ledgers, in the order of
        the parts."""
        ...


class CurationEngine(Protocol):
    def start(self, folder: Path) -> AbstractContextManager[Running]:
        """`folder`: where the parts lie."""
        ...
