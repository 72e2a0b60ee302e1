"""A network of a few numbers that has every head, and batches of made-up tokens for it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from embedsmith.core.batch import PairIds, RetrievalIds
from embedsmith.core.reps import Dense, MultiVector, Sparse
from embedsmith.core.tokens import TokenBatch
from embedsmith.train.feed import Draw
from embedsmith.train.step import Memory, Part

WHOLE = Memory(chunk_tokens=10**9)


class TinyHeads(nn.Module):
    """dense, sparse and multivector from 16 hidden units, in float64: equality can be asked to the last digits."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.linear, self.weight = nn.Embedding(60, 16), nn.Linear(16, 8), nn.Linear(16, 1)
        self.dropout = nn.Dropout(dropout)
        self.double()

    def forward(self, tokens: TokenBatch, heads, rows=None):
        padded = tokens.pad(0, rows=rows)
        hidden_NTH = self.dropout(torch.tanh(self.embed(padded.id_NT)))
        mask_NT1 = padded.mask_NT[..., None]
        mean_NH = (hidden_NTH * mask_NT1).sum(1) / mask_NT1.sum(1)
        reps = {
            "dense": lambda: Dense(F.normalize(self.linear(mean_NH), dim=-1)),
            "sparse": lambda: Sparse(padded.id_NT, F.softplus(self.weight(hidden_NTH))[..., 0] * padded.mask_NT),
            "multivector": lambda: MultiVector(F.normalize(self.linear(hidden_NTH), dim=-1) * mask_NT1, padded.mask_NT),
        }
        return {head: reps[head]() for head in heads}


def tokens(count: int, seed: int, is_query: bool = False) -> TokenBatch:
    """Rows of 1 to 9 tokens."""
    generator = np.random.default_rng(seed)
    rows = [generator.integers(1, 60, generator.integers(1, 10)).tolist() for _ in range(count)]
    return TokenBatch.from_rows(rows, [0] * count, is_query)


def retrieval_part(loss, rank=0, world=1, queries=8, negatives=2, weight=1.0, group=None) -> Draw:
    """This rank's share of a batch in which two queries share a positive and one slot of negatives is empty."""
    documents = queries * (1 + negatives)
    query, document = tokens(queries, 1, True), tokens(documents, 2)
    positive_id_QP = torch.arange(queries)[:, None] * (1 + negatives)
    positive_id_QP[1] = positive_id_QP[0]
    negative_id_QM = positive_id_QP[:, :1] + torch.arange(1, 1 + negatives)
    negative_id_QM[2, -1] = -1
    mine = slice(rank * queries // world, (rank + 1) * queries // world)
    wanted = torch.cat([positive_id_QP[mine].flatten(), negative_id_QM[mine].flatten()])
    document_id_N = torch.unique(wanted[wanted >= 0])

    ids = RetrievalIds(
        query_id_Q=torch.arange(queries)[mine] + 1000,
        positive_id_QP=positive_id_QP[mine],
        negative_id_QM=negative_id_QM[mine],
        document_id_N=document_id_N,
    )
    sides = [query.take(np.arange(queries)[mine]), document.take(document_id_N.numpy())]
    return TokenBatch.concatenate(sides), [Part("retrieval", "retrieval", ids, loss, weight, group)]


def pair_part(loss, rank=0, world=1, pairs=8, weight=1.0, group=None) -> Draw:
    left, right = tokens(pairs, 3, True), tokens(pairs, 4, True)
    label_G = torch.tensor([0.0, 1.0, 0.4, 0.4, 0.9, 0.2, 0.6, 1.0], dtype=torch.float64)[:pairs]
    rows = np.arange(pairs)[rank * pairs // world : (rank + 1) * pairs // world]
    mine = torch.from_numpy(rows)

    ids = PairIds(left_id_N=mine, right_id_N=mine + 100, label_N=label_G[mine])
    return TokenBatch.concatenate([left.take(rows), right.take(rows)]), [Part("sts", "sts", ids, loss, weight, group)]


def together(*draws: Draw) -> Draw:
    return TokenBatch.concatenate([tokens for tokens, _ in draws]), [part for _, parts in draws for part in parts]


def gradients(model: nn.Module):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same(left, right, atol=1e-12):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
    assert sum(float(a.abs().sum()) for a in left) > 1e-3
