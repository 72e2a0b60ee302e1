"""Verification: a parent passes against itself, ruined models fail the row that speaks of their ruin."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from embedsmith.calibrate.live_model import LiveMerge
from embedsmith.calibrate.verify import EncodedSample, merge_verified, verify
from embedsmith.cli import app
from embedsmith.core.errors import CheckpointError, RecipeError
from embedsmith.merge.folders import open_folder
from embedsmith.merge.methods.coefficient import Average
from embedsmith.merge.recipe import Bounds, MergeRecipe, ParentSpec
from embedsmith.models import load
from tests.merge.family import retrieval_records


@pytest.fixture
def live(folders):
    parents = [open_folder(folders / f"parent-{place}", f"p{place}") for place in range(2)]
    return LiveMerge.of(parents, open_folder(folders / "base", "base"))


def bounds(**changes):
    return Bounds(dims=(4, 8, 512), **changes)


def run(model, live):
    return verify(model, live, [retrieval_records(20)] * 2, bounds())


def failed(found):
    return [check.name for check in found.failed]


def test_a_parent_passes_and_its_likeness_to_itself_is_whole(folders, live):
    found = run(load(str(folders / "parent-0")), live)
    rows = {check.name: check for check in found.checks}
    assert not found.failed
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

    found = run(ruined(folders, collapse), live)
    rows = {check.name: check for check in found.checks}
    assert "uniformity" in failed(found)
    assert rows["uniformity"].value > -1e-3
    assert rows["anisotropy (mean cosine)"].value > 0.999


def test_an_unrelated_model_fails_on_neighbours(folders, live):
    def scramble(name, parameter):
        generator = torch.Generator().manual_seed(len(name))
        parameter.copy_(torch.randn(parameter.shape, generator=generator))

    strict = bounds(overlap=0.7, cka=0.9)
    found = verify(ruined(folders, scramble), live, [retrieval_records(20)] * 2, strict)
    assert {"CKA with the closest parent", "neighbours in common with the closest parent"} <= set(failed(found))


def test_nan_is_the_only_row(folders, live):
    def poison(name, parameter):
        if name.endswith("word_embeddings.weight"):
            parameter.fill_(float("nan"))

    found = run(ruined(folders, poison), live)
    assert failed(found) == ["vectors that are not finite"]
    assert found.checks[0].as_dict()["value"] > 0


def test_a_failing_merge_is_not_written(folders, tmp_path):
    recipe = MergeRecipe(
        parents=tuple(ParentSpec(str(folders / f"parent-{place}")) for place in range(2)),
        base=str(folders / "base"),
        output=str(tmp_path / "out"),
        method=Average(),
        cache=None,
        unrelated=True,
        verify=bounds(cka=1.0),
    )
    files = [str(folders / "pairs.jsonl")]
    with pytest.raises(CheckpointError, match="checks"):
        merge_verified(recipe, files, strict=True, overwrite=False)
    assert not (tmp_path / "out").exists()
    merge_verified(replace(recipe, verify=bounds(slack=2.0)), files, strict=True, overwrite=False)
    assert json.loads((tmp_path / "out" / "verify.json").read_text())["passed"]
    merge_verified(recipe, files, strict=False, overwrite=True)
    assert not json.loads((tmp_path / "out" / "verify.json").read_text())["passed"]


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
        return EncodedSample(vector_ND, None, [3] * len(vector_ND), [], [])

    apart, same = cloud(np.eye(4)).figures(), cloud(np.ones((4, 4)) / 2).figures()
    assert apart["anisotropy (mean cosine)"] == pytest.approx(0.0)
    assert apart["uniformity"] == pytest.approx(-4.0)
    assert apart["effective rank"] == pytest.approx(4.0)
    assert same["anisotropy (mean cosine)"] == pytest.approx(1.0)
    assert same["uniformity"] == pytest.approx(0.0, abs=1e-12)
    assert same["effective rank"] == pytest.approx(1.0)
    assert "length sensitivity" not in same


def test_the_margin_is_the_answers_lead(folders):
    model = load(str(folders / "base"))
    records = retrieval_records(5)
    figures = EncodedSample.of(model, records).figures()
    queries = torch.from_numpy(model.encode([r.query for r in records.records], role="query"))
    answers = torch.from_numpy(model.encode([r.positives[0] for r in records.records], role="document"))
    scores = queries @ answers.T
    model.settings = replace(model.settings, normalize=False)
    texts = {"query": [r.query for r in records.records], "document": [t for r in records.records for t in r.positives]}
    whole = {role: model.encode(list(dict.fromkeys(each)), role=role) for role, each in texts.items()}
    others = (scores.sum() - scores.trace()) / 20
    assert figures["margin of answers"] == pytest.approx(float(scores.trace() / 5 - others), abs=1e-5)
    lengths = [np.linalg.norm(row) for side in ("query", "document") for row in whole[side]]
    assert figures["length before normalising"] == pytest.approx(np.mean(lengths), rel=1e-5)
    assert figures["alignment"] == pytest.approx(float((2 - 2 * scores.diagonal()).mean()), abs=1e-5)
