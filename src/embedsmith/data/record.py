"""The one shape of every training example, whatever file and task it comes from."""

from __future__ import annotations

import hashlib
import math
import random
import re
import shlex
import unicodedata
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, get_args, overload

import numpy as np
import numpy.typing as npt
from typing_extensions import TypeVar

from embedsmith.core.errors import DataError
from embedsmith.core.inputs import kind_of

Task = Literal["retrieval", "sts", "classification", "clustering"]
TASKS: tuple[str, ...] = get_args(Task)
Scores = tuple[float | None, ...]
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a pair, which no UTF-8 file can hold."""


@dataclass(frozen=True, slots=True, repr=False)
class TokenIds:
    """What a record of a token cache holds in the place of a text: the tokens, and the id of the text they stand for.

    - `id`: the id of the text (`text_id`): two of them are equal if their texts are;
    - `ids`: the token ids, special ones included;
    - `body`: how many of the leading tokens belong to a prompt or an instruction.
    """

    id: int
    ids: npt.NDArray[np.int32] = field(compare=False)
    body: int = field(compare=False)

    def __repr__(self) -> str:
        return f"TokenIds(id={self.id})"


Text = str | TokenIds
T = TypeVar("T", bound=Text, default=str, covariant=True)


@dataclass(frozen=True, slots=True)
class Record(Generic[T]):
    """One example: (task, query, positives, negatives, scores of either), CoDiEmb's unified format.

    - retrieval: `positives` answer `query`, `negatives` do not; scores are graded relevance, if known;
    - sts: `query` and each positive are a pair, `positive_scores` say how alike they are, 1.0 at most;
    - classification, clustering: `query` is the text and `label` its class; positives may be absent.

    A slot that holds nothing is simply not there: no placeholder text ever stands for it. Score tuples align with
    their texts, `None` inside them is an unknown score. Scores of a read file lie in [0, 1]; teacher scores are the
    teacher's own numbers. `source` names where the record came from. A record of a token cache is a
    `Record[TokenIds]`: it has the tokens of its texts in their places.

    Source: CoDiEmb (arXiv 2508.11442), unified data format.
    """

    query: T
    positives: tuple[T, ...] = ()
    negatives: tuple[T, ...] = ()
    task: str = "retrieval"
    positive_scores: Scores | None = None
    negative_scores: Scores | None = None
    teacher_positive_scores: Scores | None = None
    teacher_negative_scores: Scores | None = None
    label: int | None = None
    instruction: str | None = None
    source: str = ""


class OneByOne(Sequence[Record[T]], Generic[T]):
    """Records that are made when they are asked for, each by the number of its row."""

    @abstractmethod
    def row(self, place: int) -> Record[T]:
        """The record of a row from 0 to the last."""

    def most_negatives(self) -> int | None:
        """Of any record, where that is known without reading all of them."""
        return None

    @overload
    def __getitem__(self, place: int) -> Record[T]: ...
    @overload
    def __getitem__(self, place: slice) -> list[Record[T]]: ...
    def __getitem__(self, place: int | slice) -> Record[T] | list[Record[T]]:
        if isinstance(place, slice):
            return [self.row(one) for one in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        return self.row(place % len(self))


def typed_for_source(*settings: str) -> str:
    """How settings of a source are typed behind a command with a recipe, for the fix of an error."""
    typed = " ".join(shlex.quote(f"data.N.{setting}") for setting in settings)
    return f"(typed: {typed}, N its place from 0)"


def for_one_file(fix: str) -> str:
    """A fix behind a verb of one file, where settings are typed without a place."""
    return fix.replace("data.N.", "").replace(", N its place from 0", "")


class RowError(DataError):
    """One row is wrong. `kind` groups rows with the same fault; `line` is its place in the file, from 1."""

    def __init__(
        self,
        kind: str,
        what: str | None = None,
        *,
        where: object = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.kind = kind
        super().__init__(what or kind, where=where, expected=expected, fix=fix)

    def at(self, where: object) -> RowError:
        """The same error, with its place."""
        return RowError(self.kind, self.what, where=where, expected=self.expected, fix=self.fix)


def text_id(text: Text) -> int:
    """A 63-bit id of the text itself: equal for texts that differ only in Unicode form or in white space.

    Normalised to NFC with runs of white space collapsed, then BLAKE2b; never negative, so that `ABSENT` is no text.
    """
    if isinstance(text, TokenIds):
        return text.id
    normal = " ".join(unicodedata.normalize("NFC", text).split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little") >> 1


def ids_among(id_N: npt.NDArray[np.int64], sorted_M: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which ids are among those of another array, which is sorted."""
    if not len(sorted_M):
        return np.zeros(len(id_N), bool)
    return np.asarray(sorted_M[np.searchsorted(sorted_M, id_N).clip(max=len(sorted_M) - 1)] == id_N)


def draw_texts(
    texts: Sequence[Text], count: int, chance: random.Random, banned: Iterable[int] = ()
) -> Iterator[tuple[int, int]]:
    """Up to `count` (place, id) of distinct texts, at random and without replacement, none of them banned by id."""
    seen = set(banned)
    for place in range(len(texts)) if len(texts) <= count else shuffled(len(texts), chance):
        if count == 0:
            return
        id_ = text_id(texts[place])
        if id_ not in seen:
            seen.add(id_)
            count -= 1
            yield place, id_


def shuffled(count: int, chance: random.Random) -> list[int]:
    """0 to `count` - 1, sorted by `random()`, whose stream Python promises to keep; `sample` and `shuffle` make no such
    promise."""
    keys = [chance.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def without_empty(record: Record, left_out: Counter[str]) -> Record:
    """The record without the empty texts that it does not need, and without their scores; counted by role. No negative
    is needed, and a positive only where there is no other. An empty query or only positive is left for `validate`."""
    for role in ("positive", "negative"):
        texts: tuple[object, ...] = getattr(record, f"{role}s")
        full = [place for place, text in enumerate(texts) if not isinstance(text, str) or (text and not text.isspace())]
        if len(full) == len(texts) or (role == "positive" and not full):
            continue
        names = (f"{role}s", f"{role}_scores", f"teacher_{role}_scores")
        held = {name: values for name in names if (values := getattr(record, name)) is not None}
        if all(len(values) == len(texts) for values in held.values()):
            left_out[f"empty {role}"] += len(texts) - len(full)
            nothing = {f"{role}s": ()}  # of texts; of scores it is None
            kept: dict[str, Any] = {
                name: tuple(values[place] for place in full) or nothing.get(name) for name, values in held.items()
            }
            record = replace(record, **kept)
    return record


def validate(record: Record, where: object = None) -> None:
    """Raise `RowError` (a `DataError`) naming `where` and the fix if the record cannot be trained on."""
    for fault in _faults(record):
        raise fault.at(where)


def _faults(record: Record) -> Iterator[RowError]:
    if record.task not in TASKS:
        yield RowError("unknown task", f"unknown task {record.task!r}", expected=f"one of {', '.join(TASKS)}")
    yield from text_faults("query", (record.query,))
    yield from text_faults("positive", record.positives)
    yield from text_faults("negative", record.negatives)
    if record.instruction is not None and not isinstance(record.instruction, str):
        yield _not_text("instruction", record.instruction)
    if not isinstance(record.source, str):
        yield _not_text("source", record.source)
    yield from value_faults(record)


_NO_SCORE = f"give every pair a score, or declare `task: retrieval` {typed_for_source('task=retrieval')}"


def value_faults(record: Record[Any]) -> Iterator[RowError]:
    """What is wrong with a record besides its texts, which may be tokens: positives, scores, the label."""
    if record.task in ("retrieval", "sts") and not record.positives:
        yield RowError("no positives", fix="give the row at least one positive text, or remove it")
    if record.task == "sts" and (record.positive_scores is None or None in record.positive_scores):
        yield RowError("no score for an sts pair", fix=_NO_SCORE)
    if record.task in ("classification", "clustering") and record.label is None and not record.positives:
        yield RowError("neither a label nor positives", fix="give the row a label")
    if record.label is not None and not -(2**63) <= record.label < 2**63:
        yield RowError("a label of more than 64 bits", fix="write it as text: it is a name")
    yield from _score_faults("positive_scores", record.positive_scores, len(record.positives))
    yield from _score_faults("negative_scores", record.negative_scores, len(record.negatives))
    yield from _score_faults("teacher_positive_scores", record.teacher_positive_scores, len(record.positives))
    yield from _score_faults("teacher_negative_scores", record.teacher_negative_scores, len(record.negatives))


def text_faults(role: str, texts: Iterable[object]) -> Iterator[RowError]:
    for text in texts:
        if not isinstance(text, str):
            yield _not_text(role, text)
        elif not text or text.isspace():
            yield RowError(f"empty {role}", fix="remove the row or give it a text; an absent text is left out, not ''")
        elif not text.isascii() and SURROGATE.search(text):
            yield RowError(f"broken Unicode in a {role}", expected="UTF-8 text without lone surrogates")


def _not_text(role: str, value: object) -> RowError:
    kind = f"the {role} is {kind_of(value)}, not text"
    return RowError(kind, f"{kind}: {str(value)[:60]}", expected="a JSON string", fix=f"write the {role} in quotes")


def _score_faults(role: str, scores: Scores | None, slots: int) -> Iterator[RowError]:
    if scores is None:
        return
    if len(scores) != slots:
        kind = f"{role} and their texts differ in number"
        yield RowError(kind, f"{len(scores)} {role} for {slots} texts", fix="one score a text; null where unknown")
    for score in scores:
        if score is None:
            continue
        if isinstance(score, bool) or not isinstance(score, int | float):
            kind = f"{role} hold {kind_of(score)}, not a number"
            yield RowError(kind, f"{kind}: {score!r}", expected="a number, or null where unknown")
        elif not math.isfinite(score):
            yield RowError(
                f"{role} hold a value that is not finite", f"{role} hold {score}", expected="a finite number"
            )


def titled(title: str | None, text: str) -> str:
    """The text of a document that has a title, for training, encoding, mining, indexing and evaluation alike: title and
    text joined by one space, as BEIR and mteb join them; the text itself where there is no title."""
    return f"{title} {text}".strip() if title else text
