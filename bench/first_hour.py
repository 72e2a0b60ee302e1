"""Own pairs in each of the column layouts that people have: to a scored model and its report by two commands.

    python -m bench.first_hour [--rows 400] [--steps 20] [--layouts anchor/positive ...]

For each layout a file of real texts is written, `embedsmith init --data FILE` looks at it, `embedsmith train` trains
MiniLM on one part and scores the other, all as a user types it. A line a layout: the seconds of both commands together
and the score before and after; bench/results/first_hour.json keeps them, also from one call to the next. Ends with an
error where a layout gives no score or no report. Some 40 seconds a layout on two quiet cores.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common import RESULTS, WORK, data_path, environment, minilm, read_json, write_json

Row = dict[str, Any]
FOLDER = WORK / "first-hour"


def pairs(count: int) -> list[tuple[str, str, str]]:
    """Real titles, their descriptions, and another title's description."""
    with gzip.open(data_path("pairs/debian-en-train.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
    positives = [row["pos"][0] for row in rows]
    return [(row["query"], good, positives[place - 1]) for place, (row, good) in enumerate(zip(rows, positives))]


def scored(count: int) -> list[Row]:
    lines = data_path("sts/stsb-en-train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line) for line in lines]


def labelled(count: int) -> list[Row]:
    lines = data_path("labels/banking77-test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:: max(len(lines) // count, 1)]]


def _message(text: str) -> Row:
    return {"role": "user", "content": text}


LAYOUTS: dict[str, Callable[[int], list[Row]]] = {
    "query/pos/neg": lambda n: [{"query": q, "pos": [p], "neg": [x]} for q, p, x in pairs(n)],
    "anchor/positive": lambda n: [{"anchor": q, "positive": p} for q, p, _ in pairs(n)],
    "positive/anchor": lambda n: [{"positive": p, "anchor": q} for q, p, _ in pairs(n)],
    "anchor/positive/negative": lambda n: [{"anchor": q, "positive": p, "negative": x} for q, p, x in pairs(n)],
    "anchor/positive/negative_n": lambda n: [
        {"anchor": q, "positive": p, "negative_1": x, "negative_2": y}
        for (q, p, x), (_, y, _) in zip(pairs(n), pairs(n + 2)[2:])
    ],
    "query/positive/negative": lambda n: [{"query": q, "positive": p, "negative": x} for q, p, x in pairs(n)],
    "question/answer": lambda n: [{"question": q, "answer": p} for q, p, _ in pairs(n)],
    "query/answer": lambda n: [{"query": q, "answer": p} for q, p, _ in pairs(n)],
    "query/response": lambda n: [{"query": q, "response": p} for q, p, _ in pairs(n)],
    "passage/query": lambda n: [{"passage": p, "query": q} for q, p, _ in pairs(n)],
    "tevatron": lambda n: [
        {
            "query_id": str(place),
            "query": q,
            "positive_passages": [{"docid": f"p{place}", "title": "", "text": p}],
            "negative_passages": [{"docid": f"n{place}", "title": "", "text": x}],
        }
        for place, (q, p, x) in enumerate(pairs(n))
    ],
    "messages": lambda n: [
        {"messages": [_message(q)], "positive_messages": [[_message(p)]], "negative_messages": [[_message(x)]]}
        for q, p, x in pairs(n)
    ],
    "codiemb": lambda n: [
        {
            "task_type": "ir",
            "query": ["Find the description.", "", q],
            "positives": [["", "", p]],
            "negatives": [["", "", x]],
            "positive_scores": [1.0],
            "negative_scores": [0.0],
        }
        for q, p, x in pairs(n)
    ],
    "sentence1/sentence2/label": lambda n: [
        {"sentence1": row["text1"], "sentence2": row["text2"], "label": row["score"]} for row in scored(n)
    ],
    "sentence_A/sentence_B/score": lambda n: [
        {"sentence_A": row["text1"], "sentence_B": row["text2"], "score": row["score"]} for row in scored(n)
    ],
    "premise/hypothesis/label": lambda n: [
        {"premise": q, "hypothesis": [p, x][place % 2], "label": ["entailment", "contradiction"][place % 2]}
        for place, (q, p, x) in enumerate(pairs(n))
    ],
    "text/label": lambda n: [{"text": row["text"], "label": row["label"]} for row in labelled(n)],
    "sentence/label": lambda n: [{"sentence": row["text"], "label": row["label"]} for row in labelled(n)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    given = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    path, settings = RESULTS / "first_hour.json", {"rows": given.rows, "steps": given.steps}
    earlier = read_json(path, {})
    made: dict[str, Row] = earlier.get("layouts", {}) if settings.items() <= earlier.items() else {}
    for name in given.layouts:
        made[name] = first_hour(name, given.rows, given.steps)
        scores = ", ".join(f"{task} {100 * b:.2f} to {100 * a:.2f}" for task, b, a in made[name]["scores"])
        print(f"{name:30} {made[name]['seconds']:6.1f} s  {scores}", flush=True)
        write_json(path, {"environment": environment(), **settings, "layouts": made})
    if lacking := [name for name, one in made.items() if not one["scores"] or not one["report"]]:
        sys.exit(f"no score or no report: {', '.join(lacking)}")


def first_hour(name: str, rows: int, steps: int) -> Row:
    folder = FOLDER / name.replace("/", "-")
    folder.mkdir(parents=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in LAYOUTS[name](rows)]
    (folder / "mine.jsonl").write_text("".join(lines), encoding="utf-8")
    started = time.monotonic()
    _type(folder, "init", "--data", "mine.jsonl", "--model", minilm(), "first")
    _type(folder, "train", "first/recipe.yaml", f"train.steps={steps}", "output=run")
    seconds = round(time.monotonic() - started, 1)
    told = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tasks = [key for key in told[0] if key.startswith("score/") and key in told[-1]]
    return {
        "seconds": seconds,
        "scores": [(key.removeprefix("score/"), told[0][key], told[-1][key]) for key in tasks],
        "report": (folder / "run" / "report.html").exists(),
    }


def _type(folder: Path, *words: str) -> None:
    command = [sys.executable, "-m", "embedsmith", *words]
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
