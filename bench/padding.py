"""Real tokens over padded tokens, and training tokens per second, of plans that go by length and of plain shuffling.

    python -m bench.padding                        # MiniLM on real package descriptions, about 10 minutes
    python -m bench.padding --rows 1000 --steps 1 --rounds 1

Data: `pairs/debian-en-train.jsonl.gz` (one line -> a description of 10 to 1,000 tokens), texts cut at --max-length.
`shuffled`: batches at random, both sides padded to the longest text of their batch, as trainers do by default.
`shuffled, chunks`: the same batches, encoded in chunks of similar length (what every plan of embedsmith gets).
`groups`: `train.plan.lengths: auto`. `tokens`: `train.plan.batch_tokens`, about the same tokens a step.
The share of padding is that of a whole epoch; speed counts real tokens of whole training steps, forward, backward and
update, in rounds that take the plans in turn, steps spread over the epoch.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from bench.common import RESULTS, WORK, data_path, environment, minilm, write_json
from embedsmith.core.recipe import parse
from embedsmith.core.tokens import IntArray
from embedsmith.train import Recipe
from embedsmith.train.build import make_accelerator
from embedsmith.train.feed import Draw
from embedsmith.train.loop import Run, build, update
from embedsmith.train.step import Chunk, Memory, Part

BATCH = 64
PLANS: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "shuffled, chunks": {},
    "groups": {"lengths": "auto"},
    "tokens": {"batch_tokens": 0},  # the budget is filled in
}


def mixed_file(rows: int) -> Path:
    """The first rows of the data, as a file of its own."""
    path = WORK / "padding" / f"pairs-{rows}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(data_path("pairs/debian-en-train.jsonl.gz"), "rt", encoding="utf-8") as file:
        path.write_text("".join(line for line, _ in zip(file, range(rows), strict=False)), encoding="utf-8")
    return path


def make_run(path: Path, plan: dict[str, Any], max_length: int) -> Run:
    tree = {
        "model": {"path": minilm(), "max_length": max_length},
        "data": [{"path": str(path), "task": "retrieval", "negatives": 0}],
        "train": {"batch_size": BATCH, "precision": "fp32", "log_with": [], "plan": plan},
        "output": str(WORK / "padding" / "run"),
    }
    recipe = parse(Recipe, tree)
    return build(recipe, make_accelerator(recipe))


def by_side(part: Part) -> Callable[[Memory, IntArray], list[Chunk]]:
    """Chunks of plain training: each side of the batch whole."""

    def cut(memory: Memory, length_N: IntArray) -> list[Chunk]:
        sides = np.split(np.arange(len(length_N)), [part.ids.sizes[0]])
        return [Chunk(rows, len(rows) * int(length_N[rows].max()), keep=True) for rows in sides]

    return cut


def chunks_of(name: str, run: Run, draw: Draw) -> tuple[int, int]:
    """(real, padded) tokens of a step."""
    tokens, [part] = draw
    cut = by_side(part) if name == "shuffled" else Memory.plan
    return int(tokens.length_N.sum()), sum(chunk.tokens for chunk in cut(run.memory, tokens.length_N))


def tokens_per_second(name: str, run: Run, numbers: list[int]) -> float:
    batches = [run.feed.draw(number) for number in numbers]
    tokens, started = 0, time.perf_counter()
    for draw in batches:
        with mock.patch.object(Memory, "plan", by_side(draw[1][0]) if name == "shuffled" else Memory.plan):
            output, _, _ = update(run, draw)
        tokens += output.tokens
    return tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6, help="timed training steps of each plan a round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    path = mixed_file(arguments.rows)
    runs, found = {}, {}
    for name, plan in PLANS.items():
        budget = {"batch_tokens": BATCH * 2 * arguments.max_length // 2} if "batch_tokens" in plan else {}
        runs[name] = make_run(path, plan | budget, arguments.max_length)
        steps = runs[name].feed.steps_per_epoch
        counts = [chunks_of(name, runs[name], runs[name].feed.draw(number)) for number in range(steps)]
        real, padded = (sum(each) for each in zip(*counts, strict=True))
        found[name] = {"real over padded": real / padded, "steps": steps, "tokens": real, "speeds": []}
        print(f"{name}: real over padded tokens {real / padded:.3f} ({steps} steps)", flush=True)
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            numbers = np.linspace(0, run.feed.steps_per_epoch - 1, arguments.steps).astype(int).tolist()
            found[name]["speeds"].append(tokens_per_second(name, run, numbers))
    plain = found["shuffled"]["speeds"]
    for name, one in found.items():
        ratio = statistics.median(mine / base for mine, base in zip(one["speeds"], plain, strict=True))
        one["times plain shuffling"] = ratio
        print(f"{name}: {statistics.median(one['speeds']):,.0f} tokens/s, {ratio:.2f} times plain shuffling")
    write_json(RESULTS / "padding.json", {"environment": environment(), "arguments": vars(arguments), "plans": found})


if __name__ == "__main__":
    main()
