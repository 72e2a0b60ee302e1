"""Losses that hold losses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from embedsmith.core.batch import Batch, GroupBatch, Loss, LossOutput, PairBatch, RetrievalBatch
from embedsmith.core.errors import RecipeError
from embedsmith.core.reps import Dense, Widths
from embedsmith.core.settings import Count, NotNegative, Range, Weights, name_of
from embedsmith.core.shelf import losses
from embedsmith.core.transfer import to_device
from embedsmith.losses.candidates import swapped
from embedsmith.losses.terms import without_memory

Inner = Annotated[Loss, losses]
"""A loss, or in a recipe its name or mapping."""


@dataclass(frozen=True)
class _Wrapper(Loss):
    """What every wrapper asks of the loss it holds.

    inner: the loss that is held: in a recipe its name, or a mapping with its `type`.
    """

    inner: Inner

    @property
    def batches(self) -> tuple[type[Batch], ...]:  # type: ignore[override]
        """A reranker has no widths, heads and sides to be exchanged."""
        return tuple(kind for kind in self.inner.batches if kind is not GroupBatch)

    def heads(self) -> frozenset[str]:
        return self.inner.heads()

    def extras(self, dimension: int) -> Mapping[str, nn.Module]:
        return self.inner.extras(dimension)

    def check(self, dimension: int) -> None:
        self.inner.check(dimension)

    def reads(self) -> frozenset[str]:
        return self.inner.reads()

    def remember(self, batch: Batch) -> None:
        self.inner.remember(batch)


@losses.register(
    "matryoshka",
    formula="sum_k c_k L( norm(x[:d_k]) ) / sum_k c_k",
    source="Kusupati et al. 2022 (2205.13147); weights f2llm: F2LLM-v2's code",
)
@dataclass(frozen=True)
class Matryoshka(_Wrapper):
    """The inner loss at several widths: leading coordinates, normalised again.

        L = sum_k c_k L_inner( x[:d_k] / |x[:d_k]| )  (divided by sum_k c_k with `normalise`)

    The full width is always one of them. Inner products of leading coordinates add up, so all widths together cost
    one score product. Only dense heads have widths; other heads count as the same at each.

    dims: widths besides the full one, different ones and at least one.
    weights: a weight for each of `dims`; the full width has 1 unless it is listed. By `weighting` where not given.
    weighting: weights when none are given: `ones`, or `f2llm`, c = 1 / (rank sqrt(full / d)) with rank 1 for the full
        width.
    normalise: divide by the sum of weights, so that the scale of the loss does not depend on `dims` (F2LLM and
        sentence-transformers do not).

    Parts: those of the inner loss, as their mean over the widths with the weights of the loss, and `width_d` for every
    width.

    Errors: `RecipeError` for widths that are empty, repeated, below 1 or above the model's, and for weights that are
    negative or do not match.
    """

    dims: Annotated[tuple[Count, ...], Range(min_length=1)]
    weights: tuple[NotNegative, ...] | None = None
    weighting: Literal["ones", "f2llm"] = "ones"
    normalise: bool = True

    def __post_init__(self) -> None:
        if len(set(self.dims)) < len(self.dims):
            raise RecipeError(f"dims is {self.dims}", where=name_of(self), expected="different widths")
        if self.weights is not None and len(self.weights) != len(self.dims):
            expected = f"{len(self.dims)}, one for each of dims"
            raise RecipeError(f"weights has {len(self.weights)} entries", where=name_of(self), expected=expected)
        if self.weights is not None and self.weighting != "ones":
            raise RecipeError("weights and weighting together", where=name_of(self), expected="one of them")

    def check(self, dimension: int) -> None:
        if max(self.dims) > dimension:
            raise RecipeError(
                f"dims has {max(self.dims)}, the embedding has {dimension} coordinates",
                where=name_of(self),
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
        local = batch.sides()[0].local
        dense = [local[head] for head in sorted(self.inner.heads()) if isinstance(local[head], Dense)]
        if not dense:
            raise RecipeError("the inner loss reads no dense head", where=name_of(self), expected="a dense head")
        dimension = max(representation.tensors()[0].shape[1] for representation in dense)
        self.check(dimension)
        widths = self.widths(dimension)
        output = self.inner(replace(batch, widths=widths))
        value_W = output.value_W.expand(len(widths))
        weight_W = to_device(torch.tensor(self.width_weights(dimension), dtype=value_W.dtype), value_W.device)
        share_W = weight_W / weight_W.sum()
        parts = {name: part if part.dim() == 0 else (part * share_W).sum() for name, part in output.parts.items()}
        named = {f"width_{width}": value.detach() for width, value in zip(widths, value_W.unbind(), strict=True)}
        return LossOutput((value_W * weight_W).sum()[None], {**parts, **named})


@losses.register("weighted", formula="weight * L", source="-")
@dataclass(frozen=True)
class Weighted(_Wrapper):
    """The inner loss times a number, ramped up over the first steps if asked.

        L = weight * min((step + 1) / warmup_steps, 1)^2 * L_inner        (no ramp with warmup_steps 0)

    weight: the number, 0 or more.
    warmup_steps: optimizer steps of a quadratic ramp, as is usual for sparsity and spread regularisers; 0 is without.

    Errors: `RecipeError` for a negative weight.
    """

    weight: NotNegative
    warmup_steps: Annotated[int, Range(ge=0)] = 0

    @property
    def batches(self) -> tuple[type[Batch], ...]:  # type: ignore[override]
        return self.inner.batches

    def __call__(self, batch: Batch) -> LossOutput:
        output = self.inner(batch)
        ramp = min((batch.progress.step + 1) / self.warmup_steps, 1.0) ** 2 if self.warmup_steps else 1.0
        return LossOutput(output.value_W * (self.weight * ramp), output.parts)


@losses.register("symmetric", formula="( L(x, y) + L(y, x) ) / 2", source="CLIP (2103.00020)")
@dataclass(frozen=True)
class Symmetric(_Wrapper):
    """The mean of the inner loss and of the inner loss with the two sides exchanged.

        L = ( L_inner(batch) + L_inner(batch with sides exchanged) ) / 2

    In an exchanged retrieval batch each document that is some query's positive searches for its queries among all
    queries; there are no hard negatives. A multi-vector head then takes its mean over the document's tokens.
    """

    def __call__(self, batch: Batch) -> LossOutput:
        there = self.inner(batch)
        if isinstance(batch, RetrievalBatch):
            back = self.inner(replace(swapped(batch), extras=without_memory(batch.extras)))
        else:
            assert isinstance(batch, PairBatch)
            left, right, left_id_N, right_id_N = batch.right, batch.left, batch.right_id_N, batch.left_id_N
            back = self.inner(replace(batch, left=left, right=right, left_id_N=left_id_N, right_id_N=right_id_N))
        return LossOutput((there.value_W + back.value_W) / 2, there.parts)


@losses.register("per_head", formula="sum_h w_h L(head h)", source="-")
@dataclass(frozen=True)
class PerHead(_Wrapper):
    """The inner loss on several heads, each with a weight.

        L = sum_h weights[h] * L_inner with head h

    weights: a weight for each head, for example {dense: 1, sparse: 0.1, multivector: 1}.

    Parts: one for each head.
    Errors: `RecipeError` when the inner loss has no field `head`, or a weight is negative.
    """

    weights: Weights

    def __post_init__(self) -> None:
        if "head" not in {f.name for f in fields(self.inner)}:  # type: ignore[arg-type]
            what = f"{type(self.inner).__name__} has no field head"
            raise RecipeError(what, where=name_of(self), expected="a loss that reads one head")

    def _on(self, head: str) -> Loss:
        inner: Any = self.inner
        changed: Loss = replace(inner, head=head)
        return changed

    def heads(self) -> frozenset[str]:
        return frozenset().union(*(self._on(head).heads() for head in self.weights))

    def __call__(self, batch: Batch) -> LossOutput:
        outputs = {head: self._on(head)(batch) for head in self.weights}
        values = [self.weights[head] * output.value_W for head, output in outputs.items()]
        parts = {head: output.value_W.detach() for head, output in outputs.items()}
        return LossOutput(_total(values), parts)


@losses.register("sum", formula="sum_k w_k L_k", source="-")
@dataclass(frozen=True)
class Sum(Loss):
    """Several losses on the same batch.

        L = sum_k weights[k] * L_k

    parts: the losses, at least one: in a recipe their names, or mappings with their `type`.
    weights: a weight for each of them; all 1 when not given.

    Its terms in logs are named after the losses, numbered where a name repeats.
    Errors: `RecipeError` when no batch is of a kind that all can read, or a weight is negative.
    """

    parts: tuple[Inner, ...]
    weights: tuple[NotNegative, ...] | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise RecipeError("parts is empty", where=name_of(self), expected="at least one loss")
        if self.weights is not None and len(self.weights) != len(self.parts):
            expected = f"{len(self.parts)}, one for each of parts"
            raise RecipeError(f"weights has {len(self.weights)} entries", where=name_of(self), expected=expected)
        if not self.batches:
            kinds = [[kind.__name__ for kind in part.batches] for part in self.parts]
            what = f"its losses read different kinds of batch: {kinds}"
            raise RecipeError(what, where=name_of(self), expected="a kind all of them read")

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

    def reads(self) -> frozenset[str]:
        return frozenset().union(*(part.reads() for part in self.parts))

    def remember(self, batch: Batch) -> None:
        for part in self.parts:
            part.remember(batch)

    def __call__(self, batch: Batch) -> LossOutput:
        names = [name_of(part) for part in self.parts]
        names = [n if names.count(n) == 1 else f"{n}_{names[:place].count(n) + 1}" for place, n in enumerate(names)]
        outputs = {name: part(batch) for name, part in zip(names, self.parts, strict=True)}
        weights = self.weights or (1.0,) * len(self.parts)
        values = [weight * output.value_W for weight, output in zip(weights, outputs.values(), strict=True)]
        named = {name: output.value_W.detach() for name, output in outputs.items()}
        inner = {f"{name}/{key}": value for name, output in outputs.items() for key, value in output.parts.items()}
        return LossOutput(_total(values), named | inner)


def _total(values: list[Tensor]) -> Tensor:
    """value_W: the sum, where a loss without widths counts at every width."""
    return torch.stack(torch.broadcast_tensors(*values)).sum(0)
