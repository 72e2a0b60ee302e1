"""What ranks tell each other, and how a batch settles gathered gradients."""

import socket
from datetime import timedelta

import pytest
import torch

from embedsmith.core import collectives
from embedsmith.core.batch import ABSENT, PairBatch, RetrievalBatch, Side, gather_pair_scores
from embedsmith.core.collectives import (
    average_gradients,
    join_ranks,
    lost_ranks,
    max_over_ranks,
    mean_over_ranks,
    objects_of_all_ranks,
    on_first_rank,
    rank,
)
from embedsmith.core.errors import DataError, TrainingError
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
        "max": max_over_ranks(rank()),
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
