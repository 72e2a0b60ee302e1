"""One process, two ranks and two shards of every verb that shares its work: seconds, memory, and whether the bytes are
the same.

    python -m bench.ranks                                        # 100,000 rows with a tiny model
    python -m bench.ranks --rows 1000000 --verbs encode
    python -m bench.ranks --rows 2000000 --verbs mine            # 2,000 queries against so many texts
    python -m bench.ranks --rows 20000 --model ../shared/models/NAME

Memory is the most that one process took, the model and the libraries in it. Every process has one thread, so that two
ranks have twice the cores of one process. Results go to bench/results/ranks.json.
"""

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from tests.faults.workplace import furnish

from bench.common import RESULTS, environment, read_json, write_json
from bench.memory import rows_to

VERBS = ("encode", "tokenize", "mine", "index")
WAYS = ("alone", "ranks", "shards")


def arguments_of(verb: str, model: str, out: Path) -> tuple[list[str], list[str]]:
    """A command, and the files that have to be equal."""
    if verb == "encode":
        return ["encode", "many.txt", str(out), "--model", model], ["vectors.npy", "ids.txt", "meta.json"]
    if verb == "tokenize":
        files = [f"many_{kind}.parquet" for kind in ("query", "corpus")]
        return ["tokenize", "many.jsonl", "--model", model, "--out", str(out)], [*files, "manifest.json"]
    if verb == "mine":
        tree = {
            "data": {"path": "many.jsonl", "limit": 2000},
            "corpus": [{"path": "many.jsonl", "column": "query"}],
            "searchers": [{"type": "embedding", "model": model}],
            "candidates": 8,
            "part": 250,
            "select": {"negatives": 2},
            "output": str(out / "mined.jsonl"),
        }
        recipe = out.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump(tree))
        return ["mine", str(recipe)], ["mined.jsonl"]
    return ["index", model, "documents.jsonl", "--to", str(out)], []


def at_once(commands: list[list[str]], folder: Path) -> float:
    """Run commands side by side; the most memory that a process of theirs took, in MiB."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    processes = [subprocess.Popen(command, cwd=folder, env=variables) for command in commands]
    most = 0.0
    for process in processes:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        most = max(most, used.ru_maxrss / 1024)
    if wrong := [process.args for process in processes if process.returncode != 0]:
        raise RuntimeError(f"{wrong[0]} failed")
    return most


def measured(verb: str, way: str, model: str, folder: Path) -> tuple[float, float]:
    """Seconds and MiB of one verb in one way."""
    given, _ = arguments_of(verb, model, folder / f"{verb}-{way}")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if way == "ranks" else []
    command = [sys.executable, *launcher, "-m", "embedsmith", *given]
    started = time.perf_counter()
    if way == "shards":
        most = max(
            at_once([[*command, "--shard", f"{index}/2"] for index in range(2)], folder),
            at_once([[*command, "--join"]], folder),
        )
    else:
        most = at_once([command], folder)
    return time.perf_counter() - started, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--verbs", nargs="+", default=VERBS, choices=VERBS)
    parser.add_argument("--model", help="a folder; by default a tiny one of random weights")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    kept, wrong = read_json(RESULTS / "ranks.json", {}), []
    try:
        furnish(folder)
        rows_to(folder, arguments.rows)
        with (folder / "many.txt").open() as texts, (folder / "documents.jsonl").open("w") as documents:
            documents.writelines(f'{{"_id": "{n}", "text": "{text.strip()}"}}\n' for n, text in enumerate(texts))
        model = os.path.abspath(arguments.model) if arguments.model else str(folder / "model")
        for verb in arguments.verbs:
            for way in WAYS:
                seconds, mib = measured(verb, way, model, folder)
                first, mine = folder / f"{verb}-alone", folder / f"{verb}-{way}"
                _, files = arguments_of(verb, model, mine)
                same = all(filecmp.cmp(first / name, mine / name, shallow=False) for name in files)
                wrong += [] if same else [f"{verb} {way}"]
                print(f"{verb:9} {way:7} {arguments.rows:9,} {seconds:8.1f} s {mib:8.0f} MiB", flush=True)
                found = {"rows": arguments.rows, "seconds": round(seconds, 1), "mib": round(mib), "same": same}
                kept[f"{verb} {way}"] = environment() | found
                write_json(RESULTS / "ranks.json", kept)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(f"other bytes: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
