"""What was paid for once: scores and answers by key, in a file that survives a kill at any moment."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
        rows: Iterable[tuple[bytes, str]] = (
            (key, json.dumps(value, ensure_ascii=False)) for key, value in values.items()
        )
        with _named(self._path), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO cache VALUES (?, ?)", rows)


@contextmanager
def open_cache(folder: Path | None, name: str) -> Iterator[Cache]:
    """The cache `name` of a folder, or one in memory. Errors: `CheckpointError` for a full disk, a damaged file, or one
    that another process is writing to."""
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


@contextmanager
def _named(path: Path | None) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        full = "full" in str(error)
        raise CheckpointError(
            f"cannot use the cache ({error})",
            where=path,
            fix="free some space, then run the same command again"
            if full
            else "make sure no other curation writes to this folder; a damaged file can be deleted, it costs only time",
        ) from error
