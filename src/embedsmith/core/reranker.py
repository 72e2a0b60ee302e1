"""How search, evaluation, mining and the server know a reranker: it reads a query and a document together."""

from collections.abc import Sequence
from typing import Protocol

import torch


class Reranker(Protocol):
    def score(self, queries: Sequence[str], documents: Sequence[str]) -> torch.Tensor:
        """score_N, fp32 on the CPU: how well the i-th document answers the i-th query; more is better.

        Scores of one query order its documents; what they are worth across models is the model's own affair.
        """
        ...
