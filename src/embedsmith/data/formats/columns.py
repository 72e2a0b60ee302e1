"""Rows to records: which column holds which role. Always by name, never by order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.settings import did_you_mean
from embedsmith.data.record import Record, RowError, Scores, kind_of

ROLES = {
    "query": "query",
    "text": "query",
    "text1": "query",
    "positives": "positives",
    "positive": "positives",
    "text2": "positives",
    "negatives": "negatives",
    "negative": "negatives",
    "score": "positive_scores",
    "positive_scores": "positive_scores",
    "negative_scores": "negative_scores",
    "teacher_scores": "teacher_scores",
    "teacher_positive_scores": "teacher_positive_scores",
    "teacher_negative_scores": "teacher_negative_scores",
    "label": "label",
    "instruction": "instruction",
    "task": "task",
    "source": "source",
}
"""What a column may be declared to hold, and the field of `Record` that means."""

F2LLM_NEGATIVES = 24
"""Columns `negative_1` to `negative_24` of F2LLM's published Parquet files."""

Columns = Mapping[str, str | Sequence[str]]
Found = dict[str, list[Any]]


@dataclass(frozen=True)
class Layout:
    """How the rows of one format name things. `columns`: role to column or columns; `required`: columns every row
    has; `strict`: another column is an error rather than left alone; `task`: what such rows are unless told."""

    name: str
    columns: Columns
    required: tuple[str, ...]
    strict: bool = False
    task: str | None = None
    known: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for role, names in self.columns.items():
            for name in (names,) if isinstance(names, str) else names:
                self.known[name] = ROLES[role]

    def fits(self, keys: set[str]) -> bool:
        return keys.issuperset(self.required)

    def found(self, row: Mapping[str, Any]) -> Found:
        """What a row holds, by role; a missing column or a null is left out."""
        found: Found = {}
        for name, role in self.known.items():
            value = row.get(name)
            if value is not None:
                found.setdefault(role, []).append(value)
        return found


def _own(*columns: str) -> dict[str, str]:
    return {name: name for name in columns}


_RECORD_KEYS = _own(*(role for role, target in ROLES.items() if role == target))

LAYOUTS = (
    Layout("records", _RECORD_KEYS, ("query", "positives"), strict=True),
    Layout("records", _RECORD_KEYS, ("query", "label"), strict=True),
    Layout(
        "flagembedding",
        {
            "query": "query",
            "positives": "pos",
            "negatives": "neg",
            "teacher_positive_scores": "pos_scores",
            "teacher_negative_scores": "neg_scores",
            "instruction": "prompt",
        },
        ("query", "pos"),
        task="retrieval",
    ),
    Layout(
        "f2llm",
        {
            "query": "query",
            "positives": "passage",
            "negatives": [f"negative_{number}" for number in range(1, F2LLM_NEGATIVES + 1)],
        },
        ("query", "passage"),
        task="retrieval",
    ),
    Layout("pairs", _own("text1", "text2", "score"), ("text1", "text2", "score"), task="sts"),
    Layout(
        "pairs",
        {"text1": "sentence1", "text2": "sentence2", "score": "score"},
        ("sentence1", "sentence2", "score"),
        task="sts",
    ),
    Layout("labels", _own("text", "label"), ("text", "label"), task="classification"),
)
"""Formats by the columns that give them away, tried in this order."""

FORMATS = ("records", "flagembedding", "f2llm", "pairs", "labels", "beir")


def choose_layout(keys: Sequence[str], name: str | None, columns: Columns | None, where: object) -> Layout:
    """The layout of a file whose first row has `keys`. Errors: `DataError` that lists what was found."""
    if columns is not None:
        return _declared(columns, keys, where)
    candidates = [layout for layout in LAYOUTS if name in (None, layout.name)]
    for layout in candidates:
        if layout.fits(set(keys)):
            return layout
    raise _no_layout(candidates, list(keys), where)


def _no_layout(candidates: Sequence[Layout], keys: list[str], where: object) -> DataError:
    known = sorted({column for layout in candidates for column in layout.known})
    hints = [f"{key!r}{near}" for key in keys if key not in known and (near := did_you_mean(key, known))]
    shapes = "; ".join(f"{layout.name}: {', '.join(layout.required)}" for layout in candidates)
    hint = f"; {', '.join(hints)}" if hints else ""
    return DataError(
        f"the columns fit no known format; found: {', '.join(keys) or 'none'}{hint}",
        where=where,
        expected=shapes,
        fix="rename them, or say what they are, for example columns: {query: title, positives: body}",
    )


def _declared(columns: Columns, keys: Sequence[str], where: object) -> Layout:
    for role in columns:
        if role not in ROLES:
            raise RecipeError(
                f"columns: unknown role {role!r}{did_you_mean(role, list(ROLES))}",
                expected=f"one of {', '.join(ROLES)}",
            )
    layout = Layout("columns", columns, ())
    missing = [name for name in layout.known if name not in keys]
    if missing:
        hints = ", ".join(f"{name!r}{did_you_mean(name, list(keys))}" for name in missing)
        raise DataError(f"no column {hints}", where=where, expected=f"one of those found: {', '.join(keys)}")
    if "query" not in {ROLES[role] for role in columns}:
        raise RecipeError("columns: no column is declared to be the query", expected="query, text1 or text")
    return layout


@dataclass(frozen=True)
class Reading:
    """What turning a file's rows into records needs besides the rows. `labels` collects the names of classes."""

    layout: Layout
    task: str
    source: str
    instruction: str | None = None
    cells: bool = False
    labels: dict[str, int] = field(default_factory=dict)

    def record(self, row: Mapping[str, Any]) -> Record:
        """The record of a row, not yet validated. Errors: `RowError`."""
        self._check_keys(row)
        found = self.layout.found(row)
        positives, negatives = self._texts(found, "positives"), self._texts(found, "negatives")
        taught = self._taught(found, len(positives))
        return Record(
            query=_one(found, "query", ""),
            positives=positives,
            negatives=negatives,
            task=_one(found, "task", self.task),
            positive_scores=self._scores(found, "positive_scores"),
            negative_scores=self._scores(found, "negative_scores"),
            teacher_positive_scores=taught[0],
            teacher_negative_scores=taught[1],
            label=self._label(_one(found, "label", None)),
            instruction=_one(found, "instruction", None) or self.instruction,
            source=_one(found, "source", self.source),
        )

    def _check_keys(self, row: Mapping[str, Any]) -> None:
        if self.layout.strict:
            for key in row:
                if key not in self.layout.known:
                    known = list(self.layout.known)
                    hint = did_you_mean(key, known) or f"; known: {', '.join(known)}"
                    raise RowError(f"unknown key {key!r}{hint}", fix="rename or remove it")
        for name in self.layout.required:
            if name not in row:
                found = ", ".join(row) or "none"
                raise RowError(
                    f"no column {name!r}", f"no column {name!r}{did_you_mean(name, list(row))}; found: {found}"
                )

    def _texts(self, found: Found, role: str) -> tuple[Any, ...]:
        """A column holds one text or a list of them; in CSV an empty cell is an absent text."""
        texts: list[Any] = []
        for value in found.get(role, ()):
            if isinstance(value, str):
                texts += [value] if value or not self.cells else []
            elif isinstance(value, list | tuple):
                texts += value
            else:
                kind = f"{role} are {kind_of(value)}, not texts"
                raise RowError(kind, f"{kind}: {str(value)[:60]}", expected="a text or a list of texts")
        return tuple(texts)

    def _scores(self, found: Found, role: str) -> Scores | None:
        if role not in found:
            return None
        scores: list[Any] = []
        for value in found.get(role, ()):
            scores += value if isinstance(value, list | tuple) else [value]
        if self.cells:
            scores = [number_of(score, role) for score in scores if score.strip()]
        return tuple(float(score) if type(score) is int else score for score in scores) or None

    def _taught(self, found: Found, positives: int) -> tuple[Scores | None, Scores | None]:
        """`teacher_scores` is the short form of both: the scores of the positives, then of the negatives."""
        both = self._scores(found, "teacher_scores")
        if both is not None:
            return both[:positives] or None, both[positives:] or None
        return self._scores(found, "teacher_positive_scores"), self._scores(found, "teacher_negative_scores")

    def _label(self, value: Any) -> int | None:
        """A class as a number. Names are numbered as they come, and renumbered in their order at the end."""
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        if isinstance(value, str) and value.strip():
            return self.labels.setdefault(value, len(self.labels))
        kind = f"the label is {kind_of(value)}"
        raise RowError(kind, f"{kind}: {value!r}", expected="a name or a whole number")


def _one(found: Found, role: str, otherwise: Any) -> Any:
    return found[role][0] if role in found else otherwise


def number_of(cell: str, role: str) -> float:
    try:
        return float(cell)
    except ValueError:
        kind = f"{role} hold text that is not a number"
        raise RowError(kind, f"{kind}: {cell[:40]!r}", expected="a number, or an empty cell") from None


# Score ranges: declared or inferred, and rescaled to [0, 1].

Range = tuple[float, float]


@dataclass
class Extent:
    """The lowest and the highest score seen in a file, and where."""

    low: float = float("inf")
    high: float = float("-inf")
    low_line: int = 0
    high_line: int = 0

    def add(self, record: Record, line: int) -> None:
        for score in (*(record.positive_scores or ()), *(record.negative_scores or ())):
            if score is not None:
                if score < self.low:
                    self.low, self.low_line = score, line
                if score > self.high:
                    self.high, self.high_line = score, line

    @property
    def empty(self) -> bool:
        return self.low > self.high


def infer_range(extent: Extent, path: object) -> Range:
    """The known range that all scores of a file fit: 0 to 1; -1 to 1; 1 to 5 if the lowest is exactly 1; 0 to 5.

    Errors: `DataError` naming the lines of the extremes if none fits.
    """
    low, high = extent.low, extent.high
    if low >= 0 and high <= 1:
        return (0.0, 1.0)
    if low >= -1 and high <= 1:
        return (-1.0, 1.0)
    if low == 1 and high <= 5:
        return (1.0, 5.0)
    if low >= 0 and high <= 5:
        return (0.0, 5.0)
    raise DataError(
        f"scores from {low:g} (line {extent.low_line}) to {high:g} (line {extent.high_line}) fit no known range",
        where=path,
        expected="0 to 1, -1 to 1, 1 to 5 or 0 to 5",
        fix="declare it: score_range: [lowest, highest]",
    )


def check_range(record: Record, declared: Range) -> None:
    """Raise `RowError` for a score outside the declared range."""
    for score in (*(record.positive_scores or ()), *(record.negative_scores or ())):
        if score is not None and not declared[0] <= score <= declared[1]:
            raise RowError(
                "score outside the declared range",
                f"score {score:g} is outside the declared range",
                expected=f"{declared[0]:g} to {declared[1]:g}",
                fix="correct the row, or declare another score_range",
            )


def rescaled(record: Record, known: Range) -> Record:
    """The record with its scores moved from `known` to [0, 1]. A teacher's scores are left alone."""
    if known == (0.0, 1.0) or (record.positive_scores is None and record.negative_scores is None):
        return record
    return replace(
        record,
        positive_scores=_moved(record.positive_scores, known),
        negative_scores=_moved(record.negative_scores, known),
    )


def _moved(scores: Scores | None, known: Range) -> Scores | None:
    low, high = known
    return None if scores is None else tuple(s if s is None else (s - low) / (high - low) for s in scores)
