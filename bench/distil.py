"""A static student of all-MiniLM-L6-v2, and one of half its layers: scores and speed beside the teacher.

    python -m bench.distil [--parts static layers] [--texts 12000] [--steps 300]

The static student is made from the vocabulary and from unlabelled texts (sentences of the training splits of STS-B and
SICK, package descriptions); the other learns the teacher's vectors of the same texts. Both are scored on stsb-en-test,
sts13-test and xquad-en, none of whose texts are trained on. About 5 minutes for the static part on a quiet core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.common import DATA, RESULTS, WORK, data_path, environment, minilm, write_json
from bench.quality_joint import read_lines
from embedsmith.data import Source, text_id
from embedsmith.distil.run import DistilRecipe, distil
from embedsmith.evaluate import load_task
from embedsmith.evaluate.overlap import texts_of

RESULT = RESULTS / "distil.json"
TASKS = ("stsb-en-test", "sts13-test", "xquad-en")
TRAINED = ("sts/stsb-en-train.jsonl", "sts/sick-train.jsonl", "pairs/debian-en-train.jsonl.gz")


def texts_file(count: int, folder: Path) -> Path:
    """Distinct texts of the training files in turn, `count` of them, without those that are scored, as one file."""
    tasks = [load_task(name, data_dir=DATA) for name in TASKS]
    scored = {text_id(text) for task in tasks for _, texts in texts_of(task) or () for text in texts}
    wells: list[list[str]] = []
    for name in TRAINED:
        rows = read_lines(data_path(name))
        both = [(row.get("text1") or row["query"], row.get("text2") or row["pos"][0]) for row in rows]
        texts = dict.fromkeys(text[:300] for pair in both for text in pair)
        wells.append([text for text in texts if text_id(text) not in scored])
    share = count // len(wells)
    chosen = list(dict.fromkeys(text for well in wells for text in well[:share]))
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["static"], choices=["static", "layers"])
    parser.add_argument("--texts", type=int, default=12_000)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    work = WORK / "distil"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    source = Source(path=str(texts_file(options.texts, work)), format="texts")
    made: dict[str, dict[str, Any]] = {"static": {"static": True}, "layers": {"layers": 3, "steps": options.steps}}
    found: dict[str, Any] = {"environment": environment()}
    for part in options.parts:
        started = time.perf_counter()
        recipe = DistilRecipe(
            teacher=minilm(),
            output=str(work / part),
            data=(source,),
            tasks=TASKS,
            tasks_folder=str(DATA),
            **made[part],
        )
        one = distil(recipe, overwrite=False)
        Console().print(one.table())
        found[part] = {"teacher": asdict(one.teacher), "student": asdict(one.student)}
        found[part]["seconds"] = round(time.perf_counter() - started)
        write_json(RESULT, found)


if __name__ == "__main__":
    main()
