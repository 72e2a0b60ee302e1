"""A model at several widths of its vectors, side by side: what Matryoshka training is for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsmith.core.collectives import ALONE, Group
from embedsmith.core.encoder import Encoder, Role, fingerprint
from embedsmith.core.errors import EvaluationError
from embedsmith.core.reps import Dense, Reps
from embedsmith.evaluate.heads import HeadScores, encoded_once
from embedsmith.evaluate.result import Results
from embedsmith.evaluate.run import evaluate
from embedsmith.evaluate.tasks import Task

FULL = "full"


@dataclass(frozen=True)
class NarrowEncoder:
    """An encoder whose dense vectors are their first `width` numbers, normalised again.

    Errors: `EvaluationError` where the vectors are not wider than that.
    """

    encoder: Encoder
    width: int

    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        reps = self.encoder.represent(texts, role=role, task=task, outputs=outputs)
        return {name: self._cut(rep) if isinstance(rep, Dense) else rep for name, rep in reps.items()}

    def _cut(self, rep: Dense) -> Dense:
        whole = rep.vector_ND.shape[1]
        if self.width >= whole:
            raise EvaluationError(f"{self.width} of {whole} numbers were asked for", expected=f"1 to {whole - 1}")
        return rep.truncate(self.width)

    def fingerprint(self) -> str:
        return hashlib.blake2b(f"{fingerprint(self.encoder)} first {self.width}".encode(), digest_size=16).hexdigest()


def score_widths(
    encoder: Encoder,
    tasks: Sequence[Task],
    widths: Sequence[int],
    *,
    about: Mapping[str, Any] | None = None,
    keep: str | Path | None = None,
    group: Group = ALONE,
) -> HeadScores:
    """Score the whole vectors (the column `full`), then their first numbers at every width, from wide to narrow. Each
    text is encoded once.

    `keep`: a folder for vectors and results, so that a stopped command continues; `group`: see `evaluate`.
    Errors: `EvaluationError` for no width, and one that the vectors do not have.
    """
    with at_widths(encoder, widths, keep) as narrowed:
        folder = None if keep is None else Path(keep) / "results"
        columns: dict[str, Results] = {
            name: evaluate(each, tasks, about=about, keep=folder, group=group) for name, each in narrowed.items()
        }
    return HeadScores(columns, {}, dict(about or {}))


@contextmanager
def at_widths(encoder: Encoder, widths: Sequence[int], keep: str | Path | None = None) -> Iterator[dict[str, Encoder]]:
    """The encoder as it is and at every width, by name; they share what was encoded."""
    if not widths or min(widths) < 1:
        raise EvaluationError(f"the widths are {list(widths)}", expected="numbers from 1, such as 64 128 256")
    with encoded_once(encoder, ("dense",), keep) as shared:
        narrow = {str(width): NarrowEncoder(shared, width) for width in sorted(set(widths), reverse=True)}
        yield {FULL: shared, **narrow}
