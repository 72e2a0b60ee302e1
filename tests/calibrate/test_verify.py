"""Verification: a parent passes against itself, ruined models fail the row that speaks of their ruin."""

import json

import pytest
import torch
from typer.testing import CliRunner

from embedsmith.calibrate.likeness import Sample, encode_sample, neighbour_overlap, portrait, prefix_overlap
from embedsmith.calibrate.live import Probe, open_live
from embedsmith.calibrate.verify import VerifyConfig, strict_check, verify, verify_recipe
from embedsmith.cli import app
from embedsmith.core.errors import CheckpointError, RecipeError
from embedsmith.data import Source
from embedsmith.merge.folders import open_folder
from embedsmith.merge.methods.coefficient import Average
from embedsmith.merge.recipe import MergeRecipe, ParentSpec
from embedsmith.merge.run import merge
from embedsmith.models import load
from tests.merge.family import retrieval_records


@pytest.fixture
def live(folders):
    parents = [open_folder(folders / f"parent-{place}", f"p{place}") for place in range(2)]
    return open_live(parents, open_folder(folders / "base", "base"))


def config(folders, **changes):
    return VerifyConfig(probe=Probe(sources=(Source(path=str(folders / "pairs.jsonl")),)), dims=(4, 8, 512), **changes)


def run(model, live, folders):
    return verify(model, live, [retrieval_records(20)] * 2, config(folders))


def test_a_parent_passes_and_its_likeness_to_itself_is_whole(folders, live):
    found = run(load(str(folders / "parent-0")), live, folders)
    rows = {check.name: check for check in found.checks}
    assert found.passed, found.failed()
    assert rows["CKA with the closest parent"].parents["p0"] == pytest.approx(1.0, abs=1e-4)
    assert rows["neighbours in common with the closest parent"].parents["p0"] == pytest.approx(1.0)
    assert rows["CKA with the closest parent"].parents["p1"] < 0.9999
    assert rows["difference after saving and loading"].value < 1e-6
    assert "neighbours kept by 8 coordinates" in rows
    assert "neighbours kept by 512 coordinates" not in rows


def ruined(folders, change):
    model = load(str(folders / "parent-0"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change(name, parameter)
    return model


def test_a_model_that_maps_all_texts_to_one_vector_fails(folders, live):
    def collapse(name, parameter):
        if name.endswith("layer.1.output.LayerNorm.weight"):
            parameter.mul_(1e-3)
        if name.endswith("layer.1.output.LayerNorm.bias"):
            parameter.fill_(1.0)

    found = run(ruined(folders, collapse), live, folders)
    rows = {check.name: check for check in found.checks}
    assert "uniformity" in found.failed()
    assert rows["uniformity"].value > -1e-3
    assert rows["anisotropy (mean cosine)"].value > 0.999


def test_an_unrelated_model_fails_on_neighbours(folders, live):
    def scramble(name, parameter):
        generator = torch.Generator().manual_seed(len(name))
        parameter.copy_(torch.randn(parameter.shape, generator=generator))

    strict = config(folders, overlap=0.7, cka=0.9)
    found = verify(ruined(folders, scramble), live, [retrieval_records(20)] * 2, strict)
    assert {"CKA with the closest parent", "neighbours in common with the closest parent"} <= set(found.failed())


def test_nan_is_the_only_row(folders, live):
    def poison(name, parameter):
        if name.endswith("word_embeddings.weight"):
            parameter.fill_(float("nan"))

    found = run(ruined(folders, poison), live, folders)
    assert found.failed() == ["vectors that are not finite"]
    assert found.as_dict()["checks"][0]["value"] > 0


def test_a_failing_merge_is_not_written(folders, tmp_path):
    recipe = MergeRecipe(
        parents=tuple(ParentSpec(str(folders / f"parent-{place}")) for place in range(2)),
        base=str(folders / "base"),
        output=str(tmp_path / "out"),
        method=Average(),
        cache=None,
        unrelated=True,
    )
    with pytest.raises(CheckpointError, match="checks"):
        merge(recipe, check=strict_check(recipe, config(folders, cka=1.0)))
    assert not (tmp_path / "out").exists()
    merge(recipe, check=strict_check(recipe, config(folders, slack=2.0)))
    assert json.loads((tmp_path / "out" / "verify.json").read_text())["passed"]
    assert verify_recipe(recipe, config(folders, slack=2.0)).passed


def test_a_recipe_sets_the_bounds_on_the_command_line(folders, tmp_path):
    parents = "".join(f"  - {folders / f'parent-{place}'}\n" for place in range(2))
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(
        f"parents:\n{parents}base: {folders / 'base'}\nmethod: average\noutput: {tmp_path / 'out'}\n"
        "cache: null\nunrelated: true\nverify: {slack: 2.0, dims: [4]}\n"
    )
    call = ["merge", str(recipe), "--strict", "--probe", str(folders / "pairs.jsonl")]
    refused = CliRunner().invoke(app, [*call, "verify.cka=1.0"])
    assert isinstance(refused.exception, CheckpointError)
    assert "CKA" in str(refused.exception)
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert "neighbours kept by 4 coordinates" in (tmp_path / "out" / "verify.json").read_text()
    wrong = CliRunner().invoke(app, [*call, "verify.overlap=7"])
    assert isinstance(wrong.exception, RecipeError)


def test_figures_of_known_clouds():
    """Orthogonal vectors: cosine 0, uniformity -4, full rank; copies of one: cosine 1, uniformity 0."""

    def cloud(vector_ND):
        count = len(vector_ND)
        none = torch.zeros(0)
        return Sample(vector_ND, torch.arange(1, count + 1).float(), torch.ones(count), none, none.long(), none.long())

    apart, same = portrait(cloud(torch.eye(4))), portrait(cloud(torch.ones(4, 4) / 2))
    assert apart["anisotropy (mean cosine)"] == pytest.approx(0.0)
    assert apart["uniformity"] == pytest.approx(-4.0)
    assert apart["effective rank"] == pytest.approx(3.0)
    assert same["anisotropy (mean cosine)"] == pytest.approx(1.0)
    assert same["uniformity"] == pytest.approx(0.0)
    assert same["effective rank"] == 0.0


def test_the_margin_is_the_answers_lead(folders):
    model = load(str(folders / "base"))
    records = retrieval_records(5)
    sample = encode_sample(model, records)
    queries = torch.from_numpy(model.encode([r.query for r in records.records], role="query"))
    answers = torch.from_numpy(model.encode([r.positives[0] for r in records.records], role="document"))
    scores = queries @ answers.T
    others = (scores.sum() - scores.trace()) / 20
    assert portrait(sample)["margin of answers"] == pytest.approx(float(scores.trace() / 5 - others), abs=1e-5)
    assert portrait(sample)["alignment"] == pytest.approx(float((2 - 2 * scores.diagonal()).mean()), abs=1e-5)


def test_neighbours():
    left = torch.nn.functional.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert neighbour_overlap(left, left, 10) == 1.0
    assert neighbour_overlap(left, -left, 5) == 1.0
    other = torch.nn.functional.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    assert neighbour_overlap(left, other, 5) < 0.5
    assert prefix_overlap(left, 8, 5) == 1.0
    assert prefix_overlap(left, 2, 5) < 1.0


def test_a_text_is_no_neighbour_of_itself():
    """Two models that pair four texts differently have no nearest neighbour in common."""
    left = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    assert neighbour_overlap(left, left[[0, 2, 1, 3]], 1) == 0.0
