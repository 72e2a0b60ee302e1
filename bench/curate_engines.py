"""Curation of a million rows by one process, by all cores, and by Ray with as many workers: are the outputs the same
bytes, how long does each take, and how much memory? And with a worker of Ray killed on the way?

    python -m bench.curate_engines                      # 1,000,000 rows, two workers
    python -m bench.curate_engines --rows 20000 --engines one local ray --rounds 1

Rows are real package titles and descriptions where the shared data is there, and made of their words; a tenth is
repeated, a tenth nearly so. Memory is what all processes of a run hold together, shared pages counted once (PSS), at
its highest.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.common import DATA, RESULTS, WORK, environment, read_json, write_json

STEPS = ("length", "symbols", "links", "boilerplate", "trivial", "exact_duplicates", "near_duplicates")
PAIRS = DATA / "pairs" / "debian-en-train.jsonl.gz"
ENGINES = ("one", "local", "ray", "ray, a worker killed")


def rows_to(path: Path, count: int) -> None:
    """Titles and descriptions: real ones first, then made of their words."""
    chance, real = random.Random(0), []
    if PAIRS.exists():
        with gzip.open(PAIRS, "rt", encoding="utf-8") as lines:
            real = [json.loads(line) for line in lines]
    vocabulary = sorted({word for row in real for text in row["pos"] for word in text.split()}) or [
        "".join(chance.choices("abcdefghijklmnop", k=chance.randint(2, 9))) for _ in range(20_000)
    ]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < count:
            if written < len(real):
                query, text = real[written]["query"], real[written]["pos"][0]
            else:
                query = " ".join(chance.choices(vocabulary, k=chance.randint(3, 8)))
                text = " ".join(chance.choices(vocabulary, k=chance.randint(20, 80)))
            pairs = [(query, text)]
            pairs += [(query, text)] if chance.random() < 0.1 else []
            pairs += [(f"{query}!", f"{text} Indeed.")] if chance.random() < 0.1 else []
            for one, other in pairs[: count - written]:
                file.write(json.dumps({"query": one, "pos": [other]}, ensure_ascii=False) + "\n")
                written += 1


def command(source: Path, out: Path, engine: str, workers: int) -> list[str]:
    settings = {"one": ["engine.processes=1"], "local": [f"engine.processes={workers}"]}
    there = settings.get(engine, ["engine.type=ray", f"engine.workers={workers}"])
    steps = [word for step in STEPS for word in ("--step", step)]
    return [sys.executable, "-m", "embedsmith", "curate", str(source), str(out), *there, *steps]


def family(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for one in found:
        found += children.get(one, [])
    return found


def held(pids: list[int]) -> float:
    """MiB that processes hold together."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(errors="replace").splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def kill_a_worker(pids: list[int]) -> bool:
    """One of Ray's workers that is at work on a part."""
    for pid in pids:
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        except OSError:
            continue
        if name.startswith("ray::") and "Map" in name:
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def measured(source: Path, folder: Path, engine: str, workers: int) -> dict[str, Any]:
    """Seconds, MiB, and the hash of the output."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    out = folder / "out.jsonl"
    killed = not engine.endswith("killed")
    began, most = time.monotonic(), 0.0
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(command(source, out, engine, workers), stdout=log, stderr=log)
        while running.poll() is None:
            pids = family(running.pid)
            most = max(most, held(pids))
            if not killed and list(folder.glob("out.jsonl.work/stages/01-*/part-*")):
                killed = kill_a_worker(pids)
            time.sleep(0.5)
    if running.returncode:
        raise RuntimeError(f"{engine} ended with {running.returncode}: {(folder / 'log').read_text()[-2000:]}")
    report = json.loads((folder / "out.report.json").read_text(encoding="utf-8"))
    return {
        "seconds": round(time.monotonic() - began, 1),
        "mib": round(most),
        "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
        "records": report["records"],
        "killed": engine.endswith("killed") and killed,
        "steps": {step["settings"]["type"]: step["seconds"] for step in report["steps"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    arguments = parser.parse_args()
    folder = WORK / "curate_engines"
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"in-{arguments.rows}.jsonl"
    if not source.exists():
        rows_to(source, arguments.rows)
    rounds: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        rounds.append({})
        for engine in arguments.engines:
            one = rounds[-1][engine] = measured(source, folder / "run", engine, arguments.workers)
            print(
                f"{engine:22} {one['seconds']:8.1f} s {one['mib']:7,} MiB {one['records']:9,} records "
                f"{one['sha256'][:12]}{' (killed one)' if one['killed'] else ''}",
                flush=True,
            )
        kept = read_json(RESULTS / "curate_engines.json", {})
        kept[str(arguments.rows)] = environment() | {"workers": arguments.workers, "rounds": rounds}
        write_json(RESULTS / "curate_engines.json", kept)
        hashes = {one["sha256"] for one in rounds[-1].values()}
        print(f"round {number + 1}: {'the same bytes' if len(hashes) == 1 else 'DIFFERENT BYTES'}")
        if {"one", "local"} <= rounds[-1].keys():
            ratio = rounds[-1]["one"]["seconds"] / rounds[-1]["local"]["seconds"]
            print(f"local: {ratio:.2f} times one process (target 1.7)")
        if len(hashes) != 1:
            sys.exit(1)


if __name__ == "__main__":
    main()
