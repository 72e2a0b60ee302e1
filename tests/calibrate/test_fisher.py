"""Fisher: every definition against a loop over examples, and the merge against its formula."""

import pytest
import torch
import torch.nn.functional as F

from embedsmith.calibrate.fisher import Fisher
from embedsmith.calibrate.probe import Probe, distinct_texts, frozen_candidates
from embedsmith.core.errors import RecipeError
from embedsmith.data import Record, RecordSet, Source
from tests.merge.family import family, retrieval_records, sts_records

PLAIN = {"normalise": False, "floor": 0.0, "shrink": 0.0}


def fisher(negatives=7, **settings):
    return Fisher(probe=Probe(sources=(Source(path="x"),), negatives=negatives), **settings)


def vectors(live, texts, role):
    """One text at a time: no padding, no batch."""
    model = live.model
    rows = [model(model.tokenize([text], role, "retrieval").pad(model.pad_id))["dense"].vector_ND for text in texts]
    return F.normalize(torch.cat(rows), dim=-1)


def squares(live, value):
    gradients = torch.autograd.grad(value, list(live.model.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.square() for p, g in zip(live.model.parameters(), gradients)]


def mean_of(examples):
    return [torch.stack(column).mean(0) for column in zip(*examples)]


def log_p(live, query, documents, temperature=0.05):
    return F.log_softmax(vectors(live, documents, "document") @ vectors(live, [query], "query")[0] / temperature, 0)


def by_definition(live, definition, lists, batch=3):
    """Written out from the formulas, one example after another."""
    chunks = [lists[start : start + batch] for start in range(0, len(lists), batch)]
    if definition == "isolated":
        return mean_of([squares(live, -log_p(live, each.query, each.documents)[0]) for each in lists])
    if definition == "exact":
        examples = []
        for each in lists:
            log_p_K = log_p(live, each.query, each.documents)
            by_document = [squares(live, log_p_K[k]) for k in range(len(log_p_K))]
            examples.append(
                [sum(log_p_K[k].exp().detach() * part for k, part in enumerate(c)) for c in zip(*by_document)]
            )
        return mean_of(examples)
    in_batch = [
        [-log_p(live, each.query, [other.documents[0] for other in chunk])[q] for q, each in enumerate(chunk)]
        for chunk in chunks
    ]
    return [sum(column) / len(lists) for column in zip(*(squares(live, sum(losses)) for losses in in_batch))]


@pytest.mark.parametrize("definition", ["isolated", "exact", "batch_square"])
def test_every_definition_equals_a_loop_over_examples(tmp_path, definition):
    live = family(tmp_path)
    records = retrieval_records(6)
    expectation = "exact" if definition == "exact" else "empirical"
    name = "isolated" if definition == "exact" else definition
    got = fisher(3, definition=name, expectation=expectation, batch_size=3).measure(live, records)
    expected = by_definition(live, definition, frozen_candidates(records, 3, 0))
    assert max(float(tensor.max()) for tensor in expected) > 1e-4
    for tensor, other in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-8, atol=1e-12)


def test_the_square_of_a_batch_is_not_the_fisher(tmp_path):
    """What other tools compute differs by far more than rounding."""
    live = family(tmp_path)
    records = retrieval_records(6)
    right, wrong = (
        fisher(3, definition=d, expectation="empirical", batch_size=3).measure(live, records)
        for d in ("isolated", "batch_square")
    )
    ratio = [float(wrong[name].sum() / right[name].sum()) for name in right if float(right[name].sum()) > 0]
    assert max(abs(r - 1) for r in ratio) > 0.1


def test_a_document_of_two_queries_is_not_its_own_negative(tmp_path):
    """Two queries with one document between them have nothing to be told apart: no loss, no Fisher."""
    live = family(tmp_path)
    two = RecordSet("two", "retrieval", [Record("the cat", ("a mat",)), Record("red dog", ("a mat",))], "two")
    third = RecordSet("x", "retrieval", [*two.records, Record("old tree", ("big tree",))], "x")
    squared = fisher(definition="batch_square", batch_size=2)
    assert all(float(f.sum()) < 1e-20 for f in squared.measure(live, third).values())


def test_sampling_tends_to_the_exact_expectation(tmp_path):
    live = family(tmp_path)
    records = retrieval_records(2)
    exact = fisher(1, expectation="exact", temperature=1.0).measure(live, records)
    draws = [fisher(1, expectation="sampled", temperature=1.0, seed=s).measure(live, records) for s in range(24)]
    name = max(exact, key=lambda key: float(exact[key].sum()))
    sampled = torch.stack([draw[name] for draw in draws]).mean(0).sum()
    assert float(sampled / exact[name].sum()) == pytest.approx(1.0, abs=0.25)


def test_the_label_free_fisher_is_the_sum_over_coordinates(tmp_path):
    """E_e (grad <e, f>)^2 = sum_d (grad f_d)^2; many draws come close."""
    live = family(tmp_path)
    records = RecordSet("one", "retrieval", [Record("the cat", ("a dog",))], "one")
    got = fisher(definition="embedding", draws=60).measure(live, records)
    vector = live.model(live.model.tokenize(["the cat"], "query", None).pad(live.model.pad_id))["dense"].vector_ND[0]
    other = live.model(live.model.tokenize(["a dog"], "document", None).pad(live.model.pad_id))["dense"].vector_ND[0]
    expected = [sum(parts) / 2 for parts in zip(*(squares(live, v[d]) for v in (vector, other) for d in range(len(v))))]
    total = sum(float(tensor.sum()) for tensor in expected)
    assert sum(float(tensor.sum()) for tensor in got.values()) == pytest.approx(total, rel=0.15)


def test_the_merge_is_the_weighted_mean_of_elements():
    deltas = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -2.0])}]
    fishers = [{"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([3.0, 1.0])}]
    merged = fisher(**PLAIN).merge(deltas, fishers, [2.0, 1.0])[0]
    assert merged["w"].tolist() == pytest.approx([(2 * 1 + 3 * 3) / 5, (6 * 2 - 2) / 7])


def test_equal_fishers_give_the_mean_and_all_parents_count():
    deltas = [{"w": torch.randn(5)} for _ in range(3)]
    fishers = [{"w": torch.full((5,), 1e-12)} for _ in range(3)]
    merged, _, effective = fisher().merge(deltas, fishers, [1.0, 1.0, 1.0])
    torch.testing.assert_close(merged["w"], torch.stack([d["w"] for d in deltas]).mean(0))
    assert effective == pytest.approx(3.0)


def test_a_tiny_fisher_is_no_plain_average():
    """The trap of an absolute floor: F of 1e-9 would be lifted to 1e-6 everywhere, and the merge would be the mean."""
    deltas = [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([0.0, 0.0])}]
    fishers = [{"w": torch.tensor([9e-9, 1e-9])}, {"w": torch.tensor([1e-9, 9e-9])}]
    for normalise in (True, False):
        merged = fisher(shrink=0.0, normalise=normalise).merge(deltas, fishers, [1.0, 1.0])[0]
        assert merged["w"].tolist() == pytest.approx([0.9, 0.1])


def test_a_part_without_gradient_is_the_weighted_mean():
    deltas = [{"w": torch.tensor([4.0])}, {"w": torch.tensor([0.0])}]
    fishers = [{"w": torch.tensor([0.0])}, {"w": torch.tensor([7.0])}]
    assert fisher().merge(deltas, fishers, [1.0, 3.0])[0]["w"].tolist() == [1.0]


def test_rounding_noise_decides_nothing():
    """The bias of keys has no gradient but that of rounding: squares of 1e-10 beside squares of 1."""
    deltas = [{"w": torch.ones(2), "noise": torch.tensor([4.0])}, {"w": torch.ones(2), "noise": torch.tensor([0.0])}]
    fishers = [{"w": torch.ones(2), "noise": torch.tensor([a])} for a in (1e-20, 5e-20)]
    assert fisher().merge(deltas, fishers, [1.0, 1.0])[0]["noise"].tolist() == [2.0]


def test_each_parent_is_measured_on_its_own_weights(tmp_path):
    live = family(tmp_path, parents=2)
    records = retrieval_records(3)
    method = fisher(2, expectation="empirical")
    both = method.of_parents(live, [records, records])
    live.place_parent(1)
    alone = method.measure(live, records)
    for name in alone:
        torch.testing.assert_close(both[1][name], alone[name])
    assert not torch.allclose(both[0][name], both[1][name])


def test_what_was_measured_is_kept_for_the_same_parent_texts_and_settings(tmp_path):
    """A second call encodes nothing; another parent, other texts or another definition are measured anew."""
    live = family(tmp_path, parents=1)
    cache, plain = tmp_path / "cache", fisher(2, expectation="empirical")

    def texts(records, own=plain, name="a"):
        before = live.texts
        found = own.of_parents(live, [records], cache, [name])
        return live.texts - before, found[0]

    count, first = texts(retrieval_records(3))
    again, second = texts(retrieval_records(3))
    assert count > 0 == again
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
    for other in ({"own": fisher(2, expectation="exact")}, {"name": "b"}, {"records": retrieval_records(3, seed=9)}):
        assert texts(**{"records": retrieval_records(3)} | other)[0] > 0
    assert texts(retrieval_records(3), fisher(2, expectation="empirical", shrink=0.5))[0] == 0


def test_candidates_are_frozen_and_never_the_querys_own(tmp_path):
    records = [Record("q", ("the cat", "a cat"), ("a cat", "hard one")), Record("r", ("the dog",)), Record("s", ("q",))]
    drawn = frozen_candidates(RecordSet("x", "retrieval", records, "x"), 5, 0)
    assert drawn == frozen_candidates(RecordSet("x", "retrieval", records, "x"), 5, 0)
    assert drawn[0].documents[:2] == ("the cat", "hard one")
    assert set(drawn[0].documents[2:]) == {"the dog"}


def test_scored_pairs_take_part_where_they_are_alike(tmp_path):
    lists = frozen_candidates(sts_records(11), 2, 0)
    assert len(lists) == 3  # scores 0.8, 0.9 and 1.0
    dull = RecordSet("d", "sts", [Record("a", ("b",), task="sts", positive_scores=(0.1,))], "d")
    with pytest.raises(RecipeError, match="definition=embedding"):
        frozen_candidates(dull, 2, 0)
    assert distinct_texts(dull) == [("a", "query"), ("b", "query")]
