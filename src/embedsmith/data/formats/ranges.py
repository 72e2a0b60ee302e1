"""The range that scores were given in: declared or inferred from a whole file, and moved to [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator
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
            fix="declare it: score_range: [lowest, highest]",
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
            "a positive with the lowest possible score is not a positive", fix="declare task: sts, or remove the rows"
        )
    return record
