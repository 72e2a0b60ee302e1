"""Texts as mining compares them: looser than by id, and by how much they overlap."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from embedsmith.core.errors import DataError
from embedsmith.core.titles import titled
from embedsmith.data import Record
from embedsmith.data.containers import open_rows
from embedsmith.data.record import RowError
from embedsmith.mining.config import Corpus

_GRAM = 5


def loose_id(text: str) -> int:
    """Equal for texts that differ only in case, width, white space or punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    letters = "".join(letter for letter in folded if letter.isalnum()) or folded
    return int.from_bytes(hashlib.blake2b(letters.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def shingles(text: str) -> frozenset[str]:
    """Character 5-grams of the folded text; a shorter text is its own."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return frozenset(folded[place : place + _GRAM] for place in range(max(len(folded) - _GRAM + 1, 1)))


def overlap(left: frozenset[str], right: frozenset[str]) -> float:
    """Jaccard: shared over all."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)


def corpus_texts(records: Sequence[Record], more: Iterable[Corpus]) -> list[str]:
    """The texts negatives are drawn from, each once: the records' positives and negatives, then the files'."""
    own = (text for record in records for text in (*record.positives, *record.negatives))
    texts = dict.fromkeys(own)
    for corpus in more:
        texts.update(dict.fromkeys(_file_texts(corpus)))
    return list(texts)


def _file_texts(corpus: Corpus) -> Iterator[str]:
    path = Path(corpus.path).expanduser()
    if path.is_dir():
        path = next((found for found in sorted(path.glob("corpus.jsonl*"))), path / "corpus.jsonl")
    for line, row in open_rows(path).rows:
        where = f"{path}:{line}"
        if isinstance(row, RowError):
            raise row.at(where)
        text = row.get(corpus.column or "text")
        if not isinstance(text, str):
            raise DataError(
                f"no text under {corpus.column or 'text'!r}; found: {', '.join(row) or 'no keys'}",
                where=where,
                fix="set corpus.column to the key that holds the text",
            )
        title = row.get("title") if corpus.column is None else None
        text = titled(title, text)
        if text.strip():
            yield text.strip()
