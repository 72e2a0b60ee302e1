"""Does the conflict of gradients tell which data sets hurt each other?

`python -m bench.conflict` trains MiniLM on every data set alone and on every pair of them together, with as many steps
of each set, and takes from the runs what a user gets from them:

    hurt of a pair       mean over its two sets of (loss together - loss alone) / loss alone, on rows that are held out
    cosine of a pair     mean of `cosine/A~B` of `train.conflict` in the run of both

and prints the rank correlation of minus the cosine with the hurt over all pairs: 1 if the pairs whose gradients agree
least hurt each other most. Beside it stand the interval in which 95 % of 2,000 resamples of the pairs lie, and how
often 10,000 shuffles of the pairs correlate as much. Values are means over seeds. Runs that are done are kept, so the
command can be stopped and continued. The results, with the machine and the versions, are in
bench/results/conflict.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

import embedsmith as es
from bench.common import RESULTS, WORK, data_path, environment, minilm, write_json
from bench.quality_joint import read_lines

SETS: dict[str, dict[str, Any]] = {
    "debian": {"path": "pairs/debian-en-train.jsonl.gz", "task": "retrieval"},
    "drcd": {"path": "pairs/drcd-zh-train.jsonl.gz", "task": "retrieval"},
    "nli-zh": {"path": "pairs/nli-zh-hard.jsonl.gz", "task": "retrieval", "negatives": 1},
    "stsb": {"path": "sts/stsb-en-train.jsonl", "task": "sts", "score_range": [0, 5]},
    "sick": {"path": "sts/sick-train.jsonl", "task": "sts", "score_range": [1, 5]},
    "stsb-zh": {"path": "sts/stsb-zh-native-train.jsonl", "task": "sts", "score_range": [0, 5]},
    "banking": {"path": "labels/banking77-train.jsonl", "loss": "supervised_contrastive", "per_class": 2},
}
HELD_OUT = 0.9  # a set is trained on this share of its rows, and its loss is that on the rest
RESAMPLES, SHUFFLES = 2_000, 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30, help="steps of each set")
    parser.add_argument("--rows", type=int, default=2500, help="rows of each set, drawn from all")
    parser.add_argument("--work", type=Path, default=WORK / "conflict")
    parser.add_argument("--results", type=Path, default=RESULTS / "conflict.json")
    arguments = parser.parse_args()
    logging.getLogger("embedsmith").setLevel(logging.WARNING)
    names, found = arguments.sets, {}
    for seed in arguments.seeds:
        made = {both: run_of(both, seed, arguments) for both in [*((name,) for name in names), *combinations(names, 2)]}
        found[seed] = {"~".join(both): row_of(both, made) for both in made if len(both) == 2}
    pairs = {pair: mean_of([of_seed[pair] for of_seed in found.values()]) for pair in found[arguments.seeds[0]]}
    told = agreement([-row["cosine"] for row in pairs.values()], [row["hurt"] for row in pairs.values()])
    settings = {"steps": arguments.steps, "rows": arguments.rows, "seeds": arguments.seeds}
    write_json(arguments.results, {"environment": environment(), **settings, "pairs": pairs, "agreement": told})
    for pair, row in sorted(pairs.items(), key=lambda each: each[1]["cosine"]):
        print(f"{pair:20} cosine {row['cosine']:+.3f}  hurt {row['hurt']:+.2%}")
    print(
        f"rank correlation {told['rho']:+.2f} over {len(pairs)} pairs, 95 % of resamples from "
        f"{told['low']:+.2f} to {told['high']:+.2f}, as much by chance {told['chance']:.1%}"
    )


def source(name: str, drawn: Path, rows: int, part: Sequence[float]) -> dict[str, Any]:
    """A set as a source: a sample of its rows, which `drawn` keeps, or the part of them that is held out."""
    facts, path = SETS[name], drawn / f"{name}.jsonl"
    if not path.exists():
        lines = read_lines(data_path(facts["path"]))
        chosen = random.Random(0).sample(lines, min(rows, len(lines)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return {**facts, "path": str(path), "name": name, "part": list(part), "batch_size": 32}


def run_of(both: Sequence[str], seed: int, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """The lines of numbers of the run on one set, or on two that take turns."""
    steps, rows = arguments.steps, arguments.rows
    drawn = arguments.work / f"rows-{rows}"
    folder = arguments.work / f"steps-{steps}-rows-{rows}-seed-{seed}" / "~".join(both)
    order = {"order": "strict", "schedule": "temperature", "temperature": 0.0}  # equal shares, evenly spread
    es.train(
        model={"path": minilm(), "max_length": 64},
        data=[source(name, drawn, rows, (0, HELD_OUT)) for name in both],
        evaluate={"validation": [source(name, drawn, rows, (HELD_OUT, 1)) for name in both]},
        output=folder,
        steps=steps * len(both),
        learning_rate=2e-5,
        schedule="constant",
        precision="fp32",
        plan=order,
        seed=seed,
        keep_checkpoints=1,
        checkpoint_every=steps * len(both),
        log_with=[],
        **({"conflict": {"every": 3, "share": 1.0}} if len(both) == 2 else {}),
    )
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def row_of(both: Sequence[str], made: dict[tuple[str, ...], list[dict[str, float]]]) -> dict[str, float]:
    """The figures of a pair in one seed."""
    lines = made[tuple(both)]
    together, alone = (
        {name: loss_of(of[name], name) for name in both}
        for of in (dict.fromkeys(both, lines), {name: made[(name,)] for name in both})
    )
    pair = "~".join(sorted(both))
    return {
        "cosine": mean_at(lines, f"cosine/{pair}"),
        "conflict_share": mean_at(lines, f"conflict_share/{pair}"),
        "hurt": statistics.mean((together[name] - alone[name]) / alone[name] for name in both),
    }


def loss_of(lines: Sequence[dict[str, float]], name: str) -> float:
    return [line[f"validation_loss/{name}"] for line in lines if f"validation_loss/{name}" in line][-1]


def mean_at(lines: Sequence[dict[str, float]], key: str) -> float:
    """NaN where the run was too short to say."""
    values = [line[key] for line in lines if key in line]
    return statistics.mean(values) if values else math.nan


def mean_of(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.mean(row[key] for row in rows) for key in rows[0]}


def agreement(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """Spearman's rank correlation, the ends of its 95 % interval by resampling, and how often shuffled values correlate
    as much in either direction."""
    left, right, chance = np.asarray(predicted), np.asarray(measured), np.random.default_rng(0)
    rho = rank_correlation(left, right)
    drawn = [chance.integers(0, len(left), len(left)) for _ in range(RESAMPLES)]
    resampled = np.array([rank_correlation(left[rows], right[rows]) for rows in drawn])
    shuffled = np.array([rank_correlation(chance.permutation(left), right) for _ in range(SHUFFLES)])
    known = resampled[~np.isnan(resampled)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (math.nan, math.nan)
    as_much = float((np.abs(shuffled) >= abs(rho) - 1e-12).mean())
    return {"rho": rho, "low": float(low), "high": float(high), "chance": as_much}


def rank_correlation(left: Any, right: Any) -> float:
    """NaN where all values of a side are equal."""
    if len(set(left.tolist())) < 2 or len(set(right.tolist())) < 2:
        return math.nan
    return float(spearmanr(left, right).statistic)


if __name__ == "__main__":
    main()
