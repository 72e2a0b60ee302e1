"""Records to our JSONL, or to the Parquet of F2LLM."""

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from embedsmith.core.errors import DataError
from embedsmith.core.files import atomic_file
from embedsmith.core.progress import log
from embedsmith.data.formats.columns import F2LLM_NEGATIVES
from embedsmith.data.record import Record

T = TypeVar("T")
_BLOCK = 10_000


def write_records(path: str | Path, records: Iterable[Record]) -> int:
    """Write our JSONL, gzipped if the name ends in .gz, or with a name in .parquet the raw layout of F2LLM (see
    `write_f2llm`); the file appears whole or not at all. Returns the count of records.

    What a record does not have is not written. The same records give the same bytes.
    Errors: `DataError` for another extension; `CheckpointError` when the disk is full.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        return write_f2llm(path, records)
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        raise DataError(
            "records are written as JSON lines", where=path, expected="a name in .jsonl, .jsonl.gz or .parquet"
        )
    count, names = 0, [f.name for f in fields(Record)]
    as_json = json.JSONEncoder(ensure_ascii=False).encode
    with atomic_file(path, "wb") as file:
        zipped = gzip.GzipFile("", "wb", 6, file, mtime=0) if path.suffix == ".gz" else None
        for record in records:
            values = ((name, getattr(record, name)) for name in names)
            plain = {name: value for name, value in values if value not in (None, (), "") or name == "query"}
            (zipped or file).write((as_json(plain) + "\n").encode())
            count += 1
        if zipped is not None:
            zipped.close()
    return count


def write_f2llm(path: Path, records: Iterable[Record]) -> int:
    """Write query, passage, negative_1 to negative_24: a row for each positive, its instruction in front of the query,
    further negatives left out. Scores and labels have no place there. Returns the count of records.

    Source: the published data of F2LLM (arXiv 2510.02294).
    """
    names = ["query", "passage", *(f"negative_{number}" for number in range(1, F2LLM_NEGATIVES + 1))]
    schema = pa.schema({name: pa.string() for name in names})
    count, rows = 0, 0
    with atomic_file(path, "wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as sink:
        for block in batched(records, _BLOCK):
            cells = [row for record in block for row in _f2llm_rows(record)]
            sink.write_table(pa.table([pa.array(column, pa.string()) for column in zip(*cells)], schema=schema))
            count, rows = count + len(block), rows + len(cells)
    if rows != count:
        log.info("%s: %d rows of %d records, one for each positive", path, rows, count)
    return count


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _f2llm_rows(record: Record) -> list[list[str | None]]:
    if not record.positives:
        raise DataError(f"no passage for {record.query[:60]!r}", where="F2LLM's layout", fix="write .jsonl")
    query = (record.instruction or "") + record.query
    negatives: list[str | None] = list(record.negatives[:F2LLM_NEGATIVES])
    negatives += [None] * (F2LLM_NEGATIVES - len(negatives))
    return [[query, positive, *negatives] for positive in record.positives]
