"""Flat memory and quick starts with millions of records.

`python -m bench.scale` writes a JSONL of `--rows` short records (5 million by default, about 400 MB, kept in
bench/out), and in fresh processes: converts it, opens it again, plans and draws batches from it; the same rows as a
stream of Parquet shards. Reported for each: seconds, and the most anonymous memory (what cannot be given back to the
system; mapped files can) above that of a process that only imported the package. `prepare` compares, for batches of 64
real pairs of up to 256 tokens and all-MiniLM-L6-v2, what the background thread does for a step (draw and tokenize) with
the step itself (its seconds and memory include loading the model): tokenizing limits training where it takes longer.
Results: bench/results/scale.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common import RESULTS, WORK, data_path, environment, minilm, write_json

BATCH, STEPS, TIMED = 64, 200, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS / "scale.json")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(measured(PARTS[arguments.part], folder_of(arguments.rows))))
        return
    folder = folder_of(arguments.rows)
    write_rows(folder, arguments.rows)
    if "convert" in arguments.parts:
        shutil.rmtree(folder / "cache", ignore_errors=True)
    figures = {part: in_process(part, arguments.rows) for part in arguments.parts}
    for part, found in figures.items():
        print(f"{part:10} " + ", ".join(f"{name} {value:,.3f}" for name, value in found.items()))
    write_json(arguments.results, {"environment": environment(), "rows": arguments.rows, "parts": figures})


def folder_of(rows: int) -> Path:
    return WORK / f"scale-{rows}"


def write_rows(folder: Path, rows: int) -> None:
    """rows.jsonl and shards of Parquet with the same rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if (folder / "done").exists():
        return
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for start in range(0, rows, 250_000):
            numbers = range(start, min(start + 250_000, rows))
            table = [{"query": f"what is number {n}", "pos": [f"{n} is {n * 7919} by now"]} for n in numbers]
            file.writelines(json.dumps(row) + "\n" for row in table)
            pq.write_table(
                pa.Table.from_pylist(table), folder / "shards" / f"{start:09}.parquet", row_group_size=50_000
            )
    (folder / "done").touch()


def in_process(part: str, rows: int) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.scale", "--part", part, "--rows", str(rows)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def measured(part: Callable[[Path], dict[str, float]], folder: Path) -> dict[str, float]:
    """Seconds of a part, and the most anonymous memory meanwhile above what there was before, in MiB."""
    records_of(folder, limit=10)  # imports what there is to import
    before = peak = anonymous()
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.02):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        more = part(folder)
    finally:
        seconds = time.perf_counter() - started
        over.set()
        watcher.join()
        peak = max(peak, anonymous())
    return {"seconds": seconds, "memory_mib": peak - before, **more}


def anonymous() -> float:
    """MiB of memory that no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def records_of(folder: Path, **options: Any) -> Any:
    from embedsmith.data import Source, read_source

    path = folder / ("shards" if options.get("streaming") else "rows.jsonl")
    return read_source(Source(path=str(path), cache=str(folder / "cache"), **options)).records


def convert(folder: Path) -> dict[str, float]:
    return {"rows": float(len(records_of(folder)))}


def reopen(folder: Path) -> dict[str, float]:
    """What a second start does: open the records, their facts, and the first and last record."""
    records = records_of(folder)
    return {"rows": float(len(records.facts())), "ends": float(len(records[0].query) + len(records[-1].query))}


def draw(records: Any, **options: Any) -> dict[str, float]:
    from embedsmith.data import BatchPlan, PlannedSource

    plan = BatchPlan((PlannedSource(len(records), BATCH, **options),))
    started = time.perf_counter()
    plan.at(0)
    first = time.perf_counter() - started
    started = time.perf_counter()
    for step in range(1, STEPS + 1):
        [records[int(row)] for row in plan.at(step).rows]
    return {"plan_seconds": first, "milliseconds_a_batch": (time.perf_counter() - started) / STEPS * 1000}


def batches(folder: Path) -> dict[str, float]:
    return draw(records_of(folder))


def stream(folder: Path) -> dict[str, float]:
    records = records_of(folder, streaming=True)
    return draw(records, order=records.order, apart=False)


def prepare(folder: Path) -> dict[str, float]:
    """A batch from texts to tokens, and the training step that it is prepared for, in milliseconds."""
    from embedsmith.core.recipe import parse
    from embedsmith.train import Recipe
    from embedsmith.train.build import make_accelerator
    from embedsmith.train.loop import build, update

    source = {"path": str(data_path("pairs/debian-en-train.jsonl.gz")), "limit": 5000, "batch_size": BATCH}
    model = {"path": str(minilm()), "max_length": 256}
    tree = {"model": model, "data": [source], "train": {"steps": 50, "log_with": []}, "output": str(folder / "run")}
    recipe = parse(Recipe, tree)
    run = build(recipe, make_accelerator(recipe))
    update(run, run.feed.draw(0))
    seconds = [0.0, 0.0]
    for step in range(1, TIMED + 1):
        started = time.perf_counter()
        drawn = run.feed.draw(step)
        ready = time.perf_counter()
        update(run, drawn)
        seconds[0] += ready - started
        seconds[1] += time.perf_counter() - ready
    batch, whole = (each / TIMED * 1000 for each in seconds)
    return {"milliseconds_a_batch": batch, "milliseconds_a_step": whole, "share_of_a_step": batch / whole}


PARTS = {"convert": convert, "reopen": reopen, "batches": batches, "stream": stream, "prepare": prepare}

if __name__ == "__main__":
    main()
