"""Element methods against a loop over whole vectors, and against hand-made numbers."""

import math
import random

import pytest
import torch

from embedsmith.core.shelf import merge_methods
from embedsmith.merge import tensor_blocks
from embedsmith.merge.methods.element import kept_count
from embedsmith.merge.tensor_blocks import DRAW_UNIT as UNIT
from embedsmith.merge.tensor_blocks import RowSums, drawn, nth_largest
from tests.merge.memory import deltas, flat, job_of, random_family, run

BASE, MOVED = random_family()
V = deltas(BASE, MOVED)
NAME = "backbone.layer.0.weight"


def one_tensor(rows):
    """A job on a base of zeros with these task vectors."""
    rows = torch.tensor(rows, dtype=torch.float32)
    return {NAME: torch.zeros_like(rows[0])}, [{NAME: row} for row in rows]


def naive_ties(v, density, election="mass", aggregate="mean", weights=(1.0, 1.0, 1.0)):
    """Entry by entry, as the paper says it."""
    count, size = v.shape
    keep = max(1, int(density * size + 1e-9))
    trimmed = torch.zeros_like(v)
    for row in range(count):
        kept = v[row].abs().argsort(descending=True)[:keep]
        trimmed[row, kept] = v[row, kept]
    signs = []
    for x in range(size):
        votes = trimmed[:, x] if election == "mass" else trimmed[:, x].sign()
        signs.append(float(sum(w * t for w, t in zip(weights, votes, strict=True))))
    majority = 1.0 if sum((s > 0) - (s < 0) for s in signs) >= 0 else -1.0
    merged = torch.zeros(size, dtype=torch.float64)
    for x in range(size):
        sign = signs[x] or majority
        agree = [(w, float(t)) for w, t in zip(weights, trimmed[:, x], strict=True) if t * sign > 0]
        if not agree:
            continue
        if aggregate == "max":
            merged[x] = max((t for _, t in agree), key=abs)
        else:
            total = sum(w for w, _ in agree) if aggregate == "mean" else sum(weights)
            merged[x] = sum(w * t for w, t in agree) / total
    return merged


@pytest.mark.parametrize("election", ["mass", "count"])
@pytest.mark.parametrize("aggregate", ["mean", "sum", "max"])
def test_ties_over_the_whole_model(election, aggregate):
    method = {"type": "ties", "density": 0.3, "election": election, "aggregate": aggregate, "scale": 0.8}
    found = flat(run(method, job_of(BASE, MOVED, weights=[1.0, 2.0, 0.5])))
    wanted = flat(BASE) + 0.8 * naive_ties(V, 0.3, election, aggregate, (1.0, 2.0, 0.5))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


def test_ties_trims_each_tensor_under_tensor_granularity():
    found = run({"type": "ties", "density": 0.3}, job_of(BASE, MOVED, granularity="tensor"))
    for name, base in BASE.items():
        v = deltas({name: base}, [{name: one[name]} for one in MOVED])
        torch.testing.assert_close(found[name], base.double().flatten() + naive_ties(v, 0.3), rtol=1e-12, atol=1e-15)


def test_ties_by_hand():
    """Trim to 2 of 4; zeros have no vote; where votes cancel the majority sign (here +) decides."""
    base, moved = one_tensor([[4.0, -1.0, 0.5, 3.0], [2.0, 5.0, 0.0, -3.0], [1.0, 0.5, 7.0, 0.0]])
    found = run({"type": "ties", "density": 0.5}, job_of(base, moved))[NAME]
    # trimmed: [4, 0, 0, 3], [0, 5, 0, -3], [1, 0, 7, 0]; the last element cancels
    assert found.tolist() == pytest.approx([2.5, 5.0, 7.0, 3.0])


def test_ties_keeps_ties_at_the_threshold_and_says_how_dense_it_became():
    base, moved = one_tensor([[1.0, 1.0, 1.0, 2.0]] * 2)
    job = job_of(base, moved)
    assert run({"type": "ties", "density": 0.5}, job)[NAME].tolist() == [1, 1, 1, 2]
    assert job.report["density"] == {"model": [1.0, 1.0]}


def test_ties_by_threshold():
    base, moved = one_tensor([[4.0, -1.0, 0.5, 3.0], [2.0, -5.0, 0.0, 3.0]])
    found = run({"type": "ties", "threshold": 2.5}, job_of(base, moved))[NAME]
    assert found.tolist() == [4.0, -5.0, 0.0, 3.0]


@pytest.mark.parametrize("rescale", ["norm", "trimmed_norm"])
@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_ties_rescaled_has_the_mean_norm(rescale, granularity):
    job = job_of(BASE, MOVED, granularity=granularity)
    found = run({"type": "ties", "density": 0.3, "rescale": rescale}, job)
    groups = [tuple(BASE)] if granularity == "model" else [(name,) for name in BASE]
    for names in groups:
        v = deltas({k: BASE[k] for k in names}, [{k: one[k] for k in names} for one in MOVED])
        if rescale == "trimmed_norm":
            least = v.abs().topk(max(1, int(0.3 * v.shape[1] + 1e-9)), dim=1).values[:, -1:]
            v = torch.where(v.abs() >= least, v, 0.0)
        merged = torch.cat([found[k] - BASE[k].double().flatten() for k in names])
        assert float(merged.norm()) == pytest.approx(float(v.norm(dim=1).mean()), rel=1e-9)


def test_ties_with_l1_restores_each_tensor():
    """One parent: what is left is the trimmed vector with the tensor's former L1 norm."""
    found = run({"type": "ties", "density": 0.3, "rescale": "l1"}, job_of(BASE, MOVED[:1], granularity="tensor"))
    for name, base in BASE.items():
        moved = (MOVED[0][name].double() - base.double()).flatten()
        merged = found[name] - base.double().flatten()
        assert float(merged.abs().sum()) == pytest.approx(float(moved.abs().sum()), rel=1e-9)
        assert int(merged.count_nonzero()) == max(1, int(0.3 * moved.numel() + 1e-9))


def test_prenorm_makes_a_small_parent_count():
    base, moved = one_tensor([[100.0, -100.0], [-1.0, -1.0], [-1.0, -1.0]])
    plain = run({"type": "ties", "density": 1.0}, job_of(base, moved))[NAME]
    equal = run({"type": "ties", "density": 1.0, "prenorm": True}, job_of(base, moved))[NAME]
    assert plain[0] > 0
    assert equal[0] < 0


def test_dare_is_right_on_average():
    base, moved = one_tensor([[1.0, -2.0, 3.0, 0.5]])
    total = sum(run({"type": "dare", "density": 0.5}, job_of(base, moved, seed=seed))[NAME] for seed in range(1000))
    torch.testing.assert_close(
        total / 1000, torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64), rtol=0.12, atol=0
    )


@pytest.mark.parametrize("name", ["dare", "della"])
def test_dropping_with_l1_keeps_the_tensors_l1_norm(name):
    job = job_of(BASE, MOVED[:1])
    found = run({"type": name, "density": 0.5, "rescale": "l1"}, job)
    for key, base in BASE.items():
        moved, merged = MOVED[0][key].double() - base.double(), found[key] - base.double().flatten()
        assert float(merged.abs().sum()) == pytest.approx(float(moved.abs().sum()), rel=1e-9)
        assert 0 < int(merged.count_nonzero()) < moved.numel()


def test_parents_get_different_masks():
    base, moved = one_tensor([[1.0] * 200, [1.0] * 200])
    found = run({"type": "dare", "density": 0.5}, job_of(base, moved))[NAME]
    assert set(found.tolist()) == {0.0, 1.0, 2.0}


def test_della_keeps_large_entries_more_often():
    method = merge_methods.build({"type": "della", "density": 0.5, "epsilon": 0.2})
    chance = method.chances(torch.tensor([[3.0, -1.0, 2.0, 1.0, -9.0, 4.0]], dtype=torch.float64), (2, 3))
    assert chance.flatten().tolist() == pytest.approx([0.7, 0.3, 0.5, 0.3, 0.7, 0.5])
    assert method.chances(torch.ones(1, 3, dtype=torch.float64), (3, 1)).tolist() == [[0.5, 0.5, 0.5]]


def test_breadcrumbs_drops_both_ends():
    base, moved = one_tensor([[1.0, -10.0, 3.0, 2.0, 5.0, 0.1, 4.0, -6.0, 7.0, 8.0]])
    found = run({"type": "breadcrumbs", "gamma": 0.2, "density": 0.5}, job_of(base, moved))[NAME]
    assert found.tolist() == [0, 0, 3, 0, 5, 0, 4, -6, 7, 0]


def test_a_small_gamma_drops_nothing_from_the_top():
    base, moved = one_tensor([[1.0, 2.0, 3.0]])
    assert run({"type": "breadcrumbs", "gamma": 0.01, "density": 0.9}, job_of(base, moved))[NAME].tolist() == [0, 2, 3]


def test_sce_against_its_definition():
    found = run({"type": "sce", "density": 0.4}, job_of(BASE, MOVED, granularity="tensor"))
    for name, base in BASE.items():
        v = deltas({name: base}, [{name: one[name]} for one in MOVED])
        variance = v.var(0, unbiased=False).float()
        least = variance.topk(max(1, int(0.4 * v.shape[1] + 1e-9))).values[-1]
        v = torch.where(variance >= least, v, 0.0)
        weight = v.square().mean(1, keepdim=True)
        agree = (v * v.sum(0).sign() > 0).double() * weight
        merged = (v * agree).sum(0) / agree.sum(0).clamp_min(1e-300)
        torch.testing.assert_close(found[name], base.double().flatten() + merged, rtol=1e-12, atol=1e-15)


def test_sce_weights_small_task_vectors_too():
    """Deltas of 1e-5: an absolute epsilon would make the weights uniform."""
    base, moved = one_tensor([[1e-5, 2e-5], [4e-5, 4e-5]])
    job = job_of(base, moved)
    run("sce", job)
    assert job.report["weights"]["model"] == pytest.approx([5 / 37, 32 / 37])


METHODS = [
    "average",
    "slerp",
    {"type": "ties", "density": 0.3, "rescale": "norm"},
    {"type": "dare", "then": "ties"},
    {"type": "dare", "rescale": "l1"},
    "breadcrumbs",
    {"type": "sce", "density": 0.5},
    "codiemb",
    {"type": "codiemb", "unit": "row"},
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_no_block_size_changes_a_bit(method, granularity):
    """Tensors larger than a block, blocks that do not divide them, all in one: the same float32 weights."""
    shapes = {"backbone.0.weight": (130, 250), "backbone.1.weight": (90, 200), "backbone.1.bias": (90,)}
    base, moved = random_family(3, shapes)
    results = []
    for block in (8192, 16384, 1 << 20):
        found = run(method, job_of(base, moved, granularity=granularity, block=block, seed=3))
        results.append({name: value.float() for name, value in found.items()})
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in shapes)


def test_della_does_not_know_the_blocks():
    shapes = {"backbone.0.weight": (130, 250)}
    base, moved = random_family(2, shapes)
    results = [run("della", job_of(base, moved, block=block)) for block in (1000, 8192, 1 << 20)]
    assert all(torch.equal(results[0]["backbone.0.weight"], other["backbone.0.weight"]) for other in results[1:])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_order_of_the_tensors_changes_nothing(method):
    forward = run(method, job_of(BASE, MOVED))
    turned = {name: BASE[name] for name in reversed(BASE)}, [{n: one[n] for n in reversed(one)} for one in MOVED]
    backward = run(method, job_of(*turned))
    assert all(torch.equal(forward[name].float(), backward[name].float()) for name in BASE)


def test_drawn_numbers_belong_to_their_element():
    whole = drawn(1, "x", 0, 3 * UNIT)
    assert torch.equal(drawn(1, "x", UNIT - 5, UNIT + 7), whole[UNIT - 5 : UNIT + 7])
    assert not torch.equal(drawn(2, "x", 0, 10), whole[:10])
    assert not torch.equal(drawn(1, "y", 0, 10), whole[:10])
    assert 0.49 < float(whole.mean()) < 0.51


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-30])
def test_streamed_selection_is_exact(scale, monkeypatch):
    monkeypatch.setattr(tensor_blocks, "_IN_MEMORY", 0)
    values = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)).abs() * scale
    values[0, 100:600] = values[0, 99]  # many equal values
    values[1, :1000] = 0
    ranks = [1, 2, 300, 2500, 4999, 5000, 0]
    found = nth_largest(lambda: values.split(700, dim=1), ranks, 5000)
    ordered = values.sort(dim=1, descending=True).values
    for column, rank in enumerate(ranks):
        wanted = torch.full((2,), torch.inf) if rank == 0 else ordered[:, rank - 1]
        assert torch.equal(found[:, column], wanted)


def test_running_sums_are_exact_in_any_order():
    draw = random.Random(0)
    values = [draw.choice((-1, 1)) * 10.0 ** draw.uniform(-30, 30) for _ in range(2000)]
    totals = set()
    for _ in range(3):
        draw.shuffle(values)
        sums = RowSums()
        for value in values:
            sums.add("x", torch.tensor([[value]], dtype=torch.float64), unit=1)
        totals |= set(sums["x"])
    assert totals == {math.fsum(values)}
    assert RowSums()["x"] == []


def test_row_sums_do_not_know_the_blocks():
    rows = torch.randn(2, 30000, generator=torch.Generator().manual_seed(0))
    found = []
    for size in (8192, 16384, 32768):
        sums = RowSums()
        for piece in rows.split(size, dim=1):
            sums.add("x", piece)
        found.append(sums["x"])
    assert found[0] == found[1] == found[2]
    assert found[0] == pytest.approx(rows.double().sum(1).tolist(), rel=1e-12)


def test_how_many_are_kept():
    assert [kept_count(d, 10) for d in (1.0, 0.29, 0.7, 0.01, 0.0)] == [10, 2, 7, 1, 0]


def naive_guided(v, layer, element, weights=None):
    """The reconstructed formula on one tensor, entry by entry."""
    weights = weights or [1.0] * len(v)
    s = v.square().mean(1).sqrt()
    floor = 1e-3 * s.mean()
    merged = torch.zeros(v.shape[1], dtype=torch.float64)
    for x in range(v.shape[1]):
        mean = v[:, x].abs().mean()
        raw = [
            a * float(s[i] / s.mean()) ** layer * float((v[i, x].abs() + floor) / (mean + floor)) ** element
            for i, a in enumerate(weights)
        ]
        merged[x] = sum(r / sum(raw) * v[i, x] for i, r in enumerate(raw))
    return merged


@pytest.mark.parametrize(("layer", "element"), [(0, 0), (1, 0), (0, 1), (1, 1), (-1, 0), (2, -0.5)])
def test_delta_guided_against_the_formula(layer, element):
    found = run({"type": "codiemb", "layer": layer, "element": element}, job_of(BASE, MOVED, weights=[1.0, 2.0, 0.5]))
    for name, base in BASE.items():
        v = deltas({name: base}, [{name: one[name]} for one in MOVED])
        wanted = base.double().flatten() + naive_guided(v, layer, element, [1.0, 2.0, 0.5])
        torch.testing.assert_close(found[name], wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("layer", "element"), [(1, 0), (1, 1), (-1, 0)])
def test_delta_guided_by_rows(layer, element):
    """Every row of a matrix is a unit of its own; a vector is one row."""
    method = {"type": "codiemb", "layer": layer, "element": element, "unit": "row"}
    found = run(method, job_of(BASE, MOVED))
    for name, base in BASE.items():
        v = deltas({name: base}, [{name: one[name]} for one in MOVED])
        rows = v.view(len(v), -1, base.shape[-1]).unbind(1)
        wanted = base.double().flatten() + torch.cat([naive_guided(row, layer, element) for row in rows])
        torch.testing.assert_close(found[name], wanted, rtol=1e-10, atol=1e-14)


def test_delta_guided_without_exponents_is_the_soup():
    soup, guided = (run(m, job_of(BASE, MOVED)) for m in ("average", {"type": "codiemb", "layer": 0, "element": 0}))
    torch.testing.assert_close(flat(guided), flat(soup), rtol=1e-14, atol=1e-15)


def test_a_parent_that_did_not_move_has_no_say():
    found = run({"type": "codiemb", "element": 0}, job_of(BASE, [MOVED[0], BASE]))
    torch.testing.assert_close(flat(found), flat(MOVED[0]), rtol=1e-12, atol=1e-15)


def test_identical_checkpoints_come_back():
    for element in (0, 1):
        found = run({"type": "codiemb", "element": element}, job_of(BASE, [MOVED[0]] * 3))
        torch.testing.assert_close(flat(found), flat(MOVED[0]), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("element", [0, 1])
@pytest.mark.parametrize("power", [1, 2])
def test_two_levels_are_the_method_twice(element, power):
    """Runs a (two checkpoints) and b (one): first within a, then across, with deviations measured anew."""
    method = {"type": "codiemb", "element": element, "power": power}
    within = run(method, job_of(BASE, MOVED[:2]))
    merged = {name: within[name].view(BASE[name].shape) for name in BASE}
    wanted = run(method, job_of(BASE, [merged, MOVED[2]]))
    found = run(method, job_of(BASE, MOVED, trajectories=["a", "a", "b"]))
    torch.testing.assert_close(flat(found), flat(wanted), rtol=1e-9, atol=1e-12)


def test_one_trajectory_is_one_level():
    one, none = (run("codiemb", job_of(BASE, MOVED, trajectories=runs)) for runs in (["a"] * 3, [None] * 3))
    torch.testing.assert_close(flat(one), flat(none), rtol=1e-12, atol=1e-15)


def test_softmax_and_inverse_weights_sum_to_one():
    for method in ({"weighting": "softmax"}, {"layer": -1.0}, {"unit": "block"}):
        job = job_of(BASE, [MOVED[0]] * 2 + [BASE])
        found = run({"type": "codiemb", "element": 0, **method}, job)
        v = deltas(BASE, [MOVED[0]])[0]
        share = (flat(found) - flat(BASE)) / v
        assert float(share.min()) >= 0
        assert float(share.max()) <= 1 + 1e-6
