"""What a mining gave, in numbers, and its parts put together."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embedsmith.core.files import atomic_file
from embedsmith.core.reps import exceeds
from embedsmith.data import Record

SUSPECT = 0.95
"""A negative that scores more than this share of its query's weakest positive is counted as probably false."""


@dataclass(frozen=True)
class MineReport:
    """What a mining gave. `suspect`: share of the negatives with a score above 0.95 times their weakest positive's (an
    estimate of the false ones). `short`: records with fewer negatives than asked for, `empty`: with none, `dropped`:
    left out for that."""

    key: str
    output: str
    records: int
    corpus: int
    negatives: int
    short: int
    empty: int
    dropped: int
    suspect: float
    negative_score: float
    positive_score: float
    seconds: float
    output_bytes: int = 0

    @staticmethod
    def of_earlier_run(path: Path, output: str, key: str) -> MineReport | None:
        """The report of an earlier run of the same, if its output is as it was left."""
        try:
            known = MineReport(**json.loads(path.read_text(encoding="utf-8")))
            return known if (known.key, known.output_bytes) == (key, Path(output).stat().st_size) else None
        except (OSError, ValueError, TypeError):
            return None

    def lines(self) -> str:
        return (
            f"{self.records:,} records, {self.negatives:,} negatives from {self.corpus:,} texts in {self.output}\n"
            f"short {self.short:,}, without any {self.empty:,}, left out {self.dropped:,}; mean score of negatives "
            f"{self.negative_score:.3f}, of positives {self.positive_score:.3f}, suspect {self.suspect:.1%}"
        )


@dataclass(frozen=True)
class Counts:
    """The same of one part, as sums."""

    records: int
    negatives: int
    short: int
    empty: int
    dropped: int
    suspect: int
    negative_score: float
    positive_score: float
    positives: int

    @staticmethod
    def of(mined: Sequence[Record], kept: Sequence[Record], wanted: int) -> Counts:
        sizes = [len(record.negatives) for record in mined]
        scores = [(r.teacher_positive_scores or (), r.teacher_negative_scores or ()) for r in kept]
        positives = [[s for s in p if s is not None] for p, _ in scores]
        negatives = [[s for s in n if s is not None] for _, n in scores]
        suspect = sum(exceeds(s, SUSPECT * min(p)) for p, n in zip(positives, negatives, strict=True) if p for s in n)
        return Counts(
            records=len(kept),
            negatives=sum(len(record.negatives) for record in kept),
            short=sum(size < wanted for size in sizes),
            empty=sum(size == 0 for size in sizes),
            dropped=len(mined) - len(kept),
            suspect=suspect,
            negative_score=sum(map(sum, negatives)),
            positive_score=sum(map(sum, positives)),
            positives=sum(map(len, positives)),
        )

    def report(self, key: str, output: str, corpus: int, seconds: float) -> MineReport:
        return MineReport(
            key=key,
            output=output,
            records=self.records,
            corpus=corpus,
            negatives=self.negatives,
            short=self.short,
            empty=self.empty,
            dropped=self.dropped,
            suspect=self.suspect / max(self.negatives, 1),
            negative_score=self.negative_score / max(self.negatives, 1),
            positive_score=self.positive_score / max(self.positives, 1),
            seconds=round(seconds, 1),
            output_bytes=Path(output).stat().st_size,
        )


def concatenate(paths: Sequence[Path], output: Path) -> None:
    """All parts as one file, gzipped if its name ends in .gz."""
    with atomic_file(output, "wb") as file:
        zipped = gzip.GzipFile("", "wb", 6, file, mtime=0) if output.suffix == ".gz" else None
        for path in paths:
            with path.open("rb") as part:
                shutil.copyfileobj(part, zipped or file)
        if zipped is not None:
            zipped.close()
