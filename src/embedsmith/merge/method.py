"""What a merging method is: a frozen dataclass that looks at the job once and says how to make each block."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from embedsmith.core.errors import RecipeError
from embedsmith.merge.gram import Gram, groups
from embedsmith.merge.parents import Parent
from embedsmith.merge.recipe import Granularity
from embedsmith.merge.stream import BLOCK, Block, blocks, drawn

Combine = Callable[[Block], Tensor]
"""A block of all models to the merged weights [E] of that block, in float64 (or float32)."""
Base = Literal["needed", "optional"]


@dataclass(frozen=True)
class Job:
    """What a method may read. `names`: the float tensors it has to make; `weight_M`: the parents' weights a_i,
    float64, as the recipe says (not normalised); `groups`: names that share one set of coefficients. `report`: what a
    method wants written into merge.json (`coefficients`, densities, costs)."""

    parents: tuple[Parent, ...]
    base: Parent | None
    names: tuple[str, ...]
    weight_M: Tensor
    granularity: Granularity = "model"
    seed: int = 0
    cache: Path | None = None
    block: int = BLOCK
    report: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Group key to names, by the granularity."""
        return groups(self.names, self.granularity)

    @cached_property
    def group_of(self) -> Mapping[str, str]:
        """Name to the key of its group."""
        return {name: key for key, names in self.groups.items() for name in names}

    @cached_property
    def gram(self) -> Gram:
        """Inner products of the task vectors of every tensor: one pass over the weights, or the cache."""
        assert self.base is not None, "checked by `Method.base`"
        return Gram.measured(self.parents, self.base, self.names, self.cache, self.block)

    def size(self, name: str) -> int:
        """Elements of a tensor."""
        return self.parents[0].size(name)

    def blocks(self, names: tuple[str, ...] | None = None, by_rows: bool = False) -> Iterator[Block]:
        """A pass over the weights."""
        chosen = self.names if names is None else names
        return blocks(self.parents, self.base, chosen, size=self.block, by_rows=by_rows)

    def drawn(self, block: Block) -> Tensor:
        """Numbers in [0, 1) [M, E], each parent its own, keyed by the parent's place."""
        own = (f"{place} {block.name}" for place in range(len(self.parents)))
        return torch.stack([drawn(self.seed, name, block.start, block.stop) for name in own])


class Method(Protocol):
    """What a merging method is: a frozen dataclass that extends this and is registered in `core.shelf.merge_methods`.

    `base`: whether task vectors are needed. `by_rows`: blocks must be whole rows. `prepare` may pass over the weights,
    read data and train; what it returns is called for every block of `job.names`, each tensor's blocks in order.
    """

    registered_name: ClassVar[str]
    base: ClassVar[Base] = "needed"
    by_rows: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, job: Job) -> Combine: ...


def combine_coefficients(coefficients: Mapping[str, Tensor]) -> Combine:
    """theta_m = (1 - sum_i c_i) theta_0 + sum_i c_i theta_i, which is theta_0 + sum_i c_i V_i, in float64.

    `coefficients`: tensor name to c [M]. Written over the weights themselves, so that identical parents come out bit
    for bit, and a merge whose coefficients sum to 1 needs no base.
    """
    plain = {name: [float(value) for value in coef_M] for name, coef_M in coefficients.items()}

    def combine(block: Block) -> Tensor:
        coefs = plain[block.name]
        rest = 1.0 - math.fsum(coefs)
        if abs(rest) < 4e-16 * len(coefs):  # the sum is 1 but for rounding: the base has no share at all
            rest = 0.0
        terms = [(coef, parent_E) for coef, parent_E in zip(coefs, block.parents, strict=True) if coef]
        if rest:
            if block.base_E is None:
                raise RecipeError(f"the coefficients of {block.name} sum to {1 - rest}", fix="give the merge a base")
            terms.append((rest, block.base_E))
        (first, first_E), *others = terms  # no coefficient at all leaves all to the base
        merged_E = first_E.to(torch.float64, copy=True).mul_(first)
        for coef, values_E in others:
            merged_E.add_(values_E.double(), alpha=coef)  # converted first: ten times faster than a mixed addition
        return merged_E

    return combine
