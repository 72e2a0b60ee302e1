"""Losses that hold losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from embedsmith.core import recipe as checks
from embedsmith.core.batch import Batch, Loss, LossOutput, PairBatch, RetrievalBatch
from embedsmith.core.errors import RecipeError
from embedsmith.core.reps import Dense, Widths
from embedsmith.core.shelf import losses
from embedsmith.losses.identity import swapped

Inner = Annotated[Loss, losses]
"""A loss, or in a recipe its name or mapping."""


@dataclass(frozen=True)
class _Holder(Loss):
    """What every wrapper asks of the loss it holds."""

    inner: Inner

    @property
    def batches(self) -> tuple[type[Batch], ...]:  # type: ignore[override]
        return self.inner.batches

    def heads(self) -> frozenset[str]:
        return self.inner.heads()

    def extras(self, dimension: int) -> Mapping[str, nn.Module]:
        return self.inner.extras(dimension)

    def check(self, dimension: int) -> None:
        self.inner.check(dimension)


@losses.register(
    "matryoshka",
    formula="sum_k c_k L( norm(x[:d_k]) ) / sum_k c_k",
    source="Kusupati et al. 2022 (2205.13147); weights f2llm: F2LLM-v2's code",
)
@dataclass(frozen=True)
class Matryoshka(_Holder):
    """The inner loss at several widths: leading coordinates, normalised again.

        L = sum_k c_k L_inner( x[:d_k] / |x[:d_k]| )  (divided by sum_k c_k with `normalise`)

    The full width is always one of them. Inner products of leading coordinates add up, so all widths together cost
    one score product. Only dense heads have widths; other heads count as the same at each.

    dims: widths besides the full one. weights: one for each of `dims`; the full width has 1 unless it is listed.
    weighting, when no weights are given: `ones`, or `f2llm`, c = 1 / (rank sqrt(full / d)) with rank 1 for the full
    width. normalise: divide by the sum of weights, so that the scale of the loss does not depend on `dims` (F2LLM
    and sentence-transformers do not).
    Parts: those of the inner loss, and `width_d` for every width.

    Errors: `RecipeError` for widths that are empty, repeated, below 1 or above the model's, and for weights that are
    negative or do not match.
    """

    dims: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    weighting: Literal["ones", "f2llm"] = "ones"
    normalise: bool = True

    def __post_init__(self) -> None:
        checks.not_empty(self, "dims")
        checks.one_of(self, "weighting", "ones", "f2llm")
        checks.same_length(self, "weights", "dims")
        if min(self.dims) < 1 or len(set(self.dims)) < len(self.dims):
            raise checks.wrong(self, f"dims is {self.dims}", "different widths of 1 or more")
        if self.weights is not None:
            checks.not_negative(self, "weights")
            if self.weighting != "ones":
                raise checks.wrong(self, "weights and weighting together", "one of them")

    def check(self, dimension: int) -> None:
        if max(self.dims) > dimension:
            raise RecipeError(
                f"dims has {max(self.dims)}, the embedding has {dimension} coordinates",
                where="matryoshka",
                expected=f"widths up to {dimension}",
            )
        for width in self.widths(dimension):
            self.inner.check(width)

    def widths(self, dimension: int) -> Widths:
        """All widths, the full one first."""
        return tuple(sorted({*self.dims, dimension}, reverse=True))

    def width_weights(self, dimension: int) -> tuple[float, ...]:
        """The weight of each of `widths`."""
        widths = self.widths(dimension)
        if self.weighting == "f2llm":
            weights = [1 / (place * math.sqrt(dimension / width)) for place, width in enumerate(widths, 1)]
        else:
            given = dict(zip(self.dims, self.weights or (1.0,) * len(self.dims), strict=True))
            weights = [given.get(width, 1.0) for width in widths]
        total = sum(weights) if self.normalise else 1.0
        return tuple(weight / total for weight in weights)

    def __call__(self, batch: Batch) -> LossOutput:
        dimension = self._dimension(batch)
        widths = self.widths(dimension)
        output = self.inner(replace(batch, widths=widths))
        value_W = output.value_W.expand(len(widths))
        weight_W = value_W.new_tensor(self.width_weights(dimension))
        named = {f"width_{width}": value.detach() for width, value in zip(widths, value_W.unbind(), strict=True)}
        return LossOutput((value_W * weight_W).sum()[None], {**output.parts, **named})

    def _dimension(self, batch: Batch) -> int:
        local = batch.sides()[0].local
        dense = [local[head] for head in sorted(self.inner.heads()) if isinstance(local[head], Dense)]
        if not dense:
            raise RecipeError("the inner loss reads no dense head", where="matryoshka", expected="a dense head")
        dimension = max(representation.tensors()[0].shape[1] for representation in dense)
        self.check(dimension)
        return dimension


@losses.register("weighted", formula="weight * L", source="-")
@dataclass(frozen=True)
class Weighted(_Holder):
    """The inner loss times a number, ramped up over the first steps if asked.

        L = weight * min((step + 1) / warmup_steps, 1)^2 * L_inner        (no ramp with warmup_steps 0)

    warmup_steps: a quadratic ramp, as is usual for sparsity and spread regularisers.
    Errors: `RecipeError` for a negative weight.
    """

    weight: float
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        checks.not_negative(self, "weight", "warmup_steps")

    def __call__(self, batch: Batch) -> LossOutput:
        output = self.inner(batch)
        ramp = min((batch.progress.step + 1) / self.warmup_steps, 1.0) ** 2 if self.warmup_steps else 1.0
        return LossOutput(output.value_W * (self.weight * ramp), output.parts)


@losses.register("symmetric", formula="( L(x, y) + L(y, x) ) / 2", source="CLIP (2103.00020)")
@dataclass(frozen=True)
class Symmetric(_Holder):
    """The mean of the inner loss and of the inner loss with the two sides exchanged.

        L = ( L_inner(batch) + L_inner(batch with sides exchanged) ) / 2

    In an exchanged retrieval batch each document that is some query's positive searches for its queries among all
    queries; there are no hard negatives. A multi-vector head then takes its mean over the document's tokens.
    """

    def __call__(self, batch: Batch) -> LossOutput:
        there = self.inner(batch)
        back = self.inner(_exchanged(batch))
        return LossOutput((there.value_W + back.value_W) / 2, there.parts)


def _exchanged(batch: Batch) -> Batch:
    if isinstance(batch, RetrievalBatch):
        return swapped(batch)
    assert isinstance(batch, PairBatch)
    return replace(batch, left=batch.right, right=batch.left, left_id_N=batch.right_id_N, right_id_N=batch.left_id_N)


@losses.register("per_head", formula="sum_h w_h L(head h)", source="-")
@dataclass(frozen=True)
class PerHead(_Holder):
    """The inner loss on several heads, each with a weight.

        L = sum_h weights[h] * L_inner with head h

    weights: by head, for example {dense: 1, sparse: 0.1, multivector: 1}. Parts: one for each head.
    Errors: `RecipeError` when the inner loss has no field `head`, or a weight is negative.
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        checks.not_empty(self, "weights")
        if "head" not in {f.name for f in fields(self.inner)}:  # type: ignore[arg-type]
            raise checks.wrong(self, f"{type(self.inner).__name__} has no field head", "a loss that reads one head")
        if any(not 0 <= weight < float("inf") for weight in self.weights.values()):
            raise checks.wrong(self, f"weights is {dict(self.weights)}", "0 or more")

    def _on(self, head: str) -> Loss:
        inner: Any = self.inner
        changed: Loss = replace(inner, head=head)
        return changed

    def heads(self) -> frozenset[str]:
        return frozenset().union(*(self._on(head).heads() for head in self.weights))

    def __call__(self, batch: Batch) -> LossOutput:
        outputs = {head: self._on(head)(batch) for head in self.weights}
        values = [self.weights[head] * output.value_W for head, output in outputs.items()]
        parts = {head: output.value_W[0].detach() for head, output in outputs.items()}
        return LossOutput(_total(values), parts)


@losses.register("sum", formula="sum_k w_k L_k", source="-")
@dataclass(frozen=True)
class Sum(Loss):
    """Several losses on the same batch.

        L = sum_k weights[k] * L_k

    parts: the losses. weights: one for each; all 1 when not given. Its parts are named after the losses, numbered
    where a name repeats.
    Errors: `RecipeError` when no batch is of a kind that all can read, or a weight is negative.
    """

    parts: tuple[Inner, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        checks.not_empty(self, "parts")
        checks.same_length(self, "weights", "parts")
        checks.not_negative(self, "weights")
        if not self.batches:
            kinds = [[kind.__name__ for kind in part.batches] for part in self.parts]
            raise checks.wrong(self, f"its losses read different kinds of batch: {kinds}", "a kind all of them read")

    @property
    def batches(self) -> tuple[type[Batch], ...]:  # type: ignore[override]
        first, *others = self.parts
        return tuple(kind for kind in first.batches if all(kind in other.batches for other in others))

    def heads(self) -> frozenset[str]:
        return frozenset().union(*(part.heads() for part in self.parts))

    def extras(self, dimension: int) -> Mapping[str, nn.Module]:
        return {name: module for part in self.parts for name, module in part.extras(dimension).items()}

    def check(self, dimension: int) -> None:
        for part in self.parts:
            part.check(dimension)

    def __call__(self, batch: Batch) -> LossOutput:
        outputs = {name: part(batch) for name, part in zip(self._names(), self.parts, strict=True)}
        weights = self.weights or (1.0,) * len(self.parts)
        values = [weight * output.value_W for weight, output in zip(weights, outputs.values(), strict=True)]
        named = {name: output.value_W[0].detach() for name, output in outputs.items()}
        inner = {f"{name}/{key}": value for name, output in outputs.items() for key, value in output.parts.items()}
        return LossOutput(_total(values), named | inner)

    def _names(self) -> list[str]:
        names = [str(getattr(type(part), "registered_name", type(part).__name__)) for part in self.parts]
        return [
            name if names.count(name) == 1 else f"{name}_{names[:place].count(name) + 1}"
            for place, name in enumerate(names)
        ]


def _total(values: list[Tensor]) -> Tensor:
    """value_W: the sum, where a loss without widths counts at every width."""
    return torch.stack(torch.broadcast_tensors(*values)).sum(0)
