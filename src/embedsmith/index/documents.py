"""Documents to be indexed, and how files hold them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedsmith.data.formats.texts import read_texts
from embedsmith.data.record import text_faults


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
    """The documents of a BEIR folder's corpus or of a file of any kind that the data room reads, one after another.

    `_id` or `id` names a document, `text` is its text with `title`, where there is one, in front; all other fields are
    metadata. Errors: `DataError` naming file and line for a row that is not like that, or whose id came before.
    """
    for one in read_texts(path, ids="unique", metadata=True):
        text = one.text.strip()
        for fault in text_faults("text", [text]):
            raise fault.at(one.where)
        yield Document(str(one.id), text, one.metadata)
