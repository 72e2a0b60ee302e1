"""`read_source`: any source of a recipe to its records, in memory or on disk as its size asks."""

from __future__ import annotations

from pathlib import Path

from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import log
from embedsmith.data.cache import belongs_on_disk, files_of, refuse_vanished, stored, weight
from embedsmith.data.formats.columns import FORMATS
from embedsmith.data.record import Text
from embedsmith.data.source import MemoryShelf, RecordSet, Source, open_source, read_rows
from embedsmith.data.stream import stream_source
from embedsmith.data.token_records import is_token_cache, read_tokens


def read_source(source: Source) -> RecordSet[Text]:
    """Read, check and rescale all records of a source, or find them in the cache if they were read before.

    Errors: `DataError` naming file and line: every kind of fault once, with its count and first lines; or the source
    that is gone, or changes while it is read. `CheckpointError` when the disk is full.
    """
    if source.format is not None and source.format not in FORMATS:
        raise RecipeError(f"unknown format {source.format!r}", expected=f"one of {', '.join(FORMATS)}")
    if source.streaming:
        return stream_source(source)
    path = Path(source.path).expanduser()
    if is_token_cache(path):
        return read_tokens(source)
    if path.exists():
        files = files_of(path)
        if not belongs_on_disk(source, weight(files)):
            return read_rows(source, open_source(source), MemoryShelf())
        return _told(source, stored(source, files, None, lambda shelf: read_rows(source, open_source(source), shelf)))
    refuse_vanished(source)
    rows = open_source(source)
    if rows.version is None or not belongs_on_disk(source, rows.size):
        return read_rows(source, rows, MemoryShelf())
    return _told(source, stored(source, {}, rows.version, lambda shelf: read_rows(source, rows, shelf)))


def _told(source: Source, found: RecordSet) -> RecordSet:
    """Rows left out are named in every run, not only in the one that converted the source."""
    for skipped in found.skipped:
        lines = ", ".join(map(str, skipped.lines))
        log.warning("%s: %d rows are left out: %s (lines %s)", source.path, skipped.count, skipped.kind, lines)
    return found
