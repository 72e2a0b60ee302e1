"""Several heads scored together: the weighted sum of their similarities, as M3-Embedding's hybrid retrieval."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from embedsmith.core.encoder import Encoder, Role, fingerprint, represent
from embedsmith.core.errors import SearchError
from embedsmith.core.reps import MultiVector, Representation, Reps, Widths, concatenate

M3_WEIGHTS: Mapping[str, float] = {"dense": 1.0, "sparse": 0.3, "multivector": 1.0}
"""w1, w2, w3 of s = w1 s_dense + w2 s_lex + w3 s_mul: what M3-Embedding retrieves with on MIRACL and MKQA."""

_NUMBERS = 2**24  # held at once while token vectors are compared: 64 MB


@dataclass(frozen=True)
class Hybrid(Representation):
    """N texts under several heads. Its scores are sum_h weight_h score_h, exact for every pair (no candidates are
    chosen by one head first)."""

    parts: tuple[Representation, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    def tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part.tensors()]

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(tuple(part.map(change) for part in self.parts), self.weights)

    @property
    def token_count(self) -> int:
        return max(part.token_count for part in self.parts)

    def scores(self, other: Self, widths: Widths | None = None) -> Tensor:
        """score_1QK. Documents are taken a few at a time where token vectors are compared."""
        rows = max(len(other), 1)
        if any(isinstance(part, MultiVector) for part in self.parts):
            rows = max(_NUMBERS // max(len(self) * self.token_count * other.token_count, 1), 1)
        blocks = [
            self._sum(other.rows(slice(start, start + rows)), lambda mine, theirs: mine.scores(theirs))
            for start in range(0, max(len(other), 1), rows)
        ]
        return torch.cat(blocks, dim=-1)

    def paired(self, other: Self, widths: Widths | None = None) -> Tensor:
        return self._sum(other, lambda mine, theirs: mine.paired(theirs))

    def _sum(self, other: Self, score: Callable[[Any, Any], Tensor]) -> Tensor:
        terms = zip(self.weights, self.parts, other.parts, strict=True)
        total: Tensor = torch.stack([weight * score(mine, theirs) for weight, mine, theirs in terms]).sum(0)
        return total


def join(pieces: Sequence[Representation]) -> Representation:
    """Rows of all pieces in order, hybrid ones too."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if isinstance(first, Hybrid):
        columns = zip(*(piece.parts for piece in pieces if isinstance(piece, Hybrid)), strict=True)
        return Hybrid(tuple(join(column) for column in columns), first.weights)
    return concatenate([{"all": piece} for piece in pieces])["all"]


@dataclass(frozen=True)
class HybridEncoder:
    """An encoder with one more output, `hybrid`: the heads of `weights` scored together."""

    encoder: Encoder
    weights: Mapping[str, float] = field(default_factory=lambda: dict(M3_WEIGHTS))

    def __post_init__(self) -> None:
        numbers = self.weights.values()
        if not all(0 <= weight < float("inf") for weight in numbers) or not any(numbers):
            raise SearchError(
                f"the weights are {dict(self.weights)}",
                expected="a number from 0 for every head, and one above 0: otherwise all documents score the same",
            )

    def represent(
        self,
        texts: Sequence[str],
        *,
        role: Role,
        task: str | None = None,
        outputs: Sequence[str] = ("dense",),
        instruction: Sequence[str | None] | None = None,
    ) -> Reps:
        if "hybrid" not in outputs:
            return represent(self.encoder, texts, role=role, task=task, outputs=outputs, instruction=instruction)
        heads = tuple(head for head, weight in self.weights.items() if weight > 0)
        plain = tuple(dict.fromkeys([*heads, *(name for name in outputs if name != "hybrid")]))
        reps = represent(self.encoder, texts, role=role, task=task, outputs=plain, instruction=instruction)
        hybrid = Hybrid(tuple(reps[head] for head in heads), tuple(self.weights[head] for head in heads))
        return {**{name: reps[name] for name in outputs if name != "hybrid"}, "hybrid": hybrid}

    def fingerprint(self) -> str:
        weights = ",".join(f"{head}={weight!r}" for head, weight in sorted(self.weights.items()))
        return hashlib.blake2b(f"{fingerprint(self.encoder)} {weights}".encode(), digest_size=16).hexdigest()
