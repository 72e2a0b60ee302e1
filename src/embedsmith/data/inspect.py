"""What a data file was understood to be, in numbers and samples: `embedsmith inspect`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from embedsmith.data.read import read_source
from embedsmith.data.record import Record, TokenIds, text_id
from embedsmith.data.source import Skipped, Source, negatives_per_query

PERCENTILES = (0, 50, 90, 99, 100)


@dataclass(frozen=True)
class Lengths:
    """Characters of the texts in one role (tokens, in a token cache), at `PERCENTILES`."""

    texts: int
    percentiles: tuple[int, ...]


@dataclass(frozen=True)
class Duplicates:
    """What repeats, by text id: rows beyond the first of their content, rows whose query came before, positives that
    came before, and negatives that are also positives of their query."""

    rows: int
    queries: int
    positives: int
    negatives_that_are_positives: int


@dataclass(frozen=True)
class Inspection:
    """All of it. `fields`: how many records hold each field; `scores`: the range assumed and why."""

    path: str
    name: str
    format: str
    task: str
    records: int
    skipped: tuple[Skipped, ...]
    left_out: dict[str, int]
    fields: dict[str, int]
    lengths: dict[str, Lengths]
    duplicates: Duplicates
    scores: str
    score_counts: dict[str, int]
    labels: dict[str, int]
    negatives_drawn: int
    fingerprint: str
    samples: tuple[Record[Any], ...]

    def tables(self) -> RenderableType:
        """The same for a terminal."""
        facts = Table("what", "found", title=self.path, title_justify="left")
        facts.add_row("format", self.format)
        facts.add_row("task", self.task)
        facts.add_row("records", f"{self.records:,}")
        for skipped in self.skipped:
            lines = ", ".join(map(str, skipped.lines)) + (", ..." if skipped.count > len(skipped.lines) else "")
            facts.add_row("skipped", Text(f"{skipped.count:,}: {skipped.kind} (lines {lines})"))
        if self.left_out:
            slots = ", ".join(f"{count:,}: {slot}" for slot, count in self.left_out.items())
            facts.add_row("slots left out", f"{slots} (their rows are kept)")
        facts.add_row("fields", ", ".join(f"{name} {count:,}" for name, count in self.fields.items()))
        facts.add_row("scores", self.scores)
        repeated = self.duplicates
        facts.add_row(
            "repeated", f"rows {repeated.rows:,}, queries {repeated.queries:,}, positives {repeated.positives:,}"
        )
        if repeated.negatives_that_are_positives:
            facts.add_row("negatives that are positives", f"{repeated.negatives_that_are_positives:,} (never drawn)")
        facts.add_row("negatives drawn for a query", str(self.negatives_drawn))
        facts.add_row("fingerprint", self.fingerprint)
        unit = "tokens" if self.format == "tokens" else "characters"
        sizes = Table(unit, "texts", *("shortest", *(f"{p} %" for p in PERCENTILES[1:-1]), "longest"))
        for role, lengths in self.lengths.items():
            sizes.add_row(role, f"{lengths.texts:,}", *(f"{value:,}" for value in lengths.percentiles))
        parts: list[RenderableType] = [facts, sizes]
        if self.score_counts:
            parts.append(_bars("score, of 1", self.score_counts))
        if self.labels:
            most = dict(Counter(self.labels).most_common(10))
            parts.append(_bars(f"label (10 of {len(self.labels)})" if len(self.labels) > 10 else "label", most))
        return Group(*parts, *(_sample(record) for record in self.samples))


def inspect_source(source: Source, samples: int = 3) -> Inspection:
    """Read a source and describe it. Samples are spread over the file. Errors: those of `read_source`."""
    found = read_source(source)
    records = found.records
    counts = {f.name: sum(getattr(r, f.name) not in (None, (), "") for r in records) for f in fields(Record)}
    scores = Counter(min(int(score * 10), 9) for r in records for score in r.positive_scores or () if score is not None)
    labels = Counter(record.label for record in records if record.label is not None)
    places = np.linspace(0, len(records) - 1, min(samples, len(records))).astype(int)
    return Inspection(
        path=source.path,
        name=found.name,
        format=found.format,
        task=found.task,
        records=len(records),
        skipped=found.skipped,
        left_out=found.left_out,
        fields={name: count for name, count in counts.items() if count and name not in ("task", "source")},
        lengths=_lengths(records),
        duplicates=_duplicates(records),
        scores=found.scores,
        score_counts={f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}": scores[tenth] for tenth in sorted(scores)},
        labels={found.labels[label] if found.labels else str(label): labels[label] for label in sorted(labels)},
        negatives_drawn=negatives_per_query(source, records),
        fingerprint=found.fingerprint,
        samples=tuple(records[int(place)] for place in places),
    )


def _lengths(records: Sequence[Record[Any]]) -> dict[str, Lengths]:
    roles: dict[str, Iterable[str | TokenIds]] = {
        "query": (record.query for record in records),
        "positives": (text for record in records for text in record.positives),
        "negatives": (text for record in records for text in record.negatives),
    }
    lengths: dict[str, Lengths] = {}
    for role, texts in roles.items():
        sizes = np.fromiter((len(text if isinstance(text, str) else text.ids) for text in texts), np.int64)
        if len(sizes):
            lengths[role] = Lengths(len(sizes), tuple(int(value) for value in np.percentile(sizes, PERCENTILES)))
    return lengths


def _duplicates(records: Sequence[Record[Any]]) -> Duplicates:
    """Eight bytes a row and text are held, not the texts: a file of millions is looked at as well."""

    def repeats(values: Iterable[int]) -> int:
        found = np.fromiter(values, np.int64)
        return len(found) - len(np.unique(found))

    def ids(texts: Sequence[str | TokenIds]) -> tuple[int, ...]:
        return tuple(text_id(text) for text in texts)

    def content(record: Record[Any]) -> int:
        return hash((text_id(record.query), ids(record.positives), ids(record.negatives), record.positive_scores))

    return Duplicates(
        rows=repeats(content(record) for record in records),
        queries=repeats(text_id(record.query) for record in records),
        positives=repeats(id_ for record in records for id_ in ids(record.positives)),
        negatives_that_are_positives=sum(
            len({*ids(record.positives)} & {*ids(record.negatives)}) for record in records if record.negatives
        ),
    )


def _bars(title: str, counts: dict[str, int]) -> Table:
    table = Table(title, "count", "")
    top = max(counts.values())
    for name, count in counts.items():
        table.add_row(Text(name), f"{count:,}", "█" * max(round(30 * count / top), 1))
    return table


def _sample(record: Record[Any]) -> Table:
    table = Table(show_header=False, title="sample", title_justify="left")
    table.add_row("query", Text(_short(record.query)))
    for role, texts, scores in (
        ("positive", record.positives, record.positive_scores),
        ("negative", record.negatives, record.negative_scores),
    ):
        for slot, text in enumerate(texts[:3]):
            known = scores[slot] if scores else None
            table.add_row(role if known is None else f"{role} ({known:.2f})", Text(_short(text)))
        if len(texts) > 3:
            table.add_row("", f"and {len(texts) - 3} more")
    if record.label is not None:
        table.add_row("label", str(record.label))
    return table


def _short(text: str | TokenIds) -> str:
    if isinstance(text, TokenIds):
        return f"{len(text.ids)} tokens of the text {text.id}"
    flat = " ".join(text.split())
    return flat if len(flat) <= 160 else flat[:157] + "..."
