"""A weight a token, whatever the text around it: the queries of inference-free SPLADE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from embedsmith.core.reps import Sparse
from embedsmith.core.tokens import PaddedTokens
from embedsmith.models.heads.base import Head, HeadSource


@dataclass(frozen=True)
class StaticWeights:
    """The head of a table of weights, which has none of its own."""

    def build(self, source: HeadSource) -> StaticHead:
        return StaticHead()


class StaticHead(Head):
    """w_t: the state of the token itself, of a table of width 1. A weight below 0 counts as 0."""

    file = "static_head.safetensors"

    @classmethod
    def build(cls, source: HeadSource) -> Head:
        return cls()

    def save(self, folder: Path) -> None:
        """Nothing: its weights are the backbone's."""

    def forward(self, hidden_NTH: Tensor, padded: PaddedTokens, part_NT: Tensor) -> Sparse:
        weight_NT = hidden_NTH[..., 0].masked_fill(~part_NT, 0.0)
        return Sparse(padded.id_NT.masked_fill(weight_NT == 0, 0), weight_NT)
