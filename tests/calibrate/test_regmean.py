"""RegMean: exact on linear models, ridge towards the average, and padding is no input."""

import torch
from torch import nn

from embedsmith.calibrate.probe import Probe
from embedsmith.calibrate.regmean import InputGrams, RegMean, linear_modules, token_chunks
from embedsmith.core.tokens import PaddedTokens
from embedsmith.data import Source
from tests.merge.family import family, retrieval_records, sts_records


def regmean(**settings):
    return RegMean(probe=Probe(sources=(Source(path="x"),)), **settings)


EXACT = regmean(off_diagonal=1.0, ridge=0.0, gram_norm="none", token_weight="token", tolerance=0.0)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_solution_is_least_squares():
    """min_W sum_i |X_i W^T - X_i W_i^T|^2, by the normal equations and by lstsq on the stacked rows."""
    inputs, deltas = [draw(30, 6, seed=i) for i in range(2)], [draw(4, 6, seed=9 + i) for i in range(2)]
    merged = EXACT.solve(deltas, [x.T @ x for x in inputs], [1.0, 1.0])
    stacked = torch.cat(inputs)
    outputs = torch.cat([x @ d.T for x, d in zip(inputs, deltas)])
    torch.testing.assert_close(merged, torch.linalg.lstsq(stacked, outputs).solution.T)


def test_parents_on_separate_inputs_are_both_recovered():
    """Each parent reads its own half of the coordinates: a merge that keeps both exists, and is found."""
    left, right = draw(20, 6), draw(20, 6, seed=1)
    left[:, 3:], right[:, :3] = 0, 0
    deltas = [draw(4, 6, seed=2), draw(4, 6, seed=3)]
    merged = EXACT.solve(deltas, [left.T @ left, right.T @ right], [1.0, 1.0])
    torch.testing.assert_close(left @ merged.T, left @ deltas[0].T)
    torch.testing.assert_close(right @ merged.T, right @ deltas[1].T)


def test_the_ridge_leads_to_the_weighted_mean_and_not_to_zero():
    deltas = [draw(4, 6, seed=2), draw(4, 6, seed=3)]
    gram = draw(2, 6)
    config = regmean(off_diagonal=1.0, ridge=1e9, gram_norm="none")
    merged = config.solve(deltas, [gram.T @ gram, gram.T @ gram], [3.0, 1.0])
    torch.testing.assert_close(merged, 0.75 * deltas[0] + 0.25 * deltas[1], rtol=1e-6, atol=1e-6)


def test_directions_no_text_reaches_get_the_mean():
    """Rank 2 of 6: off the inputs' span the solution is the mean, within it least squares; nothing is inverted."""
    deltas = [draw(4, 6, seed=2), draw(4, 6, seed=3)]
    x = draw(2, 6)
    config = regmean(off_diagonal=1.0, ridge=1e-6, gram_norm="none")
    merged = config.solve(deltas, [x.T @ x, torch.zeros(6, 6, dtype=torch.float64)], [1.0, 1.0])
    torch.testing.assert_close(x @ merged.T, x @ deltas[0].T, rtol=1e-4, atol=1e-4)
    away = draw(6, seed=5)
    away = away - x.T @ torch.linalg.solve(x @ x.T, x @ away)
    torch.testing.assert_close(away @ merged.T, away @ ((deltas[0] + deltas[1]) / 2).T, rtol=1e-4, atol=1e-4)


def test_without_any_input_it_is_the_mean():
    deltas = [draw(4, 6, seed=2), draw(4, 6, seed=3)]
    zero = torch.zeros(6, 6, dtype=torch.float64)
    torch.testing.assert_close(regmean().solve(deltas, [zero, zero], [1.0, 1.0]), (deltas[0] + deltas[1]) / 2)


def test_the_trace_evens_out_tasks_of_different_scale():
    deltas = [draw(4, 6, seed=2), draw(4, 6, seed=3)]
    grams = [g.T @ g for g in (draw(9, 6), draw(9, 6, seed=1))]
    config = regmean(ridge=0.0)
    once = config.solve(deltas, grams, [1.0, 1.0])
    torch.testing.assert_close(config.solve(deltas, [1000 * grams[0], grams[1]], [1.0, 1.0]), once)


def test_alpha_zero_weighs_each_input_feature():
    deltas, grams = [draw(2, 3, seed=2), draw(2, 3, seed=3)], [torch.diag(draw(3, seed=s).abs()) for s in (4, 5)]
    full = [g + 0.1 for g in grams]
    merged = regmean(off_diagonal=0.0, ridge=0.0, gram_norm="none").solve(deltas, full, [1.0, 1.0])
    a, b = (g.diagonal() for g in full)
    torch.testing.assert_close(merged, (deltas[0] * a + deltas[1] * b) / (a + b))


def test_grams_are_of_real_tokens_and_shared_between_modules_of_one_input(tmp_path):
    """Against texts encoded one at a time, without padding."""
    live = family(tmp_path)
    records = retrieval_records(6)
    grams = EXACT.collect(live, records)
    attention = "backbone.encoder.layer.0.attention.self"
    assert grams.shared[f"{attention}.key"] == grams.shared[f"{attention}.value"] == f"{attention}.query"
    assert len(grams.by_input) == 8  # of 12 linear layers
    module = linear_modules(live.model)["backbone.encoder.layer.1.output.dense"]
    seen = []
    handle = module.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0][0].detach()))
    for record in records.records:
        for text, role in ((record.query, "query"), (record.positives[0], "document")):
            live.model(live.model.tokenize([text], role, "retrieval").pad(live.model.pad_id))
    handle.remove()
    rows = torch.cat(seen)
    torch.testing.assert_close(grams.of("backbone.encoder.layer.1.output.dense"), rows.T @ rows / len(rows))


def test_long_texts_do_not_drown_short_ones():
    linear = {"l": nn.Linear(2, 2, dtype=torch.float64)}
    nothing = float("nan")  # what lies at the padding is nobody's input
    x = torch.tensor([[[1.0, 0.0]] * 4, [[0.0, 1.0]] + [[nothing] * 2] * 3], dtype=torch.float64)
    mask_NT = torch.tensor([[True] * 4, [True, False, False, False]])
    padded = PaddedTokens(mask_NT.long(), mask_NT, mask_NT, torch.tensor([True, True]))
    grams = InputGrams()
    with grams.collecting(linear, lambda: regmean().token_weights(padded)):
        linear["l"](x)
    assert grams.of("l").tolist() == [[0.5, 0.0], [0.0, 0.5]]


def test_texts_are_read_until_the_matrices_settle(tmp_path):
    live = family(tmp_path)
    records = retrieval_records(300)
    total = sum(len(padded.id_NT) for padded in token_chunks(live, records))
    live.texts = 0
    regmean(tolerance=0.5).collect(live, records)
    assert 128 <= live.texts < total


def test_a_merge_of_equal_parents_is_that_parent(tmp_path):
    live = family(tmp_path, parents=2)
    live.deltas[1] = live.deltas[0]
    merged = regmean().merge(live, [retrieval_records(), sts_records()], [1.0, 1.0])
    for name, delta in live.deltas[0].items():
        torch.testing.assert_close(merged[name], delta, rtol=1e-6, atol=1e-9)


def test_only_linear_weights_are_solved(tmp_path):
    live = family(tmp_path, parents=2)
    merged = regmean().merge(live, [retrieval_records(), sts_records()], [1.0, 3.0])
    solved = {f"{name}.weight" for name in linear_modules(live.model)}
    for name, value in merged.items():
        mean = 0.25 * live.deltas[0][name] + 0.75 * live.deltas[1][name]
        assert torch.allclose(value, mean) == (name not in solved), name
