"""Coefficient methods: pure functions from the Gram matrix of task vectors to one coefficient a parent.

The merge is theta_0 + sum_i c_i V_i. K [M, M], K_ij = <V_i, V_j>, and the weights a [M] are float64; every function is
differentiable in a (and in K where it reads K). No epsilon is absolute: fine-tuning moves weights by 1e-5 to 1e-3.
"""

import itertools
import math
import random
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import log

Antipodal = Literal["error", "linear", "drop_smaller"]
Norm = Literal["raw", "geometric", "linear"]
Accumulate = Literal["sum", "mean"]
Order = Literal["given", "norm", "nearest", "average", "tree"]

_NEARLY_PARALLEL = 1e-6
"""1 - cos below which the series of sin(t a)/sin(a) is used; its next term is below 1e-13."""
_ANTIPODAL = -1 + 1e-4
CANCELLED = 7e-3
"""|sum w_i u_i| of unit vectors below which they cancel out: two equal ones at the antipodal cosine have this left, and
what is left is noise that must not be stretched to full length."""


def normalised(weight_M: Tensor) -> Tensor:
    """w_i = a_i / sum a; of real numbers, too. Errors: `RecipeError` when they cancel out."""
    total = weight_M.sum()
    if not total.abs() > 1e-9 * weight_M.abs().sum():
        raise RecipeError(f"the weights {weight_M.tolist()} sum to {float(total):g}", expected="a sum that is not 0")
    return weight_M / total


def not_negative(weight_M: Tensor) -> Tensor:
    """The weights as they are. Errors: `RecipeError` for a negative one, where it would mean nothing."""
    if bool((weight_M < 0).any()):
        fix = "use average, slerp or task_arithmetic, where a negative weight leads away from a parent"
        raise RecipeError(f"weights {weight_M.tolist()}", expected="weights of at least 0", fix=fix)
    return weight_M


def norms(gram_MM: Tensor) -> Tensor:
    """|V_i| [M]."""
    return gram_MM.diagonal().clamp_min(0).sqrt()


def norm_of(gram_MM: Tensor, coef_M: Tensor) -> Tensor:
    """|sum_i c_i V_i|, a scalar."""
    return (coef_M @ gram_MM @ coef_M).clamp_min(0).sqrt()


def slerp(
    gram_MM: Tensor,
    left_M: Tensor,
    right_M: Tensor,
    t: Tensor | float,
    norm: Norm = "raw",
    on_antipodal: Antipodal = "error",
    linear_above: float = 1.0,
) -> Tensor:
    """Coefficients of SLERP between two vectors that are themselves coefficient vectors over the parents.

        V = [ sin((1-t) alpha) V_l + sin(t alpha) V_r ] / sin(alpha),   alpha = angle(V_l, V_r)

    t = 0 is left, t = 1 is right, and t outside of these goes on along the great circle; for weights
    t = a_r / (a_l + a_r). (The printed formula of 2410.15035 has the
    angle outside the sine and the weights crossed; this is the one meant.) A zero vector has no angle: linear then.
    `norm`: `raw` as above, or the result stretched to |V_l|^(1-t) |V_r|^t (`geometric`) or (1-t)|V_l| + t|V_r|.
    `on_antipodal`: the great circle between opposite vectors is not unique. `linear_above`: above this |cosine| along
    the line.
    Errors: `RecipeError` for opposite vectors with `on_antipodal="error"`.
    """
    t = torch.as_tensor(t, dtype=torch.float64)
    length_l, length_r = norm_of(gram_MM, left_M), norm_of(gram_MM, right_M)
    if not (length_l > 0 and length_r > 0):
        return (1 - t) * left_M + t * right_M
    cos = (left_M @ gram_MM @ right_M / (length_l * length_r)).clamp(-1, 1)
    if cos.abs() > linear_above:
        return (1 - t) * left_M + t * right_M
    if cos < _ANTIPODAL and on_antipodal == "error":
        raise RecipeError(
            "two task vectors point in opposite directions, so there is no shortest arc between them",
            expected="a cosine above -0.9999",
            fix="leave one parent out, or set on_antipodal to linear or drop_smaller",
        )
    if cos < _ANTIPODAL:
        log.warning("task vectors in opposite directions: on_antipodal=%s decides", on_antipodal)
        longer_M = left_M if length_l >= length_r else right_M
        return longer_M if on_antipodal == "drop_smaller" else (1 - t) * left_M + t * right_M
    mixed_M = _share(1 - t, cos) * left_M + _share(t, cos) * right_M
    if norm == "raw":
        return mixed_M
    linear = (1 - t) * length_l + t * length_r
    wanted = linear if norm == "linear" else length_l ** (1 - t) * length_r**t
    if not wanted > 0:
        raise RecipeError(f"norm: linear has no length at t = {float(t):g}", fix="use norm: raw or norm: geometric")
    return mixed_M * wanted / norm_of(gram_MM, mixed_M)


def _share(t: Tensor, cos: Tensor) -> Tensor:
    """sin(t alpha) / sin(alpha). alpha = 2 atan2(|u-v|, |u+v|) of the unit vectors: acos loses half the digits."""
    if 1 - cos < _NEARLY_PARALLEL:
        return t * (1 + (1 - t * t) * (1 - cos) / 3)
    alpha = 2 * torch.atan2((1 - cos).sqrt(), (1 + cos).sqrt())
    return torch.sin(t * alpha) / torch.sin(alpha)


def sequential_slerp(
    gram_MM: Tensor,
    weight_M: Tensor,
    accumulate: Accumulate = "sum",
    order: Order = "given",
    norm: Norm = "raw",
    on_antipodal: Antipodal = "error",
    linear_above: float = 1.0,
) -> Tensor:
    """U_1 = V_1; U_n = slerp(U_{n-1}, V_n; t_n), in the order of the parents.

    `accumulate`: the weight of what is already merged is the `sum` of its weights, t_n = a_n / sum_{k<=n} a_k (equal
    weights: equal influence), or their `mean`, t_n = a_n / (mean(a_1..a_{n-1}) + a_n), the paper's recursion
    (2410.15035), in which later parents count more. `order`: as given, longest vector first (`norm`), the closest pair
    first and then always the vector closest to one already merged (`nearest`), the mean over all orders (`average`;
    100 drawn orders above five parents), or neighbours in pairs, then the pairs in pairs (`tree`, by sums of weights).
    Weights are real: a negative one leads away from its vector.
    """
    options = (norm, on_antipodal, linear_above)
    if order == "average":
        ways = orders(len(weight_M))
        return torch.stack([_in_order(gram_MM, weight_M, way, accumulate, *options) for way in ways]).mean(0)
    way = list(range(len(weight_M)))
    if order == "tree":
        return _in_pairs(gram_MM, weight_M, *options)
    if order == "norm":
        way = norms(gram_MM).argsort(descending=True, stable=True).tolist()
    if order == "nearest":
        way = _nearest_first(gram_MM.detach())
    return _in_order(gram_MM, weight_M, way, accumulate, *options)


def _in_order(
    gram_MM: Tensor,
    weight_M: Tensor,
    way: Sequence[int],
    accumulate: Accumulate,
    norm: Norm = "raw",
    on_antipodal: Antipodal = "error",
    linear_above: float = 1.0,
) -> Tensor:
    unit_MM = torch.eye(len(weight_M), dtype=torch.float64)
    normalised(weight_M)  # refuses weights that sum to nothing
    merged_M, seen = unit_MM[way[0]], weight_M[way[0]]
    for count, place in enumerate(way[1:], start=1):
        before = seen if accumulate == "sum" else seen / count
        t = _turn(before, weight_M[place])
        merged_M = slerp(gram_MM, merged_M, unit_MM[place], t, norm, on_antipodal, linear_above)
        seen = seen + weight_M[place]
    return merged_M


def _turn(left: Tensor, right: Tensor) -> Tensor:
    """t = a_r / (a_l + a_r); between two weights of 0 the middle. Errors: `RecipeError` for weights that cancel out."""
    if not left.abs() + right.abs() > 0:
        return torch.tensor(0.5, dtype=torch.float64)
    return normalised(torch.stack([left, right]))[1]


def _nearest_first(gram_MM: Tensor) -> list[int]:
    """The closest pair, then always the vector with the largest cosine to one that is already there."""
    length_M = norms(gram_MM).clamp_min(1e-300)
    cosine_MM = gram_MM / torch.outer(length_M, length_M)
    cosine_MM.fill_diagonal_(-torch.inf)
    way = [int(place) for place in divmod(int(cosine_MM.argmax()), len(gram_MM))] if len(gram_MM) > 1 else [0]
    while len(way) < len(gram_MM):
        left = [place for place in range(len(gram_MM)) if place not in way]
        way.append(max(left, key=lambda place: float(cosine_MM[way, place].max())))
    return way


def _in_pairs(gram_MM: Tensor, weight_M: Tensor, norm: Norm, on_antipodal: Antipodal, linear_above: float) -> Tensor:
    """A balanced tree: neighbours merge, then what they became, until one is left; weights add up."""
    normalised(weight_M)  # refuses weights that sum to nothing
    left: list[tuple[Tensor, Tensor]] = list(zip(torch.eye(len(weight_M), dtype=torch.float64), weight_M, strict=True))
    while len(left) > 1:
        rest = left[len(left) // 2 * 2 :]
        paired = []
        for (one_M, one), (two_M, two) in zip(left[0::2], left[1::2], strict=False):
            merged_M = slerp(gram_MM, one_M, two_M, _turn(one, two), norm, on_antipodal, linear_above)
            paired.append((merged_M, one + two))
        left = paired + rest
    return left[0][0]


def orders(count: int) -> list[tuple[int, ...]]:
    """All orders of up to five parents; 100 drawn ones, always the same, of more."""
    if count <= 5:
        return list(itertools.permutations(range(count)))
    draw = random.Random(count)
    return [tuple(draw.sample(range(count), count)) for _ in range(100)]


def order_spread(gram_MM: Tensor, weight_M: Tensor, accumulate: Accumulate = "sum") -> float:
    """The largest angle, in degrees, between sequential SLERPs in two orders: how much the order decides."""
    ways = orders(len(weight_M))
    found_OM = torch.stack([_in_order(gram_MM, weight_M, way, accumulate, on_antipodal="linear") for way in ways])
    product_OO = found_OM @ gram_MM @ found_OM.T
    length_O = product_OO.diagonal().clamp_min(0).sqrt()
    if not length_O.all():
        return 0.0
    return math.degrees(math.acos(min(1.0, float((product_OO / torch.outer(length_O, length_O)).min()))))


def karcher(
    gram_MM: Tensor, weight_M: Tensor, norm: Literal["linear", "geometric"] = "linear", steps: int = 100
) -> Tensor:
    """The weighted mean on the sphere of directions (Frechet mean), with the weighted mean norm. Order-free.

    m <- exp_m( sum_i w_i log_m(V_i/|V_i|) ) from the normalised weighted mean until the step is below 1e-10. Unique
    where all directions lie in an open half space; all pairwise cosines above 0 suffice. Zero vectors take no part.
    Without `steps` it stays the direction of sum_i w_i V_i/|V_i|: what mergekit's `multislerp` returns, since the sum
    in its tangent space is identically zero.
    Errors: `RecipeError` for directions whose mean is next to nothing.
    """
    length_M = norms(gram_MM)
    alive_M = length_M > 0
    if not alive_M.any():
        return normalised(weight_M)
    inverse_M = torch.where(alive_M, 1 / torch.where(alive_M, length_M, torch.ones_like(length_M)), 0.0)
    w_M = normalised(weight_M * alive_M)
    mean_M = w_M * inverse_M
    if norm_of(gram_MM, mean_M) < CANCELLED:
        raise RecipeError(
            "the task vectors cancel out: their directions have no mean", fix="leave one parent out, or use average"
        )
    mean_M = mean_M / norm_of(gram_MM, mean_M) if steps else mean_M
    for _ in range(steps):
        mean_M, step = _karcher_step(gram_MM, mean_M, w_M, inverse_M)
        if step < 1e-10:
            break
    geometric = torch.exp(w_M @ torch.where(length_M > 0, length_M, 1.0).log())
    wanted = w_M @ length_M if norm == "linear" else geometric
    return mean_M * wanted / norm_of(gram_MM, mean_M)


def _karcher_step(gram_MM: Tensor, mean_M: Tensor, w_M: Tensor, inverse_M: Tensor) -> tuple[Tensor, float]:
    cos_M = ((gram_MM @ mean_M) * inverse_M).clamp(-1, 1)
    theta_M = 2 * torch.atan2((1 - cos_M).sqrt(), (1 + cos_M).sqrt())
    near_M = 1 - cos_M < _NEARLY_PARALLEL
    safe_M = torch.where(near_M, torch.ones_like(theta_M), theta_M)
    ratio_M = torch.where(near_M, 1 + (1 - cos_M) / 3, safe_M / torch.sin(safe_M))
    tangent_M = w_M * ratio_M * inverse_M - (w_M * ratio_M * cos_M).sum() * mean_M
    size = norm_of(gram_MM, tangent_M)
    if size < 1e-10:
        return mean_M, float(size.detach())
    moved_M = torch.cos(size) * mean_M + torch.sin(size) / size * tangent_M
    return moved_M / norm_of(gram_MM, moved_M), float(size.detach())
