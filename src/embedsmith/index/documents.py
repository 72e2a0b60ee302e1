"""Documents to be indexed, and how files hold them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from embedsmith.core.errors import DataError
from embedsmith.data.formats.files import open_rows
from embedsmith.data.record import RowError, text_faults, titled

T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """A text with an id, and metadata to filter by."""

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Changes with the text and the metadata."""
        content = json.dumps([self.text, self.metadata], ensure_ascii=False, sort_keys=True)
        return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def read_documents(path: str | Path) -> Iterator[Document]:
    """The documents of a BEIR folder's corpus or of a file (JSONL, JSON, CSV, Parquet; also .gz), one after another.

    `_id` or `id` names a document, `text` is its text with `title`, where there is one, in front; all other fields are
    metadata. Errors: `DataError` naming file and line for a row that is not like that, or whose id came before.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in ("corpus.jsonl", "corpus.jsonl.gz") if (path / name).exists()), path)
    if not path.is_file():
        raise DataError("no such file", where=path, expected="a file of documents, or a folder with corpus.jsonl")
    lines: dict[str, int] = {}
    for line, row in open_rows(path).rows:
        if isinstance(row, RowError):
            raise row.at(f"{path}:{line}")
        document = _document(row, f"{path}:{line}")
        first = lines.setdefault(document.id, line)
        if first != line:
            what = f"the id {document.id!r} comes twice, first in line {first}"
            raise DataError(what, where=f"{path}:{line}", fix="give every document an id of its own")
        yield document


def _document(row: Mapping[str, Any], where: str) -> Document:
    id_ = row.get("_id", row.get("id"))
    text, title = row.get("text"), row.get("title") or ""
    if id_ is None or isinstance(id_, bool) or not isinstance(id_, str | int):
        raise DataError("no id in this row", where=where, expected=f"a field _id or id; found {', '.join(row)}")
    if not isinstance(text, str) or not isinstance(title, str):
        raise DataError("no text in this row", where=where, expected=f"a field text; found {', '.join(row)}")
    whole = titled(title, text).strip()
    for fault in text_faults("text", [whole]):
        raise fault.at(where)
    metadata = {key: value for key, value in row.items() if key not in ("_id", "id", "text", "title")}
    return Document(str(id_), whole, metadata)


def without_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents in their order. Errors: `DataError` for an id that comes again."""
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            raise DataError(f"the id {document.id!r} comes twice", fix="give every document an id of its own")
        seen.add(document.id)
        yield document


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
