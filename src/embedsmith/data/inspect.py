"""What a data file was understood to be, in numbers and samples: `embedsmith inspect`."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
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
    records, seen = found.records, _Tally.of(found.records)
    counts = {f.name: seen.fields[f.name] for f in fields(Record) if f.name not in ("task", "source")}
    lengths = {role: np.asarray(sizes) for role, sizes in seen.lengths.items() if sizes}
    places = np.linspace(0, len(records) - 1, min(samples, len(records))).astype(int)
    return Inspection(
        path=source.path,
        name=found.name,
        format=found.format,
        task=found.task,
        records=len(records),
        skipped=found.skipped,
        left_out=found.left_out,
        fields={name: count for name, count in counts.items() if count},
        lengths={
            role: Lengths(len(size_N), tuple(int(value) for value in np.percentile(size_N, PERCENTILES)))
            for role, size_N in lengths.items()
        },
        duplicates=Duplicates(
            _repeats(seen.contents), _repeats(seen.queries), _repeats(seen.positives), seen.negatives_that_are_positives
        ),
        scores=found.scores,
        score_counts={
            f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}": seen.scores[tenth] for tenth in sorted(seen.scores)
        },
        labels={
            found.labels[label] if found.labels else str(label): seen.labels[label] for label in sorted(seen.labels)
        },
        negatives_drawn=negatives_per_query(source, records),
        fingerprint=found.fingerprint,
        samples=tuple(records[int(place)] for place in places),
    )


@dataclass
class _Tally:
    """What one pass over records adds up. Eight bytes a row and text are held, not the texts, and each record is made
    once: a file of millions is looked at as well. `contents`: a hash of each row, `queries` and `positives`: text ids.
    """

    fields: Counter[str] = field(default_factory=Counter)
    scores: Counter[int] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    lengths: dict[str, array[int]] = field(
        default_factory=lambda: {role: array("q") for role in ("query", "positives", "negatives")}
    )
    contents: array[int] = field(default_factory=lambda: array("q"))
    queries: array[int] = field(default_factory=lambda: array("q"))
    positives: array[int] = field(default_factory=lambda: array("q"))
    negatives_that_are_positives: int = 0

    @staticmethod
    def of(records: Sequence[Record[Any]]) -> _Tally:
        tally, names = _Tally(), [f.name for f in fields(Record)]
        for record in records:
            tally.fields.update([name for name in names if getattr(record, name) not in (None, (), "")])
            for score in record.positive_scores or ():
                if score is not None:
                    tally.scores[min(int(score * 10), 9)] += 1
            if record.label is not None:
                tally.labels[record.label] += 1
            for role, texts in (
                ("query", (record.query,)),
                ("positives", record.positives),
                ("negatives", record.negatives),
            ):
                tally.lengths[role].extend([len(text if isinstance(text, str) else text.ids) for text in texts])
            query, positives = text_id(record.query), tuple(map(text_id, record.positives))
            negatives = tuple(map(text_id, record.negatives))
            tally.contents.append(hash((query, positives, negatives, record.positive_scores)))
            tally.queries.append(query)
            tally.positives.extend(positives)
            if negatives:
                tally.negatives_that_are_positives += len({*positives} & {*negatives})
        return tally


def _repeats(values: array[int]) -> int:
    """How many of the values came before."""
    sorted_N = np.sort(np.asarray(values))
    return int((sorted_N[1:] == sorted_N[:-1]).sum())


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
