"""Diagnostics against what they are defined as: plain loops over the weights, known clouds, exact laws."""

import csv
import json
import math

import pytest
import torch
from typer.testing import CliRunner

from embedsmith.calibrate.explain import Explanation, Facts, map_of, sign_counts, sign_mass
from embedsmith.calibrate.probe import Probe, TaskBatches
from embedsmith.cli import app
from embedsmith.core.errors import CheckpointError, RecipeError
from embedsmith.data import Source
from embedsmith.merge.merge_plan import make_plan
from embedsmith.merge.methods.coefficient import Average
from embedsmith.merge.recipe import MergeRecipe, ParentSpec
from tests.claims import watch_claims
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
    facts = Facts.of(make_plan(recipe(folders)))
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
    facts = Facts.of(make_plan(recipe(folders)))
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
    places = Facts.of(make_plan(recipe(folders))).positions()
    assert places["this merge"] == pytest.approx(places["average"], abs=1e-3)


def batches(live):
    return TaskBatches.whole(live, SOURCES, [retrieval_records(), sts_records()], 6, 0)


def test_losses_along_the_length_are_those_of_its_multiples(tmp_path):
    live = family(tmp_path, parents=2)
    merge_GM = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    rows = batches(live).along_length(merge_GM, (0.0, 0.7))
    assert list(rows[1].values()) == pytest.approx([0.7, *batches(live).losses_at(0.7 * merge_GM)])
    assert rows[0] != rows[1]


def test_a_barrier_is_nothing_where_the_merge_is_the_parent(tmp_path):
    live = family(tmp_path, parents=2)
    at_parent = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    rows = batches(live).barriers(at_parent, points=3)
    assert [row["barrier"] for row in rows if row["parent"] == "parent-0"] == pytest.approx([0.0, 0.0], abs=1e-9)


def test_a_barrier_is_the_highest_rise_above_the_line(tmp_path):
    live = family(tmp_path, parents=2)
    merge_GM = torch.tensor([[0.2, 1.5]], dtype=torch.float64)
    rows = batches(live).barriers(merge_GM, points=4)
    for parent in range(2):
        start_GM = torch.eye(2, dtype=torch.float64)[[parent]]
        shares = [0, 1 / 3, 2 / 3, 1]
        losses = [batches(live).losses_at((1 - s) * start_GM + s * merge_GM) for s in shares]
        for task in range(2):
            line = [(1 - s) * losses[0][task] + s * losses[-1][task] for s in shares]
            rise = max(point[task] - low for point, low in zip(losses, line))
            assert rows[2 * parent + task]["barrier"] == pytest.approx(rise, abs=1e-6)


def test_gradients_of_one_task_twice_agree(tmp_path):
    live = family(tmp_path, parents=2)
    twice = TaskBatches.whole(live, (SOURCES[0], SOURCES[1]), [sts_records(6), sts_records(6)], 6, 0)
    rows = twice.gradient_cosines(torch.zeros(1, 2, dtype=torch.float64))
    assert rows[0][1] == pytest.approx(1.0, abs=1e-6)
    other = batches(live).gradient_cosines(torch.zeros(1, 2, dtype=torch.float64))
    assert abs(other[0][1]) < 0.99
    assert all(p.grad is None for p in live.model.parameters())


def test_a_report_is_three_files(folders, tmp_path):
    names = ("pairs", "graded")
    probe = Probe(sources=tuple(Source(path=str(folders / f"{name}.jsonl")) for name in names), negatives=2)
    explanation = Explanation.of(recipe(folders), probe)
    page = explanation.save(tmp_path)
    found = json.loads((tmp_path / "explain.json").read_text())
    assert set(found["missing"]) == {"parent-0", "parent-1"}
    assert [set(row) for row in found["along_length"]] == [{"length", "pairs", "graded"}] * 9
    assert len(found["barriers"]) == 4
    rows = list(csv.DictReader((tmp_path / "groups.csv").open()))
    assert {row["granularity"] for row in rows} == {"model", "block", "module", "tensor"}
    assert page.read_text().count('class="chart"') > 5


def test_the_verb_explains_into_a_folder_that_it_holds(folders, tmp_path, monkeypatch):
    parents = [{"path": str(folders / f"parent-{place}")} for place in range(2)]
    tree = {"parents": parents, "base": str(folders / "base"), "output": str(tmp_path / "merged"), "unrelated": True}
    (tmp_path / "merge.yaml").write_text(json.dumps(tree | {"method": {"type": "average"}}), encoding="utf-8")
    claims = watch_claims(monkeypatch, Explanation, tmp_path / "why", "save")
    words = ["merge", str(tmp_path / "merge.yaml"), "--explain", str(tmp_path / "why")]
    words += ["--probe", str(folders / "pairs.jsonl"), "--probe", str(folders / "graded.jsonl")]
    said = CliRunner().invoke(app, words, catch_exceptions=False).output
    assert claims == [True]
    assert f"report: {tmp_path / 'why' / 'explain.html'}" in said.replace("\n", "")
    assert set(json.loads((tmp_path / "why" / "explain.json").read_text())["missing"]) == {"parent-0", "parent-1"}
    assert not (tmp_path / "merged").exists()
    (tmp_path / "why" / "explain.json").write_text("mine")
    with pytest.raises(CheckpointError, match=r"explain\.json"):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_without_a_base_there_is_nothing_to_explain(folders):
    with pytest.raises(RecipeError, match="base"):
        Explanation.of(recipe(folders, base=None))
