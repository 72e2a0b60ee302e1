"""A data source of a recipe: its settings, how its rows are opened and read, and the set of records it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, cast

from pydantic import Field

from embedsmith.core.batch import Loss
from embedsmith.core.encoder import Role
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.inputs import local_path
from embedsmith.core.remote import is_remote
from embedsmith.core.settings import Count, Finite, Share, Word, section
from embedsmith.core.shelf import Name, layouts, losses
from embedsmith.data.formats.columns import Range, Reading, choose_layout
from embedsmith.data.formats.datasets import beir_rows, hub_rows, is_beir_folder
from embedsmith.data.formats.file_kinds import Rows, has_known_kind, open_rows
from embedsmith.data.formats.memory import HeldRows, held_rows
from embedsmith.data.record import OneByOne, Record, T, Task, Text

Format = Annotated[str, Name(layouts)]
_MOST_NEGATIVES = 4
_HUB = "hf://"
MOST = 10_000
"""Of what a row is multiplied by: more would only be an allocation that fails."""


@section
@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of training or validation records. Everything but `path` can be left out.

    >>> import embedsmith as es
    >>> es.split(es.Source(path="pairs.jsonl", limit=20), "parts").test_rows
    2

    - `path`: a file (.jsonl, .json, .csv, .tsv, .parquet; text kinds also .gz), a BEIR folder, a saved dataset, or
      the id of a dataset on the Hugging Face hub (`owner/name`); of `rows`, what messages call them;
    - `rows`: from Python, in place of a file: a list of dicts, or a `datasets.Dataset`; columns are found by their
      names as in a file;
    - `task`: what its records are for; `None` infers it from the columns;
    - `name`: what the source is called in logs and reports; `None` is the file's name;
    - `format`: the layout of its columns; `None` finds it by their names;
    - `columns`: role to column or columns, for files with names of their own;
    - `score_range`: the range scores were given in, [lowest, highest]; `None` infers it;
    - `split`: of a dataset or a BEIR folder; `None` is `train`, or the only one;
    - `instruction`: put before the query of every record that has none of its own;
    - `instruction_separator`: splits every query behind this text, such as `Query:`: what stands before, with the text
      itself, is the query's instruction, word for word (for models without a template);
    - `limit`: read the first so many records only; `None` reads all;
    - `part`: the rows whose query hashes into this share of [0, 1], such as [0, 0.95] to train and [0.95, 1] to
      validate on: rows of the same query fall together, in every file and every run; `None` takes all;
    - `weight`: how often an epoch sees each row, at most 10,000 times;
    - `cap`: rows that an epoch sees of it at most (others in the next); `None` sets no limit;
    - `batch_size`: rows a step, all ranks together; `None` is that of the run;
    - `per_class`: of rows with a class, so many of each class that is in a batch, which has batch_size / per_class
      classes; for losses by label. `None` draws rows whatever their class;
    - `positives`: texts drawn as positives of a query in a step, at most 10,000, like the negatives;
    - `negatives`: texts drawn as negatives of a query in a step; `None` derives it (`negatives_per_query`);
    - `shuffle`: the probability that a positive is given with its thirds in another order (M3 uses 0.002);
    - `teacher`: a model whose vectors of the same texts the losses `teacher_vectors` and `teacher_neighbours` learn
      from;
    - `guide`: a model by whose scores a loss drops false negatives (`gist_embed`, `guide_margin` of `infonce`);
    - `loss`: what is minimised on its batches; `None` is the default of the task;
    - `on_error`: `stop` at faulty rows, or `skip`, count and name them;
    - `cache`: the folder where the converted source is kept on disk; `None` derives it: small sources stay in memory,
      large ones go to the user's cache folder (`data/cache.py`);
    - `streaming`: never read it whole (Parquet files, datasets), but through a shuffled buffer (`data/stream.py`);
    - `buffer`: rows of a stream that are shuffled together; `None` is 10,000, or its largest block.

    Errors: `RecipeError` for a format that is not known.
    """

    path: str = ""
    rows: Any = None
    task: Task | None = None
    name: str | None = None
    format: Format | None = None
    columns: dict[str, str | list[str]] | None = None
    score_range: tuple[Finite, Finite] | None = None
    split: str | None = None
    instruction: str | None = None
    instruction_separator: Word | None = None
    limit: Count | None = None
    part: tuple[Share, Share] | None = None
    weight: Annotated[float, Field(gt=0, le=MOST)] = 1.0
    cap: Count | None = None
    batch_size: Count | None = None
    per_class: Annotated[int, Field(ge=2, le=MOST)] | None = None
    positives: Annotated[int, Field(ge=1, le=MOST)] = 1
    negatives: Annotated[int, Field(ge=0, le=MOST)] | None = None
    shuffle: Share = 0.0
    teacher: str | None = None
    guide: str | None = None
    loss: Annotated[Loss, losses] | None = None
    on_error: Literal["stop", "skip"] = "stop"
    cache: str | None = None
    streaming: bool = False
    buffer: Count | None = None

    def __post_init__(self) -> None:
        if self.format is not None:
            layouts.entry(self.format)
        if self.instruction is not None and self.instruction_separator is not None:
            raise RecipeError("instruction and instruction_separator are both set", fix="keep one of them")
        if self.rows is not None:
            object.__setattr__(self, "rows", held_rows(self.rows))
            object.__setattr__(self, "path", self.path or self.rows.name)
        elif not self.path:
            raise RecipeError(
                "a source has no path", fix="name its file: path: pairs.jsonl, or data.0.path=pairs.jsonl"
            )


@dataclass(frozen=True)
class Skipped:
    """Rows left out because of one kind of fault: how many, and the first of their lines."""

    kind: str
    count: int
    lines: tuple[int, ...]


CacheLayout = Literal["corpus", "inline"]


@dataclass(frozen=True)
class TokenizerFacts:
    """What makes ids what they are: the tokenizer, by name and hash, the length at which it cuts a text, and the token
    that it puts behind every text, if any."""

    name: str
    sha256: str
    max_length: int
    end_id: int | None = None

    def refuse_other(self, wanted: TokenizerFacts, where: object) -> None:
        """Errors: `DataError` naming both hashes, unless they are the same tokenizer."""
        if self.sha256 != wanted.sha256:
            raise DataError(
                f"these tokens were made by the tokenizer {self.name} (sha256 {self.sha256})",
                where=where,
                expected=f"that of the model {wanted.name} (sha256 {wanted.sha256})",
                fix="tokenize the texts again for this model: embedsmith tokenize",
            )


@dataclass(frozen=True)
class DatasetFacts:
    """One dataset of a cache. `document_role`: of its documents (in sts both sides are queries); `prompts`: by role,
    as put before texts that have no instruction of their own; `probes`: the ids of one text by role, which tell a
    model that tokenizes in another way; `ids`: whether `doc_id` is our text id or a name; `labels`: the names of its
    classes; `fingerprint`: that of the records it was made from."""

    name: str
    task: str
    layout: CacheLayout
    rows: int
    documents: int
    prompts: dict[str, str]
    document_role: Role
    ids: Literal["text", "name"] = "text"
    labels: tuple[str, ...] = ()
    fingerprint: str = ""
    probes: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordSet(Generic[T]):
    """The records of one source. `records` may be a list or a store on disk: only its length and its entries count.

    `left_out` counts the empty slots (such as `empty negative`) that rows were read without;
    `fingerprint` is a hash of the records' content; `labels` names the classes if the file names them; `scores`
    says which score range was assumed and why; `tokens`, for records of a token cache, which tokenizer made them and
    what its manifest says of them.
    """

    name: str
    task: str
    records: Sequence[Record[T]]
    fingerprint: str
    skipped: tuple[Skipped, ...] = ()
    format: str = "records"
    labels: tuple[str, ...] = ()
    score_range: Range | None = None
    scores: str = "none"
    left_out: dict[str, int] = field(default_factory=dict)
    tokens: tuple[TokenizerFacts, DatasetFacts] | None = None

    def texts_only(self, purpose: str, where: object) -> RecordSet:
        """The same records, known to hold texts. Errors: `DataError` for records of a token cache."""
        if self.tokens is not None:
            raise tokens_refused(purpose, where)
        return cast(RecordSet, self)


def tokens_refused(purpose: str, where: object) -> DataError:
    fix = "name the files that the tokens were made from"
    return DataError(f"{purpose} needs texts, and a token cache has only tokens", where=where, fix=fix)


def negatives_per_query(source: Source, records: Sequence[Record[Text]]) -> int:
    """How many negatives a query draws: as declared, otherwise the most that a record has, at most 4 (CoDiEmb's n)."""
    if source.negatives is not None:
        return source.negatives
    known = records.most_negatives() if isinstance(records, OneByOne) else None
    return min(max((len(r.negatives) for r in records), default=0) if known is None else known, _MOST_NEGATIVES)


def source_name(source: Source) -> str:
    """The declared name, or the path's last part without its extensions."""
    if source.name:
        return source.name
    last = Path(source.path.removeprefix(_HUB)).name
    return Path(last.removesuffix(".gz")).stem if has_known_kind(last) else last


def open_source(source: Source) -> Rows:
    """The rows of whatever `path` names, or those in memory. Errors: `DataError`."""
    if source.rows is not None:
        held: HeldRows = source.rows
        return held.opened(source.path, source.split)
    if source.path.startswith(_HUB) and not is_remote(source.path):
        return hub_rows(source.path.removeprefix(_HUB), source.split)
    path = local_path(source.path)
    if path.is_dir() and (source.format == "beir" or is_beir_folder(path)):
        return beir_rows(path, source.split)
    if path.is_dir() or (source.path.count("/") == 1 and not path.parent.is_dir() and not has_known_kind(path.name)):
        return hub_rows(str(path) if path.is_dir() else source.path, source.split)
    return open_rows(path)


def reading_of(row: dict[str, object], source: Source, rows: Rows, where: str) -> Reading:
    """How to read the rows of a source, decided by its first readable row. Errors: `DataError` if no format fits."""
    format_ = "records" if rows.format == "beir" else source.format
    layout = choose_layout(list(row), format_, source.columns, where)
    task = source.task or layout.task_of(row)
    if layout.name == "pairs" and task != "sts":
        layout = replace(layout, required=layout.required[:2])
    return Reading(layout, task, source_name(source), source.instruction, source.instruction_separator, rows.cells)
