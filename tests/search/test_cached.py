"""Kept representations: each part of a file's name counts, and what is read is what was written."""

import pytest
import torch
from tests.search.test_hybrid import Model, reps

from embedsmith.core.errors import SearchError
from embedsmith.core.reps import Dense
from embedsmith.search.cached import CachedEncoder


@pytest.mark.parametrize("head", ["dense", "sparse", "multivector"])
def test_what_is_read_scores_as_what_was_written(tmp_path, head):
    rep, query = reps(6, 0)[head], reps(3, 1)[head]
    CachedEncoder.write(tmp_path / "x", rep)
    again = CachedEncoder.read(tmp_path / "x")
    assert type(again) is type(rep)
    assert len(again) == 6
    assert torch.equal(query.scores(again), query.scores(rep))


@pytest.mark.parametrize("head", ["sparse", "multivector"])
def test_texts_without_tokens_and_no_texts_at_all(tmp_path, head):
    rep = reps(3, 0)[head]
    empty = rep.map(lambda tensor: torch.zeros_like(tensor))
    for number, value in enumerate((empty, empty.rows(slice(0, 0)))):
        CachedEncoder.write(tmp_path / str(number), value)
        again = CachedEncoder.read(tmp_path / str(number))
        assert len(again) == len(value)
        assert torch.equal(rep.scores(again), rep.scores(value))


def test_only_the_heads_that_are_missing_are_computed(tmp_path):
    model = Model()
    encoder = CachedEncoder.of(model, tmp_path)
    first = encoder.represent(["a", "b"], role="query", task="t", outputs=("dense",), instruction=["x", None])
    both = encoder.represent(["a", "b"], role="query", task="t", outputs=("sparse", "dense"), instruction=["x", None])
    assert [(texts, list(options["outputs"])) for texts, options in model.asked] == [
        (["a", "b"], ["dense"]),
        (["a", "b"], ["sparse"]),
    ]
    assert all(o["role"] == "query" and o["task"] == "t" and o["instruction"] == ["x", None] for _, o in model.asked)
    assert list(both) == ["sparse", "dense"]
    assert torch.equal(both["dense"].vector_ND, first["dense"].vector_ND)


def test_each_part_of_the_name_counts(tmp_path):
    asked = {"texts": ["a", "b"], "role": "query", "task": "t", "head": "dense", "instruction": None}
    changes = [
        {"texts": ["b", "a"]},
        {"texts": ["ab"]},
        {"role": "document"},
        {"task": None},
        {"task": "other"},
        {"head": "sparse"},
        {"instruction": [None, None]},
        {"instruction": ["x", None]},
        {"instruction": ["x", "y"]},
    ]
    encoder = CachedEncoder.of(Model(), tmp_path)
    names = [encoder.path(**asked), *(encoder.path(**{**asked, **change}) for change in changes)]
    names.append(CachedEncoder.of(Model("another"), tmp_path).path(**asked))
    assert len(set(names)) == len(names)
    assert encoder.path(**asked) == names[0]
    assert encoder.fingerprint() == "model"


@pytest.mark.parametrize("broken", [b"", b"not a file of tensors", None])
def test_a_file_that_is_not_whole_counts_as_none(tmp_path, broken):
    model = Model()
    encoder = CachedEncoder.of(model, tmp_path)
    whole = encoder.represent(["a"], role="query")
    path = encoder.path(["a"], "query", None, "dense")
    path.write_bytes(path.read_bytes()[:-3] if broken is None else broken)
    again = encoder.represent(["a"], role="query")
    assert len(model.asked) == 2
    assert len(again["dense"]) == len(whole["dense"])
    assert CachedEncoder.read(path) is not None


def test_what_is_not_finite_is_not_kept(tmp_path):
    with pytest.raises(SearchError, match="not finite"):
        CachedEncoder.write(tmp_path / "x", Dense(torch.tensor([[1.0, float("inf")]])))
    assert not (tmp_path / "x").exists()
