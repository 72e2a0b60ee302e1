"""Coefficient methods as recipe values: each is a formula of `formulas.py` with its settings."""

import itertools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import log
from embedsmith.core.settings import Finite, Positive, Share
from embedsmith.core.shelf import merge_methods
from embedsmith.merge.method import Base, Combine, Job, Method, combine_coefficients, settings_of
from embedsmith.merge.methods import formulas
from embedsmith.merge.methods.formulas import norm_of, normalised, norms, not_negative
from embedsmith.merge.varying import Varying, check_numbers, value_at

Of = Literal["task_vectors", "weights"]


class CoefficientMethod(Method):
    """theta_0 + sum_i c_i V_i, one c a group of tensors (the granularity); where weights differ from tensor to tensor,
    K is the group's and c the tensor's. `reads_gram`: whether K is looked at. `signed`: whether weights may be
    negative. `of`: what is combined, the `task_vectors` V_i or the raw `weights`, which need no base."""

    reads_gram: ClassVar[bool] = True
    signed: ClassVar[bool] = False
    of: ClassVar[Of] = "task_vectors"

    @abstractmethod
    def formula(self, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
        """c [M] from K [M, M] and the weights a [M]."""

    def coefficients(self, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
        """The same. Errors: `RecipeError` for a negative weight, unless it means something."""
        return self.formula(gram_MM, weight_M if self.signed else not_negative(weight_M))

    def weight_of(self, job: Job, name: str) -> Tensor:
        """a [M] of a tensor."""
        return job.weight_of(name)

    def prepare(self, job: Job) -> Combine:
        return combine_coefficients(self.by_name(job), raw=self.of == "weights")

    def by_name(self, job: Job) -> dict[str, Tensor]:
        """Tensor name to c [M]; the members of a group with the same weights share one. K is measured only where the
        method reads it."""
        nothing = torch.zeros(len(job.parents), len(job.parents), dtype=torch.float64)
        measured = job if self.of == "task_vectors" else replace(job, base=None)
        found: dict[str, Tensor] = {}
        report = job.report.setdefault("coefficients", {})
        for key, names in job.groups.items():
            # one number has no direction: as with vectors of 0, linear coefficients
            flat = not self.reads_gram or sum(job.size(name) for name in names) == 1
            gram_MM = nothing if flat else measured.gram.of(names)
            by_weights: dict[tuple[float, ...], Tensor] = {}
            for name in names:
                weight_M = self.weight_of(job, name)
                own = tuple(weight_M.tolist())
                if own not in by_weights:
                    with settings_of(key if not by_weights else name):
                        by_weights[own] = self.coefficients(gram_MM, weight_M)
                found[name] = by_weights[own]
            shared = len(by_weights) == 1
            report |= {key: found[names[0]].tolist()} if shared else {name: found[name].tolist() for name in names}
        return found


@merge_methods.register("average", formula="c_i = scale * a_i / sum a", source="Wortsman et al. 2022 (2203.05482)")
@dataclass(frozen=True)
class Average(CoefficientMethod):
    """The weighted mean of the parents (a model soup); with scale = 1 it needs no base.

    c_i = scale * a_i / sum a, a real: a negative weight leads away from its parent. Equal weights: the uniform soup.
    `scale`: length of the step from the base towards the mean.
    `restore_norm`: stretched to the mean norm of the task vectors, which a mean of nearly orthogonal ones falls short
    of by 1/sqrt(M).
    """

    base: ClassVar[Base] = "optional"
    signed: ClassVar[bool] = True

    scale: Finite = 1.0
    restore_norm: bool = False

    @property
    def reads_gram(self) -> bool:  # type: ignore[override]
        return self.restore_norm

    @property
    def is_mean(self) -> bool:
        """Whether the coefficients sum to 1, so that the base has no share."""
        return self.scale == 1 and not self.restore_norm

    def formula(self, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
        w_M = normalised(weight_M)
        if not self.restore_norm:
            return self.scale * w_M
        # c = w sum_i w_i |V_i| / |sum_i w_i V_i|; parents that cancel out keep the plain mean
        length, wanted = norm_of(gram_MM, w_M), not_negative(w_M) @ norms(gram_MM)
        return self.scale * (w_M * (wanted / length) if length > formulas.CANCELLED * wanted else w_M)


@merge_methods.register("task_arithmetic", formula="c_i = scale * a_i", source="Ilharco et al. 2023 (2212.04089)")
@dataclass(frozen=True)
class TaskArithmetic(CoefficientMethod):
    """The sum of the task vectors, not normalised: c_i = scale * a_i. A negative weight takes a task away.

    `scale`: by default 1/M, a start for embedders; 0.3 is usual for image models.
    """

    reads_gram: ClassVar[bool] = False
    signed: ClassVar[bool] = True

    scale: Finite | None = None

    def formula(self, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
        return weight_M * (1 / len(weight_M) if self.scale is None else self.scale)


@merge_methods.register(
    "slerp",
    formula="U_n = [sin((1-t)A) U_{n-1} + sin(tA) V_n] / sin A, A their angle, t = a_n / (weight of U_{n-1} + a_n)",
    source="2410.15035, with the printed slips mended",
)
@dataclass(frozen=True)
class Slerp(CoefficientMethod):
    """Spherical interpolation of task vectors, one parent after the other.

    Fine-tuned siblings are so nearly parallel as raw weights that there it would be an average. A negative weight leads
    away from its parent.

    `scale`: lambda, the length of the result against that of the interpolation.
    `accumulate`: `sum` gives equal weights equal influence, `mean` is the paper's recursion.
    `order`: of the parents: as `given`, longest first (`norm`), `nearest` first, the `average` over orders, a `tree`.
    `norm`: length of each step: of the interpolation (`raw`), or the geometric or linear mean of both lengths.
    `length`: the result's |V| as a number, times scale, whatever the interpolation gave.
    `on_antipodal`: opposite vectors are an `error`, interpolated along the line (`linear`), or lose the shorter
    (`drop_smaller`).
    `t`: of two parents, in the place of weights: 0 is the first, 1 the second; a number, several spread over the layers
    (`[0, 0.5, 1]`), or entries by a part of a tensor's name (`[{filter: attention, value: 1}, {value: 0.5}]`).
    `of`: what is turned: the `task_vectors`, or the raw `weights`, without a base, as mergekit's slerp does.
    `linear_above`: parents with a larger |cosine| are averaged; 0.9995 in mergekit's slerp.

    merge.json says how far, in degrees, results in different orders lie apart (`order_spread`).
    """

    scale: Finite = 1.0
    accumulate: formulas.Accumulate = "sum"
    order: formulas.Order = "given"
    norm: formulas.Norm = "raw"
    length: Positive | None = None
    on_antipodal: formulas.Antipodal = "error"
    t: Varying | None = None
    of: Of = "task_vectors"  # type: ignore[misc]  # a setting here
    linear_above: Share = 1.0
    signed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.t is not None:
            check_numbers("t", self.t, 0.0, 1.0)

    @property
    def base(self) -> Base:  # type: ignore[override]
        return "needed" if self.of == "task_vectors" else "optional"

    def weight_of(self, job: Job, name: str) -> Tensor:
        """The parents' weights, or 1 - t and t. Errors: `RecipeError` for a t of other than two parents, or beside
        weights."""
        if self.t is None:
            return job.weight_of(name)
        weight_M = job.weight_of(name)
        if len(weight_M) != 2 or bool((weight_M != 1).any()):
            came = f"t with {len(weight_M)} parents" if len(weight_M) != 2 else "t, and weights of the parents as well"
            raise RecipeError(came, where="method.t", fix="give two parents without weights, or weights without t")
        t = value_at(self.t, name, job.places.get(name))
        return torch.tensor([1 - t, t], dtype=torch.float64) if t is not None else weight_M

    def formula(self, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
        options = (self.accumulate, self.order, self.norm, self.on_antipodal, self.linear_above)
        coef_M = formulas.sequential_slerp(gram_MM, weight_M, *options)
        own = norm_of(gram_MM, coef_M)
        return self.scale * coef_M * (1 if self.length is None or not own > 0 else self.length / own)

    def prepare(self, job: Job) -> Combine:
        uniform = not isinstance(job.weights, Mapping) and self.of == "task_vectors"
        if len(job.parents) > 2 and job.granularity in ("model", "block") and uniform:
            job.report["order_spread"] = {
                key: formulas.order_spread(job.gram.of(names), job.weight_M, self.accumulate)
                for key, names in job.groups.items()
            }
        return super().prepare(job)


@merge_methods.register(
    "karcher", formula="argmin_m sum_i w_i angle(m, V_i)^2, times sum_i w_i |V_i|", source="Frechet mean on the sphere"
)
@dataclass(frozen=True)
class Karcher(CoefficientMethod):
    """The weighted mean of the task vectors' directions on the sphere, times their mean norm; free of any order.

    `scale`: factor of the result. `norm`: the mean norm is `linear` or `geometric`. `of`: the `task_vectors`, or the
    raw `weights`, without a base.
    """

    scale: Finite = 1.0
    norm: Literal["linear", "geometric"] = "linear"
    of: Of = "task_vectors"  # type: ignore[misc]  # a setting here

    steps: ClassVar[int] = 100

    @property
    def base(self) -> Base:  # type: ignore[override]
        return "needed" if self.of == "task_vectors" else "optional"

    def formula(self, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
        if self.steps and bool((gram_MM < 0).any()):
            log.warning("some task vectors are more than 90 degrees apart: their spherical mean may not be unique")
        return self.scale * formulas.karcher(gram_MM, weight_M, self.norm, self.steps)


@merge_methods.register(
    "normalised_mean", formula="sum_i w_i V_i/|V_i|, stretched to sum_i w_i |V_i|", source="mergekit's multislerp"
)
@dataclass(frozen=True)
class NormalisedMean(Karcher):
    """The direction of the mean of unit task vectors, times their mean norm: what mergekit calls multislerp.

    `scale`: factor of the result. `norm`: the mean norm is `linear` or `geometric`. `of`: the `task_vectors`, or the
    raw `weights`, without a base.
    """

    steps: ClassVar[int] = 0  # towards the mean on the sphere


@merge_methods.register(
    "model_stock", formula="c_i = t/M, t = M cos / (1 + (M-1) cos)", source="Jang et al. 2024 (2403.19522)"
)
@dataclass(frozen=True)
class ModelStock(CoefficientMethod):
    """Between the mean and the base, by how much runs of one task agree. Not for parents of different tasks.

    cos is the mean pairwise cosine, and t lies in [0, 1]. Of parents nearly orthogonal t is near 0 and the base comes
    back. Pairs with a zero vector are left out of the mean (no cosine), and nothing is clamped at an absolute size.
    """

    signed: ClassVar[bool] = True

    def formula(self, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
        if bool((weight_M != weight_M[0]).any()):
            raise RecipeError("model_stock has no weights", fix="remove them, or use average")
        count = len(gram_MM)
        if count < 2:
            raise RecipeError("model_stock needs at least two parents", fix="add a parent, or use average")
        length_M = norms(gram_MM)
        pairs = [(i, j) for i, j in itertools.combinations(range(count), 2) if length_M[i] > 0 and length_M[j] > 0]
        if not pairs:
            return torch.full((count,), 1 / count, dtype=torch.float64)
        cosines = torch.stack([gram_MM[i, j] / (length_M[i] * length_M[j]) for i, j in pairs])
        cos = cosines.mean().clamp(0, 1)
        return (cos / (1 + (count - 1) * cos)).expand(count)
