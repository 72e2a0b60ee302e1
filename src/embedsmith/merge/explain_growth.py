"""Length and direction of task vectors against the amount of data: fits with R^2 and their leave-one-out error.

The two findings of 2410.15035: the length of a task vector grows with its data, and the joint one leans to the larger
data set. The paper's functional form was not readable; both usual ones are fitted, and named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import RecipeError

Floats = npt.NDArray[np.float64]
FEWEST = 4
"""Points below which a fit says nothing."""


@dataclass(frozen=True)
class Fit:
    """y = `intercept` + `slope` x in the form's own coordinates.

    `r2` = 1 - SS_res / SS_tot in the units of y itself; `left_out`: root mean square error of each point predicted
    from the others. `conclusive`: at least four points.
    """

    form: str
    slope: float
    intercept: float
    r2: float
    left_out: float
    points: int

    @property
    def conclusive(self) -> bool:
        return self.points >= FEWEST

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "conclusive": self.conclusive}


def fit_norms(examples: Sequence[float], norms: Sequence[float]) -> list[Fit]:
    """|V| = c n^p (ordinary least squares in logarithms) and |V| = a + b log n, n the number of examples.

    Errors: `RecipeError` for fewer than two points, or values that have no logarithm.
    """
    n, y = _checked(examples, norms)
    return [_fit("|V| = c n^p", np.log(n), y, np.log, np.exp), _fit("|V| = a + b log n", np.log(n), y)]


def fit_directions(ratios: Sequence[float], degrees: Sequence[float]) -> Fit:
    """angle(V_joint, V_i) = a + b log(n_i / n_j), in degrees: b below 0 where the joint vector leans to more data."""
    ratio, y = _checked(ratios, degrees)
    return _fit("angle = a + b log(n_i / n_j)", np.log(ratio), y)


def _checked(x: Sequence[float], y: Sequence[float]) -> tuple[Floats, Floats]:
    if len(x) != len(y) or len(x) < 2:
        raise RecipeError(f"{len(x)} sizes and {len(y)} values", expected="at least two of both")
    if min(x) <= 0 or min(y) <= 0:
        raise RecipeError("sizes and lengths must be above 0")
    if len(set(x)) < 2:
        raise RecipeError("all sizes are the same", expected="runs on different amounts of data")
    return np.asarray(x, np.float64), np.asarray(y, np.float64)


Change = Callable[[Floats], Floats]


def _same(values: Floats) -> Floats:
    return values


def _fit(form: str, x: Floats, y: Floats, to: Change = _same, back: Change = _same) -> Fit:
    """A line through (x, to(y)); errors are measured after `back`."""
    slope, intercept = np.polyfit(x, to(y), 1)
    residual = y - back(intercept + slope * x)
    spread = float(np.square(y - y.mean()).sum())
    r2 = 1 - float(np.square(residual).sum()) / spread if spread > 0 else float("nan")
    return Fit(form, float(slope), float(intercept), r2, _left_out(x, y, to, back), len(x))


def _left_out(x: Floats, y: Floats, to: Change, back: Change) -> float:
    if len(set(x.tolist())) < 3:
        return float("nan")
    errors = []
    for place in range(len(x)):
        keep = np.arange(len(x)) != place
        slope, intercept = np.polyfit(x[keep], to(y[keep]), 1)
        errors.append(y[place] - back(np.asarray(intercept + slope * x[place])))
    return float(np.sqrt(np.mean(np.square(errors))))
