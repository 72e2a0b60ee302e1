"""Small batches with everything that goes wrong in real ones, and a linear model that makes their representations.

A text is a number; the same number has the same representation on every rank. Texts 40 and 41 differ in number only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from embedsmith.core.batch import Loss, PairBatch, Progress, RetrievalBatch, Side
from embedsmith.core.collectives import average_gradients
from embedsmith.core.reps import Dense, MultiVector, Sparse

WIDTH, TEXTS = 8, 64


class Tiny(nn.Module):
    """Every head from six features a token, float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.dense, self.middle, self.token = nn.Linear(6, WIDTH), nn.Linear(6, WIDTH), nn.Linear(6, WIDTH)
        self.weight = nn.Linear(6, 1)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.feature = torch.randn(TEXTS, 4, 6, generator=generator, dtype=torch.float64)
        self.coordinate = torch.randint(0, 12, (TEXTS, 4), generator=generator)
        self.mask = torch.rand(TEXTS, 4, generator=generator) < 0.7
        self.mask[:, 0] = True
        self.teacher = torch.randn(TEXTS, 12, generator=generator, dtype=torch.float64)
        self.teacher[5::9] = float("nan")
        self.guide = F.normalize(torch.randn(TEXTS, 5, generator=generator, dtype=torch.float64), dim=-1)
        for table in (self.feature, self.coordinate, self.mask, self.guide):
            table[41] = table[40]
        self.double()

    def forward(self, text_N, heads):
        text_N = text_N.clamp_min(0)
        feature, mask = self.feature[text_N], self.mask[text_N]
        every = {
            "dense": lambda: Dense(F.normalize(self.dense(feature.mean(1)), dim=-1)),
            "middle": lambda: Dense(F.normalize(self.middle(feature.mean(1)), dim=-1)),
            "sparse": lambda: Sparse(self.coordinate[text_N], F.softplus(self.weight(feature))[..., 0] * mask),
            "multivector": lambda: MultiVector(F.normalize(self.token(feature), dim=-1), mask),
        }
        every["retromae"] = lambda: self._pretraining(feature)
        every["mntp"] = every["tsdae"] = lambda: Dense(self._pretraining(feature).vector_ND[:, :2])
        return {head: every[head]() for head in heads}

    def _pretraining(self, feature):
        """Two sums of losses, and numbers of tokens between them."""
        made = F.softplus(self.dense(feature.mean(1))[:, :2])
        count = feature[:, 0, :2].abs().ceil()
        return Dense(torch.stack([made[:, 0], count[:, 0], made[:, 1], count[:, 1]], 1))


@dataclass(frozen=True)
class Retrieval:
    """Text numbers of queries, positives and negatives (-1: empty slot), one row a query."""

    query: list[int]
    positive: list[list[int]]
    negative: list[list[int]]
    label: list[int] | None = None
    step: int = 3

    def rows(self, rows: list[int]) -> Retrieval:
        pick = lambda column: None if column is None else [column[row] for row in rows]
        return replace(
            self,
            query=pick(self.query),
            positive=pick(self.positive),
            negative=pick(self.negative),
            label=pick(self.label),
        )

    def __len__(self) -> int:
        return len(self.query)

    @property
    def documents(self) -> list[int]:
        return sorted({text for row in (*self.positive, *self.negative) for text in row if text >= 0}) or [63]


@dataclass(frozen=True)
class Pairs:
    left: list[int]
    right: list[int]
    label: list[float]
    step: int = 3

    def rows(self, rows: list[int]) -> Pairs:
        pick = lambda column: [column[row] for row in rows]
        return replace(self, left=pick(self.left), right=pick(self.right), label=pick(self.label))

    def __len__(self) -> int:
        return len(self.left)


def teacher_score(query: int, document: int) -> float:
    """What a reranker would say; NaN for a pair it has not seen."""
    unknown = query < 0 or document < 0 or (query + document) % 7 == 0
    return float("nan") if unknown else 2 * math.sin(7.0 * query + 3.0 * document)


def graded_relevance(query: int, document: int) -> float:
    """How relevant a document is, from 0 to 1; NaN where nobody said it."""
    unknown = query < 0 or document < 0 or (query + document) % 5 == 0
    return float("nan") if unknown else max(math.sin(2.0 * query + document), 0.0)


RETRIEVAL = {
    "plain": Retrieval(list(range(6)), [[10 + i] for i in range(6)], [[20 + 2 * i, 21 + 2 * i] for i in range(6)]),
    # a query twice with different positives, a document positive for two queries, a hard negative that is another
    # row's positive, one that is a known positive, repeated slots, empty slots, tied texts, a row without positive
    "adversarial": Retrieval(
        [0, 1, 0, 3, 4, 5, 6, 7],
        [[10, 11], [12, -1], [13, 13], [12, -1], [40, 14], [-1, -1], [15, 15], [16, 17]],
        [
            [20, 13, 20],
            [21, -1, 10],
            [22, 10, 23],
            [24, 12, -1],
            [41, 25, 26],
            [27, -1, -1],
            [-1, -1, -1],
            [28, 29, 30],
        ],
    ),
    "labels": Retrieval(
        [0, 1, 2, 3, 4, 5, 6, 0],
        [[10], [11], [12], [13], [10], [15], [16], [17]],
        [[20], [21], [16], [23], [24], [25], [-1], [20]],
        label=[0, 1, 0, 2, 1, 2, 3, 0],
    ),
    "one query": Retrieval([0], [[10]], [[]]),
    "no negatives": Retrieval([0, 1, 2], [[10], [11], [10]], [[], [], []]),
}
UNDEFINED_RETRIEVAL = {
    "no positive anywhere": Retrieval([0, 0], [[-1], [-1]], [[-1], [-1]], label=[-1, -1]),
    "rows that are no query": Retrieval([-1, -1], [[-1], [-1]], [[-1], [-1]], label=[-1, -1]),
}
PAIRS = {
    "plain": Pairs(list(range(8)), list(range(10, 18)), [0.0, 1.0, 0.4, 0.3, 0.9, 0.2, 0.6, 0.8]),
    "ties": Pairs(
        [0, 0, 2, 3, 40, 41, 6, 7], [10, 11, 10, 13, 40, 40, 10, 17], [0.0, 1.0, 1.0, 0.4, 1.0, 0.5, 0.5, 0.0]
    ),
    "two classes": Pairs(list(range(6)), list(range(10, 16)), [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]),
    "padded": Pairs([0, 1, 2, -1], [10, 11, 12, -1], [0.1, 1.0, 0.5, 0.7]),
}
UNDEFINED_PAIRS = {
    "one pair": Pairs([0], [10], [0.5]),
    "all labels equal": Pairs([0, 1, 2], [10, 11, 12], [0.5, 0.5, 0.5]),
    "nothing but padding": Pairs([-1, -1], [-1, -1], [0.1, 0.7]),
}


def make_batch(model: Tiny, example, loss: Loss, extras=None, dtype=torch.float64, leaves=True):
    """A batch of the example on leaves cut from the model, and the (representations, side) pairs to push back."""
    heads = sorted(loss.heads())
    first, second = (
        (example.query, example.documents) if isinstance(example, Retrieval) else (example.left, example.right)
    )
    sides, reps = [], []
    for text in (first, second):
        text_N = torch.tensor(text)
        made = {head: _cast(rep, dtype) for head, rep in model(text_N, heads).items()}
        others = {"teacher": model.teacher, "guide": model.guide}
        side = Side({**made, **{name: Dense(table[text_N.clamp_min(0)]) for name, table in others.items()}})
        if not leaves:
            side.local = {**made, **{name: side.local[name] for name in others}}
        sides.append(side)
        reps.append(made)
    shared = {"extras": extras or {}, "progress": Progress(example.step, 100)}
    return _assemble(example, sides, shared), list(zip(reps, sides, strict=True))


def _cast(representation, dtype):
    return representation.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _assemble(example, sides, shared):
    if isinstance(example, Pairs):
        return PairBatch(
            task="sts",
            left=sides[0],
            right=sides[1],
            left_id_N=torch.tensor(example.left),
            right_id_N=torch.tensor(example.right),
            label_N=torch.tensor(example.label, dtype=torch.float64),
            **shared,
        )
    scored = lambda slots, score=teacher_score: torch.tensor(
        [[score(q, d) for d in row] for q, row in zip(example.query, slots, strict=True)], dtype=torch.float64
    )
    return RetrievalBatch(
        task="retrieval",
        query=sides[0],
        document=sides[1],
        query_id_Q=torch.tensor(example.query),
        positive_id_QP=torch.tensor(example.positive, dtype=torch.int64),
        negative_id_QM=torch.tensor(example.negative, dtype=torch.int64),
        document_id_N=torch.tensor(example.documents),
        label_Q=None if example.label is None else torch.tensor(example.label),
        positive_score_QP=scored(example.positive),
        negative_score_QM=scored(example.negative),
        positive_grade_QP=scored(example.positive, graded_relevance),
        negative_grade_QM=scored(example.negative, graded_relevance),
        **shared,
    )


def make_extras(loss: Loss, dtype=torch.float64) -> nn.ModuleDict:
    torch.manual_seed(3)
    return nn.ModuleDict(dict(loss.extras(WIDTH))).to(dtype)


def run(loss: Loss, example, dtype=torch.float64):
    """The loss's value, and the gradients of the model and the loss's extras, averaged over ranks."""
    model, extras = Tiny(), make_extras(loss, torch.float64 if dtype == torch.float64 else torch.float32)
    batch, pushed = make_batch(model, example, loss, extras, dtype)
    output = loss(batch)
    output.value.backward()
    for side in batch.sides():
        side.settle()
    for reps, side in pushed:
        for head, representation in reps.items():
            for tensor, leaf in zip(representation.floating(), side.local[head].floating(), strict=True):
                gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                torch.autograd.backward(tensor, gradient)
    parameters = [*model.parameters(), *extras.parameters()]
    average_gradients(parameters)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return output.value.detach(), gradients
