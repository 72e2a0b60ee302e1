"""Asking a language model, whichever it is: prompts in, answers out, each paid for once.

Answers, and scores of other models, are kept by key in a file that survives a kill at any moment.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from embedsmith.core.errors import CheckpointError
from embedsmith.core.inputs import typed
from embedsmith.curate.ledger import Ledger, Tools
from embedsmith.data.writers import batched

T = TypeVar("T")
Accept = Callable[[str], bool]
"""Whether an answer can be used; one that cannot is asked for again where that may help."""


def key_of(*parts: object) -> bytes:
    """A 16-byte key that depends on every part."""
    return hashlib.blake2b(json.dumps(parts, ensure_ascii=False).encode(), digest_size=16).digest()


class Cache:
    """Key to JSON value, in SQLite: written at once, memory independent of its size. One process writes at a time."""

    def __init__(self, connection: sqlite3.Connection, path: Path | None) -> None:
        self._connection, self._path = connection, path

    @staticmethod
    @contextmanager
    def open(folder: Path | None, name: str) -> Iterator[Cache]:
        """The cache `name` of a folder, or one in memory.

        Errors: `CheckpointError` for a full disk, a damaged file, or one that another process is writing to.
        """
        path = None if folder is None else folder / f"{name}.sqlite"
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        with _named(path):
            connection = sqlite3.connect(path or ":memory:", timeout=10)
        try:
            with _named(path), connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("CREATE TABLE IF NOT EXISTS cache (key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID")
            yield Cache(connection, path)
        finally:
            connection.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """The known ones of `keys`."""
        found: dict[bytes, Any] = {}
        with _named(self._path):
            for start in range(0, len(keys), 500):
                some = keys[start : start + 500]
                marks = ",".join("?" * len(some))
                rows = self._connection.execute(f"SELECT key, value FROM cache WHERE key IN ({marks})", some)
                found.update((bytes(key), json.loads(value)) for key, value in rows)
        return found

    def put(self, values: Mapping[bytes, Any]) -> None:
        """Keep the values; they are on the disk when this returns."""
        rows = ((key, json.dumps(value, ensure_ascii=False)) for key, value in values.items())
        with _named(self._path), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO cache VALUES (?, ?)", rows)


@contextmanager
def _named(path: Path | None) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, ValueError, RecursionError) as error:
        kind = getattr(error, "sqlite_errorname", "")  # SQLite says no more of a quota or a limit than of a full disk
        raise CheckpointError(
            f"cannot use the cache ({error})",
            where=path,
            fix="free some space (or raise the quota, or ulimit -f), then run the same command again"
            if kind == "SQLITE_FULL" or kind.startswith("SQLITE_IOERR")
            else "make sure no other curation writes to this folder; a damaged file can be deleted, it costs only time",
        ) from error


@dataclass(frozen=True)
class Answer:
    """What a model wrote and what it took: requests sent, tokens read and written (counted by the endpoint, or
    estimated from characters), and its cost. `usable` is the verdict of `Accept`."""

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
        """(place, answer) of every prompt, in the order in which they come. `spent` is what was used before; the
        caller adds to it."""
        ...


def ask_all(
    generator: Generator, prompts: Iterable[tuple[T, str]], accept: Accept, ledger: Ledger, tools: Tools
) -> Iterator[tuple[T, Answer | Refusal]]:
    """Every item with the answer to its prompt, in order. Answers are kept as they come, so that a run that is killed
    asks again only for those under way."""
    spent, asked = Spending(), 0
    with Cache.open(tools.folder, "answers") as cache:
        for window in batched(prompts, generator.window):
            keys = [key_of(generator.identity(), prompt) for _, prompt in window]
            found: dict[bytes, Answer | Refusal] = {}
            for key, value in cache.get(keys).items():
                found[key] = answer = typed(Answer, value, tools.folder, CheckpointError)
                spent.add(answer)
            wanted = {key: prompt for key, (_, prompt) in zip(keys, window, strict=True) if key not in found}
            for place, reply in generator.answers(list(wanted.values()), accept, spent):
                key = list(wanted)[place]
                found[key] = reply
                if isinstance(reply, Answer):
                    asked += 1
                    spent.add(reply)
                    cache.put({key: vars(reply)})
            bill = {"answers bought in this run": asked, **vars(spent), "cost": round(spent.cost, 6)}
            ledger.notes["asked"] = bill
            yield from ((item, found[key]) for (item, _), key in zip(window, keys, strict=True))


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
