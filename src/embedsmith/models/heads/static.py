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
    """The head of a table of weights, which has none of its own. `terms`: how many tokens a text may have, `None` for
    all."""

    terms: int | None = None

    def build(self, source: HeadSource) -> StaticHead:
        return StaticHead(source.sparse_terms or self.terms)


class StaticHead(Head):
    """w_t: the state of the token itself, of a table of width 1; one that was trained may be below 0."""

    file = "static_head.safetensors"

    def __init__(self, terms: int | None = None) -> None:
        super().__init__()
        self.terms = terms

    @classmethod
    def build(cls, source: HeadSource) -> Head:
        return cls(source.sparse_terms)

    def save(self, folder: Path) -> None:
        """Nothing: its weights are the backbone's."""

    def forward(self, hidden_NTH: Tensor, padded: PaddedTokens, part_NT: Tensor) -> Sparse:
        id_NT, weight_NT = padded.id_NT.masked_fill(~part_NT, 0), hidden_NTH[..., 0].masked_fill(~part_NT, 0.0)
        if self.terms is not None and self.terms < id_NT.shape[1]:  # the largest, above or below 0, of each token once
            repeated_NT = (id_NT[:, :, None] == id_NT[:, None, :]).tril(-1).any(-1)
            place_NK = weight_NT.detach().abs().masked_fill(repeated_NT, -1.0).topk(self.terms, dim=1).indices
            repeated_NK = repeated_NT.gather(1, place_NK)
            id_NT = id_NT.gather(1, place_NK).masked_fill(repeated_NK, 0)
            weight_NT = weight_NT.gather(1, place_NK).masked_fill(repeated_NK, 0.0)
        return Sparse(id_NT, weight_NT)
