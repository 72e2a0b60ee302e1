"""Every objective once more, from its definition, with Python loops over float64 numbers.

Nothing here is shared with the code under test: no ids resolved to rows, no masks, no logsumexp, no blocks; only the
rule for scores that equal their limit (`exceeds`), which the two must decide alike.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from tests.losses.examples import WIDTH, Pairs, Retrieval, Tiny, make_extras
from tests.losses.naive_ranking import binary, lambda_loss, listnet
from tests.losses.naive_retrieval import (
    classifier,
    conan_weak,
    cosine_consistency,
    cross_batch_balance,
    f2llm,
    flops,
    gist_embed,
    infonce,
    m3_ranked_kd,
    m3_self_distillation,
    margin_mse,
    mntp,
    plain_infonce,
    qwen3,
    retromae,
    score_kl,
    supervised_contrastive,
    teacher_neighbours,
    teacher_vectors,
)
from tests.losses.world import Extra, World, dot, everything, exchanged, graded, mean, softmax, unique


def reference(loss, example) -> float:
    """The value of any registered loss on an example."""
    with torch.no_grad():
        return evaluate(loss, World(example, Tiny(), make_extras(loss)))


def evaluate(loss, world: World) -> float:
    return REFERENCES[type(loss).registered_name](loss, world)


# ---- pairs


def ordering(values, temperature):
    total = 1.0
    for a, y_a in values:
        for b, y_b in values:
            total += math.exp((b - a) / temperature) if y_a > y_b else 0.0
    return math.log(total)


def cosent(loss, world):
    return ordering(graded(loss, world), loss.temperature)


def angle(loss, world):
    e = world.example
    values = []
    for row in range(len(e)):
        if e.left[row] < 0:
            continue
        x, y = world.vector(loss.head, e.left[row]), world.vector(loss.head, e.right[row])
        half = len(x) // 2
        total = 0j
        for k in range(half):
            z, w = complex(x[k], x[half + k]), complex(y[k], y[half + k])
            total += z * w.conjugate()
        norm = math.sqrt(dot(x, x) * dot(y, y))
        values.append((abs(total.real / norm + total.imag / norm), e.label[row]))
    return ordering(values, loss.temperature)


def pearson(loss, world):
    pairs = graded(loss, world)
    s_mean, y_mean = mean([s for s, _ in pairs]), mean([y for _, y in pairs])
    cov = mean([(s - s_mean) * (y - y_mean) for s, y in pairs])
    var_s, var_y = mean([(s - s_mean) ** 2 for s, _ in pairs]), mean([(y - y_mean) ** 2 for _, y in pairs])
    return 0.0 if var_y < 1e-12 else 1 - cov / math.sqrt(var_s * var_y + 1e-16)


def rank_kl(loss, world):
    pairs = graded(loss, world)
    count = len(pairs)
    if len({y for _, y in pairs}) < 2:
        return 0.0
    ranks = [sum(other > y for _, other in pairs) + (sum(other == y for _, other in pairs) - 1) / 2 for _, y in pairs]
    target = softmax([(count - 1 - r) / (count - 1) / loss.temperature for r in ranks])
    student = softmax([s / loss.temperature for s, _ in pairs])
    divergence = math.fsum(p * (math.log(p) - math.log(q)) for p, q in zip(target, student, strict=True))
    return divergence / count if loss.reduction == "reference" else divergence


def pro(loss, world):
    pairs = graded(loss, world)
    shift = mean([s for s, _ in pairs]) if loss.center else 0.0
    values = []
    for s_k, y_k in pairs:
        lower = [(s - shift, y_k - y) for s, y in pairs if y_k - y > 1e-8]
        if lower:
            up = math.exp((s_k - shift) * max(gap for _, gap in lower) / loss.temperature)
            values.append(-math.log(up / (up + math.fsum(math.exp(s * gap / loss.temperature) for s, gap in lower))))
    return mean(values)


def mid_nce(loss, world):
    e = world.example
    positive = [[r if y >= loss.threshold else -1] for r, y in zip(e.right, e.label, strict=True)]
    seen = Extra(Retrieval(e.left, positive, [[] for _ in e.left]), e.right)
    return plain_infonce(
        replace(world, example=seen), loss.temperature, loss.head, mask_false_negatives=loss.mask_false_negatives
    )


def codiemb_sts(loss, world):
    return math.fsum(loss.weights[name] * evaluate(term, world) for name, term in loss.terms().items())


# ---- regularisers


def far_pairs(loss, world):
    """Scores of the ordered pairs that count, for each side."""
    e = world.example
    if isinstance(e, Pairs):
        texts, close = [unique(e.left), unique(e.right)], [lambda a, b: False] * 2
    else:
        group = e.query if e.label is None else e.label
        groups_of = lambda q: {group[r] for r in range(len(e)) if e.query[r] == q}
        documents_of = lambda q: {d for r in range(len(e)) if e.query[r] == q for d in unique(e.positive[r])}
        groups_asking = lambda d: {group[r] for r in range(len(e)) if d in e.positive[r]}
        texts = [unique(e.query), everything(world) or [63]]
        close = [
            lambda a, b: bool(groups_of(a) & groups_of(b) or documents_of(a) & documents_of(b)),
            lambda a, b: bool(groups_asking(a) & groups_asking(b)),
        ]
    wanted = {"both": (0, 1), "first": (0,), "second": (1,)}[loss.sides]
    for side in wanted:
        pairs = [(a, b) for a in texts[side] for b in texts[side] if a != b and not close[side](a, b)]
        yield [world.score(loss.head, a, b) for a, b in pairs]


def uniformity(loss, world):
    return mean(
        [
            math.log(mean([math.exp(-loss.t * 2 * (1 - s)) for s in side])) if side else 0.0
            for side in far_pairs(loss, world)
        ]
    )


def gor(loss, world):
    return math.fsum(mean([s * s for s in side]) for side in far_pairs(loss, world))


def gor_st(loss, world):
    values = []
    for side in far_pairs(loss, world):
        second = mean([s * s for s in side]) - 1 / (world.width or WIDTH)
        values.append(mean(side) ** 2 + max(second, 0.0))
    return mean(values) if loss.combine == "mean" else math.fsum(values)


# ---- wrappers


def matryoshka(loss, world):
    widths = sorted({*loss.dims, WIDTH}, reverse=True)
    weights = []
    for place, width in enumerate(widths, 1):
        given = loss.weights[loss.dims.index(width)] if loss.weights and width in loss.dims else 1.0
        weights.append(1 / (place * math.sqrt(WIDTH / width)) if loss.weighting == "f2llm" else given)
    total = math.fsum(c * evaluate(loss.inner, replace(world, width=d)) for c, d in zip(weights, widths, strict=True))
    return total / math.fsum(weights) if loss.normalise else total


def weighted(loss, world):
    ramp = min((world.example.step + 1) / loss.warmup_steps, 1) ** 2 if loss.warmup_steps else 1.0
    return loss.weight * ramp * evaluate(loss.inner, world)


def symmetric(loss, world):
    return (evaluate(loss.inner, world) + evaluate(loss.inner, exchanged(world))) / 2


def per_head(loss, world):
    return math.fsum(weight * evaluate(replace(loss.inner, head=head), world) for head, weight in loss.weights.items())


def total(loss, world):
    weights = loss.weights or [1.0] * len(loss.parts)
    return math.fsum(weight * evaluate(part, world) for weight, part in zip(weights, loss.parts, strict=True))


REFERENCES = {
    "angle": angle,
    "binary": binary,
    "classifier": classifier,
    "codiemb_sts": codiemb_sts,
    "conan_weak": conan_weak,
    "cosent": cosent,
    "cosine_consistency": cosine_consistency,
    "cross_batch_balance": cross_batch_balance,
    "f2llm": f2llm,
    "gist_embed": gist_embed,
    "flops": flops,
    "retromae": retromae,
    "mntp": mntp,
    "tsdae": mntp,
    "gor": gor,
    "gor_st": gor_st,
    "infonce": infonce,
    "lambda": lambda_loss,
    "listnet": listnet,
    "m3_ranked_kd": m3_ranked_kd,
    "m3_self_distillation": m3_self_distillation,
    "margin_mse": margin_mse,
    "matryoshka": matryoshka,
    "mid_nce": mid_nce,
    "pearson": pearson,
    "per_head": per_head,
    "pro": pro,
    "qwen3": qwen3,
    "rank_kl": rank_kl,
    "score_kl": score_kl,
    "sum": total,
    "supervised_contrastive": supervised_contrastive,
    "symmetric": symmetric,
    "teacher_neighbours": teacher_neighbours,
    "teacher_vectors": teacher_vectors,
    "uniformity": uniformity,
    "weighted": weighted,
}
