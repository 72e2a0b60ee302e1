"""What verbs take of memory on many short rows, over what their imports take, and whether training grows by steps.

    python -m bench.memory                                   # 2,000,000 rows, 5,000 steps
    python -m bench.memory --rows 20000 --steps 200 --verbs inspect train

Every verb runs in a fork of a process that has imported everything, so what it takes is its own. Mining looks for
negatives of 2,000 queries in all rows. Results go to bench/results/memory.json.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from tests.faults.server import Server
from tests.faults.workplace import furnish
from tests.tinybert import WORDS

from bench.common import RESULTS, environment, read_json, write_json

LIMIT = 1024.0
"""MiB a verb may take."""
GROWTH = 64.0
"""MiB that all steps may take over the first tenth of them."""
PATIENCE = 4 * 3600
VERBS = ("inspect", "curate", "train", "encode", "mine", "steps")


def rows_to(folder: Path, count: int) -> None:
    """`many.jsonl`, of distinct queries and documents, and `many.txt`."""
    chance = random.Random(0)
    with (folder / "many.jsonl").open("w") as pairs, (folder / "many.txt").open("w") as texts:
        for number in range(count):
            query, document = (" ".join(chance.choices(WORDS, k=4)) + f" {number}" for _ in range(2))
            pairs.write(json.dumps({"query": query, "pos": [document]}) + "\n")
            texts.write(document + "\n")


def commands(folder: Path, steps: int) -> dict[str, list[tuple[str, ...]]]:
    """The commands of each verb; `steps` has a short and a long training."""
    tree = yaml.safe_load((folder / "train.yaml").read_text())
    tree["data"] = [{"path": "many.jsonl", "cache": "store"}]
    (folder / "many-train.yaml").write_text(yaml.safe_dump(tree))
    mining = {
        "data": {"path": "many.jsonl", "limit": 2000},
        "corpus": [{"path": "many.jsonl", "column": "query"}],
        "searchers": [{"type": "bm25"}],
        "candidates": 8,
        "select": {"negatives": 2},
        "output": "many-mined.jsonl",
    }
    (folder / "many-mine.yaml").write_text(yaml.safe_dump(mining))
    curate = ("curate", "many.jsonl", "many-curated.jsonl", "--step", "length", "--step", "exact_duplicates")
    training = ("train", "many-train.yaml", "train.checkpoint_every=1000000", "train.log_every=100")
    return {
        "inspect": [("inspect", "many.jsonl", "--json")],
        "curate": [curate],
        "train": [(*training, "output=many-run", "train.steps=20")],
        "encode": [("encode", "many.txt", "many-vectors", "--model", "model")],
        "mine": [("mine", "many-mine.yaml")],
        "steps": [(*training, f"output=steps-{count}", f"train.steps={count}") for count in (steps // 10, steps)],
    }


def measured(server: Server, folder: Path, verbs: list[str], steps: int) -> Iterator[tuple[str, float, float]]:
    """Verb, MiB and seconds; of `steps`, the MiB that the long training takes over the short one."""
    for verb, each in commands(folder, steps).items():
        if verb in verbs:
            outcomes = [server.one(command, folder, patience=PATIENCE) for command in each]
            for outcome in outcomes:
                if outcome.code != 0:
                    raise RuntimeError(f"{verb} ended with {outcome.code}: {outcome.text[-2000:]}")
            last = outcomes[-1]
            yield verb, last.memory - (outcomes[0].memory if verb == "steps" else 0.0), last.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--verbs", nargs="+", default=VERBS, choices=VERBS)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="memory-"))
    kept = read_json(RESULTS / "memory.json", {})
    over = []
    try:
        with Server() as server:
            furnish(folder)
            rows_to(folder, arguments.rows)
            for verb, mib, seconds in measured(server, folder, arguments.verbs, arguments.steps):
                limit = GROWTH if verb == "steps" else LIMIT
                count = arguments.steps if verb == "steps" else arguments.rows
                print(f"{verb:8} {count:9,} {mib:8.0f} MiB (at most {limit:.0f}) {seconds:7.1f} s", flush=True)
                over += [verb] if mib > limit else []
                kept[verb] = environment() | {"count": count, "mib": round(mib), "seconds": round(seconds, 1)}
                write_json(RESULTS / "memory.json", kept)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(f"over the limit: {', '.join(over)}" if over else 0)


if __name__ == "__main__":
    main()
