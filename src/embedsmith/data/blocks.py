"""Sources too large to read whole, as numbered blocks of rows: Parquet shards, datasets on disk or on the hub."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol, overload

import pyarrow as pa
import pyarrow.parquet as pq

from embedsmith.core.errors import DataError, MissingExtraError
from embedsmith.data.hub import choose_split, is_saved_dataset, load_datasets, refused

BLOCK_ROWS = 4096
"""Rows of a block where the source has none of its own."""

_END = 2**16
Row = Mapping[str, Any]


class Blocks(Protocol):
    """Rows of a source in blocks. `in_order`: reading them in another order than their own is slow."""

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def in_order(self) -> bool: ...

    @property
    def version(self) -> str:
        """Stands for the content of the source."""
        ...

    def read(self, block: int) -> Sequence[Row]: ...

    def place(self, block: int, row: int) -> str:
        """File and row, for messages."""
        ...


class TableRows(Sequence[Row]):
    """The rows of an Arrow table; only those asked for become Python objects."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, row: int) -> Row: ...
    @overload
    def __getitem__(self, row: slice) -> list[Row]: ...
    def __getitem__(self, row: int | slice) -> Row | list[Row]:
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(len(self)))]
        found: list[Row] = self._table.slice(row, 1).to_pylist()
        return found[0]


@dataclass(frozen=True)
class ParquetBlocks:
    """Row groups of Parquet files, which may lie anywhere fsspec reads. Only footers are read at the start.

    Errors: `DataError` for a file that is missing or not Parquet.
    """

    files: tuple[str, ...]
    _footers: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)
    _group: list[tuple[int, int, int]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for number, name in enumerate(self.files):
            with _reading(name), open_anywhere(name) as file:
                footer = pq.read_metadata(file)
            self._footers.append(footer)
            first = 1
            for group in range(footer.num_row_groups):
                self._group.append((number, group, first))
                first += footer.row_group(group).num_rows

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self._footers[number].row_group(group).num_rows for number, group, _ in self._group)

    @property
    def in_order(self) -> bool:
        return False

    @property
    def version(self) -> str:
        """A hash of the footers: rows, sizes, offsets and statistics of every column of every row group."""
        digest = hashlib.blake2b(digest_size=16)
        for footer in self._footers:
            digest.update(repr(footer.to_dict()).encode())
        return digest.hexdigest()

    def read(self, block: int) -> Sequence[Row]:
        number, group, _ = self._group[block]
        name = self.files[number]
        with _reading(name), open_anywhere(name) as file:
            return TableRows(pq.ParquetFile(file, metadata=self._footers[number]).read_row_group(group))

    def place(self, block: int, row: int) -> str:
        number, _, first = self._group[block]
        return f"{self.files[number]}:{first + row}"


@dataclass(frozen=True)
class DatasetBlocks:
    """A dataset of the package `datasets` that lies on disk, memory-mapped."""

    name: str
    dataset: Any

    @property
    def sizes(self) -> tuple[int, ...]:
        return _evenly(len(self.dataset))

    @property
    def in_order(self) -> bool:
        return False

    @property
    def version(self) -> str:
        return str(self.dataset._fingerprint)

    def read(self, block: int) -> Sequence[Row]:
        start = block * BLOCK_ROWS
        return TableRows(self.dataset.with_format("arrow")[start : start + BLOCK_ROWS])

    def place(self, block: int, row: int) -> str:
        return f"{self.name}:{block * BLOCK_ROWS + row + 1}"


@dataclass
class SequentialBlocks:
    """A dataset of the hub in files that can only be read from their start (JSON, CSV, ...). Blocks read one after the
    other cost nothing extra; to start in the middle, the rows before are skipped. `files`: what they are read from."""

    name: str
    dataset: Any
    rows: int
    files: tuple[str, ...] = ()
    _next: int = -1
    _rest: Iterator[Row] = field(default_factory=lambda: iter(()))

    @property
    def sizes(self) -> tuple[int, ...]:
        return _evenly(self.rows)

    @property
    def in_order(self) -> bool:
        return True

    @property
    def version(self) -> str:
        """A hash of the files' sizes and of the hub's or server's hashes of them; of local files, of their ends."""
        digest = hashlib.blake2b(f"{self.name} {self.dataset.info.version} {self.rows}".encode(), digest_size=16)
        for file in self.files:
            digest.update(_state_of(file))
        return digest.hexdigest()

    def read(self, block: int) -> Sequence[Row]:
        if block != self._next:
            self._rest = iter(self.dataset.skip(block * BLOCK_ROWS))
        rows = list(islice(self._rest, self.sizes[block]))
        self._next = block + 1
        if len(rows) < self.sizes[block]:
            ended = block * BLOCK_ROWS + len(rows)
            raise DataError(
                f"the stream ended after {ended} rows", where=self.name, expected=f"{self.rows}", fix="set limit to it"
            )
        return rows

    def place(self, block: int, row: int) -> str:
        return f"{self.name}:{block * BLOCK_ROWS + row + 1}"


def open_blocks(path: str, split: str | None, limit: int | None) -> Blocks:
    """The blocks of Parquet files (a file, a folder, a pattern with *), of a saved dataset, or of a hub dataset.

    Errors: `DataError` if nothing can be streamed there; `MissingExtraError` without the package `datasets`.
    """
    here = Path(path).expanduser()
    if here.is_file() and here.suffix != ".parquet":
        raise DataError(
            f"a {here.suffix or 'plain'} file cannot be streamed",
            where=path,
            expected="Parquet files, or a dataset",
            fix="leave streaming out: a large file is converted once and read from disk",
        )
    files = [str(here)] if here.is_file() else _parquet_files(here)
    if files:
        return ParquetBlocks(tuple(files))
    if is_saved_dataset(here):
        return DatasetBlocks(path, choose_split(load_datasets().load_from_disk(str(here)), split, path))
    return _hub_blocks(str(here) if here.is_dir() else path.removeprefix("hf://"), split, limit)


def _parquet_files(here: Path) -> list[str]:
    if here.is_dir():
        return sorted(str(file) for file in here.rglob("*.parquet"))
    return sorted(glob.glob(str(here), recursive=True)) if glob.has_magic(str(here)) else []


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


def _evenly(rows: int) -> tuple[int, ...]:
    return tuple(min(BLOCK_ROWS, rows - start) for start in range(0, rows, BLOCK_ROWS))


def open_anywhere(name: str) -> IO[bytes]:
    """A local file, or one behind a URL that fsspec knows."""
    if "://" not in name:
        return open(name, "rb")
    try:
        import fsspec
    except ImportError as error:
        raise MissingExtraError("fsspec", "hub") from error
    opened: IO[bytes] = fsspec.open(name, "rb").open()
    return opened


def _state_of(name: str) -> bytes:
    """What tells a file from a later version of it, without reading it whole."""
    with _reading(name):
        if "://" in name:
            import fsspec

            files, path = fsspec.core.url_to_fs(name)
            info = files.info(path)
            return f"{info['size']} {info.get('blob_id') or info.get('ETag')}".encode()
        with open(name, "rb") as file:
            head = file.read(_END)
            size = file.seek(0, 2)
            file.seek(max(size - _END, 0))
            return b"%d" % size + head + file.read()


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Says which file an error comes from."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        kind = "Parquet file" if name.endswith(".parquet") else "file"
        raise DataError(f"not a readable {kind} ({error})", where=name, fix="copy it again") from error
