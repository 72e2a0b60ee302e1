"""Encoders without a model: a text's vector is drawn from its hash, or looked up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from embedsmith.core.encoder import Role
from embedsmith.core.reps import Dense, Reps, Sparse
from embedsmith.core.seeds import derive_seed


def vector(text: str, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(text))
    return torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)


@dataclass
class HashEncoder:
    """Unrelated texts get unrelated vectors; what was asked of it is kept in `calls`."""

    width: int = 8
    calls: list[tuple[int, Role, str | None]] = field(default_factory=list)

    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        self.calls.append((len(texts), role, task))
        return {"dense": Dense(torch.stack([vector(text, self.width) for text in texts]))}


@dataclass(frozen=True)
class TableEncoder:
    """Vectors by text."""

    table: Mapping[str, Sequence[float]]

    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        return {"dense": Dense(torch.tensor([list(self.table[text]) for text in texts]))}


class ConstantEncoder:
    """A collapsed model."""

    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        return {"dense": Dense(torch.full((len(texts), 4), 0.5))}


class WordEncoder:
    """A sparse head: one coordinate a word, weight 1."""

    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        rows = [[derive_seed(word) % 1000 for word in text.split()] for text in texts]
        longest = max(len(row) for row in rows)
        coordinate = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        weight = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])
        return {"sparse": Sparse(coordinate, weight)}
