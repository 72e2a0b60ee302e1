"""Kinds of task. A task is a value: its data, and how an encoder is scored on it. Here similarity; rankings are in
`retrieval.py`, labelled texts in `labels.py`.

A new kind is one more frozen dataclass with `name`, `kind` and `evaluate`, and one more
`Format` in `load.py` that says what its files look like. Nothing else knows the kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from embedsmith.core.errors import EvaluationError
from embedsmith.core.reps import Dense
from embedsmith.evaluate.encoding import Reader
from embedsmith.evaluate.metrics import Floats, cosines, pair_scores
from embedsmith.evaluate.result import Example, TaskResult, ends


class Task(Protocol):
    """Anything `evaluate` can run."""

    kind: ClassVar[str]

    @property
    def name(self) -> str: ...

    def evaluate(self, reader: Reader) -> TaskResult:
        """Errors: `EvaluationError` when the model's output cannot be scored."""
        ...


@dataclass(frozen=True)
class STSTask:
    """Pairs of texts with a human score: does the model's similarity rank them alike?

    Main score: Spearman's correlation of cosine and `score` over all pairs. Other heads than `dense` are compared by
    their own similarity, under `spearman`.
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

    def evaluate(self, reader: Reader) -> TaskResult:
        left, right = reader.sides(self.text1, self.text2, task=self.kind, label=self.name)
        similarity_N, cosine_N = left.paired(right)[0].double().numpy(), None
        if isinstance(left, Dense) and isinstance(right, Dense):
            cosine_N = cosines(left.vector_ND.double().numpy(), right.vector_ND.double().numpy())
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
