"""Data methods as recipe values: from folders and files to the blocks of a merge."""

import shutil

import pytest
import torch

from embedsmith.calibrate.live_model import LiveMerge
from embedsmith.calibrate.probe import Probe, TaskBatches
from embedsmith.calibrate.search import LMCocktail
from embedsmith.core.errors import CheckpointError, RecipeError
from embedsmith.core.recipe import parse
from embedsmith.core.shelf import merge_methods
from embedsmith.data import Source
from embedsmith.merge import MergeRecipe, merge
from embedsmith.merge.folders import open_folder
from embedsmith.merge.method import Job
from embedsmith.models import load
from tests.calibrate.test_self_positioning import SOURCES
from tests.merge.family import family, job, merged, probe, retrieval_records, sts_records
from tests.merge.memory import float_names
from tests.merge.models import rewrite

METHODS = {
    "fisher": {"expectation": "empirical"},
    "fisher-embedding": {"definition": "embedding"},
    "regmean": {},
    "self_positioning": {"steps": 2, "check_every": 1, "batch_size": 4, "held_out": 0.5},
    "lm_cocktail": {"batch_size": 4},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_data_method_runs_from_a_recipe(folders, name):
    kind = name.split("-")[0]
    method = merge_methods.build({"type": kind, "probe": probe(folders, "pairs", "graded"), **METHODS[name]})
    for base in (True, False) if method.base == "optional" else (True,):
        one = job(folders, base)
        result = merged(one, method.prepare(one))
        assert result.keys() == set(one.names)
        for tensor in result.values():
            assert tensor.isfinite().all()
        name_ = "backbone.encoder.layer.0.output.dense.weight"
        both = torch.stack([parent.tensor(name_).reshape(-1).double() for parent in one.parents])
        assert not torch.allclose(result[name_], both[0], atol=1e-6)
        assert not torch.allclose(result[name_], both[1], atol=1e-6)


def test_a_probe_is_read_at_its_length_and_the_merge_keeps_its_own(folders, tmp_path):
    one, cut = job(folders), {**probe(folders, "pairs", "graded"), "max_length": 5}
    live = merge_methods.build({"type": "self_positioning", "probe": cut}).live(one)
    batches = TaskBatches.whole(live, Probe(**sources_of(cut)).sources, [retrieval_records(), sts_records()], 4, 0)
    longest = max(int(tokens.length_N.max()) for tokens, _ in batches.at(0))
    assert longest == 5 < LiveMerge.of(one.parents, one.base).model.settings.max_length
    with pytest.raises(RecipeError, match=r"max_length of method\.probe"):
        tree = {"type": "search", "goal": {"tasks": ["x"]}, "probe": cut}
        parse(MergeRecipe, {"parents": ["a"], "output": "b", "method": tree})
    parents = [str(folders / f"parent-{place}") for place in range(2)]
    method = {"type": "lm_cocktail", "probe": cut}
    made = merge(parents=parents, method=method, output=str(tmp_path / "out"), cache=None, unrelated=True)
    assert load(str(made.path)).settings.max_length == load(parents[0]).settings.max_length


def sources_of(tree):
    return {"sources": tuple(Source(**one) for one in tree["sources"])}


def test_methods_whose_weights_sum_to_one_need_no_base(folders):
    """The weights come out the same with theta_0 and without."""
    method = merge_methods.build({"type": "fisher", "definition": "batch_square", "probe": probe(folders, "pairs")})
    with_base, without = (merged(j := job(folders, base), method.prepare(j)) for base in (True, False))
    for name, tensor in with_base.items():
        torch.testing.assert_close(tensor, without[name], rtol=1e-4, atol=1e-6)


def test_equal_parents_come_out_as_they_are(folders):
    parent = open_folder(folders / "parent-0", "p")
    one = Job((parent, parent), open_folder(folders / "base", "base"), float_names([parent]), torch.ones(2).double())
    method = merge_methods.build({"type": "fisher", "definition": "embedding", "probe": probe(folders, "pairs")})
    for name, tensor in merged(one, method.prepare(one)).items():
        torch.testing.assert_close(tensor.float(), parent.tensor(name).reshape(-1), rtol=1e-6, atol=1e-7)


def test_a_live_merge_is_the_parents_and_the_base(folders):
    one = job(folders)
    live = LiveMerge.of(one.parents, one.base)
    texts = ["the cat sat", "a dog"]
    for place in range(2):
        live.place_parent(place)
        expected = load(str(folders / f"parent-{place}")).encode(texts)
        torch.testing.assert_close(
            live.represent(texts, role="document")["dense"].vector_ND.numpy(), expected, rtol=1e-5, atol=1e-5
        )
    live.place(torch.zeros(2))
    assert torch.allclose(
        live.represent(texts, role="document")["dense"].vector_ND,
        torch.from_numpy(load(str(folders / "base")).encode(texts)),
        atol=1e-5,
    )
    torch.testing.assert_close(live.gram()[0], one.gram.of(one.names), rtol=1e-6, atol=1e-9)


def test_cocktail_weights_are_the_softmax_of_losses(tmp_path):
    live = family(tmp_path)
    losses = TaskBatches.whole(live, SOURCES, [retrieval_records(), sts_records()], 6, 0).parent_losses()
    weight_M = LMCocktail.weights(losses, 2.0)
    values = torch.tensor(losses).double().div(-2).exp()
    torch.testing.assert_close(weight_M, values / values.sum())
    assert float(weight_M.sum()) == pytest.approx(1.0, abs=1e-15)
    assert weight_M.argmax() == torch.tensor(losses).argmin()
    assert LMCocktail.weights([1.0, 2.0], 1.0)[0] > LMCocktail.weights([1.0, 2.0], 5.0)[0]


def test_a_parent_with_nan_is_named_before_anything_is_measured(folders, tmp_path):
    bad = shutil.copytree(folders / "parent-0", tmp_path / "bad")
    rewrite(bad, {"embeddings.word_embeddings.weight": torch.full((72, 16), float("nan"))})
    with pytest.raises(CheckpointError, match=r"sick: the weight .* holds NaN"):
        LiveMerge.of([open_folder(folders / "parent-0", "well"), open_folder(tmp_path / "bad", "sick")])


def test_a_probe_is_a_fixed_sample(folders):
    def read(examples, seed):
        source = Source(path=str(folders / "pairs.jsonl"))
        return Probe(sources=(source,), examples=examples, seed=seed).read()[0].records

    assert read(5, 0) == read(5, 0)
    assert read(5, 0) != read(5, 1)
    assert len(read(5, 0)) == 5
    assert len(read(50, 0)) == 20
