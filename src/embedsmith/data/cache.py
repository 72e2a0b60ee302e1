"""Where converted sources are kept: read once into a store, found again by content, noticed when they change.

CACHE/records/KEY/      a `RecordStore` and the rest of its `RecordSet`; KEY is a hash of the source and how it is read
CACHE/sources/ID.json   what a source looked like when it was last read: sizes and times of its files, and its KEY
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from embedsmith.core.errors import DataError
from embedsmith.core.files import atomic_file, atomic_folder
from embedsmith.core.progress import log
from embedsmith.data.record import Record
from embedsmith.data.source import Change, RecordSet, Shelf, Skipped, Source, source_name
from embedsmith.data.store import RecordStore, StoreWriter

VERSION = 1
"""Of the files in an entry. Another version is another key: old entries are left alone."""

MEMORY_BYTES = 32 * 2**20
"""A source of more bytes than this (compressed kinds count four times) is kept on disk: Python objects of its records
would take about five times as much memory."""

Files = Mapping[str, tuple[int, int]]
"""Size and time of change (ns) of every file of a source, by path."""


def default_cache() -> Path:
    """`embedsmith` in the user's cache folder, as the XDG convention names it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embedsmith"


def belongs_on_disk(source: Source, size: int) -> bool:
    """Whether a source of `size` bytes is kept in the cache instead of in memory: large ones, or where it was asked."""
    return source.cache is not None or size > MEMORY_BYTES


def look(path: Path) -> Files:
    """The files of a file or folder, as they are now."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file): state for file in files if (state := _state(file)) is not None}


def _state(file: Path) -> tuple[int, int] | None:
    try:
        state = file.stat()
    except FileNotFoundError:
        return None
    return state.st_size, state.st_mtime_ns


def weight(files: Files) -> int:
    """Bytes of the texts in some files, roughly: compressed kinds hold about four times their size."""
    return sum(size * (4 if name.lower().endswith((".gz", ".parquet")) else 1) for name, (size, _) in files.items())


@dataclass(frozen=True)
class Sighting:
    """A source as it was when last read. `version` stands for the files of a dataset that is not a local path."""

    path: str
    key: str
    when: str
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    version: str | None = None

    @property
    def size(self) -> int:
        return sum(size for size, _ in self.files.values())


def stored(source: Source, files: Files, version: str | None, convert: Callable[[Shelf], RecordSet]) -> RecordSet:
    """The records of a source from its store; converted now if there is none of this content yet.

    Several processes may ask at once: one converts, the others wait. Errors: `DataError` for a source that changes
    while it is read; `CheckpointError` when the disk is full (nothing is left behind).
    """
    cache = cache_of(source)
    note = _note(cache, source)
    before = last_sighting(source)
    if before is not None and (dict(before.files), before.version) == (dict(files), version):
        entry = cache / "records" / before.key
        if (entry / "set.json").exists():
            return _open(entry)
    key = _key(source, files, version)
    entry = cache / "records" / key
    if before is not None and before.key != key:
        log.warning("%s", change_of(before, files))
    with _locked(entry):
        if not (entry / "set.json").exists():
            _convert(entry, source, files, convert)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with atomic_file(note) as file:
        json.dump(asdict(Sighting(source.path, key, now, dict(files), version)), file)
    return _open(entry)


def change_of(before: Sighting, files: Files) -> str:
    size = sum(size for size, _ in files.values())
    if not files:
        return f"{before.path} has changed since it was read on {before.when}: reading it again"
    how = "grew" if size > before.size else "shrank" if size < before.size else "changed"
    return (
        f"{before.path} {how} since it was read on {before.when} ({before.size:,} to {size:,} bytes): reading it again"
    )


def refuse_vanished(source: Source) -> None:
    """Errors: `DataError` for a local source that is gone but was read before, naming when and what it was."""
    before = last_sighting(source)
    if before is not None and before.files and not Path(source.path).expanduser().exists():
        raise DataError(
            f"the source is gone; on {before.when} it was here, with {before.size:,} bytes",
            where=source.path,
            fix="put it back, or correct the path",
        )


def last_sighting(source: Source) -> Sighting | None:
    try:
        tree = json.loads(_note(cache_of(source), source).read_text(encoding="utf-8"))
        files = {name: (size, time) for name, (size, time) in tree.pop("files").items()}
        return Sighting(**tree, files=files)
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or of another version
        return None


def cache_of(source: Source) -> Path:
    return default_cache() if source.cache is None else Path(source.cache).expanduser()


def _note(cache: Path, source: Source) -> Path:
    where = str(Path(source.path).expanduser().resolve()) if Path(source.path).expanduser().exists() else source.path
    return cache / "sources" / f"{_hash([os.path.abspath(where), _options(source)])}.json"


def _options(source: Source) -> dict[str, Any]:
    """What decides how a source is read; the rest of it only decides what is done with the records."""
    names = ("task", "format", "columns", "score_range", "split", "instruction", "limit", "on_error")
    return {name: getattr(source, name) for name in names} | {"name": source_name(source)}


def _key(source: Source, files: Files, version: str | None) -> str:
    content = [version] if version is not None else [_content(name) for name in files]
    return _hash([VERSION, content, _options(source)])


def _content(name: str) -> str:
    with open(name, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _locked(entry: Path) -> FileLock:
    with atomic_file(entry.parent / ".writable"):  # a folder that cannot be written is one clear error
        pass
    lock = FileLock(f"{entry}.lock")
    try:
        lock.acquire(timeout=0)
        lock.release()
    except Timeout:
        log.info("another process is converting the same source: waiting for it")
    return lock


def _convert(entry: Path, source: Source, files: Files, convert: Callable[[Shelf], RecordSet]) -> None:
    for left in entry.parent.glob(f".{entry.name}.*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    log.info("%s: converting to %s, once", source.path, entry)
    with atomic_folder(entry) as folder:
        shelf = DiskShelf(folder)
        try:
            found = convert(shelf)
        finally:
            shelf.abandon()
        for name, state in files.items():
            if _state(Path(name)) != state:
                raise DataError("the file changed while it was read", where=name, fix="wait until it is whole")
        tree = {name: value for name, value in _tree(found).items() if name != "records"}
        (folder / "set.json").write_text(json.dumps(tree), encoding="utf-8")


def _tree(found: RecordSet) -> dict[str, Any]:
    values = {name: getattr(found, name) for name in found.__dataclass_fields__}
    return values | {"skipped": [asdict(skipped) for skipped in found.skipped]}


def _open(entry: Path) -> RecordSet:
    tree: dict[str, Any] = json.loads((entry / "set.json").read_text(encoding="utf-8"))
    skipped = tuple(Skipped(s["kind"], s["count"], tuple(s["lines"])) for s in tree.pop("skipped"))
    known = tree.pop("score_range")
    return RecordSet(
        **tree | {"labels": tuple(tree["labels"])},
        records=RecordStore(entry),
        skipped=skipped,
        score_range=None if known is None else (known[0], known[1]),
    )


class DiskShelf:
    """Records on their way into a store: written as they come, and once more only if all of them must change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer = StoreWriter(folder / "raw")

    def __len__(self) -> int:
        return len(self._writer)

    def add(self, record: Record, line: int) -> None:
        self._writer.add(record, line)

    def settle(self, change: Change | None) -> tuple[Sequence[Record], str]:
        raw = self.folder / "raw"
        counts = self._writer.close()
        if change is not None:
            before = RecordStore(raw)
            self._writer = StoreWriter(self.folder / "changed")
            for record, line in zip(before, before.lines()):
                if (changed := change(record, int(line))) is not None:
                    self._writer.add(changed, int(line))
            counts = self._writer.close()
        self._promote("raw" if change is None else "changed")
        return RecordStore(self.folder), counts.fingerprint

    def _promote(self, name: str) -> None:
        for file in (self.folder / name).iterdir():
            file.rename(self.folder / file.name)
        for part in ("raw", "changed"):
            for file in (self.folder / part).glob("*"):
                file.unlink()
            if (self.folder / part).exists():
                (self.folder / part).rmdir()

    def abandon(self) -> None:
        self._writer.abandon()
