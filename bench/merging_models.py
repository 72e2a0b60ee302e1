"""The models of the merging bench: where entries are kept, the base, the training rows and the trained arms.

Texts are cut at 64 tokens and trained in bf16 where the processor has it: a retrieval step of 32 pairs then costs
about 1.3 seconds of a core with six layers. The parents of the part `forget` learn at a high rate (1e-4), so that few
steps move the model as far as many small ones would: what merging is asked to mend must be there first.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from bench.common import data_path, environment, minilm, read_json, write_json
from embedsmith.core.recipe import parse
from embedsmith.models import load
from embedsmith.train import Recipe, train

BATCH = 32
LENGTH = 64
"""Tokens of a text, in training and when scored."""
LEARNING_RATE = 2e-5
FORGET_RATE = 1e-4
RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
SOURCES = {"retrieval": {"retrieval": 1.0}, "sts": {"stsb": 0.75, "sick": 0.25}, "banking": {"banking": 1.0}}
"""Of a task, with shares of its steps. The two sets of graded pairs stay apart: their judges used their scales
differently, and a batch that ranks pairs of both teaches that difference. SICK has a quarter of the steps:
with half of them the STS parent lost on stsb-en-dev."""


@dataclass(frozen=True)
class Study:
    """Where things are, and how large."""

    steps: int
    layers: int
    work: Path
    results: Path
    items: int
    documents: int
    probe: int

    def folder(self, arm: str, seed: int) -> Path:
        return self.work / f"layers-{self.layers}-steps-{self.steps}-batch-{BATCH}" / f"{arm}-seed-{seed}"

    def once(self, part: str, arm: str, seed: int, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """An entry of the results: what is there is kept, what is missing is computed and appended."""
        key = {
            "part": part,
            "arm": arm,
            "seed": seed,
            "steps": self.steps,
            "layers": self.layers,
            "items": self.items,
            "documents": self.documents,
            "probe": self.probe,
        }
        for run in read_json(self.results, {"runs": []})["runs"]:
            if all(run.get(name) == value for name, value in key.items()):
                return dict(run)
        print(f"{part}: {arm}, seed {seed} ...", flush=True)
        started, used = time.perf_counter(), time.process_time()
        run = key | compute()
        run |= {"minutes": run.get("minutes", (time.perf_counter() - started) / 60), "environment": environment()}
        run["core_minutes"] = (time.process_time() - used) / 60
        table = read_json(self.results, {"runs": []})  # read again: another process may have added to it
        table["runs"].append(run)
        write_json(self.results, table)
        shown = {name: round(value, 2) for name, value in run.get("scores", {}).items()}
        print(f"  {shown} {run['core_minutes']:.2f} core-minutes", flush=True)
        return run


def base_of(study: Study) -> Path:
    """MiniLM's first layers as a model of its own."""
    folder = study.work / f"base-{study.layers}-length-{LENGTH}"
    if not folder.exists():
        model = load(minilm(), max_length=LENGTH)
        backbone: Any = model.backbone
        backbone.encoder.layer = nn.ModuleList(list(backbone.encoder.layer)[: study.layers])
        backbone.config.num_hidden_layers = study.layers
        model.save(folder)
    return folder


def rows_of(source: str) -> list[dict[str, Any]]:
    """Training rows of a source: pairs, graded pairs in 0..1, or two texts of one intent."""
    if source == "retrieval":
        return read_lines(data_path("pairs/debian-en-train.jsonl.gz"))
    if source == "stsb":
        return [row | {"score": row["score"] / 5} for row in read_lines(data_path("sts/stsb-en-train.jsonl"))]
    if source == "sick":
        return [row | {"score": (row["score"] - 1) / 4} for row in read_lines(data_path("sts/sick-train.jsonl"))]
    by_label: dict[Any, list[str]] = {}
    for row in read_lines(data_path("labels/banking77-train.jsonl")):
        by_label.setdefault(row["label"], []).append(row["text"])
    chance = random.Random(0)
    shuffled = [chance.sample(texts, len(texts)) for texts in by_label.values()]
    return [{"query": a, "pos": [b]} for texts in shuffled for a, b in pairwise(texts)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.decode("utf-8").splitlines()]


def sources(folder: Path, steps: dict[str, int], seed: int) -> list[dict[str, Any]]:
    """One epoch of each source for these steps, drawn by the seed and repeated where a source has fewer rows."""
    found = []
    for task, total in steps.items():
        left = total
        for name, share in reversed(SOURCES[task].items()):
            count = left if name == next(iter(SOURCES[task])) else round(share * total)
            left -= count
            if count > 0:
                score = {"score_range": [0, 1]} if task == "sts" else {}
                path = drawn(folder, name, count * BATCH, seed)
                found.append({"path": str(path), "name": name, "batch_size": BATCH, **score})
    return found


def drawn(folder: Path, source: str, count: int, seed: int) -> Path:
    """A file of `count` rows beside the folder."""
    rows = rows_of(source)
    chosen: list[dict[str, Any]] = []
    chance = random.Random(f"{seed}-{source}")
    while len(chosen) < count:
        chosen += chance.sample(rows, min(count - len(chosen), len(rows)))
    path = folder.with_name(f"{folder.name}-{source}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return path


def trained(study: Study, arm: str, seed: int, steps: dict[str, int], rate: float = LEARNING_RATE) -> Path:
    """The arm's model; trained now if missing. `steps`: of each task."""
    folder = study.folder(arm, seed)
    total = sum(steps.values())

    def run() -> dict[str, Any]:
        shutil.rmtree(folder, ignore_errors=True)
        recipe = {
            "model": {"path": str(base_of(study)), "max_length": LENGTH},
            "data": sources(folder, steps, seed),
            "train": {"steps": total, "batch_size": BATCH, "learning_rate": rate, "seed": seed,
                      "log_with": [], "checkpoint_every": total},
            "output": str(folder),
        }  # fmt: skip
        train(parse(Recipe, recipe))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return {"texts": 3 * 2 * BATCH * total, "task_steps": steps}

    if not (folder / "model").exists():
        drop(study, "train", arm, seed)
    study.once("train", arm, seed, run)
    return folder / "model"


def drop(study: Study, part: str, arm: str, seed: int) -> None:
    """Forget an entry whose model is gone."""
    table = read_json(study.results, {"runs": []})
    own = {"part": part, "arm": arm, "seed": seed, "steps": study.steps, "layers": study.layers}
    kept = [run for run in table["runs"] if any(run.get(name) != value for name, value in own.items())]
    if len(kept) < len(table["runs"]):
        write_json(study.results, table | {"runs": kept})


def arms_of(study: Study) -> dict[str, dict[str, int]]:
    """Steps of each task: parents, the joint model in proportion to its data, and re-sampled."""
    both = 2 * study.steps
    count = {task: sum(len(rows_of(source)) for source in SOURCES[task]) for task in ("retrieval", "sts")}
    share = count["retrieval"] / sum(count.values())
    arms = {"retrieval": {"retrieval": study.steps}, "sts": {"sts": study.steps}}
    joint = {"joint": share} | {f"joint {ratio}": ratio for ratio in RATIOS}
    for name, ratio in joint.items():
        arms[name] = {"retrieval": round(ratio * both), "sts": both - round(ratio * both)}
    return arms
