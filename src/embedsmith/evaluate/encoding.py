"""Texts to representations for evaluation: in pieces of bounded size, shared among ranks, with a progress bar, checked
for NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from embedsmith.core.collectives import ALONE, Group, objects_of_all_ranks, rank, world_size
from embedsmith.core.encoder import Encoder, Role
from embedsmith.core.errors import EmbedsmithError, EvaluationError
from embedsmith.core.progress import progress_bar
from embedsmith.core.reps import Dense, Representation
from embedsmith.search.hybrid import join

PIECE = 2048
"""Texts an encoder is given at once: enough to sort by length, few enough to hold and to show progress."""

T = TypeVar("T")


class FailedElsewhereError(EvaluationError):
    """Another rank failed, so this one stops too."""


@dataclass(frozen=True)
class Reader:
    """An encoder as the tasks use it: one head of it, on the ranks of `group`.

    Every rank encodes a share of the texts. `progress=None` shows a bar where the terminal is watched.
    """

    encoder: Encoder
    head: str = "dense"
    progress: bool | None = None
    group: Group = ALONE

    def pieces(self, texts: Sequence[str], *, role: Role, task: str, label: str) -> Iterator[Representation]:
        """Representations of successive pieces of `texts`, on this rank alone.

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
        """Representations of all texts, in their order, on every rank. A collective."""
        share = self.share(len(texts))
        mine = texts[share]
        parts = self.together(lambda: join(list(self.pieces(mine, role=role, task=task, label=label))))
        return parts[0] if share == slice(0, len(texts)) else join(parts)

    def sides(
        self, left: Sequence[str], right: Sequence[str], *, task: str, label: str
    ) -> tuple[Representation, Representation]:
        """Both sides of pairs, as queries of `task`; a text that occurs more than once is encoded once."""
        import torch

        texts = list(dict.fromkeys([*left, *right]))
        place = {text: number for number, text in enumerate(texts)}
        rep = self.all(texts, role="query", task=task, label=label)
        first, second = (rep.rows(torch.tensor([place[text] for text in side])) for side in (left, right))
        return first, second

    def dense(self, texts: Sequence[str], *, task: str, label: str) -> npt.NDArray[np.float32]:
        """vector_ND of texts that are queries of `task`. Errors: `EvaluationError` for a head without vectors."""
        rep = self.all(texts, role="query", task=task, label=label)
        if not isinstance(rep, Dense):
            raise EvaluationError(f"{task} needs one vector a text; the head {self.head!r} has none", where=label)
        vector_ND: npt.NDArray[np.float32] = rep.vector_ND.float().numpy()
        return vector_ND

    def share(self, count: int) -> slice:
        """This rank's part of `count` texts; all of them where there are fewer texts than ranks."""
        world, mine = world_size(self.group), rank(self.group)
        if count < world:
            return slice(0, count)
        return slice(count * mine // world, count * (mine + 1) // world)

    def together(self, act: Callable[[], T]) -> list[T]:
        """What `act` returns on every rank, in rank order. Errors: see `as_one`."""
        outcomes: list[tuple[T, str | None]] = objects_of_all_ranks((act(), None), self.group)
        for number, (_, message) in enumerate(outcomes):
            if message is not None:
                raise FailedElsewhereError(message, where=f"rank {number}")
        return [value for value, _ in outcomes]

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """An error of any kind on one rank ends all of them here: none waits for a rank that is gone.

        All exchange between the ranks inside goes through `together`, so each of the others receives the error of a
        failed rank at its next exchange, at the latest at the end. Errors: the rank's own; on the others
        `FailedElsewhereError` with its message.
        """
        try:
            yield
            self.together(lambda: None)
        except FailedElsewhereError:
            raise
        except BaseException as error:
            name = "" if isinstance(error, EmbedsmithError) else f"{type(error).__name__}: "
            objects_of_all_ranks((None, f"{name}{error}"), self.group)
            raise


def _check(representation: Representation, texts: Sequence[str], label: str) -> None:
    if len(representation) != len(texts):
        raise EvaluationError(f"the model gave {len(representation)} rows for {len(texts)} texts", where=label)
    for tensor in representation.floating():
        if bool(tensor.sum().isfinite()):  # one pass finds that nothing is wrong; a sum that overflowed is looked into
            continue
        if not bool(tensor.isfinite().all()):
            row = int((~tensor.isfinite()).flatten(1).any(1).nonzero()[0])
            raise EvaluationError(
                f"the model's output for {texts[row][:80]!r} is not finite",
                where=label,
                fix="check the weights; a run that diverged leaves NaN in them",
            )
