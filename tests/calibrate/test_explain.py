"""Diagnostics against what they are defined as: plain loops over the weights, known clouds, exact laws."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch

from embedsmith.calibrate.explain import explain, map_of, sign_counts, sign_mass
from embedsmith.calibrate.explain_planes import (
    Probes,
    barriers,
    gradient_conflict,
    loss_plane,
    plane_axes,
    project,
)
from embedsmith.calibrate.explain_report import explain_recipe
from embedsmith.calibrate.growth import fit_directions, fit_norms, growth_of, growth_sections
from embedsmith.calibrate.live import Probe
from embedsmith.core.errors import RecipeError
from embedsmith.data import Source
from embedsmith.merge.folders import expand
from embedsmith.merge.methods.coefficient import Average
from embedsmith.merge.plan import make_plan
from embedsmith.merge.recipe import MergeRecipe, ParentSpec
from tests.merge.family import family, retrieval_records, sts_records

SOURCES = (Source(path="pairs", task="retrieval"), Source(path="graded", task="sts"))


def recipe(folders, **changes):
    settings = {
        "parents": tuple(ParentSpec(str(folders / f"parent-{place}"), weight=w) for place, w in enumerate((1.0, 3.0))),
        "base": str(folders / "base"),
        "output": "unused",
        "method": Average(),
        "cache": None,
        "unrelated": True,
    }
    return MergeRecipe(**settings | changes)


@pytest.fixture
def vectors(folders):
    """Task vectors and the merge, flat, by a plain loop over the files."""
    plan = make_plan(recipe(folders))
    names = [name for _, own in plan.by_method for name in own]
    flat = [torch.cat([m.tensor(n).double().flatten() for n in names]) for m in (*plan.parents, plan.base)]
    deltas = [tensor - flat[-1] for tensor in flat[:-1]]
    return deltas, 0.25 * deltas[0] + 0.75 * deltas[1], flat[-1]


def test_a_row_says_what_a_loop_over_the_weights_says(folders, vectors):
    facts = explain(make_plan(recipe(folders)))
    (one, two), merged, base = vectors
    (row,) = facts.group_rows("model")
    assert row["norm/parent-0"] == pytest.approx(float(one.norm()), rel=1e-6)
    assert row["relative/parent-1"] == pytest.approx(float(two.norm() / base.norm()), rel=1e-6)
    cosine = float(one @ two / one.norm() / two.norm())
    assert row["angle/parent-0|parent-1"] == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-5)
    assert row["missing/parent-0"] == pytest.approx(1 - float(merged @ one / (one @ one)), abs=1e-6)
    both = (one != 0) & (two != 0)
    conflict = float(((one * two < 0) & both).sum() / both.sum())
    assert row["conflict_0/parent-0|parent-1"] == pytest.approx(conflict)
    assert row["conflict_excess/parent-0|parent-1"] == pytest.approx(conflict - math.acos(cosine) / math.pi, abs=1e-6)
    assert facts.outside_span() == pytest.approx(0.0, abs=1e-3)


def test_energy_of_blocks_sums_to_one(folders):
    facts = explain(make_plan(recipe(folders)))
    for granularity in ("block", "module", "tensor"):
        rows = facts.group_rows(granularity)
        assert sum(row["energy/parent-0"] for row in rows) == pytest.approx(1.0)
        assert sum(row["weights"] for row in rows) == facts.group_rows("model")[0]["weights"]


def test_sign_conflicts_by_hand():
    delta = torch.tensor([[1.0, -2.0, 0.0, 3.0], [-1.0, -1.0, 5.0, 4.0]], dtype=torch.float64)
    counts = sign_counts(delta, torch.tensor([2.0, 2.0], dtype=torch.float64))[:, 0, 1]
    assert counts.tolist() == [[3.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    assert sign_mass(delta)[0, 1].tolist() == [1 + 1 + 3, 1]


def test_the_map_keeps_distances_of_points_in_a_plane():
    points = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    placed = torch.tensor(map_of(points @ points.T), dtype=torch.float64)
    torch.testing.assert_close(torch.cdist(placed, placed), torch.cdist(points, points))


def test_the_merge_lies_on_the_map_where_its_coefficients_put_it(folders):
    places = explain(make_plan(recipe(folders))).positions()
    assert places["this merge"] == pytest.approx(places["average"], abs=1e-3)


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


def test_growth_from_runs_that_say_what_they_saw():
    """Lengths of runs on one task; angles of joint runs to the longest run of each of their tasks."""
    vectors = torch.tensor([[2.0, 0, 0], [4, 0, 0], [0, 3, 0], [1, 1, 0], [3, 1, 0], [1, 3, 0]], dtype=torch.float64)
    examples = [{"a": 100}, {"a": 400}, {"b": 300}, {"a": 50, "b": 50}, {"a": 90, "b": 30}, None]
    growth = growth_of(vectors @ vectors.T, examples)
    assert growth.lengths == {"a": [(100, 2.0), (400, 4.0)], "b": [(300, 3.0)]}
    near = [(1.0, pytest.approx(45.0)), (3.0, pytest.approx(math.degrees(math.atan(1 / 3))))]
    assert growth.directions["a"] == near
    assert growth.directions["b"][0] == (1.0, pytest.approx(45.0))
    fits = growth.length_fits()
    assert set(fits) == {"a"}
    assert fits["a"][0].at(1600) == pytest.approx(8.0)
    assert growth.direction_fits()["a"].slope < 0 < growth.direction_fits()["b"].slope * -1
    lengths, directions = growth_sections(growth)
    assert "|V| = c n^p" in lengths.body
    assert "R^2" in directions.body
    with pytest.raises(RecipeError, match="above 0"):
        growth_of(vectors @ vectors.T, [{"a": 0.0}])


def test_examples_of_a_pattern_are_those_of_a_step(folders, tmp_path):
    for steps in (10, 200):
        shutil.copytree(folders / "parent-0", tmp_path / "run" / f"step-{steps}" / "model")
    spec = ParentSpec(path=str(tmp_path / "run" / "step-*" / "model"), examples={"a": 32})
    assert [found.examples for found in expand(spec)] == [{"a": 320}, {"a": 6400}]


def test_axes_of_a_plane_are_orthogonal_and_of_one_length():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    gram = vectors @ vectors.T
    axes = plane_axes(gram, 0, 1)
    inner = axes.T @ gram @ axes
    torch.testing.assert_close(inner, gram[0, 0] * torch.eye(2, dtype=torch.float64))
    place = project(torch.tensor([0.3, -0.7, 0.0], dtype=torch.float64), axes, gram)
    torch.testing.assert_close(
        place[0] * axes[:, 0] + place[1] * axes[:, 1], torch.tensor([0.3, -0.7, 0.0], dtype=torch.float64)
    )


def probes(live):
    return Probes.of(live, SOURCES, [retrieval_records(), sts_records()], 6)


def test_a_plane_has_each_task_s_loss_at_its_points(tmp_path):
    live = family(tmp_path, parents=2)
    own = probes(live)
    plane = loss_plane(own, 0, 1, {}, steps=3, margin=0.0)
    corner = (
        plane.u[2] * plane_axes(live.gram().sum(0), 0, 1)[:, 0]
        + plane.v[0] * plane_axes(live.gram().sum(0), 0, 1)[:, 1]
    )
    expected = own.losses(corner)
    assert [rows[0][2] for rows in plane.losses] == pytest.approx(expected)
    assert plane.marks["parent-0"] == pytest.approx((1.0, 0.0))
    assert plane.marks["base"] == pytest.approx((0.0, 0.0))


def test_a_barrier_is_nothing_where_the_merge_is_the_parent(tmp_path):
    live = family(tmp_path, parents=2)
    at_parent = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    rows = barriers(probes(live), at_parent, points=3)
    assert [row["barrier"] for row in rows if row["parent"] == "parent-0"] == pytest.approx([0.0, 0.0], abs=1e-9)


def test_gradients_of_one_task_twice_agree(tmp_path):
    live = family(tmp_path, parents=2)
    twice = Probes.of(live, (SOURCES[0], SOURCES[1]), [sts_records(6), sts_records(6)], 6)
    rows = gradient_conflict(twice, torch.zeros(1, 2, dtype=torch.float64))
    assert rows[0][1] == pytest.approx(1.0, abs=1e-6)
    other = gradient_conflict(probes(live), torch.zeros(1, 2, dtype=torch.float64))
    assert abs(other[0][1]) < 0.99
    assert all(p.grad is None for p in live.model.parameters())


def test_a_report_is_three_files(folders, tmp_path):
    names = ("pairs", "graded")
    probe = Probe(sources=tuple(Source(path=str(folders / f"{name}.jsonl")) for name in names), negatives=2)
    explanation = explain_recipe(recipe(folders), probe, sizes=[100, 200])
    page = explanation.save(tmp_path)
    found = json.loads((tmp_path / "explain.json").read_text())
    assert set(found["missing"]) == {"parent-0", "parent-1"}
    assert len(found["plane"]["losses"]) == 2
    assert len(found["growth"]["length_fits"]["examples"]) == 2
    rows = list(csv.DictReader((tmp_path / "groups.csv").open()))
    assert {row["granularity"] for row in rows} == {"model", "block", "module", "tensor"}
    assert page.read_text().count('class="chart"') > 5


def test_without_a_base_there_is_nothing_to_explain(folders):
    with pytest.raises(RecipeError, match="base"):
        explain_recipe(recipe(folders, base=None))
