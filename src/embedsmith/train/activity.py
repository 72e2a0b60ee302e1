"""How alive the sparse vectors of a step are: what shows at once that a sparse head dies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from embedsmith.core.batch import Side
from embedsmith.core.progress import log
from embedsmith.core.reps import Sparse

DEAD = 0.5
"""From this share of empty vectors on a warning is given."""


def sparse_activity(sides: Iterable[Side]) -> dict[str, Tensor]:
    """Of every sparse head: `HEAD_active`, the mean number of weights above 0 a text, `HEAD_empty`, the share of texts
    without any, and `HEAD_zero`, the share of weights that are 0 (padding among them)."""
    found: dict[str, list[Tensor]] = {}
    for side in sides:
        for head, rep in side.local.items():
            if isinstance(rep, Sparse):
                found.setdefault(head, []).append(rep.weight_NT.detach())
    values: dict[str, Tensor] = {}
    for head, weights in found.items():
        active_N = torch.cat([(weight_NT > 0).sum(1) for weight_NT in weights]).float()
        slots = sum(weight_NT.numel() for weight_NT in weights)
        values[f"{head}_active"] = active_N.mean()
        values[f"{head}_empty"] = (active_N == 0).float().mean()
        values[f"{head}_zero"] = 1 - active_N.sum() / max(slots, 1)
    return values


class DeadHeads:
    """Warns once for each head and source of which most vectors are empty."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def watch(self, report: Mapping[str, float]) -> None:
        """`report`: the numbers of one log line, named `HEAD_empty/SOURCE`."""
        for name, value in report.items():
            key, _, source = name.partition("/")
            if key.endswith("_empty") and value > DEAD and name not in self._told:
                self._told.add(name)
                log.warning(
                    "%s: %.0f%% of the texts have an empty %s vector; a smaller learning rate, a larger weight of this "
                    "head or distillation from the start may revive it",
                    source,
                    100 * value,
                    key.removesuffix("_empty"),
                )
