"""Planning a million records: build time, memory and next-batch time, beside sentence-transformers.

    python -m bench.data_plan                            # one million records of ten files, about 3 minutes
    python -m bench.data_plan --records 100000

Both sides get the same records in memory and cut them into batches of 64 in which no two rows share a text; batches of
all files come in proportion. The peer is `NoDuplicatesBatchSampler` (with and without its precomputed hashes) under
`ProportionalBatchSampler`, over `datasets` held in memory. Each side runs in a process of its own. Build: from records
to the first batch. Memory: the highest resident size during build and epoch, above that before. The next batch is
timed over a whole epoch (the peer: 4,000 batches); for embedsmith also the start of the next epoch, when every file
draws a new pass.
On a shared machine the processor seconds of the build say more than the clock.
One row in twenty repeats an earlier query and one in twenty an earlier positive.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.common import RESULTS, environment, resident, write_json

FILES, BATCH = 10, 64
SIDES = ("embedsmith", "embedsmith, lengths", "sentence-transformers", "sentence-transformers, hashes")


def texts(file: int, count: int) -> Iterator[tuple[str, str]]:
    chance = np.random.default_rng(file)
    repeat = chance.random((count, 2)) < 0.05
    earlier = (chance.random((count, 2)) * np.arange(count)[:, None]).astype(int)
    for row in range(count):
        query, positive = (int(earlier[row, side]) if repeat[row, side] else row for side in (0, 1))
        words = "and a few words more " * (positive % 7 + 1)
        yield f"question {query} of file {file}: what is it?", f"answer {positive} of file {file}, {words}"


def embedsmith(count: int, lengths: bool) -> dict[str, Any]:
    from embedsmith.data import BatchPlan, PlanConfig, PlannedSource, Record, row_facts

    sets = [[Record(query, (positive,)) for query, positive in texts(file, count // FILES)] for file in range(FILES)]
    before, started, busy = resident("VmHWM"), time.perf_counter(), time.process_time()
    facts = tuple(row_facts(records) for records in sets)
    read = time.perf_counter()
    config = PlanConfig(lengths="auto" if lengths else None)
    sources = [PlannedSource(len(known), BATCH, facts=known) for known in facts]
    plan = BatchPlan(tuple(sources), config=config)
    plan.at(0)
    built, busy = time.perf_counter(), time.process_time() - busy
    steps = plan.steps_per_epoch
    epoch = clock(lambda: plan.at, range(1, steps))
    following = clock(lambda: plan.at, range(steps, steps + 2000))
    return {
        "build": built - started,
        "build, processor": busy,
        "of which reading texts": read - started,
        "memory": resident("VmHWM") - before,
        **epoch,
        "longest of the next epoch": following["longest"],
        "rows left out": sum(plan.unused_rows),
    }


def clock(make: Callable[[], Callable[[int], Any]], steps: range) -> dict[str, float]:
    """Milliseconds a batch."""
    call, taken = make(), []
    for step in steps:
        start = time.perf_counter()
        call(step)
        taken.append(1000 * (time.perf_counter() - start))
    return {"mean": float(np.mean(taken)), "p99": float(np.percentile(taken, 99)), "longest": float(max(taken))}


def peer(count: int, hashes: bool) -> dict[str, Any]:
    import datasets
    import torch
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler, ProportionalBatchSampler
    from torch.utils.data import ConcatDataset

    datasets.disable_progress_bars()
    sets = []
    for file in range(FILES):
        queries, positives = zip(*texts(file, count // FILES), strict=True)
        sets.append(datasets.Dataset.from_dict({"anchor": list(queries), "positive": list(positives)}))
    before, started, busy = resident("VmHWM"), time.perf_counter(), time.process_time()
    options: dict[str, Any] = {"precompute_hashes": True, "precompute_num_proc": None} if hashes else {}
    samplers = [
        NoDuplicatesBatchSampler(one, BATCH, True, generator=torch.Generator(), seed=file, **options)
        for file, one in enumerate(sets)
    ]
    sampler = ProportionalBatchSampler(ConcatDataset(sets), samplers, torch.Generator(), 0)
    batches = iter(sampler)
    next(batches)
    built, busy = time.perf_counter(), time.process_time() - busy
    limit = min(len(sampler), 4000)
    epoch = clock(lambda: lambda step: next(batches), range(1, limit))
    return {
        "build": built - started,
        "build, processor": busy,
        "memory": resident("VmHWM") - before,
        **epoch,
        "steps timed": limit,
    }


def one_side(side: str, count: int) -> dict[str, Any]:
    if side.startswith("embedsmith"):
        return embedsmith(count, "lengths" in side)
    return peer(count, "hashes" in side)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--side", choices=SIDES, help="run this side here and print its figures")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(one_side(arguments.side, arguments.records)))
        return
    found = {}
    for side in SIDES:
        command = [sys.executable, "-m", "bench.data_plan", "--records", str(arguments.records), "--side", side]
        found[side] = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
        figures = ", ".join(f"{name} {value:,.3g}" for name, value in found[side].items())
        print(f"{side}: {figures}", flush=True)
    mine, theirs = found["embedsmith"], found["sentence-transformers"]
    print(
        f"next batch: {theirs['mean'] / mine['mean']:,.0f} times as fast (seconds to build, MiB, milliseconds a batch)"
    )
    write_json(RESULTS / "data_plan.json", {"environment": environment(), "records": arguments.records, "sides": found})


if __name__ == "__main__":
    main()
