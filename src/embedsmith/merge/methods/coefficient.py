"""Coefficient methods as recipe values: each is a function of `coefficients.py` with its settings."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import log
from embedsmith.core.shelf import merge_methods
from embedsmith.merge.method import Base, Combine, Job, combine_coefficients
from embedsmith.merge.methods import formulas as formula
from embedsmith.merge.methods.formulas import Accumulate, Antipodal, Norm, Order


class CoefficientMethod(Protocol):
    """theta_0 + sum_i c_i V_i, one c a group of tensors (the granularity)."""

    base: ClassVar[Base] = "needed"
    by_rows: ClassVar[bool] = False
    reads_gram: ClassVar[bool] = True

    @abstractmethod
    def coefficients(self, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
        """c [M] from K [M, M] and the weights a [M]."""

    def prepare(self, job: Job) -> Combine:
        return combine_coefficients(group_coefficients(self, job))


def group_coefficients(method: CoefficientMethod, job: Job) -> dict[str, Tensor]:
    """Tensor name to c [M]; the members of a group share one. K is measured only where the method reads it."""
    nothing = torch.zeros(len(job.parents), len(job.parents), dtype=torch.float64)
    found: dict[str, Tensor] = {}
    shown: dict[str, list[float]] = {}
    for key, names in job.groups.items():
        # one number has no direction: as with vectors of 0, linear coefficients
        flat = not method.reads_gram or sum(job.size(name) for name in names) == 1
        coef_M = _in_group(method, nothing if flat else job.gram.of(names), job.weight_M, key)
        shown[key] = coef_M.tolist()
        found |= {name: coef_M for name in names}
    job.report["coefficients"] = shown
    return found


def _in_group(method: CoefficientMethod, gram_MM: Tensor, weight_M: Tensor, key: str) -> Tensor:
    """The coefficients, or the error with the group's name in front."""
    try:
        return method.coefficients(gram_MM, weight_M)
    except RecipeError as error:
        raise RecipeError(error.what, where=key, expected=error.expected, fix=error.fix) from error


def check_weights(weight_M: Tensor) -> None:
    """Errors: `RecipeError` for a negative weight."""
    if bool((weight_M < 0).any()):
        raise RecipeError(f"weights {weight_M.tolist()}", expected="weights of at least 0")


@merge_methods.register("average", formula="c_i = scale * a_i / sum a", source="Wortsman et al. 2022 (2203.05482)")
@dataclass(frozen=True)
class Average(CoefficientMethod):
    """The weighted mean of the parents (a model soup); with scale = 1 it needs no base.

    c_i = scale * a_i / sum a. Equal weights: the uniform soup. `restore_norm`: stretched to the mean norm of the task
    vectors, which a mean of nearly orthogonal ones falls short of by 1/sqrt(M).
    """

    base: ClassVar[Base] = "optional"

    scale: float = 1.0
    restore_norm: bool = False

    @property
    def reads_gram(self) -> bool:  # type: ignore[override]
        return self.restore_norm

    @property
    def is_mean(self) -> bool:
        """Whether the coefficients sum to 1, so that the base has no share."""
        return self.scale == 1 and not self.restore_norm

    def coefficients(self, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
        check_weights(weight_M)
        if self.restore_norm:
            return self.scale * formula.norm_restoring(gram_MM, weight_M)
        return self.scale * formula.average(weight_M)


@merge_methods.register("task_arithmetic", formula="c_i = scale * a_i", source="Ilharco et al. 2023 (2212.04089)")
@dataclass(frozen=True)
class TaskArithmetic(CoefficientMethod):
    """The sum of the task vectors, not normalised: c_i = scale * a_i. A negative weight takes a task away.

    scale=None is 1/M, a start for embedders; 0.3 is usual for image models.
    """

    reads_gram: ClassVar[bool] = False

    scale: float | None = None

    def coefficients(self, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
        return weight_M * (1 / len(weight_M) if self.scale is None else self.scale)


@merge_methods.register(
    "slerp",
    formula="U_n = [sin((1-t)A) U_{n-1} + sin(tA) V_n] / sin A, A their angle, t = a_n / (weight of U_{n-1} + a_n)",
    source="2410.15035, with the printed slips mended",
)
@dataclass(frozen=True)
class Slerp(CoefficientMethod):
    """Spherical interpolation of task vectors, one parent after the other.

    Of task vectors, never of raw weights: fine-tuned siblings are so nearly parallel that it would be an average.
    scale: lambda, the length of the result against that of the interpolation. accumulate: `sum` gives equal weights
    equal influence, `mean` is the paper's recursion. order, norm, on_antipodal: see `coefficients.sequential_slerp`.
    length: the result's |V| as a number, times scale, whatever the interpolation gave.
    merge.json says how far, in degrees, results in different orders lie apart (`order_spread`).
    """

    scale: float = 1.0
    accumulate: Accumulate = "sum"
    order: Order = "given"
    norm: Norm = "raw"
    length: float | None = None
    on_antipodal: Antipodal = "error"

    def __post_init__(self) -> None:
        if self.length is not None and self.length <= 0:
            raise RecipeError(f"length is {self.length}", expected="a number above 0")

    def coefficients(self, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
        check_weights(weight_M)
        options = (self.accumulate, self.order, self.norm, self.on_antipodal)
        coef_M = formula.sequential_slerp(gram_MM, weight_M, *options)
        own = formula.norm_of(gram_MM, coef_M)
        return self.scale * coef_M * (1 if self.length is None or not own > 0 else self.length / own)

    def prepare(self, job: Job) -> Combine:
        if len(job.parents) > 2 and job.granularity in ("model", "block"):
            job.report["order_spread"] = {
                key: formula.order_spread(job.gram.of(names), job.weight_M, self.accumulate)
                for key, names in job.groups.items()
            }
        return combine_coefficients(group_coefficients(self, job))


@merge_methods.register(
    "warp", formula="theta_0 + eta * slerp(V_1..V_M)", source="WARP (Rame et al. 2024, 2406.16768), stages 2 and 3"
)
@dataclass(frozen=True)
class Warp(CoefficientMethod):
    """Interpolation towards the base after SLERP (LITI): c = eta * slerp. Sweep eta for the frontier of what was
    gained against what was forgotten; `granularity: block` is the paper's layer-wise form."""

    eta: float = 0.5
    on_antipodal: Antipodal = "error"

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise RecipeError(f"eta is {self.eta}", expected="from 0 (the base) to 1 (the merge)")

    def coefficients(self, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
        return Slerp(scale=self.eta, on_antipodal=self.on_antipodal).coefficients(gram_MM, weight_M)


@merge_methods.register(
    "karcher", formula="argmin_m sum_i w_i angle(m, V_i)^2, times sum_i w_i |V_i|", source="Frechet mean on the sphere"
)
@dataclass(frozen=True)
class Karcher(CoefficientMethod):
    """The weighted mean of the task vectors' directions on the sphere, times their mean norm; free of any order."""

    scale: float = 1.0
    norm: Literal["linear", "geometric"] = "linear"

    def coefficients(self, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
        check_weights(weight_M)
        if bool((gram_MM < 0).any()):
            log.warning("some task vectors are more than 90 degrees apart: their spherical mean may not be unique")
        return self.scale * formula.karcher(gram_MM, weight_M, self.norm)


@merge_methods.register(
    "normalised_mean", formula="sum_i w_i V_i/|V_i|, stretched to sum_i w_i |V_i|", source="mergekit's multislerp"
)
@dataclass(frozen=True)
class NormalisedMean(CoefficientMethod):
    """The direction of the mean of unit task vectors, times their mean norm: what mergekit calls multislerp."""

    scale: float = 1.0
    norm: Literal["linear", "geometric"] = "linear"

    def coefficients(self, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
        check_weights(weight_M)
        return self.scale * formula.normalised_mean(gram_MM, weight_M, self.norm)


@merge_methods.register(
    "model_stock", formula="c_i = t/M, t = M cos / (1 + (M-1) cos)", source="Jang et al. 2024 (2403.19522)"
)
@dataclass(frozen=True)
class ModelStock(CoefficientMethod):
    """Between the mean and the base, by how much runs of one task agree. Not for parents of different tasks."""

    def coefficients(self, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
        if bool((weight_M != weight_M[0]).any()):
            raise RecipeError("model_stock has no weights", fix="remove them, or use average")
        return formula.model_stock(gram_MM)


@merge_methods.register("nan", formula="c_i = (a_i/|V_i|) / sum_j (a_j/|V_j|)", source="NAN (2505.16148)")
@dataclass(frozen=True)
class InverseNorms(CoefficientMethod):
    """Weights inverse to how far a parent moved: c_i proportional to a_i / |V_i|, summing to `scale`."""

    scale: float = 1.0

    def coefficients(self, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
        check_weights(weight_M)
        return self.scale * formula.inverse_norms(gram_MM, weight_M)
