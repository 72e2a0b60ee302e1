"""Asking a language model, whichever it is: prompts in, answers out, each paid for once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from embedsmith.core.errors import CheckpointError
from embedsmith.core.inputs import typed
from embedsmith.curate.keeper import Answer, Purse, Refusal, key_of
from embedsmith.curate.ledger import Ledger, PerRecord, Tools
from embedsmith.data.record import Record
from embedsmith.data.writers import batched

T = TypeVar("T")
Accept = Callable[[str], bool]
"""Whether an answer can be used; one that cannot is asked for again where that may help."""


class Generator(Protocol):
    @property
    def window(self) -> int:
        """How many prompts to hand over at once."""
        ...

    def identity(self) -> object:
        """Everything an answer depends on, besides its prompt."""
        ...

    def answers(self, prompts: Sequence[str], accept: Accept, purse: Purse) -> Iterator[tuple[int, Answer | Refusal]]:
        """(place, answer) of every prompt, in the order in which they come. One that pays for requests asks the
        `purse` before each."""
        ...


@runtime_checkable
class Divisible(Protocol):
    """A generator whose bounds hold for all who ask together."""

    def shared(self, workers: int) -> Any:
        """The generator as one of so many workers has it."""
        ...


def ask_all(
    generator: Generator, prompts: Iterable[tuple[T, str]], accept: Accept, tools: Tools
) -> Iterator[tuple[T, Answer | Refusal]]:
    """Every item with the answer to its prompt, in order. Answers are kept as they come, so that a run that is killed
    asks again only for those under way."""
    with tools.cache("answers") as cache:
        for window in batched(prompts, generator.window):
            keys = [key_of(generator.identity(), prompt) for _, prompt in window]
            known = {key: typed(Answer, value, tools.folder, CheckpointError) for key, value in cache.get(keys).items()}
            tools.purse.count(known, bought=False)
            found: dict[bytes, Answer | Refusal] = {**known}
            wanted = {key: prompt for key, (_, prompt) in zip(keys, window, strict=True) if key not in found}
            order = list(wanted)
            for place, reply in generator.answers(list(wanted.values()), accept, tools.purse):
                found[order[place]] = reply
                if isinstance(reply, Answer):
                    tools.purse.count({order[place]: reply}, bought=True)
                    cache.put({order[place]: vars(reply)})
            yield from ((item, found[key]) for (item, _), key in zip(window, keys, strict=True))


class Asks(Protocol):
    """A step that asks a language model: a chain whose last pass is `Asked(self)`."""

    @property
    def generator(self) -> Any: ...

    def asked(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        """What is made of records and of the answers to what is asked about them."""
        ...


@dataclass(frozen=True)
class Asked(PerRecord):
    """The pass of a step in which a language model is asked. `step`: which one."""

    holds_model: ClassVar[bool] = True

    step: Asks

    def over(self, records: Iterable[Record], ledger: Ledger, tools: Tools, known: None) -> Iterator[Record]:
        return self.step.asked(records, ledger, tools)

    def conclude(self, ledger: Ledger, tools: Tools) -> None:
        ledger.notes["asked"] = tools.purse.bill()

    def shared(self, workers: int) -> Asked:
        step, generator = self.step, self.step.generator
        if not isinstance(generator, Divisible):
            return self
        return Asked(replace(step, generator=generator.shared(workers)))  # type: ignore[type-var]


_BULLET = re.compile(
    r"^(?:[-*•·]+\s+|\(?\d{1,2}[.)、:：]\s*|(?:Q(?:uestion|uery)?|A|Answer|问题|查询|问|答|翻译)\s*\d{0,2}\s*[:：.]\s*)+",
    re.IGNORECASE,
)
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_QUOTES = "\"'`“”‘’「」『』* "


def lines_of(text: str) -> list[str]:
    """The lines of an answer without what models put around them: thoughts, numbers, bullets, quotes, headlines that
    end in a colon. Each once."""
    found = (_BULLET.sub("", line.strip()).strip(_QUOTES) for line in _THOUGHTS.sub("", text).splitlines())
    return list(dict.fromkeys(line for line in found if line and not line.endswith((":", "："))))
