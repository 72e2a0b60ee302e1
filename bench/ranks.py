"""One process, two ranks and two shards of every verb that shares its work: seconds, memory, and whether the bytes are
the same.

    python -m bench.ranks                                        # 100,000 rows (index: 20,000) with a tiny model
    python -m bench.ranks --rows 1000000 --verbs encode
    python -m bench.ranks --rows 2000000 --verbs mine            # 2,000 queries against so many texts
    python -m bench.ranks --rows 1000000 --verbs mine-cells      # the same by an index of cells: recall, seconds
    python -m bench.ranks --rows 20000 --model ../shared/models/NAME

Memory is the most that one process took, the model and the libraries in it; `cpu` are the seconds of all processes
together, which a busy machine changes little. Every process has one thread, so that two ranks have twice the cores of
one process. Results go to bench/results/ranks.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from tests.faults.workplace import furnish

from bench.common import RESULTS, environment, read_json, write_json
from bench.memory import rows_to

VERBS = ("encode", "tokenize", "mine", "mine-cells", "mine-words", "evaluate", "index")
WAYS = ("alone", "ranks", "shards")
MOST = {"index": 20_000}
"""Rows of a verb where nothing else is asked for: an engine's own writing is no faster on ranks."""
SEARCHERS: dict[str, dict[str, Any]] = {
    "mine": {"type": "embedding"},
    "mine-cells": {"type": "embedding", "index": "IVF1024,Flat", "effort": 32},
    "mine-words": {"type": "bm25"},
}


def arguments_of(verb: str, model: str, out: Path) -> tuple[list[str], list[str]]:
    """A command, and the files that have to be equal."""
    if verb == "encode":
        return ["encode", "many.txt", str(out), "--model", model], ["vectors.npy", "ids.txt", "meta.json"]
    if verb == "tokenize":
        files = [f"many_{kind}.parquet" for kind in ("query", "corpus")]
        return ["tokenize", "many.jsonl", "--model", model, "--out", str(out)], [*files, "manifest.json"]
    if verb == "evaluate":  # what it found is compared, not the time that it took
        return ["evaluate", model, "few.jsonl", "--keep", f"{out}-kept", "--json", str(out)], ["scores"]
    if verb in SEARCHERS:
        searcher = SEARCHERS[verb] | ({} if verb == "mine-words" else {"model": model})
        tree = {
            "data": {"path": "many.jsonl", "limit": 2000},
            "corpus": [{"path": "many.jsonl", "column": "query"}],
            "searchers": [searcher],
            "candidates": 8,
            "part": 250,
            "select": {"negatives": 2},
            "output": str(out / "mined.jsonl"),
        }
        recipe = out.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump(tree))
        return ["mine", str(recipe)], ["mined.jsonl"]
    return ["index", model, "documents.jsonl", "--to", str(out)], []


def at_once(commands: list[list[str]], folder: Path) -> tuple[float, float]:
    """Run commands side by side; the most memory that a process of theirs took, in MiB, and the seconds of all on a
    core."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    processes = [subprocess.Popen(command, cwd=folder, env=variables) for command in commands]
    most = cpu = 0.0
    for process in processes:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        most, cpu = max(most, used.ru_maxrss / 1024), cpu + used.ru_utime + used.ru_stime
    if wrong := [process.args for process in processes if process.returncode != 0]:
        raise RuntimeError(f"{wrong[0]} failed")
    return most, cpu


def measured(verb: str, way: str, model: str, folder: Path) -> tuple[float, float, float]:
    """Seconds, MiB and seconds on a core of one verb in one way."""
    given, _ = arguments_of(verb, model, folder / f"{verb}-{way}")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if way == "ranks" else []
    command = [sys.executable, *launcher, "-m", "embedsmith", *given]
    started = time.perf_counter()
    rounds = [[command]]
    if way == "shards":
        rounds = [[[*command, "--shard", f"{index}/2"] for index in range(2)], [[*command, "--join"]]]
    found = []
    for commands in rounds:
        try:
            found.append(at_once(commands, folder))
        except RuntimeError:  # a shard of `mine` was through before another had started: the array is sent again
            if len(commands) == 1:
                raise
            found.append(at_once(commands, folder))
    return time.perf_counter() - started, max(most for most, _ in found), sum(cpu for _, cpu in found)


def content(place: Path, name: str) -> Any:
    """What has to be equal of an output."""
    if name != "scores":
        return (place / name).read_bytes()
    return [{k: v for k, v in task.items() if k != "seconds"} for task in json.loads(place.read_bytes())["tasks"]]


def write_rows(folder: Path, rows: int) -> None:
    """The files that the verbs read: `few.jsonl` are 2,000 pairs, whose positives are what is searched."""
    rows_to(folder, rows)
    with (folder / "many.txt").open() as texts, (folder / "documents.jsonl").open("w") as documents:
        documents.writelines(f'{{"_id": "{n}", "text": "{text.strip()}"}}\n' for n, text in enumerate(texts))
    with (folder / "many.jsonl").open() as pairs, (folder / "few.jsonl").open("w") as few:
        few.writelines(islice(pairs, 2000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--verbs", nargs="+", default=VERBS, choices=VERBS)
    parser.add_argument("--model", help="a folder; by default a tiny one of random weights")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    kept, wrong = read_json(RESULTS / "ranks.json", {}), []
    try:
        furnish(folder)
        model = os.path.abspath(arguments.model) if arguments.model else str(folder / "model")
        for verb in arguments.verbs:
            rows = arguments.rows or MOST.get(verb, 100_000)
            write_rows(folder, rows)
            for way in WAYS:
                seconds, mib, cpu = measured(verb, way, model, folder)
                first, mine = folder / f"{verb}-alone", folder / f"{verb}-{way}"
                _, files = arguments_of(verb, model, mine)
                same = all(content(first, name) == content(mine, name) for name in files)
                wrong += [] if same else [f"{verb} {way}"]
                print(f"{verb:10} {way:7} {rows:9,} {seconds:8.1f} s {mib:8.0f} MiB {cpu:8.1f} s of cpu", flush=True)
                found = {"rows": rows, "seconds": round(seconds, 1), "mib": round(mib), "cpu": round(cpu, 1)}
                if verb in SEARCHERS:
                    recall = json.loads((mine / "mined.report.json").read_bytes())["recall"]
                    found |= {"recall": {name.partition(" of ")[0]: share for name, share in recall.items()}}
                found |= {"same": same}
                kept[f"{verb} {way}"] = environment() | found
                write_json(RESULTS / "ranks.json", kept)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(f"other bytes: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
