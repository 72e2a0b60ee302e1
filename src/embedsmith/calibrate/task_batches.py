"""Training batches of every task of a probe, for losses and gradients at any place of a live model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from embedsmith.calibrate.live_model import LiveMerge
from embedsmith.core.batch import Progress
from embedsmith.core.errors import RecipeError
from embedsmith.core.seeds import derive_seed
from embedsmith.core.tokens import TokenBatch
from embedsmith.data import RecordSet, Source
from embedsmith.train.build import build_extras, derive_memory, make_supply
from embedsmith.train.config import TrainConfig
from embedsmith.train.feed import Supply, make_part
from embedsmith.train.step import Memory, Part, evaluate_parts, run_step

Drawn = tuple[TokenBatch, Part]
"""Texts of one task, and what its loss needs to know of them."""


@dataclass(frozen=True)
class TaskBatches:
    """Batches of every task: the same step always gives the same batch, so that starts and modes are compared on the
    same texts. `train` and `held_out` are row numbers of each supply."""

    live: LiveMerge
    supplies: Sequence[Supply]
    train: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    extras: Mapping[str, nn.Module]
    memory: Memory
    seed: int
    size: int

    @staticmethod
    def whole(
        live: LiveMerge, sources: Sequence[Source], sets: Sequence[RecordSet], batch_size: int, seed: int
    ) -> TaskBatches:
        """Nothing kept back: all examples are on both sides."""
        pairs = zip(sources, sets, strict=True)
        supplies = [make_supply(source, records, batch_size, live.model) for source, records in pairs]
        extras = build_extras([supply.loss for supply in supplies], live.model).to(live.model.device)
        rows = [list(range(len(records.records))) for records in sets]
        memory = derive_memory(TrainConfig(), live.model.device)
        return TaskBatches(live, supplies, rows, rows, dict(extras.items()), memory, seed, batch_size)

    def split(self, share: float) -> TaskBatches:
        """With `share` of every task's examples held out. Errors: `RecipeError` for a task with too few to split."""
        train, held_out = [], []
        for supply in self.supplies:
            count = len(supply.records.records)
            kept_back = round(share * count)
            if kept_back < 2 or count - kept_back < 2:
                raise RecipeError(
                    f"{count} probe examples of {supply.records.name}", expected="enough for two parts", fix="take more"
                )
            order = _shuffled(count, derive_seed("split", self.seed))
            train.append(order[kept_back:])
            held_out.append(order[:kept_back])
        return replace(self, train=train, held_out=held_out)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(supply.records.name for supply in self.supplies)

    def at(self, step: int) -> list[Drawn]:
        """One part a task, each with an equal share: the mean over tasks of each task's mean loss. The rows of a step
        are cut from shuffled passes over all rows."""
        parts = []
        for task, (supply, rows) in enumerate(zip(self.supplies, self.train, strict=True)):
            size = min(supply.batch_size or self.size, len(rows))
            a_pass, place = divmod(step, max(len(rows) // size, 1))
            order = _shuffled(len(rows), derive_seed(derive_seed(self.seed, task), a_pass))
            parts.append(self._part(task, [rows[row] for row in order[place * size : (place + 1) * size]], step))
        return parts

    def held_out_parts(self) -> list[list[Drawn]]:
        """The held-out examples in batches, each task's losses averaged over its batches."""
        parts = []
        for n, (supply, rows) in enumerate(zip(self.supplies, self.held_out, strict=True)):
            size = min(supply.batch_size or self.size, len(rows))
            starts = range(0, len(rows) - size + 1, size)
            parts.append([self._part(n, rows[start : start + size], 0, len(starts)) for start in starts])
        return parts

    def _part(self, task: int, rows: Sequence[int], visit: int, shares: int = 1) -> Drawn:
        tokens, part = make_part(self.live.model, self.supplies[task], rows, self.seed, visit)
        return tokens, replace(part, weight=1 / (len(self.supplies) * shares))

    def loss(self, drawn: Drawn) -> float:
        """The weighted loss of a part at the live model's weights, without gradient."""
        tokens, part = drawn
        return float(evaluate_parts(self.live.encode, tokens, [part], self.memory, self.extras, Progress()))

    def losses_at(self, coefficient_GM: Tensor) -> list[float]:
        """Mean loss of every task on its held-out examples at theta_0 + sum_i c_i V_i."""
        self.live.place(coefficient_GM)
        count = len(self.supplies)
        return [count * sum(self.loss(part) for part in parts) for parts in self.held_out_parts()]

    def backward(self, drawn: Sequence[Drawn]) -> float:
        """The weighted loss of several parts together, with its gradient left in the live model's parameters."""
        tokens, parts = TokenBatch.concatenate([each for each, _ in drawn]), [part for _, part in drawn]
        return float(run_step(self.live.encode, tokens, parts, self.memory, self.extras, Progress()).value)


def _shuffled(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
