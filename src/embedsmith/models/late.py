"""The module through which PyLate loads a multi-vector head: a `ColBERT` model keeps the CLS of a query, M3 drops it.

`pylate.models.ColBERT(folder)` finds it by name in an installed embedsmith; no code lies in the model's folder. PyLate
scores by the sum over query tokens: M3's mean times the number of a query's vectors, so the same ranking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pylate.models import Dense
from safetensors.torch import load_file
from torch import Tensor

from embedsmith.core.settings import Width
from embedsmith.core.tokens import PaddedTokens
from embedsmith.models.folder import read_folder_file
from embedsmith.models.heads.token_states import MultiVectorHead


@dataclass(frozen=True)
class _Config:
    in_features: Width
    out_features: Width
    left_out: Sequence[int]


class WordVectors(Dense):  # type: ignore[misc]
    """PyLate's projection, after which tokens that M3 leaves out take no part in the scores. `left_out`: their ids."""

    def __init__(self, in_features: int, out_features: int, left_out: list[int]) -> None:
        super().__init__(in_features, out_features, bias=True)
        self.left_out = left_out

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Replaces `token_embeddings` [N, T, D] and `attention_mask` [N, T]."""
        mask_NT = features["attention_mask"].bool()
        is_query_N = torch.zeros(len(mask_NT), dtype=torch.bool)
        padded = PaddedTokens(features["input_ids"], mask_NT, mask_NT, is_query_N)
        head = MultiVectorHead(self.linear, self.left_out).to(mask_NT.device)
        made = head(features["token_embeddings"], padded, mask_NT)
        mask: Tensor = made.mask_NT.to(features["attention_mask"].dtype)
        return {**features, "token_embeddings": made.vector_NTD, "attention_mask": mask}

    def get_config_dict(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, "left_out": self.left_out}

    @staticmethod
    def load(input_path: str) -> WordVectors:
        folder = Path(input_path)
        config = read_folder_file(_Config, folder / "config.json")
        made = WordVectors(config.in_features, config.out_features, list(config.left_out))
        made.load_state_dict(load_file(folder / "model.safetensors"))
        return made
