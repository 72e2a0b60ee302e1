"""The objectives over a query's own documents once more, with Python loops over float64 numbers: of lists of
(score, grade), and of the examples of the other losses, where positives have the grade 1 and negatives 0."""

from __future__ import annotations

import math

from tests.losses.world import mean, queries, softmax


def lists(loss, world):
    for _, query, positives, negatives in queries(world):
        graded = [(d, 1.0) for d in positives] + [(d, 0.0) for d in negatives if d not in positives]
        yield [(world.score(loss.head, query, d) / loss.temperature, grade) for d, grade in graded]


def binary(loss, world):
    return binary_of(loss, lists(loss, world))


def listnet(loss, world):
    return listnet_of(loss, lists(loss, world))


def lambda_loss(loss, world):
    return lambda_of(loss, lists(loss, world))


def binary_of(loss, scored):
    values = []
    for own in scored:
        for s, y in own:
            p = 1 / (1 + math.exp(-s))
            values.append(-loss.positive_weight * y * math.log(p) - (1 - y) * math.log(1 - p))
    return mean(values)


def listnet_of(loss, scored):
    values = []
    for own in scored:
        if len(own) >= 2:
            target = softmax([y / loss.grade_temperature for _, y in own])
            student = softmax([s for s, _ in own])
            values.append(-math.fsum(p * math.log(q) for p, q in zip(target, student, strict=True)))
    return mean(values)


def lambda_of(loss, scored):
    values = []
    for own in scored:
        order = sorted(range(len(own)), key=lambda place: -own[place][0])
        rank = {place: number for number, place in enumerate(order, 1)}
        discount = lambda r: math.log2(1 + r)
        most = loss.k or len(own)
        best = sorted((2**y - 1 for _, y in own), reverse=True)[:most]
        ideal = math.fsum(gain / discount(r) for r, gain in enumerate(best, 1))
        terms = []
        for a, (s_a, y_a) in enumerate(own):
            for b, (s_b, y_b) in enumerate(own):
                if not y_a > y_b:
                    continue
                change = abs((2**y_a - 2**y_b) / ideal)
                lambdarank = abs(1 / discount(rank[a]) - 1 / discount(rank[b]))
                apart = abs(rank[a] - rank[b])
                ndcg2 = abs(1 / discount(apart) - 1 / discount(apart + 1))
                weight = {"lambdarank": lambdarank, "ndcg2": ndcg2, "ndcg2++": lambdarank + loss.mu * ndcg2}
                counts = min(rank[a], rank[b]) <= most
                terms.append(counts * change * weight[loss.weight] * math.log2(1 + math.exp(s_b - s_a)))
        if terms:
            values.append(math.fsum(terms))
    return mean(values)
