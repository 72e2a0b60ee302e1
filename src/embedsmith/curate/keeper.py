"""What is paid for once: scores and answers kept by key in a file that survives a kill at any moment, and the purse of
a step, which all that ask for it share.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedsmith.core.errors import CheckpointError


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


_COUNTING = threading.Lock()


@dataclass
class Purse:
    """What a step has spent and may still spend, whoever of its workers asks. Answers count once each, by their keys,
    however often they are read again; a request reserves the most that it can cost before it is sent."""

    spent: Spending = field(default_factory=Spending)
    bought: int = 0
    requests: int = 0
    cost: float = 0.0
    _counted: set[bytes] = field(default_factory=set)

    def reserve(self, cost: float, max_requests: int | None, max_cost: float | None) -> bool:
        """Whether one more request that costs at most so much may be sent; if so, it is counted as sent."""
        with _COUNTING:
            if max_requests is not None and self.requests >= max_requests:
                return False
            if max_cost is not None and self.cost + cost > max_cost:
                return False
            self.requests += 1
            self.cost += cost
            return True

    def give_back(self, cost: float) -> None:
        """What was reserved and not spent."""
        with _COUNTING:
            self.cost -= cost

    def count(self, answers: Mapping[bytes, Answer], bought: bool) -> None:
        """Answers as they come: bought just now, with what was reserved for them, or kept from before."""
        with _COUNTING:
            for key, answer in answers.items():
                if key in self._counted:
                    continue
                self._counted.add(key)
                self.spent.add(answer)
                self.bought += bought
                if not bought:
                    self.requests += answer.requests
                    self.cost += answer.cost

    def bill(self) -> dict[str, Any]:
        """For the report."""
        return {"answers bought in this run": self.bought, **vars(self.spent), "cost": round(self.spent.cost, 6)}
