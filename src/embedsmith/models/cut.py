"""How much of the texts a model does not read: what its `max_length` cuts off, in tokens."""

import copy
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from embedsmith.core.encoder import Role
from embedsmith.core.tokens import IntArray
from embedsmith.data import RecordSet
from embedsmith.data.record import Record, Text
from embedsmith.data.stream import HasOrder
from embedsmith.models.cross_encoder import CrossEncoder
from embedsmith.models.embedder import Embedder
from embedsmith.models.pair_text import PairText

SAMPLED_ROWS = 1000
_CHARACTERS = 2_000_000
"""Of a role at most: a few books need no more to be told apart from short texts."""
_NO_END = 10**9


@dataclass(frozen=True)
class CutTexts:
    """What is cut of the texts of some rows, `rows` of `of_rows`, prompts counted: `cut` of `texts` texts lose `lost`
    of their `tokens` tokens at `max_length`; the longest text has `longest`."""

    rows: int
    of_rows: int
    texts: int
    cut: int
    tokens: int
    lost: int
    longest: int
    max_length: int

    def __str__(self) -> str:
        sample = "" if self.rows == self.of_rows else f" (of {self.rows:,} rows spread over it)"
        if self.cut == 0:
            return f"no text is longer than the {self.max_length:,} tokens of max_length{sample}"
        share, lost = self.cut / self.texts, self.lost / self.tokens
        return (
            f"{share:.1%} of the texts are longer than the {self.max_length:,} tokens of max_length and are cut; "
            f"{lost:.1%} of all tokens are not read; the longest text has {self.longest:,}{sample}"
        )


def cut_of(model: Embedder | CrossEncoder, found: RecordSet[Text]) -> CutTexts | None:
    """Of a source, or of rows that are spread over it where it has many; `None` of one that holds tokens, or is
    streamed and not read before. A reranker's texts are pairs of a query and a document."""
    records, task = found.records, found.task
    if found.tokens is not None or isinstance(records, HasOrder) or len(records) == 0:
        return None
    places = np.linspace(0, len(records) - 1, min(len(records), SAMPLED_ROWS)).astype(int)
    rows = [cast(Record, records[int(place)]) for place in places]
    length_N = _pair_lengths(model, rows) if isinstance(model, CrossEncoder) else _text_lengths(model, rows, task)
    over_N = np.maximum(length_N - model.max_length, 0)
    counts = (len(length_N), int((over_N > 0).sum()), int(length_N.sum()), int(over_N.sum()))
    return CutTexts(len(rows), len(records), *counts, int(length_N.max(initial=0)), model.max_length)


def _text_lengths(model: Embedder, rows: list[Record], task: str) -> IntArray:
    documents: Role = "query" if task == "sts" else "document"
    sides: tuple[tuple[Role, list[str]], ...] = (
        ("query", [row.query for row in rows]),
        (documents, [text for row in rows for text in (*row.positives, *row.negatives)]),
    )
    reader = copy.copy(model)  # the same weights and tokenizer
    reader.settings = replace(model.settings, max_length=_NO_END, mcls=None)
    return np.concatenate([reader.tokenize(_within(texts), role, task).length_N for role, texts in sides if texts])


def _pair_lengths(model: CrossEncoder, rows: list[Record]) -> IntArray:
    pairs = [(row.query, text) for row in rows for text in (*row.positives, *row.negatives)]
    documents = _within([text for _, text in pairs])
    reader = PairText(copy.deepcopy(model.tokenizer), replace(model.settings, max_length=_NO_END))
    return reader([query for query, _ in pairs[: len(documents)]], documents).length_N


def _within(texts: list[str]) -> list[str]:
    """The first of the texts that together have so many characters as are looked at; one in any case."""
    total = np.cumsum([len(text) for text in texts])
    return texts[: max(int(np.searchsorted(total, _CHARACTERS)), 1)]
