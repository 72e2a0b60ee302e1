"""Texts to representations for evaluation: in pieces of bounded size, with a progress bar, checked for NaN."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from embedsmith.core.encoder import Encoder, Role
from embedsmith.core.errors import EvaluationError
from embedsmith.core.progress import progress_bar
from embedsmith.core.reps import Representation, concatenate

PIECE = 2048
"""Texts an encoder is given at once: enough to sort by length, few enough to hold and to show progress."""


@dataclass(frozen=True)
class Reader:
    """An encoder as the tasks use it: one head of it.

    `progress=None` shows a bar where the terminal is watched.
    """

    encoder: Encoder
    head: str = "dense"
    progress: bool | None = None

    def pieces(self, texts: Sequence[str], *, role: Role, task: str, label: str) -> Iterator[Representation]:
        """Representations of successive pieces of `texts`.

        Errors: `EvaluationError` for a missing head, a wrong number of rows and values that are not finite.
        """
        with progress_bar(label, len(texts), visible=self.progress) as bar:
            for start in range(0, len(texts), PIECE):
                piece = texts[start : start + PIECE]
                reps = self.encoder.represent(piece, role=role, task=task, outputs=(self.head,))
                if self.head not in reps:
                    have = ", ".join(reps)
                    raise EvaluationError(f"the model gave no {self.head!r} output", where=label, expected=have)
                _check(reps[self.head], piece, label)
                yield reps[self.head]
                bar.advance(len(piece))

    def all(self, texts: Sequence[str], *, role: Role, task: str, label: str) -> Representation:
        parts = [{self.head: part} for part in self.pieces(texts, role=role, task=task, label=label)]
        joined: Representation = concatenate(parts)[self.head]
        return joined


def _check(representation: Representation, texts: Sequence[str], label: str) -> None:
    if len(representation) != len(texts):
        raise EvaluationError(f"the model gave {len(representation)} rows for {len(texts)} texts", where=label)
    for tensor in representation.floating():
        if not bool(tensor.isfinite().all()):
            row = int((~tensor.isfinite()).flatten(1).any(1).nonzero()[0])
            raise EvaluationError(
                f"the model's output for {texts[row][:80]!r} is not finite",
                where=label,
                fix="check the weights; a run that diverged leaves NaN in them",
            )
