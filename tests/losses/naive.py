"""Every objective once more, from its definition, with Python loops over float64 numbers.

Nothing here is shared with the code under test: no ids resolved to rows, no masks, no logsumexp, no blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import chain

import torch

from tests.losses.examples import WIDTH, Pairs, Retrieval, Tiny, make_extras, teacher_score


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


def reference(loss, example) -> float:
    """The value of any registered loss on an example."""
    with torch.no_grad():
        return evaluate(loss, World(example, Tiny(), make_extras(loss)))


def evaluate(loss, world: World) -> float:
    return REFERENCES[type(loss).registered_name](loss, world)


# ---- retrieval


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


def infonce(loss, world):
    forward = one_way(loss, world)
    return forward if not loss.symmetric else (forward + one_way(loss, exchanged(world))) / 2


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


def one_way(loss, world):
    t, h, e = loss.temperature, loss.head, world.example
    if loss.learn_temperature:
        t = math.exp(float(world.extras[loss.temperature_name].log))
    losses, weights = [], []
    for row, query, positives, negatives in queries(world):
        if not positives:
            continue
        known = known_positives(world, row, loss.mask_false_negatives)
        own = [d for d in negatives if d not in known]
        pool = {
            "all": unique([*everything(world), *getattr(e, "more", [])]),
            "positives": all_positives(world),
            "positives_and_own": unique([*all_positives(world), *own]),
            "own": own,
        }[loss.negatives]
        pool = [d for d in pool if d not in known]
        positive_scores = [world.score(h, query, d) for d in positives]
        terms = []
        targets = positive_scores if loss.multi_positive == "outside" else [max(positive_scores)]
        for number, target in enumerate(targets):
            limit = math.inf
            if loss.margin is not None:
                limit = min(limit, target + loss.margin)
            if loss.relative_margin is not None:
                limit = min(limit, target * loss.relative_margin)
            z = 0.0
            for d in pool:
                s = world.score(h, query, d)
                kind = "hard" if d in own else "in_batch"
                bonus = loss.hardness_weight * s if loss.hardness_on in (kind, "all") else 0.0
                z += math.exp(s / t + bonus) if s <= limit else 0.0
            if loss.include_qq:
                for other in unique(e.query):
                    rows = [r for r in range(len(e)) if e.query[r] == other]
                    shares = any(set(unique(e.positive[r])) & set(positives) for r in rows)
                    s = world.score(h, query, other)
                    if other != query and s <= limit and not (shares and loss.mask_false_negatives):
                        z += math.exp(s / t)
            if loss.include_dd:
                for d in all_positives(world):
                    s = world.score(h, positives[number], d)
                    z += math.exp(s / t) if d not in known and s <= limit else 0.0
            up = (
                math.fsum(math.exp(s / t) for s in positive_scores)
                if loss.multi_positive == "inside"
                else math.exp(target / t)
            )
            terms.append(-math.log(up / (up + z)))
        focal = [(1 - math.exp(-term)) ** loss.focal_gamma for term in terms]
        losses.append(mean([w * term for w, term in zip(focal, terms, strict=True)]))
        weights.append(mean(focal))
    return mean(losses) / mean(weights) if loss.focal_gamma and mean(weights) else mean(losses)


def plain_infonce(world, temperature, head, **options):
    from embedsmith.losses import InfoNCE

    return infonce(InfoNCE(temperature, head, **options), world)


def qwen3(loss, world):
    options = {"negatives": "positives_and_own", "include_qq": True, "include_dd": True}
    return plain_infonce(
        world, loss.temperature, loss.head, margin=loss.margin, hardness_weight=loss.hardness_weight, **options
    )


def f2llm(loss, world):
    hard = plain_infonce(world, loss.temperature, loss.head, negatives="own")
    if not loss.in_batch:
        return hard
    return hard + plain_infonce(world, loss.temperature, loss.head, negatives="positives")


def conan_weak(loss, world):
    return plain_infonce(world, loss.temperature, loss.head, negatives="positives", symmetric=loss.symmetric)


def cross_batch_balance(loss, world):
    rows = list(queries(world))
    values = []
    for _, query, positives, _ in rows:
        mates = [row for row in rows if row[1] == query]
        known = {d for _, _, theirs, _ in mates for d in theirs}
        pool = {d for _, _, _, negatives in mates for d in negatives} - known
        z = math.fsum(math.exp(world.score(loss.head, query, d) / loss.temperature) for d in pool)
        ups = [math.exp(world.score(loss.head, query, d) / loss.temperature) for d in positives]
        if ups:
            values.append(mean([-math.log(up / (up + z)) for up in ups]))
    return mean(values)


def cosine_consistency(loss, world):
    if isinstance(world.example, Pairs):
        return mean([1 - s for s, y in graded(loss, world) if y >= loss.threshold])
    rows = [(q, positives) for _, q, positives, _ in queries(world) if positives]
    return mean([mean([1 - world.score(loss.head, q, d) for d in positives]) for q, positives in rows])


def supervised_contrastive(loss, world):
    e = world.example
    label = {q: y for q, y in zip(reversed(e.query), reversed(e.label), strict=True) if q >= 0 and y >= 0}
    values = []
    for query in label:
        others = [a for a in label if a != query]
        same = [a for a in others if label[a] == label[query]]
        exps = {a: math.exp(world.score(loss.head, query, a) / loss.temperature) for a in others}
        if same:
            values.append(mean([-math.log(exps[p] / math.fsum(exps.values())) for p in same]))
    return mean(values)


def classifier(loss, world):
    layer = world.extras[loss.name]
    values = []
    for query, label in zip(world.example.query, world.example.label, strict=True):
        if query < 0 or label < 0:
            continue
        x = world.vector(loss.head, query)
        logit = [dot(layer.weight[c].tolist()[: len(x)], x) + float(layer.bias[c]) for c in range(loss.classes)]
        z = math.fsum(map(math.exp, logit))
        target = [loss.smoothing / loss.classes + (1 - loss.smoothing) * (c == label) for c in range(loss.classes)]
        values.append(-math.fsum(p * math.log(math.exp(v) / z) for p, v in zip(target, logit, strict=True)))
    return mean(values)


# ---- teachers


def scored_list(loss, world, query, positives, negatives):
    """(score, teacher) of a query's own documents that the teacher has seen, positives apart from negatives."""
    sides = []
    for documents in (positives, [d for d in negatives if d not in positives]):
        seen = [d for d in documents if not math.isnan(teacher_score(query, d))]
        sides.append([(world.score(loss.head, query, d), teacher_score(query, d)) for d in seen])
    return sides


def softmax(values):
    z = math.fsum(map(math.exp, values))
    return [math.exp(value) / z for value in values]


def score_kl(loss, world):
    values = []
    for _, query, positives, negatives in queries(world):
        own = list(chain(*scored_list(loss, world, query, positives, negatives)))
        if len(own) < 2:
            continue
        target = softmax([teacher / loss.teacher_temperature for _, teacher in own])
        student = softmax([s / loss.temperature for s, _ in own])
        values.append(math.fsum(p * math.log(p / q) for p, q in zip(target, student, strict=True)))
    return mean(values)


def margin_mse(loss, world):
    values = []
    for _, query, positives, negatives in queries(world):
        up, down = scored_list(loss, world, query, positives, negatives)
        pairs = [(s - r - loss.scale * (a - b)) ** 2 for s, a in up for r, b in down]
        if pairs:
            values.append(mean(pairs))
    return mean(values)


def m3_ranked_kd(loss, world):
    values = []
    for row, query, positives, negatives in queries(world):
        known = known_positives(world, row, True)
        own_documents = [*positives, *(d for d in negatives if d not in known)]
        own = sorted(
            chain(*scored_list(loss, world, query, positives, [d for d in negatives if d not in known])),
            key=lambda pair: -pair[1],
        )
        if not own:
            continue
        others = [d for d in everything(world) if d not in known and d not in own_documents]
        z = math.fsum(math.exp(world.score(loss.head, query, d) / loss.temperature) for d in others)
        target = softmax([teacher for _, teacher in own])
        total = 0.0
        for g, (score, _) in enumerate(own):
            rest = math.fsum(math.exp(s / loss.temperature) for s, _ in own[g:])
            total += target[g] * -math.log(math.exp(score / loss.temperature) / (rest + z))
        values.append(total)
    return mean(values)


def teacher_vectors(loss, world):
    e = world.example
    if isinstance(e, Pairs):
        sides = [[t for t in e.left if t >= 0], [t for t in e.right if t >= 0]]
    else:
        sides = [[t for t in e.query if t >= 0], [*everything(world)] or [63]]
    totals = []
    for texts in sides:
        values = []
        for text in texts:
            teacher = world.model.teacher[text].tolist()
            if any(math.isnan(x) for x in teacher):
                continue
            # at a Matryoshka width the leading coordinates as they are
            student = replace(world, width=None).vector(loss.head, text)[: world.width]
            if loss.project:
                weight = world.extras[loss.name].weight.tolist()
                student = [dot(row[: len(student)], student) for row in weight]
            teacher = teacher[: len(student)]
            if loss.kind == "mse":
                values.append(mean([(a - b) ** 2 for a, b in zip(student, teacher, strict=True)]))
            else:
                values.append(1 - dot(student, teacher) / math.sqrt(dot(student, student) * dot(teacher, teacher)))
        totals.append(mean(values))
    return sum(totals) / 2


def m3_self_distillation(loss, world):
    t, heads = loss.temperature, list(loss.weights)
    sums = {name: [] for name in (*heads, "ensemble", *(f"{h} taught" for h in heads))}
    for row, query, positives, _ in queries(world):
        known = known_positives(world, row, loss.mask_false_negatives)
        terms = {name: [] for name in sums}
        for positive in positives:
            candidates = [positive, *(d for d in everything(world) if d not in known)]
            scores = {h: [world.score(h, query, d) / t for d in candidates] for h in heads}
            scores["ensemble"] = [
                math.fsum(loss.weights[h] * scores[h][c] for h in heads) for c in range(len(candidates))
            ]
            target = softmax(scores["ensemble"])
            for name, values in scores.items():
                terms[name].append(-math.log(softmax(values)[0]))
            for h in heads:
                log_student = [math.log(p) for p in softmax(scores[h])]
                terms[f"{h} taught"].append(-dot(target, log_student))
        if positives:
            for name in sums:
                sums[name].append(mean(terms[name]))
    value = {name: mean(values) for name, values in sums.items()}
    first = (math.fsum(loss.lambdas[h] * value[h] for h in heads) + value["ensemble"]) / (len(heads) + 1)
    taught = math.fsum(loss.lambdas[h] * value[f"{h} taught"] for h in heads) / len(heads)
    return (first + taught) / 2 if world.example.step >= loss.start_step else first


# ---- pairs


def graded(loss, world):
    e = world.example
    rows = [row for row in range(len(e)) if e.left[row] >= 0]
    return [(world.score(loss.head, e.left[row], e.right[row]), e.label[row]) for row in rows]


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
    "classifier": classifier,
    "codiemb_sts": codiemb_sts,
    "conan_weak": conan_weak,
    "cosent": cosent,
    "cosine_consistency": cosine_consistency,
    "cross_batch_balance": cross_batch_balance,
    "f2llm": f2llm,
    "gor": gor,
    "gor_st": gor_st,
    "infonce": infonce,
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
    "teacher_vectors": teacher_vectors,
    "uniformity": uniformity,
    "weighted": weighted,
}
