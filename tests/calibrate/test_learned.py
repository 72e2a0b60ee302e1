"""Data methods as recipe values: from folders and files to the blocks of a merge."""

import numpy as np
import pytest
import torch

from embedsmith.calibrate.cocktail import CocktailConfig, cocktail_weights, softmin
from embedsmith.calibrate.live import open_live, sample
from embedsmith.calibrate.matching import MatchBatches, linear_cka
from embedsmith.calibrate.positioning import PositioningConfig, ProbeBatches, position_step, self_position
from embedsmith.core.errors import CheckpointError
from embedsmith.core.reps import Dense
from embedsmith.core.shelf import merge_methods
from embedsmith.merge.folders import open_folder
from embedsmith.merge.method import Job
from embedsmith.merge.parents import float_names
from embedsmith.models import load
from tests.calibrate.test_positioning import SOURCES, position
from tests.merge.family import family, job, merged, probe, retrieval_records, sts_records

METHODS = {
    "fisher": {"expectation": "empirical"},
    "fisher-embedding": {"definition": "embedding"},
    "regmean": {},
    "regmean-plus": {"sequential": True},
    "self_positioning": {"steps": 2, "check_every": 1, "batch_size": 4, "held_out": 0.5},
    "parent_matching": {"steps": 2, "check_every": 1, "batch_size": 4, "held_out": 0.5},
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


def test_methods_whose_weights_sum_to_one_need_no_base(folders):
    """The weights come out the same with theta_0 and without."""
    method = merge_methods.build({"type": "fisher", "definition": "shared", "probe": probe(folders, "pairs")})
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
    live = open_live(one.parents, one.base)
    texts = ["the cat sat", "a dog"]
    for place in range(2):
        live.place_parent(place)
        expected = load(str(folders / f"parent-{place}")).encode(texts)
        torch.testing.assert_close(
            live.represent(texts, role="document")["dense"].vector_ND.numpy(), expected, rtol=1e-5, atol=1e-5
        )
    live.place_base()
    assert torch.allclose(
        live.represent(texts, role="document")["dense"].vector_ND,
        torch.from_numpy(load(str(folders / "base")).encode(texts)),
        atol=1e-5,
    )
    torch.testing.assert_close(live.gram()[0], one.gram.of(one.names), rtol=1e-6, atol=1e-9)


def test_cocktail_weights_are_the_softmax_of_losses(tmp_path):
    live = family(tmp_path)
    batches = ProbeBatches.whole(live, SOURCES, [retrieval_records(), sts_records()], 6, 0)
    found = cocktail_weights(live, batches, CocktailConfig(temperature=2.0, batch_size=6))
    values = torch.tensor(found.losses).double().div(-2).exp()
    torch.testing.assert_close(found.weight_M, values / values.sum())
    assert float(found.weight_M.sum()) == pytest.approx(1.0, abs=1e-15)
    assert found.weight_M.argmax() == torch.tensor(found.losses).argmin()
    assert softmin([1.0, 2.0], 1.0)[0] > softmin([1.0, 2.0], 5.0)[0]


@pytest.mark.parametrize("objective", ["similarity", "cka"])
def test_the_gradient_of_matching_is_autograds(tmp_path, objective):
    """The same descent with a teacher's vectors beside the texts."""
    live = family(tmp_path)
    config = PositioningConfig(batch_size=6)
    found = MatchBatches.match(live, [retrieval_records(), sts_records(), retrieval_records(seed=5)], config, objective)
    where = position(live, config)
    parts = found.at(1)
    position_step(live, parts, found, where, live.gram(), config)
    theta = {
        n: b + sum(where.coefficients(live.gram(), "paper")[0, i] * live.deltas[i][n] for i in range(3))
        for n, b in live.base.items()
    }
    from torch.func import functional_call

    from embedsmith.core.batch import Side
    from embedsmith.core.reps import TEACHER

    total = where.price(where.coefficients(live.gram(), "paper"), config)
    for whole, part in parts:
        cut = np.split(np.arange(len(whole)), [part.ids.sizes[0]])
        sides = [Side({}), Side({})]
        for side, tokens, teacher in zip(sides, (whole.take(rows) for rows in cut), part.teacher):
            vectors = [
                functional_call(live.model, theta, (tokens.take([n]).pad(live.model.pad_id), ("dense",)))[
                    "dense"
                ].vector_ND
                for n in range(len(tokens))
            ]
            side.local = {"dense": Dense(torch.cat(vectors) if vectors else teacher.vector_ND), TEACHER: teacher}
        total = total + part.weight * part.loss(part.ids.with_sides(*sides, task=part.task)).value
    for tensor, gradient in zip(
        (where.log_weight_M, where.length), torch.autograd.grad(total, (where.log_weight_M, where.length))
    ):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-8, atol=1e-11)


def test_matching_finds_the_parent_it_is_shown(tmp_path):
    """One teacher: the best place is that parent, its weight rises and its loss falls."""
    live = family(tmp_path, parents=2)
    config = PositioningConfig(mode="simplex", steps=30, batch_size=8, check_every=10, mu=0.0, learning_rate=0.1)
    batches = MatchBatches.match(live, [retrieval_records(20), retrieval_records(20)], config, "similarity")
    batches = type(batches)(**{**vars(batches), "teachers": [batches.teachers[1]] * 2})
    found = self_position(live, batches, config)
    held = [entry["held_out"] for entry in found.trajectory if "held_out" in entry]
    assert found.weights[1] > 0.7
    assert found.objective < 0.5 * held[0]


def test_cka_ignores_rotation_and_scale():
    left = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    assert float(linear_cka(left, 3 * left @ turn + 1)) == pytest.approx(1.0)
    assert float(linear_cka(left, left[torch.randperm(20)])) < 0.6


def test_a_parent_with_nan_is_named_before_anything_is_measured(folders, tmp_path):
    model = load(str(folders / "parent-0"))
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("nan")
    model.save(tmp_path / "bad")
    with pytest.raises(CheckpointError, match=r"sick: the weight .* holds NaN"):
        open_live([open_folder(folders / "parent-0", "well"), open_folder(tmp_path / "bad", "sick")])


def test_a_probe_is_a_fixed_sample(folders):
    records = retrieval_records(20)
    assert sample(records, 5, 0).records == sample(records, 5, 0).records
    assert sample(records, 5, 0).records != sample(records, 5, 1).records
    assert len(sample(records, 50, 0).records) == 20
