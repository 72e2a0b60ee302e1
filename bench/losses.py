"""What the loss library's arithmetic is worth. One command, ratios to bench/results/losses.json:

    python -m bench.losses [--quick] [--parts lists streamed]

1. PRO, RankKL and CoSENT at 1,024 pairs, forward and backward, against the same arithmetic as published: an ordered
   Python loop over the list (PRO), ranks by comparing lists (RankKL), the matrix of all pairs (CoSENT). Labels are
   drawn from STS-B's; PRO is also timed with 1,024 distinct labels, its dearest case.
2. Streamed InfoNCE: peak memory over the inputs and their gradients at 32,768 queries by 65,536 candidates of width
   128, and its time for a score entry against the plain path at 8,192 by 16,384.

Every measurement of memory runs in a process of its own. Times are processor time of one thread, medians of
interleaved runs; the second part takes minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import RESULTS, data_path, environment, read_json, resident, write_json
from bench.quality_joint import read_lines
from embedsmith.core.batch import Loss, PairBatch, RetrievalBatch, Side
from embedsmith.core.reps import Dense
from embedsmith.losses import PRO, CoSENT, InfoNCE, RankKL

RESULT = RESULTS / "losses.json"
WIDTH = 128


def pair_batch(count: int, distinct: bool) -> PairBatch:
    """Pairs whose vectors are one number wide, so that next to nothing but the loss's arithmetic is measured. Labels
    are those of STS-B's training pairs (72 values), or all `distinct`."""
    generator = torch.Generator().manual_seed(0)
    score_N1 = torch.rand(count, 1, generator=generator) * 2 - 1
    sides = [Side({"dense": Dense(vector)}) for vector in (score_N1, torch.ones(count, 1))]
    ids = torch.arange(count)
    rows = read_lines(data_path("sts/stsb-en-train.jsonl"))
    drawn = torch.tensor([row["score"] / 5 for row in random.Random(0).sample(rows, count)])
    label_N = torch.rand(count, generator=generator) if distinct else drawn
    return PairBatch(task="sts", left=sides[0], right=sides[1], left_id_N=ids, right_id_N=ids + count, label_N=label_N)


def loop_pro(score_N: Tensor, label_N: Tensor, temperature: float = 0.05) -> Tensor:
    """The published arithmetic: items in order of label; for each the log-softmax of its own logit among those of
    the items below it, added to a running sum."""
    order = torch.argsort(label_N, descending=True)
    logit_N, label_N = score_N[order] / temperature, label_N[order]
    total, anchors = torch.zeros(()), 0
    for k in range(len(label_N) - 1):
        gap = label_N[k] - label_N[k + 1 :]
        lower = gap > 1e-8
        if lower.any():
            gap = gap[lower]
            own = logit_N[k] * gap.max()
            others = logit_N[k + 1 :][lower] * gap
            total = total + torch.cat([own[None], others]).log_softmax(0)[0]
            anchors += 1
    return -total / anchors


def items_pro(score_N: Tensor, label_N: Tensor, temperature: float = 0.05) -> Tensor:
    """The ordered loop one item at a time, as the published code writes it: inner loop over lower items."""
    order = torch.argsort(label_N, descending=True).tolist()
    terms = []
    for place, k in enumerate(order):
        gaps = [(i, label_N[k] - label_N[i]) for i in order[place + 1 :]]
        gaps = [(i, gap) for i, gap in gaps if gap > 1e-8]
        if gaps:
            own = torch.exp(score_N[k] * torch.stack([gap for _, gap in gaps]).max() / temperature)
            total = own
            for i, gap in gaps:
                total = total + torch.exp(score_N[i] * gap / temperature)
            terms.append(torch.log(total) - torch.log(own))
    return torch.stack(terms).mean()


def loop_rank_kl(score_N: Tensor, label_N: Tensor, temperature: float = 0.05) -> Tensor:
    """Ranks by comparing every label with every other in Python lists, then torch's divergence."""
    label = label_N.tolist()
    ranks = [sum(other > y for other in label) + (sum(other == y for other in label) - 1) / 2 for y in label]
    target = torch.tensor([(len(label) - 1 - r) / (len(label) - 1) / temperature for r in ranks]).softmax(-1)
    return F.kl_div((score_N / temperature).log_softmax(-1), target, reduction="sum") / len(label)


def matrix_cosent(score_N: Tensor, label_N: Tensor, temperature: float = 0.05) -> Tensor:
    """The matrix of all differences, ties and wrong orders pushed to -1e12."""
    logit = score_N / temperature
    difference = logit[None, :] - logit[:, None]
    difference = difference - (label_N[:, None] <= label_N[None, :]).float() * 1e12
    return torch.cat([torch.zeros(1), difference.flatten()]).logsumexp(0)


def seconds(run: Callable[[], Tensor]) -> tuple[float, float]:
    """Forward and backward once: processor seconds and the value."""
    start = time.process_time()
    value = run()
    value.backward()  # type: ignore[no-untyped-call]
    return time.process_time() - start, value.item()


def compare(
    loss: Loss, published: Callable[[Tensor, Tensor], Tensor], count: int, repeats: int, distinct: bool = False
) -> dict[str, Any]:
    batch = pair_batch(count, distinct)
    ours = lambda: loss(batch).value
    theirs = lambda: published(batch.scores()[0], batch.label_N)
    seconds(ours)
    rows = [([seconds(ours) for _ in range(10)], [seconds(theirs)]) for _ in range(repeats)]
    mine, loop = (statistics.median(run[0] for row in rows for run in row[side]) for side in (0, 1))
    value, other = rows[0][0][0][1], rows[0][1][0][1]
    assert abs(value - other) < 1e-3 * max(1.0, abs(other)), (value, other)
    return {"pairs": count, "ms": 1000 * mine, "published_ms": 1000 * loop, "times_faster": loop / mine}


def retrieval_batch(queries: int, candidates: int) -> RetrievalBatch:
    generator = torch.Generator().manual_seed(0)
    query, document = (
        Side({"dense": Dense(F.normalize(torch.randn(count, WIDTH, generator=generator)))})
        for count in (queries, candidates)
    )
    hard = candidates // queries - 1
    document_id_N = torch.arange(candidates)
    return RetrievalBatch(
        task="retrieval",
        query=query,
        document=document,
        query_id_Q=torch.arange(queries) + candidates,
        positive_id_QP=document_id_N[:queries, None],
        negative_id_QM=document_id_N[queries:].view(queries, hard),
        document_id_N=document_id_N,
    )


def peak_of(queries: int, candidates: int, block_size: int | None) -> dict[str, float]:
    """In this process, on one thread: processor seconds, and peak resident memory above the inputs and room for their
    gradients."""
    torch.set_num_threads(1)
    small = retrieval_batch(64, 128)
    InfoNCE(block_size=32)(small).value.backward()  # type: ignore[no-untyped-call]
    batch = retrieval_batch(queries, candidates)
    before = resident() + 4 * WIDTH * (queries + candidates) / 2**20
    start = time.process_time()
    InfoNCE(block_size=block_size)(batch).value.backward()  # type: ignore[no-untyped-call]
    return {"seconds": time.process_time() - start, "peak_mib": resident("VmHWM") - before}


def in_process(*arguments: int | None) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.losses", "--measure", *(str(argument or 0) for argument in arguments)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def streamed(quick: bool) -> dict[str, Any]:
    plain_size, large_size = ((2048, 4096), (4096, 8192)) if quick else ((8192, 16384), (32768, 65536))
    block_size = 512
    runs = [(in_process(*plain_size, None), in_process(*plain_size, block_size)) for _ in range(1 if quick else 3)]
    plain, blocks = (statistics.median(run[side]["seconds"] for run in runs) for side in (0, 1))
    large = in_process(*large_size, block_size)
    entries = [size[0] * size[1] for size in (plain_size, large_size)]
    return {
        "width": WIDTH,
        "block_size": block_size,
        "plain": {"size": plain_size, "seconds": plain, "peak_mib": runs[0][0]["peak_mib"]},
        "streamed_same_size": {"seconds": blocks, "peak_mib": runs[0][1]["peak_mib"], "time_ratio": blocks / plain},
        "streamed_large": {"size": large_size, **large},
        "time_for_an_entry_ratio": (large["seconds"] / entries[1]) / (plain / entries[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; writes nothing")
    parser.add_argument("--parts", nargs="+", choices=("lists", "streamed"), default=["lists", "streamed"])
    parser.add_argument("--measure", nargs=3, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        queries, candidates, block_size = arguments.measure
        print(json.dumps(peak_of(queries, candidates, block_size or None)))
        return
    result = read_json(RESULT, {})
    if "lists" in arguments.parts:
        result |= lists(*((128, 2) if arguments.quick else (1024, 9)))
    if "streamed" in arguments.parts:
        result |= {"streamed_infonce": streamed(arguments.quick) | {"environment": environment()}}
    print(json.dumps(result, indent=2))
    if not arguments.quick:
        write_json(RESULT, result)


def lists(count: int, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {
        "pro": compare(PRO(), loop_pro, count, repeats),
        "pro_distinct_labels": compare(PRO(), loop_pro, count, repeats, distinct=True),
        "pro_item_by_item": compare(PRO(), items_pro, count // 4, 1),
        "rank_kl": compare(RankKL(), loop_rank_kl, count, repeats),
        "cosent": compare(CoSENT(), matrix_cosent, count, repeats),
        "environment": environment(),
    }


if __name__ == "__main__":
    main()
