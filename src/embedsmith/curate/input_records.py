"""The input of a curation, whatever it is, as records that can be read again and again, one by one."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from glob import glob
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

from embedsmith.core.errors import DataError
from embedsmith.core.inputs import local_path
from embedsmith.core.settings import Count, Finite, section
from embedsmith.curate.ledger import Ledger
from embedsmith.curate.structure import READERS, STRUCTURES, Kind, read_page, row_pairs
from embedsmith.data.formats.columns import Extent, Range, Tier, check_range, known_layouts, rescaled
from embedsmith.data.formats.datasets import beir_rows, is_beir_folder, is_saved_dataset
from embedsmith.data.formats.file_kinds import Rows
from embedsmith.data.formats.texts import read_texts
from embedsmith.data.record import Record, RowError, Task
from embedsmith.data.source import Format, Source, open_source, reading_of, source_name, tokens_refused
from embedsmith.data.token_records import is_token_cache

InputKind = Literal["records", "rows", "documents", "pages", "parallel"]


@section
@dataclass(frozen=True, kw_only=True)
class Input:
    """What to curate. Everything but `path` can be left out.

    - `path`: one or several files, folders, patterns (`pages/**/*.md`) or dataset ids;
    - `kind`: `records` (files of a known format), `rows` (pairs from columns such as title and body), `documents`
      (texts that have no query yet: column `text` and perhaps `title`, or a text file with one a line), `pages`
      (Markdown and HTML), `parallel` (two or more BEIR folders with the same ids: a query in one language, its
      documents in another); `None` finds out;
    - `pairs`: which structures of rows and pages to take; `None`: all;
    - `task`, `format`, `columns`, `score_range`, `split`, `instruction`: as in a training source;
    - `limit`: the first so many records only; `None` takes all;
    - `on_error`: `stop` at faulty rows, or `skip`, count and name them.
    """

    path: str | list[str]
    kind: InputKind | None = None
    pairs: tuple[Kind, ...] | None = None
    task: Task | None = None
    format: Format | None = None
    columns: dict[str, str | list[str]] | None = None
    score_range: tuple[Finite, Finite] | None = None
    split: str | None = None
    instruction: str | None = None
    limit: Count | None = None
    on_error: Literal["stop", "skip"] = "stop"

    def source(self, path: str) -> Source:
        """One of its files, as it would be trained on."""
        same = ("task", "format", "columns", "score_range", "split", "instruction")
        return Source(path=path, **{name: getattr(self, name) for name in same})


@dataclass
class InputRecords:
    """An input that is read from the start each time it is iterated. `ledger` counts the last reading."""

    input: Input
    wants_documents: bool = False
    ledger: Ledger = field(default_factory=Ledger)

    @cached_property
    def paths(self) -> list[str]:
        """Folders of pages and patterns as files, in the order of their names.

        Errors: `DataError` for no file, or a token cache.
        """
        given = [self.input.path] if isinstance(self.input.path, str) else self.input.path
        if caches := [path for path in given if is_token_cache(local_path(path))]:
            raise tokens_refused("curating", caches[0])
        found = [path for each in given for path in _expand(each)]
        if not found:
            raise DataError("no file to read", where=", ".join(given), fix="check the path or the pattern")
        return found

    @cached_property
    def kind(self) -> InputKind:
        """As declared; else by the file's kind and, for rows, by the columns of the first one."""
        if self.input.kind is not None:
            return self.input.kind
        first = Path(self.paths[0])
        if first.suffix.lower() in READERS:
            return "pages"
        if first.suffix.lower() == ".txt":
            return "documents"
        if self.input.columns or self.input.format or is_beir_folder(first):
            return "records"
        rows = open_source(self.input.source(self.paths[0])).rows
        row = next((row for _, row in rows if not isinstance(row, RowError)), {})
        tiers: tuple[Tier, ...] = ("own", "packages")  # what is common may be a structure to make pairs of
        if any(layout.fits(row) for tier in tiers for layout in known_layouts(tier)):
            return "records"
        if self.wants_documents and "text" in row:
            return "documents"
        return "rows" if any(True for _ in row_pairs(row, self.input.pairs, "")) else "records"

    @cached_property
    def identity(self) -> list[Any]:
        """What the content depends on: settings, and each file's size and time of writing."""
        state = []
        for path in map(Path, self.paths):
            files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
            state += [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
        return [repr(self.input), self.kind, state]

    @cached_property
    def scan(self) -> tuple[dict[str, Range | None], tuple[str, ...]]:
        """What only the whole input tells: the score range of each file, and the names of all classes, sorted. Faulty
        rows are left to the next reading.

        Errors: `DataError` for scores that fit no known range.
        """
        ranges: dict[str, Range | None] = {}
        names: set[str] = set()
        for source in map(self.input.source, self.paths):
            rows, reading, extent = open_source(source), None, Extent()
            declared = source.score_range or rows.score_range
            for line, row in rows.rows:
                if isinstance(row, RowError):
                    continue
                try:
                    reading = reading or reading_of(row, source, rows, f"{rows.path}:{line}")
                    if not {"label", "positive_scores", "negative_scores"} & set(reading.layout.known.values()):
                        break
                    record = reading.record(row)
                except RowError:
                    continue
                extent.add(record, line)
            names |= set(reading.labels) if reading else set()
            ranges[source.path] = declared or (None if extent.empty else extent.range(source.path))
        return ranges, tuple(sorted(names))

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, where the files name them."""
        return self.scan[1] if self.kind == "records" else ()

    def __iter__(self) -> Iterator[Record]:
        self.ledger = Ledger(self.ledger.examples)
        read = {
            "pages": self._pages,
            "rows": self._pairs,
            "documents": self._documents,
            "parallel": self._parallel,
            "records": self._records,
        }
        for record in read[self.kind]():
            self.ledger.given += 1
            yield record
            if self.ledger.given == self.input.limit:
                return

    def _pages(self) -> Iterator[Record]:
        for path in self.paths:
            self.ledger.taken += 1
            try:
                page = read_page(Path(path))
            except DataError as error:
                self._fault(error.what, error, path)
                continue
            made = list(page.pairs(self.input.pairs, Path(path).name))
            yield from made
            if not made:
                self.ledger.record_left("no structure found", Record(Path(path).name))

    def _pairs(self) -> Iterator[Record]:
        kinds: Counter[str] = Counter()
        for path in self.paths:
            source = self.input.source(path)
            for _, row in self._sound(open_source(source)):
                found = list(row_pairs(row, self.input.pairs, source_name(source)))
                kinds.update(record.source.rsplit("/", 1)[-1] for record in found)
                if not found:
                    self.ledger.record_left("no structure found", Record(str(row)[:200]))
                yield from found
        self.ledger.notes["structures"] = dict(kinds)
        if not kinds:
            known = "; ".join(f"{form.kind}: {form.query[0]}, {form.document[0]}" for form in STRUCTURES)
            raise DataError("no row has a structure to make pairs of", where=self.paths[0], expected=known)

    def _documents(self) -> Iterator[Record]:
        for path in self.paths:
            rows = open_source(self.input.source(path))
            if lines := ".txt" in Path(path).suffixes:  # an empty line only keeps texts apart
                full = (pair for pair in rows.rows if isinstance(pair[1], RowError) or pair[1]["text"].strip())
                rows = replace(rows, rows=full)
            for line, row in self._sound(rows):
                text, title = row.get("text"), row.get("title") or ""
                if isinstance(text, str) and text.strip() and isinstance(title, str):
                    yield Record(title.strip(), (text.strip() if lines else text,), source=Path(path).name)
                else:
                    fault = RowError("no text", fix="name the column of the documents `text`").at(f"{path}:{line}")
                    self._fault("no text", fault, str(row)[:200])

    def _records(self) -> Iterator[Record]:
        """Checked records, scores in [0, 1], named classes numbered in the order of their names in all files."""
        ranges, names = self.scan
        number = {name: place for place, name in enumerate(names)}
        empty: Counter[str] = Counter()
        for path in self.paths:
            source = self.input.source(path)
            rows, reading = open_source(source), None
            for line, row in self._sound(rows):
                try:
                    if reading is None:
                        reading = reading_of(dict(row), source, rows, path)
                        reading = replace(reading, labels=dict(number), left_out=empty)
                    record = reading.record(row)
                    if reading.left_out:
                        self.ledger.notes["slots left out"] = dict(reading.left_out)
                    if (known := ranges[path]) is not None:
                        check_range(record, known)
                    yield rescaled(record, known)
                except RowError as error:
                    self._fault(error.kind, error.at(f"{rows.path}:{line}"), str(row)[:200])

    def _parallel(self) -> Iterator[Record]:
        """Cross-lingual records of BEIR folders with the same ids: the queries of each with the documents of each
        other. Errors: `DataError` for fewer than two folders, or folders without common queries."""
        if len(self.paths) < 2:
            raise DataError("parallel input needs two folders or more", where=", ".join(self.paths))
        read = {folder: _queries_and_documents(folder, self.input.split) for folder in map(Path, self.paths)}
        for one, other in permutations(read, 2):
            queries, (_, documents) = read[one][0], read[other]
            common = [id_ for id_ in queries if id_ in documents]
            if not common:
                raise DataError("no query of the one has documents in the other", where=f"{one}, {other}")
            for id_ in common:
                yield Record(queries[id_], documents[id_], source=f"{one.name}-{other.name}")

    def _sound(self, rows: Rows) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for line, row in rows.rows:
            self.ledger.taken += 1
            if isinstance(row, RowError):
                self._fault(row.kind, row.at(f"{rows.path}:{line}"), "")
            else:
                yield line, row

    def _fault(self, reason: str, error: DataError, shown: str) -> None:
        if self.input.on_error == "stop":
            raise DataError(
                error.what,
                where=error.where,
                expected=error.expected,
                fix=f"{error.fix or 'correct it'}; or leave such rows out with input.on_error=skip",
            )
        self.ledger.record_left(f"faulty: {reason}", Record(shown), f"{error.where}")


def _queries_and_documents(folder: Path, split: str | None) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Judged queries, and the relevant documents of each, by the query's id."""
    texts = {str(one.id): one.text.strip() for one in read_texts(folder, "queries", ids="each")}
    rows = beir_rows(folder, split)
    by_text = {row["query"]: tuple(row["positives"]) for _, row in rows.rows if not isinstance(row, RowError)}
    return texts, {id_: by_text[text] for id_, text in texts.items() if by_text.get(text)}


def _expand(given: str) -> list[str]:
    """A pattern as its files, a folder of pages as its pages, all else as it is."""
    path = local_path(given)
    if any(mark in given for mark in "*?[") and not path.exists():
        return sorted(found for found in glob(str(path), recursive=True) if Path(found).is_file())
    if path.is_dir() and not is_beir_folder(path) and not is_saved_dataset(path):
        return sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in READERS) or [given]
    return [given]
