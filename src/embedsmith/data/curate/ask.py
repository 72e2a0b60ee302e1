"""Asking a language model, whichever it is: prompts in, answers out, each paid for once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from embedsmith.data.curate.cache import key_of, open_cache
from embedsmith.data.curate.step import Ledger, Tools, in_windows

T = TypeVar("T")
Accept = Callable[[str], bool]
"""Whether an answer can be used; one that cannot is asked for again where that may help."""


@dataclass(frozen=True)
class Answer:
    """What a model said and what it took: requests sent, tokens read and written (counted by the endpoint, or
    estimated from characters), and its cost. `usable` is what `Accept` said."""

    text: str
    usable: bool = True
    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0


@dataclass(frozen=True)
class Refusal:
    """Why there is no answer. Not kept: the next run asks again."""

    reason: str


@dataclass
class Spending:
    """What a step has used up, answers from the cache included: a run that was stopped goes on counting."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0

    def add(self, answer: Answer) -> None:
        self.requests += answer.requests
        self.tokens_in += answer.tokens_in
        self.tokens_out += answer.tokens_out
        self.cost += answer.cost


class Generator(Protocol):
    @property
    def window(self) -> int:
        """How many prompts to hand over at once."""
        ...

    def identity(self) -> object:
        """Everything an answer depends on, besides its prompt."""
        ...

    def answers(
        self, prompts: Sequence[str], accept: Accept, spent: Spending
    ) -> Iterator[tuple[int, Answer | Refusal]]:
        """(place, answer) of every prompt, in the order in which they come. `spent` is what was used before; whoever
        asks adds to it."""
        ...


def ask_all(
    generator: Generator, prompts: Iterable[tuple[T, str]], accept: Accept, ledger: Ledger, tools: Tools
) -> Iterator[tuple[T, Answer | Refusal]]:
    """Every item with the answer to its prompt, in order. Answers are kept as they come, so that a run that is killed
    asks again only for those under way."""
    spent, asked = Spending(), 0
    with open_cache(tools.folder, "answers") as cache:
        for window in in_windows(prompts, generator.window):
            keys = [key_of(generator.identity(), prompt) for _, prompt in window]
            found: dict[bytes, Answer | Refusal] = {}
            for key, value in cache.get(keys).items():
                found[key] = answer = Answer(**value)
                spent.add(answer)
            wanted = {key: prompt for key, (_, prompt) in zip(keys, window, strict=True) if key not in found}
            for place, reply in generator.answers(list(wanted.values()), accept, spent):
                key = list(wanted)[place]
                found[key] = reply
                if isinstance(reply, Answer):
                    asked += 1
                    spent.add(reply)
                    cache.put({key: vars(reply)})
            ledger.notes["asked"] = _bill(spent, asked)
            yield from ((item, found[key]) for (item, _), key in zip(window, keys, strict=True))


def _bill(spent: Spending, asked: int) -> dict[str, Any]:
    return {"answers bought in this run": asked, **vars(spent), "cost": round(spent.cost, 6)}


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
