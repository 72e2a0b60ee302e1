"""How long does measuring the conflict of gradients take, on a real model?

`python -m bench.conflict_time` trains MiniLM on Debian's pairs and the STS benchmark in turn, without `train.conflict`
and with it, every so many steps and with the default share of the time (3 %), and prints beside what the run itself
says (`conflict_time` in metrics.jsonl) how many cosines it has, and the seconds of a step by the clock over those
without, median of rounds that alternate. Results, with the machine and the versions, go to
bench/results/conflict_time.json. About 12 minutes on two quiet cores; `--rounds 1` is a third.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import embedsmith as es
from bench.common import RESULTS, WORK, environment, minilm, write_json
from bench.conflict import source

SHARE = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", nargs="+", type=int, default=[1, 5, 20], help="steps between two measurements")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="an encoder's folder in place of MiniLM")
    parser.add_argument("--work", type=Path, default=WORK / "conflict_time")
    parser.add_argument("--results", type=Path, default=RESULTS / "conflict_time.json")
    arguments = parser.parse_args()
    logging.getLogger("embedsmith").setLevel(logging.WARNING)
    rows: dict[int, list[dict[str, float]]] = {}
    for number in range(arguments.rounds):
        for every in (0, *arguments.every):
            rows.setdefault(every, []).append(run_of(every, number, arguments))
    plain = statistics.median(row["seconds"] for row in rows[0])
    settings = {"steps": arguments.steps, "batch": arguments.batch, "share": SHARE}
    write_json(arguments.results, {"environment": environment(), **settings, "rounds": rows})
    print(f"without: {plain / arguments.steps:.2f} s a step")
    for every in arguments.every:
        took = statistics.median(row["seconds"] for row in rows[every]) / plain - 1
        said = max(row["conflict_time"] for row in rows[every])
        met = "met" if said <= SHARE else "NOT met"
        words = f"{said:.2%} of the time by its own count ({met}), {took:+.1%} by the clock"
        print(f"every {every}: {rows[every][0]['cosines']:.0f} cosines, {words}")


def run_of(every: int, number: int, arguments: argparse.Namespace) -> dict[str, float]:
    """A run, measured or (`every` 0) not: its seconds from the first step to the last, and what it says of itself."""
    folder = arguments.work / f"every-{every}-round-{number}"
    data = [source(name, arguments.work / "rows", 2500, (0, 1)) for name in ("debian", "stsb")]
    settings: dict[str, Any] = {"conflict": {"every": every, "share": SHARE}} if every else {}
    started = time.perf_counter()
    es.train(
        model={"path": arguments.model or minilm(), "max_length": 64},
        data=[each | {"batch_size": arguments.batch} for each in data],
        output=folder,
        steps=arguments.steps,
        plan={"order": "strict", "schedule": "temperature", "temperature": 0.0},
        checkpoint_every=arguments.steps,
        keep_checkpoints=1,
        log_every=1,
        log_with=[],
        overwrite=folder.exists(),
        **settings,
    )
    seconds = time.perf_counter() - started
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    cosines = sum("cosine/debian~stsb" in line for line in lines)
    shares = [line["conflict_time"] for line in lines if "conflict_time" in line]
    return {"seconds": seconds, "cosines": cosines, "conflict_time": shares[-1] if shares else 0.0}


if __name__ == "__main__":
    main()
