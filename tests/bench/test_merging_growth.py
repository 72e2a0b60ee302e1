"""Fits of length and direction against data: exact laws, and what their figures say."""

import math

import numpy as np
import pytest
from bench.merging_growth import Growth, fit_directions, fit_norms, growth_sections

from embedsmith.core.errors import RecipeError


def test_fits_of_exact_laws():
    sizes = [100, 300, 1000, 5000, 20000]
    power, logarithm = fit_norms(sizes, [0.5 * n**0.4 for n in sizes])
    assert (power.slope, power.r2, power.left_out) == pytest.approx((0.4, 1.0, 0.0), abs=1e-9)
    assert logarithm.r2 < 0.95
    _, line = fit_norms(sizes, [1 + 0.2 * math.log(n) for n in sizes])
    assert (line.slope, line.intercept, line.r2) == pytest.approx((0.2, 1.0, 1.0))
    assert fit_directions([0.1, 0.5, 2, 10], [50 - 8 * math.log(r) for r in (0.1, 0.5, 2, 10)]).slope == pytest.approx(
        -8
    )


def test_r2_and_the_left_out_error_are_what_they_say():
    x, y = [1, 2, 4, 8], [1.0, 2.5, 2.0, 4.0]
    fit = fit_norms(x, y)[1]
    slope, intercept = np.polyfit(np.log(x), y, 1)
    residual = np.array(y) - (intercept + slope * np.log(x))
    assert fit.r2 == pytest.approx(1 - (residual**2).sum() / ((np.array(y) - np.mean(y)) ** 2).sum())
    errors = []
    for place in range(4):
        keep = [n for n in range(4) if n != place]
        a, b = np.polyfit(np.log([x[n] for n in keep]), [y[n] for n in keep], 1)
        errors.append(y[place] - (b + a * np.log(x[place])))
    assert fit.left_out == pytest.approx(np.sqrt(np.mean(np.square(errors))))


def test_few_points_conclude_nothing_and_bad_ones_are_errors():
    assert not fit_norms([1, 2, 3], [1, 2, 3])[0].conclusive
    assert fit_norms([1, 2, 3, 4], [1, 2, 3, 4])[0].conclusive
    for sizes, norms in (([1], [1]), ([1, 1], [1, 2]), ([0, 1], [1, 2])):
        with pytest.raises(RecipeError):
            fit_norms(sizes, norms)


def test_sections_show_the_points_of_every_task_with_their_fits():
    growth = Growth({"a": [(100, 2.0), (400, 4.0)], "b": [(300, 3.0)]}, {"a": [(1.0, 45.0), (3.0, 18.4)]})
    fits = growth.length_fits()
    assert set(fits) == {"a"}
    assert fits["a"][0].at(1600) == pytest.approx(8.0)
    assert growth.direction_fits()["a"].slope < 0
    lengths, directions = growth_sections(growth)
    assert "|V| = c n^p" in lengths.body
    assert "R^2" in directions.body
