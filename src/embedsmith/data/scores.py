"""Score ranges: declared or inferred, and rescaled to [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass, replace

from embedsmith.core.errors import DataError
from embedsmith.data.record import Record, RowError, Scores

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
