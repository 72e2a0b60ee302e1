"""Where converted sources are kept: read once into a store, found again by content, noticed when they change.

CACHE/records/KEY/      a `RecordStore` and the rest of its `RecordSet`; KEY is a hash of the source and how it is read
CACHE/sources/ID.json   what a source looked like when it was last read: sizes and times of its files, and its KEY
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from embedsmith.core.errors import DataError
from embedsmith.core.files import atomic_file
from embedsmith.core.inputs import read_json, read_typed
from embedsmith.core.outputs import atomic_folder
from embedsmith.core.progress import log
from embedsmith.core.remote import cache_home
from embedsmith.data.source import RecordSet, Skipped, Source, source_name
from embedsmith.data.store import RecordStore, StoreWriter

STORE_VERSION = 2
"""Of the files in an entry. Another version is another key: old entries are left alone."""

MEMORY_BYTES = 32 * 2**20
"""A source of more bytes than this (compressed kinds count four times) is kept on disk: Python objects of its records
would take about five times as much memory."""

Files = Mapping[str, tuple[int, int]]
"""Size and time of change (ns) of every file of a source, by path."""


def belongs_on_disk(source: Source, size: int) -> bool:
    """Whether a source of `size` bytes is kept in the cache instead of in memory: large ones, or where it was asked."""
    return source.cache is not None or size > MEMORY_BYTES


def file_states(path: Path) -> Files:
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


def refuse_vanished(source: Source) -> None:
    """Errors: `DataError` for a local source that is gone but was read before, naming when and what it was."""
    before = Sighting.last(_note(source))
    if before is not None and before.files and not Path(source.path).expanduser().exists():
        raise DataError(
            f"the source is gone; on {before.when} it was here, with {before.size:,} bytes",
            where=source.path,
            fix="put it back, or correct the path",
        )


def stored(
    source: Source,
    files: Files,
    version: str | None,
    convert: Callable[[StoreWriter], RecordSet[Any]],
    *,
    tokens: bool = False,
) -> RecordSet[Any]:
    """The records of a source from its store; converted now if there is none of this content yet. `tokens`: whether
    they hold token ids.

    Several processes may ask at once: one converts, the others wait. Errors: `DataError` for a source that changes
    while it is read; `CheckpointError` when the disk is full (nothing is left behind).
    """
    note, kept = _note(source, tokens), _cache(source) / "records"
    now = Sighting(source.path, "", datetime.now(UTC).isoformat(timespec="seconds"), dict(files), version)
    before = Sighting.last(note)
    unchanged = before is not None and (before.files, before.version) == (now.files, version)
    if before is not None and unchanged and (kept / before.key / "set.json").exists():
        return _open(kept / before.key)
    content = [version] if version is not None else [_content(name) for name in files]
    now = replace(now, key=_hash([STORE_VERSION, content, _options(source, tokens)]))
    if before is not None and before.key != now.key:
        log.warning("%s", before.change(now))
    entry = kept / now.key
    with _locked(entry):
        if not (entry / "set.json").exists():
            _convert(entry, source, files, convert, tokens)
    with atomic_file(note) as file:
        json.dump(asdict(now), file)
    return _open(entry)


@dataclass(frozen=True)
class Sighting:
    """A source as it was when last read. `version` stands for the files of a dataset that is not a local path."""

    path: str
    key: str
    when: str
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    version: str | None = None

    @staticmethod
    def last(note: Path) -> Sighting | None:
        try:
            tree = read_json(note)
            files = {name: (size, time) for name, (size, time) in tree.pop("files").items()}
            return Sighting(**tree, files=files)
        except (DataError, ValueError, TypeError, KeyError, AttributeError):  # none yet, or of another version
            return None

    @property
    def size(self) -> int:
        return sum(size for size, _ in self.files.values())

    def change(self, now: Sighting) -> str:
        """What has happened to the source since, in a sentence."""
        read = f"since it was read on {self.when}"
        if not now.files:
            return f"{self.path} has changed {read}: reading it again"
        how = "grew" if now.size > self.size else "shrank" if now.size < self.size else "changed"
        return f"{self.path} {how} {read} ({self.size:,} to {now.size:,} bytes): reading it again"


def _cache(source: Source) -> Path:
    """The folder that the source names, else the user's."""
    if source.cache is not None:
        return Path(os.path.expanduser(source.cache))
    return cache_home()


def _note(source: Source, tokens: bool = False) -> Path:
    """The file that says what the source looked like when it was last read."""
    here = Path(source.path).expanduser()
    where = os.path.abspath(str(here.resolve()) if here.exists() else source.path)
    return _cache(source) / "sources" / f"{_hash([where, _options(source, tokens)])}.json"


def _options(source: Source, tokens: bool) -> dict[str, Any]:
    """What decides how a source is read; the rest of it only decides what is done with the records."""
    names = ("task", "format", "columns", "score_range", "split", "instruction", "limit", "on_error")
    options = {name: getattr(source, name) for name in names} | {"name": source_name(source)}
    if source.instruction_separator is not None:
        options["instruction_separator"] = source.instruction_separator
    return options | ({"tokens": "of one table"} if tokens else {})  # before, they lay in two


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


def _convert(
    entry: Path, source: Source, files: Files, convert: Callable[[StoreWriter], RecordSet[Any]], tokens: bool
) -> None:
    for left in entry.parent.glob(f".{entry.name}.*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    log.info("%s: converting to %s, once", source.path, entry)
    with atomic_folder(entry) as folder:
        writer = StoreWriter(folder, tokens=tokens)
        try:
            found = convert(writer)
        finally:
            writer.abandon()
        for name, state in files.items():
            if _state(Path(name)) != state:
                raise DataError("the file changed while it was read", where=name, fix="wait until it is whole")
        kept = _Set(**{f.name: getattr(found, f.name) for f in fields(_Set)})
        (folder / "set.json").write_text(json.dumps(asdict(kept)), encoding="utf-8")


@dataclass(frozen=True)
class _Set:
    """What `set.json` holds of a `RecordSet`."""

    name: str
    task: str
    fingerprint: str
    skipped: tuple[Skipped, ...]
    format: str
    labels: tuple[str, ...]
    score_range: tuple[float, float] | None
    scores: str
    left_out: dict[str, int]


def _open(entry: Path) -> RecordSet[Any]:
    kept = read_typed(entry / "set.json", _Set, fix=f"delete the folder {entry}: the source is converted again")
    return RecordSet(**vars(kept), records=RecordStore(entry))
