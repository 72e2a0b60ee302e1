"""How search, mining and evaluation know a model: a cached matrix, a server or another library's model fits too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from embedsmith.core.errors import ModelError
from embedsmith.core.reps import Reps

Role = Literal["query", "document"]


class Encoder(Protocol):
    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        """Representations of N texts, in their order, on the CPU, without gradient."""
        ...


@runtime_checkable
class Fingerprinted(Protocol):
    """An encoder that can say which one it is."""

    def fingerprint(self) -> str:
        """A hash of everything its output depends on: weights, settings, prompts."""
        ...


def fingerprint(encoder: Encoder) -> str:
    """The encoder's hash. Errors: `ModelError` for an encoder that has none."""
    if not isinstance(encoder, Fingerprinted):
        raise ModelError(
            f"{type(encoder).__name__} cannot say which model it is",
            expected="a method fingerprint() that returns a hash of its weights and settings",
            fix="add it, or do without what is kept on disk",
        )
    return encoder.fingerprint()
