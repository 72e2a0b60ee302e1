"""A token cache as a source: records whose texts are places in it, and the tokens at those places.

A record of a cache holds keys instead of texts (`TokenText`): `q5:17` is the query in row 5, whose text has the id 17;
`d8:23` the document in row 8. Whatever draws rows, positives and negatives works on them as on texts: `text_id` gives
the id of the text, `tokens_of` the tokens. The Parquet files are converted once (`storecache`) to
plain arrays that are memory-mapped, because Parquet cannot be read at single rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.tokens import IntArray, TokenBatch
from embedsmith.data.facts import RowFacts
from embedsmith.data.record import Record, TokenSide, TokenText
from embedsmith.data.source import RecordSet, Source
from embedsmith.data.store import Kind, RecordStore, map_array
from embedsmith.data.storecache import look, stored
from embedsmith.data.tokenconvert import SIDES, convert_tokens, corpus_of
from embedsmith.data.tokenmanifest import MANIFEST, DatasetFacts, Manifest, TokenizerFacts


def is_token_cache(path: Path) -> bool:
    """A folder of tokens, with or without its manifest."""
    if not path.is_dir():
        return False
    if (path / MANIFEST).is_file():
        return True
    return any("query_input_ids" in pq.read_schema(file).names for file in path.glob("*.parquet"))


def read_tokens(source: Source) -> RecordSet:
    """A dataset of a token cache; `split` names it where there are several.

    Errors: `DataError` for a missing manifest, file or dataset, a document that is named but not there, or doc ids
    that stand for several documents.
    """
    folder = Path(source.path).expanduser()
    manifest = Manifest.load(folder)
    facts = _chosen(manifest, source, folder)
    source = replace(source, split=facts.name, format=None, task=_task(source, facts))
    files = {name: state for name, state in look(folder).items() if Path(name).name in _files_of(folder, facts)}
    found = stored(source, files, None, lambda shelf: convert_tokens(folder, facts, source, shelf))
    store = found.records
    assert isinstance(store, RecordStore)
    return replace(
        found,
        records=TokenRecords(store, manifest.tokenizer, facts),
        fingerprint=f"{found.fingerprint}-{manifest.tokenizer.sha256[:16]}",
    )


def _chosen(manifest: Manifest, source: Source, folder: Path) -> DatasetFacts:
    names = list(manifest.datasets)
    name = source.split or (names[0] if len(names) == 1 else None)
    if name not in manifest.datasets:
        raise DataError(
            "several datasets" if source.split is None and names else f"no dataset {source.split!r}",
            where=folder,
            expected=f"one of those in its manifest: {', '.join(names) or 'none'}",
            fix="set split to one of them",
        )
    return manifest.datasets[name]


def _task(source: Source, facts: DatasetFacts) -> Any:
    if source.task is not None and source.task != facts.task:
        raise RecipeError(f"the tokens are of task {facts.task}, not {source.task}", where=source.path)
    return facts.task


def _files_of(folder: Path, facts: DatasetFacts) -> set[str]:
    if facts.layout == "inline":
        return {f"{facts.name}.parquet"}
    return {f"{facts.name}_query.parquet", corpus_of(folder, facts.name).name}


@dataclass(frozen=True)
class TokenRecords(Sequence[Record]):
    """Records of keys (see above), and the tokens behind them. Safe to share between threads."""

    store: RecordStore
    tokenizer: TokenizerFacts
    facts_of_set: DatasetFacts

    def __len__(self) -> int:
        return len(self.store)

    @overload
    def __getitem__(self, row: int) -> Record: ...
    @overload
    def __getitem__(self, row: slice) -> list[Record]: ...
    def __getitem__(self, row: int | slice) -> Record | list[Record]:
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(len(self)))]
        return self._known(self.store[row])

    def __iter__(self) -> Iterator[Record]:
        return map(self._known, self.store)

    def _known(self, record: Record) -> Record:
        """The record with keys that know their tokens."""
        return replace(
            record,
            query=self._text(record.query),
            positives=tuple(map(self._text, record.positives)),
            negatives=tuple(map(self._text, record.negatives)),
        )

    def _text(self, key: str) -> TokenText:
        row, _, id_ = key[1:].partition(":")
        return TokenText(key, int(id_), int(row), self._sides[key[0]])

    def facts(self) -> RowFacts:
        """Ids of the texts, and lengths in tokens."""
        folder = self.store.folder
        return RowFacts(
            map_array(folder / "tokens.query_id", np.int64),
            map_array(folder / "tokens.positive_id", np.int64),
            self.store.facts().offset_N1,
            map_array(folder / "tokens.length", np.int32),
        )

    def most_negatives(self) -> int:
        return self.store.most_negatives()

    @cached_property
    def _sides(self) -> dict[str, Side]:
        return {letter: Side.open(self.store.folder, name) for letter, name in SIDES.items()}


def tokens_of(texts: Sequence[str], is_query: bool, tokenize: Callable[[list[int]], TokenBatch]) -> TokenBatch:
    """The tokens of texts, in their order: looked up where they are known, and by `tokenize`, which is given the
    places of the texts that are not."""
    known: dict[int, list[int]] = {}
    places: list[int] = []
    plain: list[int] = []
    sides: dict[int, TokenSide] = {}
    for place, text in enumerate(texts):
        if isinstance(text, TokenText):
            sides[id(text.side)] = text.side
            known.setdefault(id(text.side), []).append(place)
        else:
            plain.append(place)
    if not known:
        return tokenize(plain)
    parts = []
    for number, side in sides.items():
        rows = [text.row for place in known[number] if isinstance(text := texts[place], TokenText)]
        parts.append(side.take(np.asarray(rows, np.int64), is_query))
        places += known[number]
    if plain:
        parts.append(tokenize(plain))
        places += plain
    return TokenBatch.concatenate(parts).take(np.argsort(places))


@dataclass(frozen=True)
class Side:
    """Tokens of all queries or all documents: row n is `id_S[end_N[n - 1]:end_N[n]]`."""

    id_S: npt.NDArray[np.int32]
    end_N: IntArray
    body_N: npt.NDArray[np.int32]

    @staticmethod
    def open(folder: Path, name: str) -> Side:
        kinds: dict[str, Kind] = {"ids": np.int32, "ends": np.int64, "body": np.int32}
        return Side(*(map_array(folder / f"tokens.{name}.{part}", kind) for part, kind in kinds.items()))

    def take(self, rows: IntArray, is_query: bool) -> TokenBatch:
        end = self.end_N[rows]
        start = np.where(rows > 0, self.end_N[rows - 1], 0)
        offset_P = np.concatenate([[0], np.cumsum(end - start)]).astype(np.int64)
        place = np.arange(offset_P[-1]) + np.repeat(start - offset_P[:-1], end - start)
        body = self.body_N[rows].astype(np.int64)
        return TokenBatch(self.id_S[place].astype(np.int64), offset_P, body, np.full(len(rows), is_query))
