"""Streaming: a source of any size, of which only the blocks in use are in memory.

A pass goes through all blocks in a new order, and through the rows of a buffer of blocks in a new order: the buffer
is filled, shuffled, emptied, and filled again. So the n-th row of a pass is a function of (seed, pass, n); the
position of a run stays the number of its step, a resumed run draws the same batches after reading one buffer, and
ranks take disjoint slices of every batch, however many there are.

    Blocks          rows of Parquet files, of a dataset on disk or of one on the hub, numbered, a block at a time
    StreamRecords   a row of a block, checked and made a record when it is asked for; keeps the blocks in use
    HasOrder.order  the order of a pass, which the plan follows
"""

from __future__ import annotations

import glob
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from threading import Lock
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from embedsmith.core.errors import DataError, MissingExtraError
from embedsmith.core.inputs import local_path
from embedsmith.core.progress import log
from embedsmith.data.formats.columns import Reading, check_range, rescaled, scores_of
from embedsmith.data.formats.datasets import choose_split, is_saved_dataset, load_datasets, refused
from embedsmith.data.formats.file_kinds import Rows, readable_parquet, table_row
from embedsmith.data.record import OneByOne, Record, RowError
from embedsmith.data.source import RecordSet, Source, reading_of, source_name

BLOCK_ROWS = 4096
"""Rows of a block where the source has none of its own."""

BUFFER_ROWS = 10_000
"""Rows shuffled together unless the source says or one of its blocks has more (it is in memory anyway)."""

_END = 2**16


def stream_source(source: Source) -> RecordSet:
    """A source to be streamed. Its first block decides layout, task and the most negatives of a row.

    Scores need a declared range and classes need numbers: what would need every row to be read is not inferred. The
    fingerprint is that of the files (footers of Parquet files), not of every record.
    Errors: `DataError` as in `open_blocks`, or for an empty stream.
    """
    if source.rows is not None:
        raise DataError("rows in memory are not streamed", where=source.path, fix="leave streaming out")
    blocks = open_blocks(source.path, source.split, source.limit)
    rows = min(sum(blocks.sizes), source.limit or sum(blocks.sizes))
    if rows == 0:
        raise DataError("no records in it", where=source.path, fix="check that it is the right source")
    first = next(block for block, size in enumerate(blocks.sizes) if size)
    try:
        head = dict(blocks.read(first)[0])
        reading = reading_of(head, source, Rows(source.path, ()), blocks.place(first, 0))
    except RowError as error:
        raise error.at(blocks.place(first, 0)) from error
    return RecordSet(
        name=source_name(source),
        task=reading.task,
        records=StreamRecords(blocks, source, reading, rows),
        fingerprint=f"{blocks.version}-{rows}",
        format=reading.layout.name,
        score_range=source.score_range,
        scores="declared" if source.score_range else "none",
    )


@runtime_checkable
class HasOrder(Protocol):
    """Records that cannot be read in any order at the same cost, and say in which order a pass should take them."""

    def order(self, chance: np.random.Generator) -> npt.NDArray[np.integer]:
        """A permutation of all rows, drawn with `chance` alone."""
        ...


@dataclass(frozen=True)
class StreamRecords(OneByOne[str]):
    """The records of a stream by row number; rows of the same buffer are cheap to reach together.

    A faulty row stops with its file and row; with `on_error: skip` the next good row of its block takes its place,
    and the faulty one is named and counted in `skipped`. Safe to share between threads.
    """

    blocks: Blocks
    source: Source
    reading: Reading
    rows: int
    skipped: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    _held: OrderedDict[int, RowBlock] = field(default_factory=OrderedDict, init=False, repr=False, compare=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return self.rows

    @cached_property
    def buffer(self) -> int:
        """Rows that are shuffled together."""
        return self.source.buffer or max(BUFFER_ROWS, *self.blocks.sizes)

    @cached_property
    def start_B(self) -> npt.NDArray[np.int64]:
        """First row of each block, and the end of the last."""
        return np.concatenate([[0], np.cumsum(self.blocks.sizes)]).clip(max=self.rows).astype(np.int64)

    def order(self, chance: np.random.Generator) -> npt.NDArray[np.integer]:
        """Blocks in a drawn order (unless they must come in their own), then each buffer of rows in a drawn order."""
        start_B = self.start_B
        sequence = np.arange(len(start_B) - 1)
        if not self.blocks.in_order:
            chance.shuffle(sequence)
        order_N = np.concatenate([np.arange(start_B[block], start_B[block + 1]) for block in sequence])
        for start in range(0, len(order_N), self.buffer):
            chance.shuffle(order_N[start : start + self.buffer])
        return order_N

    def row(self, place: int) -> Record:
        block = int(np.searchsorted(self.start_B, place, side="right")) - 1
        first, rows = place - int(self.start_B[block]), self._block(block)
        for step in range(len(rows)):
            at = (first + step) % len(rows)
            try:
                record = self._record(rows[at])
                if self.reading.left_out and "slots" not in self.told:
                    self.told.add("slots")
                    log.warning("%s: empty slots are left out; their rows are read without them", self.source.path)
                return record
            except RowError as error:
                named = error.at(self.blocks.place(block, at))
                if self.source.on_error == "stop":
                    raise named from error
                if str(named.where) not in self.skipped:
                    self.skipped.add(str(named.where))
                    log.warning("skipped (%d so far): %s: %s", len(self.skipped), named.where, named.what)
        raise DataError("no good row in the block", where=self.blocks.place(block, 0))

    def _block(self, number: int) -> RowBlock:
        """A block, read now or held. A buffer touches at most its own rows and the rest of the blocks at its two ends:
        what is more is let go."""
        with self._lock:
            if number not in self._held:
                self._held[number] = self.blocks.read(number)
                most = self.buffer + 2 * max(self.blocks.sizes)
                while len(self._held) > 1 and sum(map(len, self._held.values())) > most:
                    self._held.popitem(last=False)
            self._held.move_to_end(number)
            return self._held[number]

    def _record(self, row: Mapping[str, Any]) -> Record:
        """What reading a whole file does with a row, without what needs the whole file. Errors: `RowError`."""
        record, declared = self.reading.record(row), self.source.score_range
        if record.task != self.reading.task:
            raise RowError(f"a row of task {record.task} among those of task {self.reading.task}")
        if self.reading.labels:
            raise RowError("classes have names", fix="number the classes, or leave streaming out")
        if declared is None:
            if any(True for _ in scores_of(record)):
                raise RowError("scores of an unknown range", fix="declare score_range: [lowest, highest]")
            return record
        check_range(record, declared)
        return rescaled(record, declared)

    def most_negatives(self) -> int:
        """Of the first hundred rows."""
        return max(len(self[row].negatives) for row in range(min(len(self), 100)))


class _Table:
    """The rows of an Arrow table; only those asked for become Python objects."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, row: int, /) -> Mapping[str, Any]:
        found = table_row(self._table, row)
        if isinstance(found, RowError):
            raise found
        return found


RowBlock = _Table | list[Mapping[str, Any]]


class ParquetBlocks:
    """Row groups of Parquet files, which may lie anywhere fsspec reads. Only footers are read at the start.

    Errors: `DataError` for a file that is missing or not Parquet.
    """

    in_order = False

    def __init__(self, files: tuple[str, ...]) -> None:
        self.files = files
        self._footers: list[Any] = []
        self._group: list[tuple[int, int, int]] = []
        sizes: list[int] = []
        for number, name in enumerate(files):
            with readable_parquet(name), _opened(name) as file:
                self._footers.append(pq.read_metadata(file))
            _refuse_mixed_types(self._footers[-1], name)
            first = 1
            for group in range(self._footers[-1].num_row_groups):
                self._group.append((number, group, first))
                sizes.append(self._footers[-1].row_group(group).num_rows)
                first += sizes[-1]
        self.sizes = tuple(sizes)

    @property
    def version(self) -> str:
        """A hash of the footers: rows, sizes, offsets and statistics of every column of every row group."""
        digest = hashlib.blake2b(digest_size=16)
        for name, footer in zip(self.files, self._footers, strict=True):
            try:
                digest.update(repr(footer.to_dict()).encode())
            except (ValueError, OverflowError):  # statistics of values that Python has no object for
                digest.update(_state_of(name))
        return digest.hexdigest()

    def read(self, block: int) -> RowBlock:
        number, group, _ = self._group[block]
        name = self.files[number]
        with readable_parquet(name), _opened(name) as file:
            return _Table(pq.ParquetFile(file, metadata=self._footers[number]).read_row_group(group))

    def place(self, block: int, row: int) -> str:
        number, _, first = self._group[block]
        return f"{self.files[number]}:{first + row}"


def _refuse_mixed_types(footer: Any, name: str) -> None:
    """Errors: `DataError` for a footer whose row groups hold other types than its columns: to ask for their statistics
    would end the process."""
    kinds = [footer.schema.column(place).physical_type for place in range(footer.num_columns)]
    for group in map(footer.row_group, range(footer.num_row_groups)):
        if kinds != [group.column(place).physical_type for place in range(group.num_columns)]:
            raise DataError("not a readable Parquet file (its footer is damaged)", where=name, fix="copy it again")


@dataclass
class DatasetBlocks:
    """A dataset of the package `datasets` that lies on disk, memory-mapped."""

    name: str
    dataset: Any
    rows: int
    in_order: bool = field(default=False, init=False)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(min(BLOCK_ROWS, self.rows - start) for start in range(0, self.rows, BLOCK_ROWS))

    @property
    def version(self) -> str:
        return str(self.dataset._fingerprint)

    def read(self, block: int) -> RowBlock:
        start = block * BLOCK_ROWS
        return _Table(self.dataset.with_format("arrow")[start : start + BLOCK_ROWS])

    def place(self, block: int, row: int) -> str:
        return f"{self.name}:{block * BLOCK_ROWS + row + 1}"


@dataclass
class SequentialBlocks(DatasetBlocks):
    """A dataset of the hub in files that can only be read from their start (JSON, CSV, ...). Blocks read one after the
    other cost nothing extra; to start in the middle, the rows before are skipped. `files`: what they are read from."""

    files: tuple[str, ...] = ()
    in_order: bool = field(default=True, init=False)
    _next: int = field(default=-1, init=False)
    _rest: Iterator[Mapping[str, Any]] = field(default_factory=lambda: iter(()), init=False)

    @property
    def version(self) -> str:
        """A hash of the files' sizes and of the hub's or server's hashes of them; of local files, of their ends."""
        digest = hashlib.blake2b(f"{self.name} {self.dataset.info.version} {self.rows}".encode(), digest_size=16)
        for file in self.files:
            digest.update(_state_of(file))
        return digest.hexdigest()

    def read(self, block: int) -> RowBlock:
        if block != self._next:
            self._rest = iter(self.dataset.skip(block * BLOCK_ROWS))
        with refused(self.name):
            rows = list(islice(self._rest, self.sizes[block]))
        self._next = block + 1
        if len(rows) < self.sizes[block]:
            ended = block * BLOCK_ROWS + len(rows)
            raise DataError(
                f"the stream ended after {ended} rows", where=self.name, expected=f"{self.rows}", fix="set limit to it"
            )
        return rows


Blocks = ParquetBlocks | DatasetBlocks
"""Rows of a source in blocks of known `sizes`. `in_order`: reading them in another order than their own is slow;
`version` stands for the content of the source; `read` gives a block, and `place` file and row, for messages."""


def open_blocks(path: str, split: str | None, limit: int | None) -> Blocks:
    """The blocks of Parquet files (a file, a folder, a pattern with *), of a saved dataset, or of a hub dataset.

    Errors: `DataError` if nothing can be streamed there; `MissingExtraError` without the package `datasets`.
    """
    here = local_path(path)
    if here.is_file() and here.suffix != ".parquet":
        raise DataError(
            f"a {here.suffix or 'plain'} file cannot be streamed",
            where=path,
            expected="Parquet files, or a dataset",
            fix="leave streaming out: a large file is converted once and read from disk",
        )
    if here.is_file():
        files = [str(here)]
    elif here.is_dir():
        files = sorted(str(file) for file in here.rglob("*.parquet") if not file.is_dir())
    else:
        files = sorted(glob.glob(str(here), recursive=True)) if glob.has_magic(str(here)) else []
    if files:
        return ParquetBlocks(tuple(files))
    if is_saved_dataset(here):
        with refused(path):
            found = load_datasets().load_from_disk(str(here))
        dataset = choose_split(found, split, path)
        return DatasetBlocks(path, dataset, len(dataset))
    return _hub_blocks(str(here) if here.is_dir() else path.removeprefix("hf://"), split, limit)


def _hub_blocks(name: str, split: str | None, limit: int | None) -> Blocks:
    datasets = load_datasets()
    with refused(name):
        builder = datasets.load_dataset_builder(name)
        files = builder.config.data_files or {}
        chosen = choose_split(dict(files), split, name)
        if chosen and all(str(file).endswith(".parquet") for file in chosen):
            return ParquetBlocks(tuple(str(file) for file in chosen))
        stream = choose_split(datasets.load_dataset(name, streaming=True), split, name)
    counted = (stream.info.splits or {}).get(stream.split)
    rows = limit or (counted.num_examples if counted is not None else 0)
    if not rows:
        raise DataError("its number of rows is not known", where=name, fix="set limit to the rows of an epoch")
    return SequentialBlocks(name, stream, rows, tuple(str(file) for file in chosen or ()))


def _opened(name: str) -> IO[bytes]:
    """A local file, or one behind a URL that fsspec knows."""
    if "://" not in name:
        return local_path(name).open("rb")
    try:
        import fsspec
    except ImportError as error:
        raise MissingExtraError("fsspec", "hub") from error
    opened: IO[bytes] = fsspec.open(name, "rb").open()
    return opened


def _state_of(name: str) -> bytes:
    """What distinguishes a file from a later version of it, without reading it whole."""
    try:
        if "://" in name:
            import fsspec

            files, path = fsspec.core.url_to_fs(name)
            info = files.info(path)
            return f"{info['size']} {info.get('blob_id') or info.get('ETag')}".encode()
        with _opened(name) as file:
            head = file.read(_END)
            size = file.seek(0, 2)
            file.seek(max(size - _END, 0))
            return b"%d" % size + head + file.read()
    except OSError as error:
        raise DataError(f"not a readable file ({error})", where=name, fix="copy it again") from error
