"""Records to our JSONL."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from embedsmith.core.errors import DataError
from embedsmith.core.files import atomic_file
from embedsmith.data.record import Record


def write_records(path: str | Path, records: Iterable[Record]) -> int:
    """Write our JSONL, gzipped if the name ends in .gz; the file appears whole or not at all. Returns the count.

    What a record does not have is not written. The same records give the same bytes.
    Errors: `DataError` for another extension; `CheckpointError` when the disk is full.
    """
    path = Path(path)
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        raise DataError("records are written as JSON lines", where=path, expected="a name in .jsonl or .jsonl.gz")
    count = 0
    with atomic_file(path, "wb") as file:
        zipped = gzip.GzipFile("", "wb", 6, file, mtime=0) if path.suffix == ".gz" else None
        for record in records:
            line = json.dumps(_plain(record), ensure_ascii=False) + "\n"
            (zipped or file).write(line.encode())
            count += 1
        if zipped is not None:
            zipped.close()
    return count


def _plain(record: Record) -> dict[str, Any]:
    values = {f.name: getattr(record, f.name) for f in fields(Record)}
    return {name: value for name, value in values.items() if value not in (None, (), "") or name == "query"}
