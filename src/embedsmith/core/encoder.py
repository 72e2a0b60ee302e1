"""How search, mining and evaluation know a model: a cached matrix, a server or another library's model fits too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from embedsmith.core.reps import Reps

Role = Literal["query", "document"]


class Encoder(Protocol):
    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        """Representations of N texts, in their order, on the CPU, without gradient."""
        ...
