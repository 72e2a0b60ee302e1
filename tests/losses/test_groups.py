"""Groups: a reranker's scores of queries with their own documents. Every loss that reads them equals loops over float64
numbers, several ranks equal one, and nothing depends on what stands in empty slots."""

import math

import pytest
import torch

from embedsmith.core.batch import ABSENT, GroupBatch, GroupIds, Side
from embedsmith.core.collectives import rank, world_size
from embedsmith.core.reps import Dense
from embedsmith.losses import Binary, LambdaLoss, ListNet, MarginMSE, ScoreKL, Sum, Weighted
from tests.losses.naive_ranking import binary_of, lambda_of, listnet_of
from tests.losses.world import mean, softmax
from tests.ranks import on_ranks

NAN = math.nan
# (score, grade, teacher) of each document; positives are the first two slots
GROUPS = [
    [(2.0, 1.0, 3.0), None, (0.5, 0.0, -1.0), (1.2, 0.0, 0.5)],
    [(-1.0, 0.4, 1.0), (0.3, 1.0, 2.0), (0.3, 0.0, NAN), None],
    [(0.1, 1.0, NAN), None, None, None],
    [None, None, (0.7, 0.0, 1.0), (0.7, 0.2, 2.0)],
    [None, None, None, None],
    [(-2.0, 1.0, 0.0), (1.0, 1.0, 0.1), (3.0, 0.0, 0.2), (-0.4, 0.0, 0.3)],
]
TIED = (4, 5, 7, 8)
"""Documents, counted through, whose score another of the same query has."""
LOSSES = [
    Binary(),
    Binary(4.0, 0.5),
    ListNet(),
    ListNet(0.1, 2.0),
    LambdaLoss(),
    LambdaLoss("lambdarank", k=2, temperature=0.5),
    LambdaLoss("ndcg2"),
    MarginMSE(0.5),
    ScoreKL(),
    ScoreKL(2.0, 0.5),
    Weighted(Binary(), 0.3),
    Sum((ListNet(), ScoreKL()), (1.0, 0.5)),
]


def batch_of(groups, dtype=torch.float64, empty=0.0):
    """The batch of some groups, and the scores that its loss is differentiated by."""
    there = [[document is not None for document in row] for row in groups]
    scores = [document[0] for row in groups for document in row if document is not None] or [0.0]
    number = iter(range(10**6))
    pair_QX = torch.tensor([[next(number) if one else ABSENT for one in row] for row in there])
    of = lambda place, usual: torch.tensor([[usual if d is None else d[place] for d in row] for row in groups])
    ids = GroupIds(pair_QX=pair_QX, grade_QX=of(1, empty), teacher_QX=of(2, empty), positives=2, pairs=len(scores))
    score_N1 = torch.tensor(scores, dtype=dtype)[:, None]
    side = Side({"score": Dense(score_N1)})
    return ids.with_sides(side, task="retrieval"), side.local["score"].vector_ND


def listed(loss, groups):
    """(score over the temperature, grade) of the documents of each group."""
    t = loss.temperature or 1.0
    return [[(d[0] / t, d[1]) for d in row if d is not None] for row in groups if any(row)]


def naive(loss, groups):
    if isinstance(loss, Weighted):
        return loss.weight * naive(loss.inner, groups)
    if isinstance(loss, Sum):
        return sum(w * naive(part, groups) for w, part in zip(loss.weights, loss.parts, strict=True))
    if isinstance(loss, MarginMSE):
        values = []
        for row in groups:
            sides = [[d for d in side if d and not math.isnan(d[2])] for side in (row[:2], row[2:])]
            pairs = [(p[0] - n[0] - loss.scale * (p[2] - n[2])) ** 2 for p in sides[0] for n in sides[1]]
            values += [mean(pairs)] if pairs else []
        return mean(values)
    if isinstance(loss, ScoreKL):
        values = []
        for row in groups:
            known = [d for d in row if d and not math.isnan(d[2])]
            if len(known) >= 2:
                target = softmax([d[2] / loss.teacher_temperature for d in known])
                student = softmax([d[0] / (loss.temperature or 1.0) for d in known])
                values.append(math.fsum(p * math.log(p / q) for p, q in zip(target, student, strict=True)))
        return mean(values)
    of = {Binary: binary_of, ListNet: listnet_of, LambdaLoss: lambda_of}[type(loss)]
    return of(loss, listed(loss, groups))


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_equals_the_naive_loop_whatever_stands_in_empty_slots(loss):
    for empty in (0.0, 7.0):
        batch, score_N1 = batch_of(GROUPS, empty=empty)
        value = loss(batch).value
        assert value.item() == pytest.approx(naive(loss, GROUPS), abs=1e-7)  # grades and teachers are fp32
        value.backward()
        assert torch.isfinite(score_N1.grad).all()


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_gradient_is_the_derivative_of_the_value(loss):
    batch, score_N1 = batch_of(GROUPS)
    loss(batch).value.backward()
    step = 1e-6
    for place in range(len(score_N1)):
        found = []
        for sign in (1, -1):
            moved, score = batch_of(GROUPS)
            with torch.no_grad():
                score[place] += sign * step
            found.append(loss(moved).value.item())
        if not isinstance(loss, LambdaLoss) or place not in TIED:  # a step changes the ranks of tied scores
            assert score_N1.grad[place].item() == pytest.approx((found[0] - found[1]) / (2 * step), abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_batch_without_anything_to_compare_gives_a_connected_zero(loss):
    batch, score_N1 = batch_of([[None] * 4, [None] * 4])
    value = loss(batch).value
    value.backward()
    assert value.item() == 0
    assert score_N1.grad.abs().sum() == 0


def walk():
    """On a rank: value and gradient of every loss, each rank with its share of the groups (two ranks: three each)."""
    found = []
    for loss in LOSSES:
        mine = slice(rank() * len(GROUPS) // world_size(), (rank() + 1) * len(GROUPS) // world_size())
        batch, score_N1 = batch_of(GROUPS[mine])
        value = loss(batch).value
        value.backward()
        found.append((value.item(), score_N1.grad[:, 0].tolist()))
    return found


@pytest.mark.dist
def test_two_ranks_equal_one(tmp_path):
    whole, ranks = walk(), on_ranks(2, walk, tmp_path)
    for loss, (value, gradient), several in zip(LOSSES, whole, zip(*ranks, strict=True), strict=True):
        assert mean([one for one, _ in several]) == pytest.approx(value, abs=1e-9), loss
        joined = [each / 2 for _, part in several for each in part]  # gradients are averaged over ranks
        assert joined == pytest.approx(gradient, abs=1e-9), loss


@pytest.mark.slow
def test_listnet_and_lambda_are_those_of_sentence_transformers():
    """Its ListNet is ours. Its lambda takes the mean over the pairs of the batch, where ours keeps the paper's sum, so
    one query at a time is compared."""
    losses = pytest.importorskip("sentence_transformers.cross_encoder.losses")
    weights = {
        "lambdarank": losses.LambdaRankScheme(),
        "ndcg2": losses.NDCGLoss2Scheme(),
        "ndcg2++": losses.NDCGLoss2PPScheme(),
    }
    for row in ([GROUPS[0]], [GROUPS[1]], [GROUPS[5]]):
        documents = [d for d in row[0] if d is not None]
        scores, grades = torch.tensor([d[0] for d in documents]), [torch.tensor([d[1] for d in documents])]

        class Fake:
            num_labels, device = 1, torch.device("cpu")

            def preprocess(self, pairs, **options):
                return {"row": torch.arange(len(pairs))}

            def __call__(self, tokens, scores=scores):
                return {"scores": scores[tokens["row"]]}

        inputs = (["q"], [["d"] * len(documents)])
        theirs = losses.ListNetLoss(Fake(), mini_batch_size=-1)(inputs, grades)
        assert ListNet()(batch_of(row)[0]).value.item() == pytest.approx(float(theirs), abs=1e-5)
        above = sum(a > b for a in grades[0] for b in grades[0])
        for name, scheme in weights.items():
            theirs = losses.LambdaLoss(Fake(), weighting_scheme=scheme, mini_batch_size=-1)(inputs, grades)
            ours = LambdaLoss(name)(batch_of(row)[0]).value.item()
            assert ours == pytest.approx(float(theirs) * int(above), abs=1e-4), name


def test_a_group_batch_is_given_its_only_output_whatever_head_a_loss_names():
    batch, _ = batch_of(GROUPS)
    assert isinstance(batch, GroupBatch)
    assert Binary(head="sparse")(batch).value.item() == Binary()(batch).value.item()
