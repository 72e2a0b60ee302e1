"""Representations: what a model makes of N texts. Dimension 0 of every field is N; shapes are in `shapes.md`.

Losses, search and evaluation see a text only through these three kinds. Everything that moves representations around
(gather, concatenate, split, pad) is written once, over fields, so no mask is ever left behind.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar, Self, overload

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Widths = tuple[int, ...]


def _tokens(pad: float) -> Any:
    """A field whose dimension 1 is a ragged token axis, filled with `pad` beyond a row's own tokens."""
    return field(metadata={"pad": pad})


@dataclass(frozen=True)
class Representation:
    """Base of the three kinds: the operations that are the same for all."""

    @abstractmethod
    def scores(self, other: Self, widths: Widths | None = None) -> Tensor:
        """Every row against every row of `other`: score_WQK, fp32 (or fp64). W is 1 without `widths`."""

    @abstractmethod
    def paired(self, other: Self, widths: Widths | None = None) -> Tensor:
        """Row n against row n of `other`: score_WN, fp32 (or fp64). W is 1 without `widths`."""

    def __len__(self) -> int:
        return len(self.tensors()[0])

    def tensors(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]

    def floating(self) -> list[Tensor]:
        """The fields that can carry a gradient."""
        return [tensor for tensor in self.tensors() if tensor.is_floating_point()]

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same representation with every field changed, masks included."""
        return replace(self, **{f.name: change(getattr(self, f.name)) for f in fields(self)})

    def rows(self, index: Tensor | slice) -> Self:
        return self.map(lambda tensor: tensor[index])

    def split(self, size: int) -> Iterator[Self]:
        """Blocks of `size` rows, the last one shorter. Split, not sliced: the gradient of all blocks is then put
        together once, not added up in a full-size buffer for every block."""
        names = [f.name for f in fields(self)]
        for column in zip(*(tensor.split(size) for tensor in self.tensors()), strict=True):
            yield replace(self, **dict(zip(names, column, strict=True)))

    @classmethod
    def of_pieces(cls, pieces: Sequence[Self], row_N: Tensor | None = None) -> Self:
        """The rows of several pieces in order, or those of them that `row_N` counts through; token axes are padded to
        the longest piece."""
        columns: dict[str, Tensor] = {}
        for f in fields(pieces[0]):
            column: list[Tensor] = [getattr(piece, f.name) for piece in pieces]
            if "pad" in f.metadata:
                longest = max(tensor.shape[1] for tensor in column)
                gaps = [(0, 0) * (tensor.dim() - 2) + (0, longest - tensor.shape[1]) for tensor in column]
                column = [F.pad(t, gap, value=f.metadata["pad"]) if gap[-1] else t for t, gap in zip(column, gaps)]
            whole = torch.cat(column)
            columns[f.name] = whole if row_N is None else whole[row_N.to(whole.device)]
        return replace(pieces[0], **columns)

    def leaf(self) -> Self:
        """A copy cut from its graph whose floating fields collect gradients of their own."""
        return self.map(lambda tensor: tensor.detach().requires_grad_(tensor.is_floating_point()))

    @property
    def token_count(self) -> int:
        """Length of the ragged token axis; 0 for a representation without one."""
        return max((getattr(self, f.name).shape[1] for f in fields(self) if "pad" in f.metadata), default=0)

    def pad_tokens(self, length: int) -> Self:
        """Lengthen the ragged token axis to `length`, each field with its own pad value."""

        def padded(f: Field[Any]) -> Tensor:
            tensor: Tensor = getattr(self, f.name)
            missing = length - tensor.shape[1] if "pad" in f.metadata else 0
            if missing <= 0:
                return tensor
            return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing), value=f.metadata["pad"])

        return replace(self, **{f.name: padded(f) for f in fields(self)})

    def pad_rows(self, count: int) -> Self:
        """Append rows of zeros up to `count` rows; the caller masks them by id."""
        missing = count - len(self)
        return self if missing == 0 else self.map(lambda t: torch.cat([t, t.new_zeros(missing, *t.shape[1:])]))


@dataclass(frozen=True)
class Dense(Representation):
    """One vector a text, normalised by the model unless its settings leave that out."""

    vector_ND: Tensor

    def scores(self, other: Self, widths: Widths | None = None) -> Tensor:
        left_QD, right_KD = in_fp32(self.vector_ND), in_fp32(other.vector_ND)
        if widths is None:
            return (left_QD @ right_KD.T)[None]
        return _prefix_cosines(left_QD, right_KD, widths, lambda a, b: a @ b.T, lambda a, b: a[:, None] * b[None, :])

    def paired(self, other: Self, widths: Widths | None = None) -> Tensor:
        left_ND, right_ND = in_fp32(self.vector_ND), in_fp32(other.vector_ND)
        if widths is None:
            return (left_ND * right_ND).sum(-1)[None]
        return _prefix_cosines(left_ND, right_ND, widths, lambda a, b: (a * b).sum(-1), lambda a, b: a * b)

    def truncate(self, width: int) -> Dense:
        """The leading `width` coordinates, normalised again."""
        return Dense(F.normalize(in_fp32(self.vector_ND)[:, :width], dim=-1))


@dataclass(frozen=True)
class Cosine(Dense):
    """Vectors that the model leaves at their length, compared by their cosine."""

    def scores(self, other: Self, widths: Widths | None = None) -> Tensor:
        return super().scores(other, widths or (self.vector_ND.shape[1],))

    def paired(self, other: Self, widths: Widths | None = None) -> Tensor:
        return super().paired(other, widths or (self.vector_ND.shape[1],))


@dataclass(frozen=True)
class Euclidean(Dense):
    """Vectors compared by minus their distance."""

    order: ClassVar[float] = 2.0

    def scores(self, other: Self, widths: Widths | None = None) -> Tensor:
        left_QD, right_KD = in_fp32(self.vector_ND), in_fp32(other.vector_ND)
        wanted = widths or (left_QD.shape[1],)
        return torch.stack([-torch.cdist(left_QD[:, :width], right_KD[:, :width], p=self.order) for width in wanted])

    def paired(self, other: Self, widths: Widths | None = None) -> Tensor:
        apart_ND = in_fp32(self.vector_ND) - in_fp32(other.vector_ND)
        wanted = widths or (apart_ND.shape[1],)
        return torch.stack([-torch.linalg.vector_norm(apart_ND[:, :width], self.order, dim=-1) for width in wanted])


@dataclass(frozen=True)
class Manhattan(Euclidean):
    """Vectors compared by minus the sum of what their coordinates lie apart."""

    order: ClassVar[float] = 1.0


def _prefix_cosines(
    left_ND: Tensor,
    right_ND: Tensor,
    widths: Widths,
    product: Callable[[Tensor, Tensor], Tensor],
    outer: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Cosines of the leading coordinates at every width. Inner products of prefixes add up, so all widths together
    cost one product of full width (Matryoshka's Gram trick)."""
    total: Tensor | None = None
    by_width: dict[int, Tensor] = {}
    start = 0
    for width in sorted(set(widths)):
        block = product(left_ND[:, start:width], right_ND[:, start:width])
        total = block if total is None else total + block
        norms = [torch.linalg.vector_norm(side[:, :width], dim=-1).clamp_min(1e-12) for side in (left_ND, right_ND)]
        by_width[width] = total / outer(*norms)
        start = width
    return torch.stack([by_width[width] for width in widths])


@dataclass(frozen=True)
class Sparse(Representation):
    """Weights of vocabulary entries. A repeated coordinate counts with its largest weight; weight 0 at coordinate 0 is
    padding."""

    coordinate_NT: Tensor = _tokens(pad=0)
    weight_NT: Tensor = _tokens(pad=0.0)

    def scores(self, other: Self, widths: Widths | None = None) -> Tensor:
        vocabulary_V = torch.unique(self.coordinate_NT)
        return (self.over(vocabulary_V) @ other.over(vocabulary_V).T)[None]

    def paired(self, other: Self, widths: Widths | None = None) -> Tensor:
        vocabulary_V = torch.unique(self.coordinate_NT)
        return (self.over(vocabulary_V) * other.over(vocabulary_V)).sum(-1)[None]

    def over(self, vocabulary_V: Tensor) -> Tensor:
        """weight_NV over the given sorted coordinates only: [N, V] never exists."""
        if not len(vocabulary_V):  # there is no text on the other side
            return in_fp32(self.weight_NT).new_zeros(len(self), 0)
        place_NT = torch.searchsorted(vocabulary_V, self.coordinate_NT).clamp_max(len(vocabulary_V) - 1)
        there_NT = (vocabulary_V[place_NT] == self.coordinate_NT) & ((self.weight_NT != 0) | (self.coordinate_NT != 0))
        weight_NT = in_fp32(self.weight_NT).masked_fill(~there_NT, float("-inf"))  # below any weight under 0
        lowest_NV = weight_NT.new_full((len(weight_NT), len(vocabulary_V)), float("-inf"))
        weight_NV = lowest_NV.scatter_reduce(1, place_NT, weight_NT, reduce="amax", include_self=True)
        return weight_NV.masked_fill(weight_NV == float("-inf"), 0.0)


@dataclass(frozen=True)
class MultiVector(Representation):
    """One vector a token. Scores: the mean over query tokens of the best document token (M3-Embedding, 3.2)."""

    vector_NTD: Tensor = _tokens(pad=0.0)
    mask_NT: Tensor = _tokens(pad=False)

    def scores(self, other: Self, widths: Widths | None = None) -> Tensor:
        asked_SD = in_fp32(self.vector_NTD).flatten(0, 1)
        score_KUS = in_fp32(other.vector_NTD) @ asked_SD.T  # tokens of documents in rows: maxima over rows are quick
        best_KS = _best(score_KUS, other.mask_NT[..., None], axis=1)
        best_QKT = best_KS.unflatten(1, self.mask_NT.shape).transpose(0, 1)
        return self.over_tokens(best_QKT, self.mask_NT[:, None, :])[None]

    def paired(self, other: Self, widths: Widths | None = None) -> Tensor:
        score_NTU = torch.einsum("ntd,nud->ntu", in_fp32(self.vector_NTD), in_fp32(other.vector_NTD))
        return self.over_tokens(_best(score_NTU, other.mask_NT[:, None, :], axis=-1), self.mask_NT)[None]

    @staticmethod
    def over_tokens(best: Tensor, mask: Tensor) -> Tensor:
        """The scores of query tokens put together: their mean over those that `mask` marks."""
        return best.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp_min(1)


@dataclass(frozen=True)
class MaxSim(MultiVector):
    """One vector a token, scored by the sum over query tokens, as ColBERT does: the mean times their number."""

    @staticmethod
    def over_tokens(best: Tensor, mask: Tensor) -> Tensor:
        return best.masked_fill(~mask, 0.0).sum(-1)


def _best(score: Tensor, mask: Tensor, axis: int) -> Tensor:
    """Maximum over document tokens. A masked token is -inf, not a zero vector: zeros would put a floor under the score.
    A document without any token (a row of padding) scores 0: -inf would become NaN in a sum that should ignore it."""
    best = score.masked_fill_(~mask, float("-inf")).amax(axis)
    return best.masked_fill(~mask.any(axis), 0.0)


Reps = Mapping[str, Representation]
"""Head name (`dense`, `sparse`, `multivector`, `middle`) to representation, all with the same N."""


TEACHER = "teacher"
"""The head under which a teacher's vectors stand beside the model's own. A row of NaN is unknown."""
GUIDE = "guide"
"""The same for a guide, a model that says which negatives are false."""


def each_head(reps: Reps, change: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: change(value) for name, value in reps.items()}


def concatenate(parts: Sequence[Reps]) -> Reps:
    """Rows of all parts in order; token axes are padded to the longest."""
    return {name: first.of_pieces([part[name] for part in parts]) for name, first in parts[0].items()}


def in_fp32(tensor: Tensor) -> Tensor:
    """fp32, unless it is fp64 already. At temperature 0.01 logits reach 100, where bf16 has a step of 0.5."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


TIE = 2.0**-18
"""How far fp32 scores of the same two texts may lie apart, at a score of 1: sums of a thousand products in another
order, by another processor or in blocks of another size, differ by less."""


@overload
def exceeds(score: Tensor, limit: Tensor | float) -> Tensor: ...
@overload
def exceeds(score: float, limit: Tensor) -> Tensor: ...
@overload
def exceeds(score: npt.NDArray[Any], limit: npt.NDArray[Any] | float) -> npt.NDArray[np.bool_]: ...
@overload
def exceeds(score: float, limit: npt.NDArray[Any]) -> npt.NDArray[np.bool_]: ...
@overload
def exceeds(score: float, limit: float) -> bool: ...
def exceeds(score: Any, limit: Any) -> Any:
    """Whether a score is above a limit by more than rounding: `score > limit + TIE (1 + |limit|)`; False for a NaN.

    Every threshold on scores is decided here, so that a score equal to its limit but for the order of a sum falls on
    the same side on every processor, in blocks and on several ranks. Two texts with equal vectors are such a case.
    """
    return score > limit + TIE * (1 + abs(limit))
