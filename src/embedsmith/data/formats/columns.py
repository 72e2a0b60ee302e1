"""Rows to records: which column holds which role (always by name, never by order), and the range that scores were given
in, declared or inferred from a whole file, which is moved to [0, 1]."""

import math
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.inputs import kind_of
from embedsmith.core.settings import did_you_mean
from embedsmith.core.shelf import layouts
from embedsmith.data.record import Record, RowError, Scores, typed_for_source, validate, without_empty

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
Row = Mapping[str, Any]
Found = dict[str, list[Any]]


@dataclass(frozen=True)
class Layout:
    """How the rows of one format name things. `columns`: role (a key of `ROLES`) to column or columns; `required`:
    columns every row has; `strict`: another column is an error rather than left alone; `task`: what such rows are
    unless a source says otherwise, `None` where it depends on the row; `unfold`: makes the columns that `columns` names
    of a row that has them otherwise (nested, numbered), or raises `RowError`. `by_name`: only where the format is
    named, since its columns are those of other files too. `name`: the one it is registered under.

    A layout is registered as a function without arguments that returns it, or several, tried in their order, where
    files of one format name things in several ways:

        @layouts.register("search_log")
        def search_log() -> Layout:
            \"\"\"What was typed, and what was clicked.\"\"\"
            return Layout({"query": "typed", "positives": "clicked"}, required=("typed", "clicked"), task="retrieval")
    """

    columns: Columns
    required: tuple[str, ...]
    strict: bool = False
    task: str | None = None
    unfold: Callable[[Row], Row] | None = None
    by_name: bool = False
    name: str = "columns"
    known: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for role, names in self.columns.items():
            if role not in ROLES:
                raise RecipeError(
                    f"columns: unknown role {role!r}{did_you_mean(role, list(ROLES))}",
                    expected=f"one of {', '.join(ROLES)}",
                )
            for name in (names,) if isinstance(names, str) else names:
                self.known[name] = ROLES[role]

    def fits(self, keys: Iterable[str]) -> bool:
        return set(keys).issuperset(self.required)

    def check(self, row: Mapping[str, Any]) -> None:
        """Errors: `RowError` for a column that is missing, or that a strict layout does not know."""
        for key in row if self.strict else ():
            if key not in self.known:
                known = list(self.known)
                hint = did_you_mean(key, known) or f"; known: {', '.join(known)}"
                raise RowError(f"unknown key {key!r}{hint}", fix="rename or remove it")
        for name in self.required:
            if name not in row:
                kind = f"no column {name!r}"
                found = ", ".join(row) or "none"
                raise RowError(kind, f"{kind}{did_you_mean(name, list(row))}; found: {found}")

    def found(self, row: Row) -> Found:
        """What a row holds, by role; a missing column or a null is left out. Errors: `RowError` of `unfold`."""
        row = row if self.unfold is None else self.unfold(row)
        found: Found = {}
        for name, role in self.known.items():
            value = row.get(name)
            if value is not None:
                found.setdefault(role, []).append(value)
        return found

    def task_of(self, row: Mapping[str, Any]) -> str:
        """Its own; else a scored pair is sts, a label without positives classification, anything else retrieval."""
        if self.task is not None:
            return self.task
        found = self.found(row)
        positives = found.get("positives", [])
        if not positives:
            return "classification" if "label" in found else "retrieval"
        single = len(positives) == 1 and (not isinstance(positives[0], list) or len(positives[0]) == 1)
        return "sts" if single and "positive_scores" in found and "negatives" not in found else "retrieval"


_RECORD_KEYS = {role: role for role, target in ROLES.items() if role == target}


@layouts.register("records")
def our_records() -> tuple[Layout, ...]:
    """Our own: the fields of `Record`, and no others."""
    by_answer = Layout(_RECORD_KEYS, ("query", "positives"), strict=True)
    return by_answer, replace(by_answer, required=("query", "label"))


@layouts.register("flagembedding")
def flagembedding() -> Layout:
    """FlagEmbedding's training files."""
    columns = {
        "query": "query",
        "positives": "pos",
        "negatives": "neg",
        "teacher_positive_scores": "pos_scores",
        "teacher_negative_scores": "neg_scores",
        "instruction": "prompt",
    }
    return Layout(columns, ("query", "pos"), task="retrieval")


@layouts.register("f2llm")
def f2llm() -> Layout:
    """F2LLM's published Parquet files."""
    negatives = [f"negative_{number}" for number in range(1, F2LLM_NEGATIVES + 1)]
    columns = {"query": "query", "positives": "passage", "negatives": negatives}
    return Layout(columns, ("query", "passage"), task="retrieval")


@layouts.register("pairs")
def scored_pairs() -> tuple[Layout, ...]:
    """Two texts and how alike they are."""
    named = (("text1", "text2", "score"), ("sentence1", "sentence2", "score"))
    return tuple(Layout(dict(zip(named[0], names)), names, task="sts") for names in named)


@layouts.register("labels")
def labelled_texts() -> tuple[Layout, ...]:
    """A text and its class."""
    names = ("text", "sentence")
    return tuple(Layout({"text": n, "label": "label"}, (n, "label"), task="classification") for n in names)


@layouts.register("beir")
def beir_folder() -> tuple[Layout, ...]:
    """A folder of corpus, queries and judgements: known by its files (`formats/datasets.py`), not by columns."""
    return ()


OWN = ("codiemb", "records", "flagembedding", "f2llm", "pairs", "labels", "beir")
"""The layouts of which the first that fits is taken."""
COMMON = ("anchors", "answers", "scored", "nli", "tevatron", "swift", "texts")
"""Those of `formats/common.py`, tried where none of `OWN` fits: exactly one of them must, since a file that fits two
can be read in two ways. Layouts of other packages come after them, in the same way."""

Tier = Literal["own", "common", "packages"]


def known_layouts(tier: Tier) -> list[Layout]:
    """By the columns that give them away: ours in the order in which they are tried, or those of other packages, which
    are imported for that."""
    names = {"own": OWN, "common": COMMON}.get(tier) or [n for n in layouts.names() if n not in OWN + COMMON]
    found: list[Layout] = []
    for name in names:
        made = layouts.get(name)()
        found += [replace(layout, name=name) for layout in (made if isinstance(made, tuple) else (made,))]
    return found


def choose_layout(keys: Sequence[str], name: str | None, columns: Columns | None, where: object) -> Layout:
    """The layout of a file whose first row has `keys`: as declared, or the first of `OWN` that fits; where none does,
    the only one of `COMMON`; only where none of ours does, the one of another package. Errors: `DataError` that lists
    what was found, where none fits, or several that read the row in other ways.
    """
    if columns is not None:
        declared = Layout(columns, ())
        if missing := [name for name in declared.known if name not in keys]:
            hints = ", ".join(f"{name!r}{did_you_mean(name, list(keys))}" for name in missing)
            raise DataError(f"no column {hints}", where=where, expected=f"one of those found: {', '.join(keys)}")
        if "query" not in declared.known.values():
            raise RecipeError("columns: no column is declared to be the query", expected="query, text1 or text")
        return declared
    tried: list[Layout] = []
    for tier in typing.get_args(Tier):
        tried += [one for one in known_layouts(tier) if one.name == name or (name is None and not one.by_name)]
        if fitting := [layout for layout in tried if layout.fits(keys)]:
            if tier != "own":
                _refuse_several(fitting, where, by_name=tier == "packages")
            return fitting[0]
    raise _no_layout(tried, list(keys), where)


def _refuse_several(fitting: Sequence[Layout], where: object, by_name: bool) -> None:
    """Errors: `DataError` for layouts of several names (`by_name`), or that take other columns of a row, or the same
    for another task. A file with both a score and a label is read by its score."""

    def way(layout: Layout) -> tuple[str | None, ...]:
        texts = (name for name in layout.required if name not in ("score", "label"))
        return (layout.name,) if by_name else (layout.task, *texts)

    ways = {way(layout): layout for layout in reversed(fitting)}
    if len(ways) == 1:
        return
    names = dict.fromkeys(layout.name for layout in fitting)
    first = fitting[0]
    roles = list(zip(("query", "positives", "score"), first.required))
    declared = ", ".join(f"{role}: {name}" for role, name in roles)
    typed = typed_for_source(*(f"columns.{role}={name}" for role, name in roles))
    raise DataError(
        f"the columns fit several formats: {', '.join(names)}",
        where=where,
        expected="; ".join(f"{layout.name}: {', '.join(layout.required)}" for layout in reversed(ways.values())),
        fix=f"name it, for example format: {first.name} beside its path {typed_for_source(f'format={first.name}')}"
        if len(names) == len(ways)
        else f"say what they are, for example columns: {{{declared}}} beside the path {typed}",
    )


def _no_layout(candidates: Sequence[Layout], keys: list[str], where: object) -> DataError:
    known = sorted({column for layout in candidates for column in layout.known})
    hints = [f"{key!r}{near}" for key in keys if key not in known and (near := did_you_mean(key, known))]
    required = {layout.name: [one.required for one in candidates if one.name == layout.name] for layout in candidates}
    shapes = "; ".join(
        f"{name}: {', '.join(first)}{f' (and {len(others)} like it)' if others else ''}"
        for name, (first, *others) in required.items()
    )
    hint = f"; {', '.join(hints)}" if hints else ""
    roles = {"query": "title", "positives": "body"} if len(keys) < 2 else dict(zip(("query", "positives"), keys))
    declared = ", ".join(f"{role}: {key}" for role, key in roles.items())
    typed = typed_for_source(*(f"columns.{role}={key}" for role, key in roles.items()))
    return DataError(
        f"the columns fit no known format; found: {', '.join(keys) or 'none'}{hint}",
        where=where,
        expected=shapes,
        fix=f"rename them, or say what they are, for example columns: {{{declared}}} beside the path {typed}",
    )


@dataclass(frozen=True)
class Reading:
    """What turning a file's rows into records needs besides the rows. `labels` collects the names of classes;
    `left_out` counts the empty slots that rows were read without."""

    layout: Layout
    task: str
    source: str
    instruction: str | None = None
    separator: str | None = None
    cells: bool = False
    labels: dict[str, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def record(self, row: Mapping[str, Any]) -> Record:
        """The record of a row, valid and without its empty slots. Errors: `RowError`."""
        self.layout.check(row)
        found = self.layout.found(row)
        positives, negatives = self._texts(found, "positives"), self._texts(found, "negatives")
        teacher = self._teacher_scores(found, len(positives), len(negatives))

        def one(role: str, otherwise: Any) -> Any:
            return found[role][0] if role in found else otherwise

        record = Record(
            query=one("query", ""),
            positives=positives,
            negatives=negatives,
            task=one("task", self.task),
            positive_scores=self._scores(found, "positive_scores", len(positives)),
            negative_scores=self._scores(found, "negative_scores", len(negatives)),
            teacher_positive_scores=teacher[0],
            teacher_negative_scores=teacher[1],
            label=self._label(one("label", None)),
            instruction=one("instruction", None) or self.instruction,
            source=one("source", self.source),
        )
        record = without_empty(record, self.left_out)
        validate(record)
        return record if self.separator is None or record.instruction is not None else self._split(record)

    def _split(self, record: Record) -> Record:
        """The query cut behind the separator and the white space that follows it."""
        assert self.separator is not None
        before, found, text = record.query.partition(self.separator)
        body = text.lstrip()
        if not body:
            self.left_out[f"instruction: no {self.separator!r} in the query"] += 1
            return record
        instruction = before + found + text[: len(text) - len(body)]
        return replace(record, query=body, instruction=instruction)

    def _texts(self, found: Found, role: str) -> tuple[Any, ...]:
        """A column holds one text or a list of them; in CSV an empty cell is an absent text."""
        texts: list[Any] = []
        for value in found.get(role, ()):
            if isinstance(value, str):
                texts += [value] if value or not self.cells else []
            elif isinstance(value, list | tuple):
                texts += [text for text in value if text or not self.cells]
            else:
                kind = f"{role} are {kind_of(value)}, not texts"
                raise RowError(kind, f"{kind}: {str(value)[:60]}", expected="a text or a list of texts")
        return tuple(texts)

    def _scores(self, found: Found, role: str, texts: int) -> Scores | None:
        """The scores of so many texts, as they stand there: whether they are as many is checked with the record. In CSV
        an empty cell is an absent score."""
        if role not in found:
            return None
        scores: list[Any] = []
        for value in found[role]:
            scores += value if isinstance(value, list | tuple) else [value]
        if self.cells:
            scores = [self._number(score, role) for score in scores if score.strip()]
        return None if not scores and (self.cells or not texts) else tuple(map(_as_float, scores))

    def _number(self, cell: str, role: str) -> float:
        try:
            return float(cell)
        except ValueError:
            kind = f"{role} hold text that is not a number"
            raise RowError(kind, f"{kind}: {cell[:40]!r}", expected="a number, or an empty cell") from None

    def _teacher_scores(self, found: Found, positives: int, negatives: int) -> tuple[Scores | None, Scores | None]:
        """`teacher_scores` is the short form of both: the scores of the positives, then of the negatives."""
        both = self._scores(found, "teacher_scores", positives + negatives)
        if both is None:
            own = self._scores(found, "teacher_positive_scores", positives)
            return own, self._scores(found, "teacher_negative_scores", negatives)
        if len(both) != positives + negatives:
            kind = "teacher_scores and their texts differ in number"
            what = f"{len(both)} teacher_scores for {positives} positives and {negatives} negatives"
            raise RowError(kind, what, fix="one score a text; null where unknown")
        return both[:positives] or None, both[positives:] or None

    def _label(self, value: Any) -> int | None:
        """A class as a number. Names are numbered as they come, and renumbered in their order at the end."""
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        if isinstance(value, str) and value.strip():
            return self.labels.setdefault(value, len(self.labels))
        kind = f"the label is {kind_of(value)}"
        raise RowError(kind, f"{kind}: {value!r}", expected="a name or a whole number")


def _as_float(score: Any) -> Any:
    """A whole number as a float; one too large for that is infinite, which no score may be."""
    try:
        return float(score) if type(score) is int else score
    except OverflowError:
        return math.inf


Range = tuple[float, float]


@dataclass
class Extent:
    """The lowest and the highest score seen in a file, and where."""

    low: float = float("inf")
    high: float = float("-inf")
    low_line: int = 0
    high_line: int = 0

    def add(self, record: Record, line: int) -> None:
        for score in scores_of(record):
            if score < self.low:
                self.low, self.low_line = score, line
            if score > self.high:
                self.high, self.high_line = score, line

    @property
    def empty(self) -> bool:
        return self.low > self.high

    def range(self, path: object) -> Range:
        """The known range that all scores of a file fit: 0 to 1; -1 to 1; 1 to 5 if the lowest is exactly 1; 0 to 5.

        Errors: `DataError` naming the lines of the extremes if none fits.
        """
        low, high = self.low, self.high
        if low >= 0 and high <= 1:
            return (0.0, 1.0)
        if low >= -1 and high <= 1:
            return (-1.0, 1.0)
        if low == 1 and high <= 5:
            return (1.0, 5.0)
        if low >= 0 and high <= 5:
            return (0.0, 5.0)
        raise DataError(
            f"scores from {low:g} (line {self.low_line}) to {high:g} (line {self.high_line}) fit no known range",
            where=path,
            expected="0 to 1, -1 to 1, 1 to 5 or 0 to 5",
            fix=f"declare it: score_range: [{low:g}, {high:g}] or wider beside its path "
            + typed_for_source(f"score_range=[{low:g},{high:g}]"),
        )


def scores_of(record: Record) -> Iterator[float]:
    """The known scores of its positives and negatives, the teacher's left out."""
    both = (*(record.positive_scores or ()), *(record.negative_scores or ()))
    return (score for score in both if score is not None)


def check_range(record: Record, declared: Range) -> None:
    """Raise `RowError` for a score outside the declared range."""
    for score in scores_of(record):
        if not declared[0] <= score <= declared[1]:
            raise RowError(
                "score outside the declared range",
                f"score {score:g} is outside the declared range",
                expected=f"{declared[0]:g} to {declared[1]:g}",
                fix="correct the row, or declare another score_range",
            )


def rescaled(record: Record, known: Range | None) -> Record:
    """The record with its scores moved from `known` to [0, 1]. A teacher's scores are left alone.

    Errors: `RowError` for a retrieval record with a positive of the lowest score: there a positive is a target whatever
    its score, and that one would be learnt.
    """
    if known is not None and known != (0.0, 1.0):
        low, high = known

        def moved(scores: Scores | None) -> Scores | None:
            return None if scores is None else tuple(s if s is None else (s - low) / (high - low) for s in scores)

        positive_scores, negative_scores = moved(record.positive_scores), moved(record.negative_scores)
        record = replace(record, positive_scores=positive_scores, negative_scores=negative_scores)
    if record.task == "retrieval" and 0.0 in (record.positive_scores or ()):
        raise RowError(
            "a positive with the lowest possible score is not a positive",
            fix=f"declare task: sts beside its path {typed_for_source('task=sts')}, or remove the rows",
        )
    return record
