"""The rates of a plan, measured here by the verbs themselves on a few thousand of the recipe's own texts.

A verb is run on more and more texts until a run takes some seconds. What the last run took over the one before is the
time of a text; the rest is what every run takes. Nothing is kept.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from embedsmith.core.progress import log
from embedsmith.data.record import Record
from embedsmith.data.writers import write_records
from embedsmith.search import exact_top_k

SIZES = (64, 256, 1024, 4096, 16384, 65536)
"""Rows of the runs."""
PATIENCE = 3.0
"""Seconds of a run after which no longer one is made."""


@dataclass(frozen=True)
class Line:
    """Seconds of n rows: `fixed` + n x `each`; bytes on the disk: n x `bytes_each`. `basis`: how that was found, by
    runs of `sizes` rows."""

    fixed: float
    each: float
    bytes_each: float
    basis: str
    sizes: tuple[int, int]

    def seconds(self, rows: float) -> float:
        return self.fixed + rows * self.each


def measured_line(what: str, run: Callable[[int, Path], object], patience: float = PATIENCE) -> Line:
    """`run(rows, folder)` is done in an empty folder each time, which it leaves full of what it wrote."""
    known: list[tuple[int, float, int]] = []
    for rows in SIZES:
        with tempfile.TemporaryDirectory(prefix="embedsmith-plan-") as name:
            begun = time.perf_counter()
            run(rows, Path(name))
            took = time.perf_counter() - begun
            known.append((rows, took, size_of(Path(name))))
        if took > patience and len(known) > 1:
            break
    (few, short, small), (many, long, large) = known[-2:]
    each = max(long - short, 0.0) / (many - few)
    basis = f"{what} on {few:,} and {many:,} rows took {short:.2f} s and {long:.2f} s here"
    log.info("%s", basis)
    return Line(max(long - many * each, 0.0), each, max(large - small, 0) / (many - few), basis, (few, many))


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def more_of(records: Sequence[Record], count: int) -> Iterator[Record]:
    """So many records, no two of them equal: after the last one they come again, with a number behind every text."""
    for place, record in enumerate(islice(cycle(records), count)):
        turn = place // len(records)
        if turn == 0:
            yield record
            continue
        positives, negatives = (tuple(f"{t} {turn}" for t in side) for side in (record.positives, record.negatives))
        yield replace(record, query=f"{record.query} {turn}", positives=positives, negatives=negatives)


@contextmanager
def rows_beside(records: Sequence[Record], count: int, folder: Path) -> Iterator[Path]:
    """So many of them in a file beside `folder`, whose size is then what a verb wrote."""
    path = folder.with_name(f"{folder.name}-rows.jsonl")
    try:
        write_records(path, more_of(records, count))
        yield path
    finally:
        path.unlink(missing_ok=True)


def disk_rate(folder: Path, size: int = 2**26) -> float:
    """Bytes a second that reach the disk below a folder that exists, or the nearest one that does."""
    while not folder.is_dir():
        folder = folder.parent
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        begun = time.perf_counter()
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return size / (time.perf_counter() - begun)


def search_rate(width: int) -> float:
    """Multiplications and additions a second of an exact search here, by its own code."""
    random = np.random.default_rng(0)
    query, document = (random.standard_normal((n, width), dtype=np.float32) for n in (512, 16384))
    exact_top_k(query[:8], document[:1024], 100)
    begun = time.perf_counter()
    exact_top_k(query, document, 100)
    return 2.0 * len(query) * len(document) * width / (time.perf_counter() - begun)
