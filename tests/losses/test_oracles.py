"""Published and measured numbers of single losses, and the gradients of what is held fixed."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from embedsmith.core.batch import ABSENT, PairBatch, Progress, RetrievalBatch, Side
from embedsmith.core.collectives import rank
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.reps import Dense
from embedsmith.losses import (
    GOR,
    PRO,
    AnglE,
    Classifier,
    CoDiEmbSTS,
    CoSENT,
    CosineConsistency,
    CrossBatchBalance,
    InfoNCE,
    M3SelfDistillation,
    Matryoshka,
    Pearson,
    RankKL,
    TeacherVectors,
    Uniformity,
    Weighted,
    balance_weights,
)
from embedsmith.losses.candidates import swapped
from embedsmith.losses.sts import complex_angles, ordering_loss, rank_targets
from tests.losses.examples import PAIRS, RETRIEVAL, Retrieval, Tiny, make_batch, make_extras, run
from tests.ranks import on_ranks


def pairs_with(score, label):
    """A pair batch whose dense scores are the given numbers, and the leaf whose gradient is theirs."""
    left = Side({"dense": Dense(torch.as_tensor(score, dtype=torch.float64)[:, None])})
    right = Side({"dense": Dense(torch.ones(len(score), 1, dtype=torch.float64))})
    ids = torch.arange(len(score))
    label_N = torch.as_tensor(label, dtype=torch.float64)
    batch = PairBatch(task="sts", left=left, right=right, left_id_N=ids, right_id_N=ids + 1000, label_N=label_N)
    return batch, left.local["dense"].vector_ND


def random_pairs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1
    return pairs_with(score, torch.rand(count, generator=generator, dtype=torch.float64))


def vectors(query, document):
    """A retrieval batch of given dense vectors: query i's positive is document i, the rest are negatives in-batch."""
    count, total = len(query), len(document)
    sides = [Side({"dense": Dense(F.normalize(torch.as_tensor(v).double(), dim=-1))}) for v in (query, document)]
    return RetrievalBatch(
        task="retrieval",
        query=sides[0],
        document=sides[1],
        query_id_Q=torch.arange(count) + 5000,
        positive_id_QP=torch.arange(count)[:, None],
        negative_id_QM=torch.empty(count, 0, dtype=torch.int64),
        document_id_N=torch.arange(total),
    )


def test_rank_kl_targets():
    distinct = (rank_targets(torch.linspace(0, 1, 32).double()) / 0.05).softmax(-1).sort(descending=True).values
    torch.testing.assert_close(distinct[:4].tolist(), [0.475422, 0.249396, 0.130828, 0.068629], rtol=0, atol=1e-6)
    tied = rank_targets(torch.tensor([1.0] * 10 + [0.0] * 22, dtype=torch.float64))
    torch.testing.assert_close(tied[[0, 10]].tolist(), [0.854839, 0.338710], rtol=0, atol=1e-6)
    share = (tied / 0.05).softmax(-1)
    torch.testing.assert_close(share[[0, 10]].tolist(), [0.0999928, 3.28798e-06], rtol=1e-5, atol=0)


def test_rank_kl_reference_reduction_is_the_divergence_over_n():
    batch, _ = random_pairs(32)
    ratio = RankKL(reduction="sum")(batch).value / RankKL()(batch).value
    assert ratio.item() == pytest.approx(32, abs=1e-12)


def ordered_pro(score, label, temperature=0.05):
    """As published: a loop over the list sorted by label, each item against those after it."""
    order = sorted(range(len(label)), key=lambda k: -label[k])
    values = []
    for place, k in enumerate(order):
        lower = [i for i in order[place + 1 :] if label[k] - label[i] > 1e-8]
        if lower:
            up = math.exp(score[k] * max(label[k] - label[i] for i in lower) / temperature)
            down = math.fsum(math.exp(score[i] * (label[k] - label[i]) / temperature) for i in lower)
            values.append(-math.log(up / (up + down)))
    return math.fsum(values) / len(values)


def test_pro_equals_the_ordered_loop():
    batch, score = random_pairs(40)
    assert PRO()(batch).value.item() == pytest.approx(
        ordered_pro(score[:, 0].tolist(), batch.label_N.tolist()), abs=1e-9
    )


def test_pro_depends_on_the_level_of_scores_unless_centred():
    label = torch.linspace(0, 1, 20).tolist()
    score = [math.sin(9 * y) / 3 for y in label]
    shifted = [[s + shift for s in score] for shift in (-0.5, 0.0, 0.5)]
    plain = [PRO()(pairs_with(s, label)[0]).value.item() for s in shifted]
    assert plain[0] > plain[1] + 0.5 > plain[2] + 1.0
    centred = [PRO(center=True)(pairs_with(s, label)[0]).value.item() for s in shifted]
    assert max(centred) - min(centred) < 1e-9


def test_pro_of_equal_predictions_and_tied_labels_is_zero_with_a_finite_gradient():
    batch, score = pairs_with([0.3] * 5, [0.5] * 5)
    value = PRO()(batch).value
    value.backward()
    assert value.item() == 0
    assert torch.isfinite(score.grad).all()


def test_pearson_is_a_correlation_with_population_moments():
    label = [0.0, 0.1, 0.4, 0.5, 0.6, 0.8, 0.9, 1.0]
    value = Pearson()(pairs_with([2 * y - 1 for y in label], label)[0]).value.item()
    assert value == pytest.approx(0, abs=1e-9)
    unbiased = torch.tensor(label).double().var() / torch.tensor(label).double().var(correction=0)
    assert 1 / unbiased == pytest.approx(7 / 8)  # what unbiased variances would make of a perfect correlation
    assert Pearson()(pairs_with([-y for y in label], label)[0]).value.item() == pytest.approx(2, abs=1e-9)


def test_pearson_of_equal_scores_is_one_and_moves_nothing():
    batch, score = pairs_with([0.25] * 4, [0.1, 0.9, 0.4, 0.2])
    value = Pearson()(batch).value
    value.backward()
    assert value.item() == 1
    assert score.grad.abs().max() == 0


def test_cosent_without_an_ordered_pair_is_zero():
    for label in ([0.5], [0.5] * 6):
        value = CoSENT()(pairs_with([0.1 * k for k in range(len(label))], label)[0]).value
        assert value.item() == 0
        assert value.requires_grad


def test_cosent_ignores_everything_but_the_order_of_labels():
    score, label = [0.3, -0.2, 0.9, 0.1], [0.1, 0.2, 0.2, 0.9]
    values = [CoSENT()(pairs_with(score, [f(y) for y in label])[0]).value.item() for f in (float, math.exp, math.sqrt)]
    assert values[0] == pytest.approx(values[1], abs=1e-12) == pytest.approx(values[2], abs=1e-12)


def test_cosent_of_many_pairs_equals_the_matrix_form_in_fp32():
    generator = torch.Generator().manual_seed(1)
    score_N = torch.rand(700, generator=generator) * 2 - 1
    label_N = (torch.rand(700, generator=generator) * 12).round() / 12
    logit_N = (score_N / 0.01).requires_grad_()
    exact_N = (score_N.double() / 0.01).requires_grad_()
    matrix = (exact_N[None, :] - exact_N[:, None])[label_N[:, None] > label_N[None, :]]
    expected = torch.cat([matrix.new_zeros(1), matrix]).logsumexp(0)
    expected.backward()
    value = ordering_loss(logit_N[None], label_N)[0]
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(logit_N.grad.double(), exact_N.grad, rtol=0, atol=1e-5)


def test_angle_of_a_rotation():
    """x / y is e^{i phi} in every coordinate: the score is |cos phi + sin phi|."""
    y = torch.complex(torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64))
    x = y * torch.exp(1j * torch.tensor(0.4, dtype=torch.float64))
    halves = [torch.cat([z.real, z.imag])[None] for z in (x, y)]
    score = complex_angles(*(Dense(F.normalize(v, dim=-1)) for v in halves), None)
    assert score.item() == pytest.approx(abs(math.cos(0.4) + math.sin(0.4)))
    with pytest.raises(RecipeError):
        Matryoshka(AnglE(), (4, 3)).check(8)


@pytest.mark.parametrize(("width", "expected"), [(32, -3.75), (128, -3.94), (1024, -3.99)])
def test_uniformity_of_random_vectors(width, expected):
    torch.manual_seed(0)
    batch = vectors(torch.randn(400, width), torch.randn(400, width))
    assert Uniformity()(batch).value.item() == pytest.approx(expected, abs=0.01)
    assert GOR("first")(batch).value.item() == pytest.approx(1 / width, rel=0.05)


def test_uniformity_gradient_at_duplicates_is_finite():
    batch = vectors(torch.ones(4, 8), torch.ones(4, 8))
    Uniformity()(batch).value.backward()
    assert torch.isfinite(batch.query.local["dense"].vector_ND.grad).all()


def test_infonce_of_one_query_without_negatives_is_zero():
    value, gradients = run(InfoNCE(), RETRIEVAL["one query"])
    assert value.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients)


def test_hard_case_of_infonce_keeps_its_precision_in_fp32():
    """Positive at cosine 1, negatives at -1, temperature 0.01: the loss is e^-200, not the rounding of a difference."""
    batch = vectors([[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]])
    assert 0 < InfoNCE(0.01)(batch).value.item() < 1e-80


def scores_of(batch):
    return batch.query.local["dense"].vector_ND @ batch.document.local["dense"].vector_ND.T


def gradient_of(value, batch):
    query = batch.query.local["dense"].vector_ND
    query.grad = None
    value.backward()
    return query.grad.clone()


def test_hardness_weights_carry_no_gradient():
    torch.manual_seed(2)
    batch = vectors(torch.randn(5, 6), torch.randn(5, 6))
    logit = scores_of(batch) / 0.2
    logit = logit + 3.0 * scores_of(batch).detach() * ~torch.eye(5, dtype=torch.bool)
    expected = gradient_of(F.cross_entropy(logit, torch.arange(5)), batch)
    got = gradient_of(InfoNCE(0.2, hardness_weight=3.0, hardness_on="in_batch")(batch).value, batch)
    torch.testing.assert_close(got, expected)


def test_focal_weights_carry_no_gradient():
    torch.manual_seed(2)
    batch = vectors(torch.randn(5, 6), torch.randn(5, 6))
    each = F.cross_entropy(scores_of(batch) / 0.2, torch.arange(5), reduction="none")
    weight = (1 - (-each.detach()).exp()) ** 0.5
    expected = gradient_of((weight * each).sum() / weight.sum(), batch)
    torch.testing.assert_close(gradient_of(InfoNCE(0.2, focal_gamma=0.5)(batch).value, batch), expected)


def test_the_ensemble_teaches_without_gradient_and_from_its_start_step():
    torch.manual_seed(2)
    batch = vectors(torch.randn(5, 6), torch.randn(5, 6))
    loss = M3SelfDistillation(0.2, {"dense": 0.7}, {"dense": 1.0}, start_step=2)
    assert loss.heads() == {"dense"}
    logit = scores_of(batch) / 0.2
    contrast = (F.cross_entropy(logit, torch.arange(5)) + F.cross_entropy(0.7 * logit, torch.arange(5))) / 2
    taught = F.cross_entropy(logit, (0.7 * logit).detach().softmax(-1))
    before, after = (loss(replace(batch, progress=Progress(step, 10))).value for step in (1, 2))
    assert before.item() == pytest.approx(contrast.item())
    assert after.item() == pytest.approx(((contrast + taught) / 2).item())
    torch.testing.assert_close(gradient_of(after, batch), gradient_of((contrast + taught) / 2, batch))


def test_learnable_temperature_gets_the_gradient_of_its_logarithm():
    loss = InfoNCE(0.3, learn_temperature=True, temperature_name="tau")
    extras = make_extras(loss)
    batch, _ = make_batch(Tiny(), RETRIEVAL["plain"], loss, extras)
    loss(batch).value.backward()
    at = lambda temperature: InfoNCE(temperature)(make_batch(Tiny(), RETRIEVAL["plain"], loss)[0]).value.item()
    start = float(extras["tau"].log.detach())
    numeric = (at(math.exp(start + 1e-5)) - at(math.exp(start - 1e-5))) / 2e-5
    assert extras["tau"].log.grad.item() == pytest.approx(numeric, rel=1e-6)


def test_masking_by_identity():
    """A document that is the positive of the same query in another row, and a duplicate, are no negatives."""
    rows = Retrieval([0, 0, 2], [[10], [11], [12]], [[11], [20], [10]])
    masked, _ = run(InfoNCE(0.2), rows)
    rest, _ = run(InfoNCE(0.2, mask_false_negatives=False), rows)
    assert masked.item() < rest.item() - 0.01


def test_cosine_consistency_reads_both_kinds_of_batch():
    assert run(CosineConsistency(), PAIRS["plain"])[0].item() > 0
    assert run(CosineConsistency(), RETRIEVAL["plain"])[0].item() > 0


def test_matryoshka_equals_the_loss_on_every_slice():
    torch.manual_seed(4)
    query, document = torch.randn(5, 8), torch.randn(9, 8)
    loss = InfoNCE(0.2, symmetric=True, margin=0.1)
    slices = [loss(vectors(query[:, :w], document[:, :w])).value for w in (8, 6, 3)]
    for dims in ((3, 6), (6, 3), (8, 3, 6)):
        got = Matryoshka(loss, dims)(vectors(query, document))
        assert got.value.item() == pytest.approx(torch.stack(slices).mean().item(), abs=1e-12)
        assert got.parts["width_3"].item() == pytest.approx(slices[2].item(), abs=1e-12)


def test_f2llm_widths_weigh_as_published():
    weights = Matryoshka(InfoNCE(), (8, 16, 32, 64, 128, 256, 512), weighting="f2llm", normalise=False).width_weights(
        1024
    )
    torch.testing.assert_close(list(weights), [1.0, 0.354, 0.167, 0.088, 0.05, 0.030, 0.018, 0.011], rtol=0, atol=6e-4)
    assert sum(weights) == pytest.approx(1.717, abs=1e-3)


def test_matryoshka_above_the_width_is_refused_before_training():
    with pytest.raises(RecipeError, match=r"^matryoshka: dims has 512, the embedding has 384"):
        Matryoshka(InfoNCE(), (512,)).check(384)


def test_codiemb_needs_no_middle_layer_without_mid_nce():
    assert CoDiEmbSTS().heads() == {"dense", "middle"}
    assert CoDiEmbSTS({"pearson": 2.0, "rank_kl": 5.0}).heads() == {"dense"}


def test_weighted_ramps_up():
    batch, _ = random_pairs(6)
    value = lambda step: Weighted(CoSENT(), 2.0, warmup_steps=4)(
        replace(batch, progress=Progress(step, 9))
    ).value.item()
    full = CoSENT()(batch).value.item()
    assert [value(s) / full for s in (0, 1, 3, 8)] == pytest.approx([2 / 16, 2 / 4, 2.0, 2.0])


def test_labels_out_of_range_and_missing_are_data_errors():
    loss = Classifier(2)
    with pytest.raises(DataError, match="classes from 0 to 1"):
        run(loss, RETRIEVAL["labels"])
    batch, _ = make_batch(Tiny(), RETRIEVAL["labels"], loss)
    for source, where in (("mine", "mine"), ("", "classifier")):
        with pytest.raises(DataError, match=f"^{where}: a label of"):
            loss(replace(batch, source=source))
    with pytest.raises(DataError, match="labels"):
        run(loss, RETRIEVAL["plain"])


def test_a_narrow_teacher_needs_a_projection():
    batch, _ = make_batch(Tiny(), RETRIEVAL["plain"], TeacherVectors())
    for side in batch.sides():
        side.local["teacher"] = Dense(side.local["teacher"].vector_ND[:, :4])
    with pytest.raises(DataError, match="project"):
        TeacherVectors()(batch)


def test_balance_weights():
    assert balance_weights("balanced", 4, 0, 0.8) == (1.0, 0.8)
    assert balance_weights("split", 4, 1, 0.8) == pytest.approx((5 / 4, 0.8 * 5 / 1))
    with pytest.raises(RecipeError):
        balance_weights("split", 4, 0)
    with pytest.raises(RecipeError):
        balance_weights("balanced", 1, 0, -1.0)


def same_queries_other_negatives(ranks):
    rows = Retrieval([0, 1, 2], [[10], [11], [12]], [[20, 21], [22, 23], [24, 25]])
    if ranks == 1:
        return rows
    return replace(rows, negative=[[slots[rank()]] for slots in rows.negative])


def balanced(ranks):
    return run(CrossBatchBalance(0.2), same_queries_other_negatives(ranks))


@pytest.mark.dist
def test_negatives_spread_over_ranks_equal_all_on_one(tmp_path):
    value, gradients = balanced(1)
    for got, got_gradients in on_ranks(2, balanced, tmp_path, 2):
        assert got.item() == pytest.approx(value.item(), abs=1e-12)
        for a, b in zip(got_gradients, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def local_form(seed):
    return run(CoSENT(cross_device=False), PAIRS["plain"].rows([4 * rank() + k for k in range(4)]))[0]


@pytest.mark.dist
def test_the_local_form_is_each_ranks_own(tmp_path):
    values = on_ranks(2, local_form, tmp_path, 0)
    for number, value in enumerate(values):
        alone, _ = run(CoSENT(), PAIRS["plain"].rows([4 * number + k for k in range(4)]))
        assert value.item() == pytest.approx(alone.item(), abs=1e-12)
    assert values[0].item() != values[1].item()


def test_a_batch_seen_from_the_documents_has_a_slot_even_where_nobody_asks():
    """Losses over slots take a maximum or a mean over them, which an empty axis has not."""
    loss = InfoNCE()
    for positive, slots in (([[-1], [-1]], 1), ([[10], [10]], 2), ([[10], [11]], 1)):
        example = Retrieval([0, 1], positive, [[20], [21]])
        batch, _ = make_batch(Tiny(), example, loss, make_extras(loss))
        turned = swapped(batch)
        assert turned.positive_id_QP.shape == (len(example.documents), slots)
        assert turned.negative_id_QM.shape == (len(example.documents), 0)
        asks = [document in {text for row in positive for text in row} for document in batch.document_id_N.tolist()]
        assert (turned.query_id_Q != ABSENT).tolist() == asks
