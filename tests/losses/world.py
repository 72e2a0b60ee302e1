"""An example as numbers: scores of texts, and the ids that matter to a loss, found with Python loops."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from tests.losses.examples import Pairs, Retrieval, Tiny


@dataclass(frozen=True)
class World:
    """An example with the numbers a model gives its texts; `width`: leading coordinates of dense heads."""

    example: Retrieval | Pairs
    model: Tiny
    extras: dict
    width: int | None = None
    seen: dict = field(default_factory=dict)

    def vector(self, head, text):
        return self._once(("vector", head, text), lambda: self._vector(head, text))

    def score(self, head, a, b):
        return self._once((head, a, b), lambda: self._score(head, a, b))

    def _once(self, key, compute):
        key = (self.width, *key)
        if key not in self.seen:
            self.seen[key] = compute()
        return self.seen[key]

    def _vector(self, head, text):
        (dense,) = self.model(torch.tensor([text]), [head])[head].tensors()
        vector = dense[0].tolist()
        if self.width is None:
            return vector
        vector = vector[: self.width]
        return [x / math.sqrt(math.fsum(y * y for y in vector)) for x in vector]

    def _score(self, head, a, b):
        if head in ("dense", "middle"):
            return dot(self.vector(head, a), self.vector(head, b))
        left, right = (self.model(torch.tensor([text]), [head])[head] for text in (a, b))
        if head == "sparse":
            tables = []
            for side in (left, right):
                table: dict[int, float] = {}
                for coordinate, weight in zip(side.coordinate_NT[0].tolist(), side.weight_NT[0].tolist(), strict=True):
                    table[coordinate] = max(weight, table.get(coordinate, 0.0))
                tables.append(table)
            return math.fsum(weight * tables[1].get(c, 0.0) for c, weight in tables[0].items())
        rows = [
            [v for v, real in zip(side.vector_NTD[0].tolist(), side.mask_NT[0].tolist(), strict=True) if real]
            for side in (left, right)
        ]
        return sum(max(dot(q, d) for d in rows[1]) for q in rows[0]) / len(rows[0])


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def mean(values):
    return math.fsum(values) / len(values) if values else 0.0


def unique(values):
    return list(dict.fromkeys(value for value in values if value >= 0))


def queries(world):
    """(row, query, its positives, its negatives): rows that are a query, slots that hold a document, once each."""
    e = world.example
    for row, query in enumerate(e.query):
        if query >= 0:
            positives = unique(e.positive[row])
            yield row, query, positives, [d for d in unique(e.negative[row])]


def known_positives(world, row, masked):
    e = world.example
    if not masked:
        return set(unique(e.positive[row]))
    group = e.query if e.label is None else e.label
    same = [other for other in range(len(e)) if group[other] == group[row]]
    return {d for other in same for d in unique(e.positive[other])}


def everything(world):
    e = world.example
    return unique([d for row in (*e.positive, *e.negative) for d in row])


def all_positives(world):
    return unique([d for row in world.example.positive for d in row])


def exchanged(world):
    e = world.example
    if isinstance(e, Pairs):
        return replace(world, example=Pairs(e.right, e.left, e.label, e.step))
    documents = all_positives(world)
    askers = [unique([q for row, q, positives, _ in queries(world) if d in positives]) for d in documents]
    width = max(map(len, askers), default=1)
    label = None if e.label is None else [e.label[e.query.index(asked[0])] for asked in askers]
    slots = [asked + [-1] * (width - len(asked)) for asked in askers]
    swapped = Retrieval(documents, slots, [[] for _ in documents], label, e.step)
    return replace(world, example=Extra(swapped, e.query))


class Extra(Retrieval):
    """A retrieval example with candidates that belong to no row."""

    def __init__(self, example, more):
        super().__init__(example.query, example.positive, example.negative, example.label, example.step)
        object.__setattr__(self, "more", unique(more))


def softmax(values):
    z = math.fsum(map(math.exp, values))
    return [math.exp(value) / z for value in values]


def graded(loss, world):
    e = world.example
    rows = [row for row in range(len(e)) if e.left[row] >= 0]
    return [(world.score(loss.head, e.left[row], e.right[row]), e.label[row]) for row in rows]
