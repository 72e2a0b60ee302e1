"""Naive references of the losses over candidates, labels and teachers; see naive.py."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain

import torch

from embedsmith.core.reps import exceeds
from tests.losses.examples import Pairs, Retrieval, graded_relevance, teacher_score
from tests.losses.world import (
    Extra,
    all_positives,
    dot,
    everything,
    exchanged,
    graded,
    known_positives,
    mean,
    queries,
    softmax,
    unique,
)


def infonce(loss, world):
    forward = one_way(loss, world)
    return forward if not loss.symmetric else (forward + one_way(loss, exchanged(world))) / 2


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
        grades = {d: grade(e, query, d, unknown=1.0) for d in positives}
        if loss.grades == "soft":
            listed = [d for d in own if grade(e, query, d, unknown=0.0) > 0]
            grades |= {d: grade(e, query, d, unknown=0.0) for d in listed}
            own, positives = [d for d in own if d not in listed], [*positives, *listed]
            known = {*known, *listed}
        pool = {
            "all": unique([*everything(world), *getattr(e, "more", [])]),
            "positives": all_positives(world),
            "positives_and_own": unique([*all_positives(world), *own]),
            "own": own,
        }[loss.negatives]
        pool = [d for d in pool if d not in known]
        together = loss.multi_positive == "inside" or loss.grades == "soft"
        positive_scores = [world.score(h, query, d) for d in positives]
        guides = [guide(world, query, d) for d in positives]
        terms, slots = [], range(len(positives))
        for number in slots[:1] if together else slots:
            target = max(positive_scores) if together else positive_scores[number]
            guided = max(guides) if together else guides[number]
            limit = guide_limit = math.inf
            if loss.margin is not None:
                limit = min(limit, target + loss.margin)
            if loss.relative_margin is not None:
                limit = min(limit, target * loss.relative_margin)
            if loss.guide_margin is not None:
                guide_limit = min(guide_limit, guided - loss.guide_margin)
            if loss.guide_relative_margin is not None:
                guide_limit = min(guide_limit, guided - loss.guide_relative_margin * abs(guided))

            def dropped(score, a, b, limit=limit, guide_limit=guide_limit):
                return exceeds(score, limit) or exceeds(guide(world, a, b), guide_limit)

            z = 0.0
            for d in pool:
                s = world.score(h, query, d)
                kind = "hard" if d in own else "in_batch"
                bonus = loss.hardness_weight * s if loss.hardness_on in (kind, "all") else 0.0
                z += 0.0 if dropped(s, query, d) else math.exp(s / t + bonus)
            if loss.include_qq:
                for other in unique(e.query):
                    rows = [r for r in range(len(e)) if e.query[r] == other]
                    shares = any(set(unique(e.positive[r])) & set(positives) for r in rows)
                    s = world.score(h, query, other)
                    if other != query and not dropped(s, query, other) and not (shares and loss.mask_false_negatives):
                        z += math.exp(s / t)
            if loss.include_dd:
                for d in all_positives(world):
                    s = world.score(h, positives[number], d)
                    z += 0.0 if d in known or dropped(s, positives[number], d) else math.exp(s / t)
            ups = [math.exp(s / t) for s in positive_scores]
            if loss.grades == "soft":
                total = math.fsum(grades.values())
                shares = [grades[d] / total if total else 0.0 for d in positives]
                all_ups = math.fsum(ups) + z
                terms.append(-math.fsum(y * math.log(up / all_ups) for y, up in zip(shares, ups, strict=True)))
            else:
                up = math.fsum(ups) if together else ups[number]
                terms.append(-math.log(up / (up + z)))
        if loss.grades == "soft" and not any(grades.values()):
            continue
        weight = [(1 - math.exp(-term)) ** loss.focal_gamma if loss.focal_gamma else 1.0 for term in terms]
        if loss.grades == "weights":
            weight = [w * grades[d] for w, d in zip(weight, positives, strict=True)]
        losses.append(mean([w * term for w, term in zip(weight, terms, strict=True)]))
        weights.append(mean(weight))
    weighted = loss.focal_gamma or loss.grades == "weights"
    return mean(losses) / mean(weights) if weighted and mean(weights) else mean(losses)


def grade(example, query, document, unknown):
    """Graded relevance; nobody gave any for a batch that is seen from its documents."""
    found = math.nan if isinstance(example, Extra) else graded_relevance(query, document)
    return unknown if math.isnan(found) else found


def guide(world, a, b):
    return dot(world.model.guide[a].tolist(), world.model.guide[b].tolist())


def gist_embed(loss, world):
    relative = loss.relative_margin
    margins = {"guide_margin": loss.margin} if relative is None else {"guide_relative_margin": relative}
    return plain_infonce(
        world, loss.temperature, loss.head, **margins, include_qq=loss.queries, include_dd=loss.positives
    )


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


def teacher_neighbours(loss, world):
    e = world.example
    totals = []
    for side in [e.left, e.right] if isinstance(e, Pairs) else [e.query, everything(world) or [63]]:
        teachers = {text: world.model.teacher[text].tolist() for text in side if text >= 0}
        texts = [text for text, vector in teachers.items() if not any(math.isnan(x) for x in vector)]
        values = []
        for one in texts:
            others = [text for text in texts if text != one]
            if not others:
                continue
            lengths = {text: math.sqrt(dot(teachers[text], teachers[text])) for text in texts}
            cosines = [dot(teachers[one], teachers[o]) / (lengths[one] * lengths[o]) for o in others]
            target = softmax([cosine / loss.temperature for cosine in cosines])
            found = softmax([world.score(loss.head, one, o) / loss.temperature for o in others])
            values.append(-math.fsum(p * math.log(q) for p, q in zip(target, found, strict=True)))
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
    done = max(world.example.step - loss.start_step + 1, 0)
    share = 0.5 * min(done / loss.ramp_steps, 1) if loss.ramp_steps else 0.5 * (done > 0)
    return (1 - share) * first + share * taught


def texts_of_sides(world):
    e = world.example
    if not isinstance(e, Retrieval):
        return [t for t in e.left if t >= 0], [t for t in e.right if t >= 0]
    return [q for q in e.query if q >= 0], everything(world) or [63]


def flops(loss, world):
    ramp = min((world.example.step + 1) / loss.ramp_steps, 1) ** 2 if loss.ramp_steps else 1.0
    total = 0.0
    for scale, texts in zip((loss.query, loss.document), texts_of_sides(world), strict=True):
        if not texts:
            continue
        sums: dict[int, float] = {}
        for text in texts:
            sparse = world.model(torch.tensor([text]), ["sparse"])["sparse"]
            table: dict[int, float] = {}
            for word, weight in zip(sparse.coordinate_NT[0].tolist(), sparse.weight_NT[0].tolist(), strict=True):
                table[word] = max(weight, table.get(word, 0.0))
            for word, weight in table.items():
                sums[word] = sums.get(word, 0.0) + weight
        total += scale * math.fsum((value / len(texts)) ** 2 for value in sums.values())
    return ramp * total


def retromae(loss, world, places=(0, 2)):
    queries_, documents = texts_of_sides(world)
    chosen = {"queries": queries_, "documents": documents, "both": [*queries_, *documents]}[loss.sides]
    rows = [world.vector(loss.head, text) for text in chosen]
    if not rows:
        return 0.0
    return sum(math.fsum(row[k] for row in rows) / math.fsum(row[k + 1] for row in rows) for k in places)


def mntp(loss, world):
    return retromae(loss, world, (0,))
