"""The last step to disk: 64-bit sums to the numbers of the file, and how much of the merge that costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from embedsmith.core.errors import CheckpointError
from embedsmith.merge.draw import bits
from embedsmith.merge.gram import block_of
from embedsmith.merge.stream import Block

_SIXTEEN = (torch.bfloat16, torch.float16)
LOSSY = 0.1
"""Above this share of |V| lost to rounding a warning asks for float32."""


def rounded(values_E: Tensor, dtype: torch.dtype, block: Block, stochastic_seed: int | None) -> Tensor:
    """To nearest, or (bfloat16) up or down with the probability that is right on average, keyed by the element.

    Errors: `CheckpointError` where a value is too large for the type.
    """
    if stochastic_seed is not None and dtype == torch.bfloat16:
        drawn_E = bits(stochastic_seed, f"round {block.name}", block.start, block.stop) & 0xFFFF
        pattern_E = values_E.float().view(torch.int32).to(torch.int64) + drawn_E
        return ((pattern_E >> 16) << 16).to(torch.int32).view(torch.float32).to(dtype)
    made_E = values_E.float().to(dtype) if dtype != torch.float64 else values_E.double()
    if dtype.itemsize < 4 and not torch.isfinite(made_E).all():
        raise CheckpointError(
            f"a weight of {block.name} is too large for {dtype}", where="merge", fix="set dtype to float32 or bfloat16"
        )
    return made_E


@dataclass
class RoundingLoss:
    """Sums a block of the model: error^2, |V|^2, unchanged elements, elements."""

    sums: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0, 0.0, 0.0]))

    def add(self, block: Block, exact_E: Tensor, written_E: Tensor) -> None:
        """Counts only where something can be lost: 16-bit numbers, and a base to measure the merge from."""
        if block.base_E is None or written_E.dtype not in _SIXTEEN:
            return
        base_E, written_E = block.base_E.double(), written_E.double()
        exact_E = exact_E.double()
        row = self.sums[block_of(block.name)]
        row[0] += float((written_E - exact_E).square().sum())
        row[1] += float((exact_E - base_E).square().sum())
        row[2] += float((written_E == base_E).sum())
        row[3] += len(exact_E)

    def report(self) -> dict[str, dict[str, float]]:
        """Block to `loss` (|error| / |V|, 0 where nothing moved) and `unchanged` (share of elements as in the base)."""
        return {
            name: {"loss": (row[0] / row[1]) ** 0.5 if row[1] else 0.0, "unchanged": row[2] / row[3]}
            for name, row in self.sums.items()
        }

    def total(self) -> float | None:
        """|error| / |V| of the whole model, `None` where nothing was rounded."""
        error, moved = (sum(row[place] for row in self.sums.values()) for place in (0, 1))
        return None if not self.sums else (error / moved) ** 0.5 if moved else 0.0

    def restore(self, sums: Mapping[str, Any]) -> None:
        self.sums.update({name: list(row) for name, row in sums.items()})
