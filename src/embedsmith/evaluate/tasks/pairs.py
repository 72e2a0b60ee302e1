"""Tasks on pairs of texts, with a score that people gave or with a label: is the similarity that of the pairs?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from embedsmith.core.errors import DataError, EvaluationError
from embedsmith.core.reps import Dense
from embedsmith.core.shelf import task_kinds
from embedsmith.data.formats.file_kinds import sound_rows
from embedsmith.data.formats.texts import text_in
from embedsmith.evaluate.encoding import Reader
from embedsmith.evaluate.metrics import Floats, pair_scores, paired_cosines
from embedsmith.evaluate.result import Example, TaskResult, ends
from embedsmith.evaluate.tasks.kinds import Format, TaskKind, has_columns, is_number, refuse_empty
from embedsmith.evaluate.tasks.rows import read_rows, task_in


@task_kinds.register("sts")
@dataclass(frozen=True)
class STSTask(TaskKind):
    """Pairs of texts with a human score: does the model's similarity rank them alike?

    Main score: Spearman's correlation of cosine and `score` over all pairs. Other heads than `dense` are compared by
    their own similarity, under `spearman`.

    name: what results call it.
    text1, text2: the two texts of every pair.
    score: how alike people find them; only the order counts.
    """

    name: str
    text1: Sequence[str] = field(repr=False)
    text2: Sequence[str] = field(repr=False)
    score: Sequence[float] = field(repr=False)
    kind: ClassVar[str] = "sts"

    def __post_init__(self) -> None:
        if not len(self.text1) == len(self.text2) == len(self.score):
            sizes = f"{len(self.text1)}, {len(self.text2)} and {len(self.score)}"
            raise EvaluationError(f"text1, text2 and score have {sizes} entries", where=self.name)
        if not self.text1:
            raise EvaluationError("no pairs to score", where=self.name)
        if not all(np.isfinite(self.score)):
            raise EvaluationError("a score is not a finite number", where=self.name)

    @staticmethod
    def read(path: Path, name: str, split: str) -> STSTask:
        """Rows of `text1`, `text2`, `score` (or `sentence1`, `sentence2`, `score`). The file is the split."""
        text1: list[str] = []
        text2: list[str] = []
        score: list[float] = []
        for where, row in sound_rows(path):
            _append_texts(row, where, text1, text2)
            value: Any = row.get("score")
            if isinstance(value, str) and is_number(value):
                value = float(value)
            if isinstance(value, bool) or not isinstance(value, int | float) or not is_number(value):
                raise DataError(f"the score is {value!r}", where=where, expected="`score`, a finite number")
            score.append(float(value))
        refuse_empty(score, path, "text1, text2, score")
        return STSTask(name, text1, text2, score)

    @staticmethod
    def read_rows(path: Path, name: str, split: str) -> STSTask:
        """Scored pairs in any other layout that training reads, their scores as training sees them, in [0, 1]."""
        pairs = [
            (record.query, text, score)
            for record in read_rows(path)
            for text, score in zip(record.positives, record.positive_scores or ())
            if score is not None
        ]
        return STSTask(name, *zip(*pairs))

    formats: ClassVar[tuple[Format, ...]] = (
        Format(lambda path: task_in(path) == "sts", read_rows, 21, listed=False),
        Format(has_columns({"text1", "text2", "score"}, {"sentence1", "sentence2", "score"}), read, 3),
    )

    def evaluate(self, reader: Reader) -> TaskResult:
        left, right = reader.sides(self.text1, self.text2, task=self.kind, label=self.name)
        similarity_N, cosine_N = left.paired(right)[0].double().numpy(), None
        if isinstance(left, Dense) and isinstance(right, Dense):
            cosine_N = paired_cosines(left.vector_ND.double().numpy(), right.vector_ND.double().numpy())
        label_N = np.asarray(self.score, dtype=np.float64)
        scores = pair_scores("scored pairs", similarity_N, label_N)
        metric, items = "spearman", {"similarity": similarity_N, "score": label_N}
        if cosine_N is not None:
            metric, items["cosine"] = "cosine_spearman", cosine_N
            scores |= pair_scores("scored pairs", cosine_N, label_N, "cosine_")
        undefined = "the model (or the file) gives every pair the same score, so there is no correlation"
        notes = (undefined,) if np.isnan(scores[metric]) else ()
        ids = [str(number) for number in range(len(label_N))]
        examples = self._examples(similarity_N if cosine_N is None else cosine_N, label_N)
        return TaskResult(
            self.name, self.kind, metric, scores, {"pairs": len(label_N)}, ids, items, notes, examples=examples
        )

    def _examples(self, similarity_N: Floats, label_N: Floats) -> tuple[Example, ...]:
        """The pairs whose rank by the model is nearest to, and farthest from, their rank by the score."""
        from scipy.stats import rankdata

        gap_N = np.abs(rankdata(similarity_N) - rankdata(label_N)) / len(label_N)
        return tuple(
            Example(
                str(row),
                1.0 - float(gap_N[row]),
                {"text 1": self.text1[row], "text 2": self.text2[row]},
                {"score": float(label_N[row]), "similarity": float(similarity_N[row])},
            )
            for row in ends(1.0 - gap_N)
        )


@task_kinds.register("pair_classification")
@dataclass(frozen=True)
class PairClassificationTask(TaskKind):
    """Pairs of texts that belong together (1) or not (0): does similarity separate them?

    Main score: average precision of the cosine, `cosine_ap`; other heads than `dense` use their own similarity, under
    `ap`. Accuracy and F1 are those at their best threshold, found on the same pairs, as in mteb.

    name: what results call it.
    text1, text2: the two texts of every pair.
    label: 1 where they belong together, 0 where they do not.
    """

    name: str
    text1: Sequence[str] = field(repr=False)
    text2: Sequence[str] = field(repr=False)
    label: Sequence[int] = field(repr=False)
    kind: ClassVar[str] = "pair_classification"

    def __post_init__(self) -> None:
        if not len(self.text1) == len(self.text2) == len(self.label) or not self.text1:
            sizes = f"{len(self.text1)}, {len(self.text2)} and {len(self.label)}"
            raise EvaluationError(f"text1, text2 and label have {sizes} entries", where=self.name, expected="pairs")
        if set(self.label) != {0, 1}:
            found = ", ".join(str(label) for label in sorted(set(self.label))[:5])
            raise EvaluationError(f"the labels are {found}", where=self.name, expected="0 and 1, both of them")

    @staticmethod
    def read(path: Path, name: str, split: str) -> PairClassificationTask:
        """Rows of `text1`, `text2` and `label` (or `score`), which is 0 or 1."""
        text1: list[str] = []
        text2: list[str] = []
        label: list[int] = []
        for where, row in sound_rows(path):
            _append_texts(row, where, text1, text2)
            value: Any = row.get("label", row.get("score"))
            if str(value) not in ("0", "1", "0.0", "1.0"):
                raise DataError(f"the label is {value!r}", where=where, expected="`label` (or `score`), 0 or 1")
            label.append(int(float(value)))
        refuse_empty(label, path, "text1, text2, label")
        return PairClassificationTask(name, text1, text2, label)

    formats: ClassVar[tuple[Format, ...]] = (
        Format(has_columns({"text1", "text2", "label"}, {"sentence1", "sentence2", "label"}), read, 4),
    )

    def evaluate(self, reader: Reader) -> TaskResult:
        left, right = reader.sides(self.text1, self.text2, task=self.kind, label=self.name)
        label_N = np.asarray(self.label, dtype=np.int64)
        similarity_N = left.paired(right)[0].double().numpy()
        scores = pair_scores("labelled pairs", similarity_N, label_N)
        metric, items = "ap", {"similarity": similarity_N, "label": label_N * 1.0}
        if isinstance(left, Dense) and isinstance(right, Dense):
            cosine_N = paired_cosines(left.vector_ND.numpy(), right.vector_ND.numpy())
            metric, items["cosine"] = "cosine_ap", cosine_N
            scores |= pair_scores("labelled pairs", cosine_N, label_N, "cosine_")
        notes = ("the model gives every pair the same score",) if float(np.ptp(similarity_N)) == 0.0 else ()
        ids = [str(number) for number in range(len(label_N))]
        counts = {"pairs": len(label_N), "positives": int(label_N.sum())}
        return TaskResult(self.name, self.kind, metric, scores, counts, ids, items, notes)


def _append_texts(row: Mapping[str, Any], where: str, text1: list[str], text2: list[str]) -> None:
    first, second = ("sentence1", "sentence2") if "sentence1" in row and "text1" not in row else ("text1", "text2")
    text1.append(text_in(row, first, where))
    text2.append(text_in(row, second, where))
