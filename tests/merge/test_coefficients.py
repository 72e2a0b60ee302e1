"""Coefficient methods against the vectors themselves: what K says must be what the geometry says, to 1e-12."""

import itertools
import math

import pytest
import torch

from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import parse
from embedsmith.core.shelf import merge_methods
from embedsmith.merge import MergeRecipe
from embedsmith.merge.methods import formulas as formula
from embedsmith.merge.methods.coefficient import Average, ModelStock, Slerp

M, SIZE = 3, 50


def vectors(count=M, seed=0, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) * torch.arange(1, count + 1)[:, None]


def near(seed=0, count=M):
    """Vectors 30 to 60 degrees apart, of different lengths."""
    common = vectors(1, seed + 100)
    return common + 0.7 * vectors(count, seed)


def ones(count=M):
    return torch.ones(count, dtype=torch.float64)


def weights(*values):
    return torch.tensor(values, dtype=torch.float64)


def direct_slerp(left, right, t):
    """The textbook: angle by the arc cosine, on the vectors."""
    cos = left @ right / (left.norm() * right.norm())
    alpha = torch.acos(cos)
    return (torch.sin((1 - t) * alpha) * left + torch.sin(t * alpha) * right) / torch.sin(alpha)


def angle(one, two):
    return math.degrees(math.acos(min(1.0, float(one @ two / (one.norm() * two.norm())))))


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_slerp_equals_the_vectors(t):
    v = near(count=2)
    unit = torch.eye(2, dtype=torch.float64)
    coef = formula.slerp(v @ v.T, unit[0], unit[1], t)
    torch.testing.assert_close(coef @ v, direct_slerp(v[0], v[1], t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("accumulate", ["sum", "mean"])
def test_sequential_slerp_equals_the_vectors(accumulate):
    v, a = near(), weights(1.0, 2.0, 0.5)
    merged = v[0]
    for place in range(1, M):
        before = a[:place].sum() if accumulate == "sum" else a[:place].mean()
        merged = direct_slerp(merged, v[place], a[place] / (before + a[place]))
    coef = formula.sequential_slerp(v @ v.T, a, accumulate)
    torch.testing.assert_close(coef @ v, merged, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("accumulate", ["sum", "mean"])
def test_the_average_over_orders_is_the_mean_of_them_all(accumulate):
    v, a = near(), weights(1.0, 2.0, 0.5)
    merged = []
    for way in itertools.permutations(range(M)):
        merged.append(v[way[0]])
        for place in range(1, M):
            before = a[list(way[:place])].sum() if accumulate == "sum" else a[list(way[:place])].mean()
            merged[-1] = direct_slerp(merged[-1], v[way[place]], a[way[place]] / (before + a[way[place]]))
    coef = formula.sequential_slerp(v @ v.T, a, accumulate, order="average")
    torch.testing.assert_close(coef @ v, torch.stack(merged).mean(0), rtol=1e-12, atol=1e-12)


def test_a_larger_weight_pulls_towards_its_vector():
    v = near(count=2)
    coef = formula.sequential_slerp(v @ v.T, weights(1e9, 1.0))
    torch.testing.assert_close(coef @ v, v[0], rtol=1e-6, atol=1e-6)


def test_slerp_swapped_with_one_minus_t_is_the_same():
    v = near(count=2)
    unit = torch.eye(2, dtype=torch.float64)
    one, two = formula.slerp(v @ v.T, unit[0], unit[1], 0.3), formula.slerp(v @ v.T, unit[1], unit[0], 0.7)
    torch.testing.assert_close(one, two, rtol=1e-14, atol=0)


def test_slerp_keeps_equal_norms():
    v = near(count=2)
    v = v / v.norm(dim=1, keepdim=True) * 3
    assert float((formula.sequential_slerp(v @ v.T, ones(2)) @ v).norm()) == pytest.approx(3, rel=1e-12)


@pytest.mark.parametrize(
    ("norm", "wanted"), [("linear", lambda a, b: (a + b) / 2), ("geometric", lambda a, b: (a * b) ** 0.5)]
)
def test_slerp_norms(norm, wanted):
    v = near(count=2)
    coef = formula.sequential_slerp(v @ v.T, ones(2), norm=norm)
    assert float((coef @ v).norm()) == pytest.approx(float(wanted(v[0].norm(), v[1].norm())), rel=1e-12)


@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-5, 9e-4, 2e-3])
def test_nearly_parallel_vectors_have_no_seam(gap):
    """sin(t a)/sin(a) by its series below 1 - cos = 1e-6 and by the formula above it, against high precision."""
    v = torch.zeros(2, 3, dtype=torch.float64)
    v[0, 0] = 1
    v[1, 0], v[1, 1] = math.cos(gap), math.sin(gap)
    coef = formula.sequential_slerp(v @ v.T, weights(0.7, 0.3))
    wanted = weights(0.7, 0.3) if gap == 0 else weights(math.sin(0.7 * gap), math.sin(0.3 * gap)) / math.sin(gap)
    torch.testing.assert_close(coef, wanted, rtol=3e-9, atol=0)


def test_a_zero_vector_gives_linear_coefficients():
    v = near(count=2)
    v[1] = 0
    assert formula.sequential_slerp(v @ v.T, weights(0.7, 0.3)).tolist() == pytest.approx([0.7, 0.3])


def test_opposite_vectors_are_an_error_or_a_choice():
    v = near(count=2)
    v[1] = -2 * v[0] + 1e-9
    gram = v @ v.T
    with pytest.raises(RecipeError, match="opposite directions"):
        formula.sequential_slerp(gram, ones(2))
    assert formula.sequential_slerp(gram, ones(2), on_antipodal="linear").tolist() == [0.5, 0.5]
    assert formula.sequential_slerp(gram, ones(2), on_antipodal="drop_smaller").tolist() == [0.0, 1.0]


def test_slerp_has_a_gradient_in_the_weights():
    v = near()
    gram = v @ v.T
    a = weights(1.0, 2.0, 0.5).requires_grad_()
    for accumulate in ("sum", "mean"):
        assert torch.autograd.gradcheck(lambda a, rule=accumulate: formula.sequential_slerp(gram, a, rule), a)
    assert torch.autograd.gradcheck(lambda a: formula.karcher(gram, a), a, atol=1e-6)


def test_order_matters_more_under_the_mean_rule():
    v = near()
    gram = v @ v.T
    by_sum, by_mean = (formula.order_spread(gram, ones(), rule) for rule in ("sum", "mean"))
    assert 0 < by_sum < by_mean
    spread = max(
        angle(
            formula.sequential_slerp(gram[list(p)][:, list(p)], ones()) @ v[list(p)],
            formula.sequential_slerp(gram, ones()) @ v,
        )
        for p in itertools.permutations(range(M))
    )
    assert spread <= by_sum + 1e-9


def test_order_average_and_norm_do_not_know_the_order():
    v, a = near(), weights(1.0, 2.0, 0.5)
    back = [2, 0, 1]
    for order in ("average", "norm"):
        one = formula.sequential_slerp(v @ v.T, a, order=order) @ v
        two = formula.sequential_slerp(v[back] @ v[back].T, a[back], order=order) @ v[back]
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_a_tree_pairs_neighbours_and_adds_their_weights():
    vector = near(count=5)
    first, second = direct_slerp(vector[0], vector[1], 2 / 3), direct_slerp(vector[2], vector[3], 4 / 7)
    wanted = direct_slerp(direct_slerp(first, second, 7 / 10), vector[4], 5 / 15)
    found_M = formula.sequential_slerp(vector @ vector.T, weights(1, 2, 3, 4, 5), order="tree")
    torch.testing.assert_close(found_M @ vector, wanted, rtol=1e-12, atol=1e-12)


def test_the_nearest_come_first():
    vector_MD = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0.9, 0.3, 0], [0, 1, 0.2]], dtype=torch.float64)
    gram_MM, way = vector_MD @ vector_MD.T, [0, 2, 3, 1]
    moved_M = formula.sequential_slerp(gram_MM[way][:, way], ones(4))
    found_M = formula.sequential_slerp(gram_MM, ones(4), order="nearest")
    torch.testing.assert_close(found_M[way], moved_M, rtol=1e-12, atol=1e-12)


def test_a_length_by_number():
    vector = near()
    coef_M = Slerp(length=0.25, scale=2.0).coefficients(vector @ vector.T, ones())
    assert float((coef_M @ vector).norm()) == pytest.approx(0.5)


def test_identical_vectors_come_back():
    v = near(count=1).expand(4, -1)
    for found in (
        formula.sequential_slerp(v @ v.T, ones(4)),
        formula.karcher(v @ v.T, ones(4)),
        formula.normalised(ones(4)),
    ):
        torch.testing.assert_close(found @ v, v[0], rtol=1e-12, atol=1e-12)


def test_karcher_of_two_is_slerp():
    v = near(count=2)
    v = v / v.norm(dim=1, keepdim=True)
    for a in (ones(2), weights(0.7, 0.3)):
        torch.testing.assert_close(
            formula.karcher(v @ v.T, a), formula.sequential_slerp(v @ v.T, a), rtol=1e-9, atol=1e-9
        )


def test_karcher_is_where_the_logarithms_cancel_and_knows_no_order():
    v, a = near(), weights(0.5, 0.3, 0.2)
    mean = formula.karcher(v @ v.T, a) @ v
    direction = mean / mean.norm()
    total = torch.zeros(SIZE, dtype=torch.float64)
    for weight, unit in zip(a, v / v.norm(dim=1, keepdim=True), strict=True):
        theta = torch.acos(unit @ direction)
        total += weight * theta / torch.sin(theta) * (unit - torch.cos(theta) * direction)
    assert float(total.norm()) < 1e-9
    assert float(mean.norm()) == pytest.approx(float(a @ v.norm(dim=1)), rel=1e-12)
    back = [2, 0, 1]
    torch.testing.assert_close(formula.karcher(v[back] @ v[back].T, a[back]), formula.karcher(v @ v.T, a)[back])


def test_karcher_is_not_the_normalised_mean():
    """Orthogonal vectors with weights .7/.2/.1: 4.7 degrees apart (mergekit's multislerp is the second)."""
    v, a = torch.eye(3, dtype=torch.float64), weights(0.7, 0.2, 0.1)
    found = merge_methods.build("normalised_mean").coefficients(v, a)
    assert angle(formula.karcher(v, a), found) == pytest.approx(4.7, abs=0.1)
    torch.testing.assert_close(found, a / a.norm())


def test_norm_restoring_average_has_the_mean_norm():
    v, a = vectors(), weights(0.5, 0.3, 0.2)
    merged = Average(restore_norm=True).coefficients(v @ v.T, a) @ v
    assert float(merged.norm()) == pytest.approx(float(a @ v.norm(dim=1)), rel=1e-12)
    assert angle(merged, a @ v) < 1e-5


def test_model_stock():
    v = torch.eye(3, dtype=torch.float64) * 1e-4
    stock = ModelStock()
    assert stock.coefficients(v @ v.T, ones()).tolist() == [0, 0, 0]
    same = near(count=1).expand(3, -1) * 1e-5
    torch.testing.assert_close(stock.coefficients(same @ same.T, ones()), ones() / 3)
    pair = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64) * 1e-6
    assert stock.coefficients(pair @ pair.T, ones(2)).tolist() == pytest.approx([0.6 / 1.6] * 2)


def test_task_vectors_of_zero_give_the_mean():
    zero = torch.zeros(M, M, dtype=torch.float64)
    for name in ("karcher", "normalised_mean", "slerp", "average", "model_stock"):
        assert merge_methods.build(name).coefficients(zero, ones()).tolist() == pytest.approx([1 / M] * M)


def test_scale_of_the_task_vectors_changes_nothing():
    """Fine-tuning moves weights by 1e-5: nothing may hang on an absolute epsilon."""
    v = near()
    for name in ("karcher", "normalised_mean", "slerp", "model_stock"):
        method = merge_methods.build(name)
        large, small = (method.coefficients(s * s * (v @ v.T), ones()) for s in (1.0, 1e-9))
        torch.testing.assert_close(large, small, rtol=1e-9, atol=0)


def test_scaled_slerp_and_task_arithmetic():
    v = near()
    gram = v @ v.T
    whole, half = (merge_methods.build({"type": "slerp", "scale": s}).coefficients(gram, ones()) for s in (1, 0.5))
    torch.testing.assert_close(half * 2, whole)
    torch.testing.assert_close(whole, formula.sequential_slerp(gram, ones()))
    method = merge_methods.build({"type": "task_arithmetic", "scale": 0.3})
    assert method.coefficients(gram, weights(1, -1, 2)).tolist() == pytest.approx([0.3, -0.3, 0.6])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"type": "slerp", "length": 0}, r"method\.length: .* greater than 0"),
        ("warp", "(?s)no longer there.*slerp with scale"),
        ({"type": "magmax"}, "(?s)no longer there.*aggregate: max"),
        ({"type": "regmean", "sequential": True}, r"regmean\.sequential is no longer there"),
        ({"type": "fisher", "definition": "shared"}, "definition: isolated"),
        ({"type": "search", "searcher": "halving"}, "searcher: grid"),
        ({"type": "sler"}, "did you mean 'slerp'"),
        ({"type": "ties", "density": 0}, r"method\.density: .* greater than 0"),
        ({"type": "della", "density": 0.9}, "epsilon"),
        ({"type": "breadcrumbs", "density": 1.0}, "gamma"),
    ],
)
def test_bad_settings(value, message):
    with pytest.raises(RecipeError, match=message):
        parse(MergeRecipe, {"parents": ["a"], "output": "b", "method": value})


def test_a_key_of_a_parent_that_is_gone():
    tree = {"parents": [{"path": "a", "examples": {"x": 3}}], "output": "b", "method": "average"}
    with pytest.raises(RecipeError, match="key examples of a parent is no longer there"):
        parse(MergeRecipe, tree)


def test_weights_that_sum_to_nothing():
    with pytest.raises(RecipeError, match="sum to 0"):
        formula.normalised(weights(1, -1))
    with pytest.raises(RecipeError, match="at least 0"):
        merge_methods.build("karcher").coefficients(torch.eye(2, dtype=torch.float64), weights(1, -1))
