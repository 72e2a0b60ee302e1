"""How far a plan is from what then happens: predicted and measured hours of every verb, on this machine.

    python -m bench.plan                       # 100,000 and 1,000,000 texts; within 25 %
    python -m bench.plan --texts 3000 --verbs encode tokenize

The model is a tiny random one, so that a million texts take minutes; rows are made up of words, four texts each, all of
them different. `plan` looks at the first rows and measures its rates; then each verb is done for real. Results go to
bench/results/plan.json.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tinybert import WORDS, tiny_bert

import embedsmith as es
from bench.common import RESULTS, environment, read_json, write_json
from embedsmith.api.tokenizing import TokenizeJob, tokenize
from embedsmith.data import Source
from embedsmith.models import ModelConfig
from embedsmith.models.encode_files import EncodeJob, encode_files

BOUND = 0.25
VERBS = ("tokenize", "curate", "train", "encode", "mine", "index")
TEXTS_A_ROW = 4
CURATE = [{"type": "length", "query_min": 2}, {"type": "exact_duplicates"}]
MINE = {"searchers": [{"type": "embedding", "model": "model"}], "candidates": 16, "select": {"negatives": 2}}


def rows_to(path: Path, rows: int) -> None:
    chance = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            query, *rest = (" ".join(chance.choices(WORDS, k=8)) + f" {number}" for _ in range(TEXTS_A_ROW))
            file.write(json.dumps({"query": query, "pos": rest[:1], "neg": rest[1:]}) + "\n")


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    model, data = {"path": str(folder / "model")}, {"path": str(folder / "rows.jsonl")}
    searchers = [{"type": "embedding", "model": model["path"]}]
    return {
        "tokenize": {"model": model, "data": [data], "out": str(folder / "tokens")},
        "curate": {"input": data, "steps": CURATE, "output": str(folder / "curated.jsonl")},
        "mine": MINE | {"searchers": searchers, "data": data, "output": str(folder / "mined.jsonl")},
        "train": {
            "model": model,
            "data": [{**data, "batch_size": 256}],
            "train": {"epochs": 1, "checkpoint_every": 10**6, "log_with": []},
            "output": str(folder / "run"),
        },
    }


def done(verb: str, folder: Path, recipe: dict[str, Any], texts: int) -> Callable[[], object]:
    """The verb itself."""
    model, rows = str(folder / "model"), folder / "rows.jsonl"
    lines = folder / "texts.txt"
    if verb in ("encode", "index"):
        chance = random.Random(1)
        lines.write_text("".join(" ".join(chance.choices(WORDS, k=8)) + f" {n}\n" for n in range(texts)))
    if verb == "encode":
        return lambda: encode_files(EncodeJob(model, (lines,), folder / "vectors"))
    if verb == "index":
        return lambda: es.index(model, lines.read_text().splitlines(), to=folder / "index")
    if verb == "tokenize":
        return lambda: tokenize(TokenizeJob(ModelConfig(model), (Source(path=str(rows)),), str(folder / "tokens")))
    functions: dict[str, Any] = {"curate": es.curate, "mine": es.mine, "train": es.train}
    return lambda: functions[verb](recipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--verbs", nargs="+", default=VERBS, choices=VERBS)
    parser.add_argument(
        "--most-mined", type=int, default=100_000, help="texts that are mined: pairs grow as the square"
    )
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="plan-"))
    kept, far = read_json(RESULTS / "plan.json", {}), []
    try:
        es.load(str(tiny_bert(folder / "plain")), pooling="mean").save(folder / "model")
        rows_to(folder / "rows.jsonl", 1000)
        given = recipes(folder)
        for verb in arguments.verbs:
            counts = [n for n in arguments.texts if verb != "mine" or n <= arguments.most_mined]
            rows_to(folder / "rows.jsonl", 1000)
            said = es.plan(given.get(verb, given["train"]), texts=counts)
            for texts in counts:
                rows_to(folder / "rows.jsonl", texts // TEXTS_A_ROW)
                act = done(verb, folder, given.get(verb, {}), texts)
                begun = time.perf_counter()
                act()
                took = time.perf_counter() - begun
                hoped = 3600 * next(one.hours for one in said.costs if (one.name, one.texts) == (verb, texts))
                share = hoped / took
                print(f"{verb:9} {texts:9,} predicted {hoped:8.1f} s, measured {took:8.1f} s, {share:.2f}", flush=True)
                far += [f"{verb} at {texts:,}"] if abs(share - 1) > BOUND else []
                figures = {"predicted": round(hoped, 2), "measured": round(took, 2), "ratio": round(share, 3)}
                kept[f"{verb} {texts}"] = environment() | figures
                write_json(RESULTS / "plan.json", kept)
                for path in folder.iterdir():
                    if path.name not in ("plain", "model", "rows.jsonl"):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(f"further than {BOUND:.0%}: {', '.join(far)}" if far else 0)


if __name__ == "__main__":
    main()
