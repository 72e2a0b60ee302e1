"""What ranks tell each other, and how a batch settles gathered gradients."""

import socket
import time
from datetime import timedelta

import pytest
import torch

from embedsmith.core import collectives
from embedsmith.core.batch import ABSENT, LossOutput, PairBatch, RetrievalBatch, Side, gather_pair_scores
from embedsmith.core.collectives import (
    ALONE,
    agreed_by_hosts,
    average_gradients,
    complete_gradients,
    gather_rows,
    join_ranks,
    lost_ranks,
    mean_over_ranks,
    objects_of_all_ranks,
    on_every_rank,
    on_first_rank,
    rank,
    refuse_different,
    refuse_launcher,
    sum_over_ranks,
    world_size,
)
from embedsmith.core.errors import DataError, EmbedsmithError, TrainingError
from embedsmith.core.reps import Dense, MultiVector
from tests.ranks import on_ranks


def talk():
    one = torch.nn.Parameter(torch.zeros(2))
    two = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    one.grad = torch.full((2,), float(rank()))
    if rank() == 1:
        two.grad = torch.ones(3, dtype=torch.float64)
    idle = torch.nn.Parameter(torch.zeros(1))
    average_gradients([one, two, idle])
    try:
        on_first_rank(fail)
        raised = ""
    except DataError as error:
        raised = str(error)
    return {
        "mean": one.grad.tolist(),
        "missing": two.grad.tolist(),
        "idle": idle.grad is None,
        "max": agreed_by_hosts(rank()),
        "objects": objects_of_all_ranks({"rank": rank()}),
        "scalar": float(mean_over_ranks(torch.tensor(float(rank())))),
        "first": on_first_rank(lambda: rank() + 40),
        "raised": raised,
    }


def fail():
    raise DataError("bad row", where="a.jsonl:3")


@pytest.mark.dist
def test_ranks_agree(tmp_path):
    for result in on_ranks(2, talk, tmp_path):
        assert result == {
            "mean": [0.5, 0.5],
            "missing": [0.5, 0.5, 0.5],
            "idle": True,
            "max": 1,
            "objects": [{"rank": 0}, {"rank": 1}],
            "scalar": 0.5,
            "first": 40,
            "raised": "a.jsonl:3: bad row",
        }


def gather_ragged():
    """Rank 0 has two texts of three tokens, rank 1 one text of five."""
    count, tokens = (2, 3) if rank() == 0 else (1, 5)
    vector = torch.full((count, tokens, 2), float(rank() + 1))
    side = Side({"multivector": MultiVector(vector, torch.ones(count, tokens, dtype=torch.bool))})
    everywhere = side.all("multivector")
    ids = side.all_ids(torch.arange(count) + 10 * rank())
    weight = torch.arange(4.0)[:, None, None] * (rank() + 1)
    (everywhere.vector_NTD * weight).sum().backward()
    side.settle()
    return {
        "shape": tuple(everywhere.vector_NTD.shape),
        "ids": ids.tolist(),
        "tokens": everywhere.mask_NT.sum(1).tolist(),
        "gradient": side.local["multivector"].vector_NTD.grad[:, 0, 0].tolist(),
    }


@pytest.mark.dist
def test_ragged_sides_are_padded_masked_and_settled(tmp_path):
    first, second = on_ranks(2, gather_ragged, tmp_path)
    for result in (first, second):
        assert result["shape"] == (4, 5, 2)
        assert result["ids"] == [0, 1, 10, ABSENT]
        assert result["tokens"] == [3, 3, 5, 0]
    assert first["gradient"] == [0.0, 3.0]  # row k earns k from rank 0 and 2k from rank 1
    assert second["gradient"] == [6.0]


def gather_scores():
    score = torch.full((1, 2), float(rank()), requires_grad=True)
    everywhere = gather_pair_scores(score)
    (everywhere * torch.arange(4.0)).sum().backward()
    return {"scores": everywhere.tolist(), "gradient": score.grad.tolist()}


@pytest.mark.dist
def test_pair_scores_get_the_gradient_of_every_ranks_copy(tmp_path):
    first, second = on_ranks(2, gather_scores, tmp_path)
    assert first["scores"] == second["scores"] == [[0.0, 0.0, 1.0, 1.0]]
    assert first["gradient"] == [[0.0, 2.0]]
    assert second["gradient"] == [[4.0, 6.0]]


def dense_side(count):
    return Side({"dense": Dense(torch.randn(count, 3))})


def test_duplicates_and_padding_count_once_and_never():
    batch = RetrievalBatch(
        task="retrieval",
        query=dense_side(1),
        document=dense_side(6),
        query_id_Q=torch.tensor([1]),
        positive_id_QP=torch.tensor([[7]]),
        negative_id_QM=torch.tensor([[9]]),
        document_id_N=torch.tensor([7, 9, 7, ABSENT, 9, 8]),
    )
    assert batch.first_of_its_id_K.tolist() == [True, True, False, False, False, True]


def test_the_mean_over_rows_ignores_invalid_rows_and_survives_none():
    batch = PairBatch(
        task="sts",
        left=dense_side(2),
        right=dense_side(2),
        left_id_N=torch.arange(2),
        right_id_N=torch.arange(2),
        label_N=torch.zeros(2),
    )
    value_WN = torch.tensor([[2.0, float("nan")]], requires_grad=True)
    assert batch.mean_over_rows(value_WN, torch.tensor([True, False])).tolist() == [2.0]
    zero = batch.mean_over_rows(value_WN, torch.tensor([False, False]))
    zero.sum().backward()
    assert zero.tolist() == [0.0]
    assert value_WN.grad.tolist() == [[0.0, 0.0]]


def test_a_rank_whose_peers_never_start_does_not_wait_for_ever(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(collectives, "STARTING", timedelta(seconds=1))
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(TrainingError, match="lost another process of this run, or never found it"), lost_ranks():
        join_ranks()
    assert not torch.distributed.is_initialized()


def move_tensors():
    """What crosses ranks leaves what it was made of as it was, and cut from its graph."""
    own = torch.full((2, 2), float(rank() + 1), requires_grad=True)
    scaled = own * 2
    total, rows = sum_over_ranks(scaled), gather_rows(scaled.T)
    group = torch.distributed.new_group([1])
    inside = {} if rank() == 0 else {"group": (world_size(group), rank(group), agreed_by_hosts(7, group=group))}
    differing = []
    for facts in ({"rate": 1}, {"rate": rank()}, {"rate": 1, "more": 2} if rank() else {"rate": 1}):
        try:
            refuse_different(facts, "start all ranks alike")
        except TrainingError as error:
            differing.append(str(error))
    big = [torch.nn.Parameter(torch.zeros(4)) for _ in range(3)]
    big += [torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)), torch.nn.Parameter(torch.zeros(1), False)]
    for number, parameter in enumerate(big[:4]):
        parameter.grad = torch.full_like(parameter, float(number + 4 * rank()))
    average_gradients(big)
    return {
        "total": (total.tolist(), total.requires_grad),
        "own": scaled.tolist(),
        "rows": (rows[:, 0].tolist(), rows.requires_grad),
        "alone": (world_size(ALONE), rank(ALONE), float(sum_over_ranks(torch.tensor(3.0), ALONE))),
        "mean": float(mean_over_ranks(torch.tensor(float(rank())), ALONE)),
        "differing": differing,
        "averaged": [None if p.grad is None else p.grad[0].item() for p in big],
        **inside,
    }


@pytest.mark.dist
def test_what_crosses_ranks_is_cut_and_changes_nothing(tmp_path):
    for number, result in enumerate(on_ranks(2, move_tensors, tmp_path)):
        assert result["total"] == ([[6.0, 6.0], [6.0, 6.0]], False)
        assert result["own"] == [[2.0 * (number + 1)] * 2] * 2
        assert result["rows"] == ([2.0, 2.0, 4.0, 4.0], False)
        assert result["alone"] == (1, 0, 3.0)
        assert result["mean"] == number
        first, second = result["differing"]
        assert "rate is 0 on rank 0, 1 on rank 1" in first
        assert "to fix: start all ranks alike" in first
        assert "more is nothing on rank 0, 2 on rank 1" in second
        assert "rate" not in second
        assert result["averaged"] == [2.0, 3.0, 4.0, 5.0, None]
    assert result["group"] == (1, 0, 7)


def test_small_gradients_travel_together_and_types_apart(monkeypatch):
    monkeypatch.setattr(collectives, "_BUCKET_BYTES", 40)
    sizes = [4, 4, 2, 1, 40, 1]
    tensors = [torch.zeros(size) for size in sizes]
    assert [[len(t) for t in bucket] for bucket in collectives._buckets(tensors)] == [[4, 4, 2], [1], [40], [1]]
    mixed = [torch.zeros(1), torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    assert [len(bucket) for bucket in collectives._buckets(mixed)] == [1, 2]
    assert list(collectives._buckets([])) == []


def test_one_process_is_its_own_answer():
    tensor = torch.ones(2, requires_grad=True)
    assert (world_size(), rank(), agreed_by_hosts(3), objects_of_all_ranks("x")) == (1, 0, 3, ["x"])
    assert sum_over_ranks(tensor) is tensor
    assert mean_over_ranks(tensor) is tensor
    assert not gather_rows(tensor).requires_grad
    refuse_different({"a": 1}, "fix")
    parameter = torch.nn.Parameter(torch.ones(2))
    average_gradients([parameter])
    assert parameter.grad is None
    assert complete_gradients([torch.nn.Parameter(torch.ones(1), requires_grad=False)]) == []
    with pytest.raises(DataError, match="bad row"):
        on_first_rank(fail)


def test_a_launcher_is_refused_where_ranks_would_repeat_the_work(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    refuse_launcher("encode", "start it alone")
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_launcher("encode", "start it alone")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EmbedsmithError, match=r"encode works in one process.* 2 ranks(.|\n)*to fix: start it alone"):
        refuse_launcher("encode", "start it alone")


@pytest.mark.parametrize("error", [RuntimeError("[gloo/transport] closed"), torch.distributed.DistNetworkError("x")])
def test_a_lost_process_is_named_by_the_rank_that_lost_it(monkeypatch, error):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(TrainingError, match="rank 3 lost another process"), lost_ranks():
        raise error
    for other in (RuntimeError("x"), ValueError("gloo")):
        with pytest.raises(type(other), match=str(other)), lost_ranks():
            raise other


def ragged_batches():
    """Rank 0 has two queries with two positive slots, rank 1 one query with three."""
    count, slots = (2, 2) if rank() == 0 else (1, 3)
    start = 100 * rank()
    batch = RetrievalBatch(
        task="retrieval",
        query=dense_side(count),
        document=dense_side(3),
        query_id_Q=torch.arange(count) + start,
        positive_id_QP=torch.arange(count * slots).reshape(count, slots) + start + 10,
        negative_id_QM=torch.full((count, 1), ABSENT),
        document_id_N=torch.arange(3) + start + 10,
    )
    pairs = PairBatch(
        task="sts",
        left=dense_side(2),
        right=dense_side(2),
        left_id_N=torch.arange(2),
        right_id_N=torch.arange(2),
        label_N=torch.tensor([0.25, 0.5]) + rank(),
    )
    alone = batch.alone()
    value = batch.mean_over_rows(torch.full((1, count), 6.0 * (rank() + 1)))
    return {
        "query": batch.query_id_G.tolist(),
        "document": batch.document_id_K.tolist(),
        "positive": batch.positive_id_GP.tolist(),
        "first": batch.first_of_its_id_K.tolist(),
        "labels": pairs.label_G.tolist(),
        "alone": (alone.query_id_G.tolist(), alone.document_id_K.tolist(), alone.positive_id_GP.shape[1]),
        "leaf": alone.query.local["dense"].vector_ND is batch.query.local["dense"].vector_ND,
        "rows": (batch.query.rows, alone.query.rows, len(batch.query)),
        "value": value.tolist(),
    }


@pytest.mark.dist
def test_ids_of_all_ranks_stand_in_the_order_of_their_rows(tmp_path):
    first, second = on_ranks(2, ragged_batches, tmp_path)
    for result in (first, second):
        assert result["query"] == [0, 1, 100, ABSENT]
        assert result["document"] == [10, 11, 12, 110, 111, 112]
        assert result["positive"] == [[10, 11, ABSENT], [12, 13, ABSENT], [110, 111, 112], [ABSENT] * 3]
        assert result["first"] == [True] * 6
        assert result["labels"] == [0.25, 0.5, 1.25, 1.5]
        assert result["leaf"]
    assert first["alone"] == ([0, 1], [10, 11, 12], 2)
    assert second["alone"] == ([100], [110, 111, 112], 3)
    assert (first["rows"], second["rows"]) == ((2, 2, 2), (2, 1, 1))
    assert (first["value"][0] + second["value"][0]) / 2 == pytest.approx((6 + 6 + 12) / 3)


def test_what_stands_beside_a_batch_goes_along():
    batch = PairBatch(
        task="sts",
        source="file",
        left=dense_side(2),
        right=dense_side(3),
        left_id_N=torch.arange(2),
        right_id_N=torch.arange(3),
        label_N=torch.zeros(2),
        widths=(2, 3),
    )
    assert batch.sizes == (2, 3)
    assert batch.sides() == (batch.left, batch.right)
    assert {key: batch.shared()[key] for key in ("task", "source", "widths")} == {
        "task": "sts",
        "source": "file",
        "widths": (2, 3),
    }
    output = LossOutput(torch.tensor([1.0, 2.0]))
    assert (float(output.value), dict(output.parts)) == (3.0, {})


def test_a_failure_on_one_rank_is_one_on_all_of_them_with_its_words(monkeypatch):
    told = []
    everyones = lambda mine, group: told.append(mine) or [None, mine, "rank 2 has no disk"]
    monkeypatch.setattr(collectives, "objects_of_all_ranks", everyones)
    with pytest.raises(EmbedsmithError) as caught:
        on_every_rank(lambda: None, "mine", fix="try again")
    assert str(caught.value) == "mine: another rank failed: rank 2 has no disk\n  to fix: try again"

    def fail():
        raise DataError("mine own")

    with pytest.raises(DataError, match="mine own"):
        on_every_rank(fail, "mine")
    assert told == [None, "mine own"]
    monkeypatch.setattr(collectives, "objects_of_all_ranks", lambda mine, group: [mine, None])
    on_every_rank(lambda: None, "mine")


def wait_in_vain():
    """Rank 1 comes four seconds late to a collective that has one."""
    hurried = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=1))
    if rank() == 1:
        time.sleep(4)
        return ""
    try:
        with lost_ranks():
            sum_over_ranks(torch.ones(1), hurried)
    except TrainingError as error:
        return str(error)
    return "nothing was said"


@pytest.mark.slow
@pytest.mark.dist
def test_a_rank_that_waits_in_vain_says_so(tmp_path):
    said, _ = on_ranks(2, wait_in_vain, tmp_path)
    assert "rank 0 has waited for another one for as long as it may" in said
    assert "train.rank_timeout" in said
