"""The study's own runs: draw texts, train an arm, score it, append the row. Whatever is there is not done again."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.common import data_path, environment, minilm, read_json, write_json
from bench.quality_joint import read_lines
from bench.reproduce.claim import Row
from embedsmith.core.encoder import Encoder, Role
from embedsmith.core.reps import Dense, Reps
from embedsmith.evaluate import Task, TaskResult

WIDTHS = (32, 64, 128, 192)
LENGTH = 48
TEMPERATURE = 0.02
RETRIEVAL_LOSS = {"type": "infonce", "temperature": TEMPERATURE}
COSENT = {"type": "cosent", "temperature": 0.05}

Maker = Callable[["Study", int], Path]
"""Trains (or goes on training, or merges) an arm with a seed; returns its model."""


@dataclass(frozen=True)
class Study:
    """Where things are, and how large: `steps` of every arm, `batch` rows a step, the part of debian-dev."""

    work: Path
    results: Path
    makers: Mapping[str, Maker]
    measurers: Mapping[str, Callable[[Study, int], dict[str, float]]]
    """Arms that are no model to score: what they measure instead."""
    steps: int = 80
    batch: int = 32
    items: int = 500
    documents: int = 2000
    layers: int = 3
    learning_rate: float = 5e-5
    widths: frozenset[str] = frozenset()
    """Arms that are scored at every width too."""
    geometry: frozenset[str] = frozenset()
    """Arms whose token states are looked at too."""

    @property
    def settings(self) -> dict[str, Any]:
        names = ("steps", "batch", "items", "documents", "layers", "learning_rate")
        return {name: getattr(self, name) for name in names}

    def folder(self, arm: str, seed: int | None) -> Path:
        sizes = f"{self.layers}-{self.steps}x{self.batch}-{self.learning_rate}"
        return self.work / sizes / f"{re.sub(r'[^a-z]+', '-', arm).strip('-')}-{seed}"

    # Rows ---------------------------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """All rows of these settings."""
        table = read_json(self.results, {})
        labels = {name: _numbers(text) for name, text in table.get("labels", {}).get(f"{self.items}", {}).items()}
        return [
            Row(
                run["arm"],
                run["seed"],
                run["scores"],
                {name: _numbers(text) for name, text in run["items"].items()},
                labels,
            )
            for run in table.get("runs", [])
            if run["settings"] == self.settings
        ]

    def has(self, arm: str, seed: int | None) -> bool:
        runs = read_json(self.results, {}).get("runs", [])
        return any((run["arm"], run["seed"], run["settings"]) == (arm, seed, self.settings) for run in runs)

    def record(self, arm: str, seed: int | None) -> None:
        """Make the arm's row, unless it is there. Another process may add to the file meanwhile."""
        if self.has(arm, seed):
            return
        print(f"{arm}, seed {seed} ...", flush=True)
        started = time.perf_counter()
        found = self._measured(arm, seed or 0)
        minutes = round((time.perf_counter() - started) / 60, 2)
        row = {"arm": arm, "seed": seed, "settings": self.settings, "minutes": minutes, **found}
        table = read_json(self.results, {})
        if not self.has(arm, seed):
            table.setdefault("runs", []).append(row | {"environment": environment()})
        table.setdefault("labels", {})[f"{self.items}"] = {"stsb": _text(self.stsb.score, 2)}
        write_json(self.results, table)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in found["scores"].items())
        print(f"  {shown}  ({minutes} minutes)", flush=True)

    def _measured(self, arm: str, seed: int) -> dict[str, Any]:
        if arm in self.measurers:
            return {"scores": self.measurers[arm](self, seed), "items": {}}
        model = self.model(arm, seed)
        found = self.score(model, arm in self.widths, arm in self.geometry)
        found["scores"] |= replaced(model.parent / "metrics.jsonl")
        return found

    # Models -------------------------------------------------------------------------------------------------------

    def base(self) -> Path:
        """MiniLM's first layers."""
        import embedsmith

        folder = self.work / f"base-{self.layers}"
        if not folder.exists():
            embedsmith.load(minilm(), layers=self.layers, max_length=LENGTH).save(folder)
        return folder

    def model(self, arm: str, seed: int) -> Path:
        """The arm's model, made now if it is missing."""
        return self.makers[arm](self, seed)

    def train(
        self,
        arm: str,
        seed: int,
        data: Sequence[dict[str, Any]],
        start: Path | None = None,
        checkpoints: bool = False,
        **changes: Any,
    ) -> Path:
        """A run of embedsmith, continued where it was stopped. `start`: another model than the base; `checkpoints`:
        keep those at half time and at the end; `changes`: of the `train` section."""
        from embedsmith.core.recipe import parse
        from embedsmith.train import Recipe, train

        output = self.folder(arm, seed)
        if not (output / "finished.json").exists():
            settings: dict[str, Any] = {
                "steps": self.steps,
                "batch_size": self.batch,
                "learning_rate": self.learning_rate,
                "weight_decay": 0.0,
                "seed": seed,
                "log_with": [],
                "log_every": 1,
                "checkpoint_every": max(self.steps // 2, 1),
            }
            tree = {
                "model": {"path": str(start or self.base()), "max_length": LENGTH},
                "data": list(data),
                "train": settings | changes,
                "output": str(output),
            }
            train(parse(Recipe, tree))
            if not checkpoints:
                shutil.rmtree(output / "checkpoints")
        return output / "model"

    # Texts --------------------------------------------------------------------------------------------------------

    def drawn(self, name: str, seed: int, count: int, rows: Sequence[dict[str, Any]], order: str | None = None) -> Path:
        """The first `count` rows in an order that the seed draws: a larger count begins with the same rows, and so do
        files of one `order`. Rows are repeated where there are too few."""
        path = self.work / "data" / f"{name}-{count}-{seed}.jsonl"
        if not path.exists():
            places = random.Random(f"{order or name}-{seed}").sample(range(len(rows)), len(rows))
            save_lines(path, [rows[places[at % len(rows)]] for at in range(count)])
        return path

    def pairs(self, seed: int, count: int) -> dict[str, Any]:
        """A source of `count` questions and answers: titles and descriptions of Debian's packages."""
        path = self.drawn("debian", seed, count, read_lines(data_path("pairs/debian-en-train.jsonl.gz")))
        return {"path": str(path), "name": "debian", "task": "retrieval", "batch_size": self.batch, "negatives": 0}

    def graded(self, seed: int, count: int) -> dict[str, Any]:
        """A source of `count` pairs of sentences with human scores: the STS benchmark."""
        path = self.drawn("stsb", seed, count, read_lines(data_path("sts/stsb-en-train.jsonl")))
        return {"path": str(path), "name": "stsb", "task": "sts", "batch_size": self.batch, "score_range": [0, 5]}

    # Scores -------------------------------------------------------------------------------------------------------

    @cached_property
    def tasks(self) -> dict[str, Task]:
        from embedsmith.calibrate.objective import reduced_task
        from embedsmith.evaluate import load_task

        files = {
            "debian": "retrieval/debian-dev",
            "stsb": "sts/stsb-en-dev.jsonl",
            "stsb-test": "sts/stsb-en-test.jsonl",
        }
        made = {name: load_task(str(data_path(path))) for name, path in files.items()}
        return {name: reduced_task(task, self._count(name), self.documents, 0) for name, task in made.items()}

    def _count(self, name: str) -> int:
        return self.items if name == "debian" else 3 * self.items

    @property
    def stsb(self) -> Any:
        return self.tasks["stsb"]

    def score(self, model: Path, widths: bool, geometry: bool) -> dict[str, Any]:
        """Main scores times 100 with the items of debian-dev and stsb-en-dev; at every width, and the shape of the
        space, where asked for."""
        import embedsmith

        encoder = embedsmith.load(str(model), max_length=128)
        scores, items = self._scored(Narrow(encoder), list(self.tasks), "")
        if widths:
            kept: dict[Any, Dense] = {}
            for width in WIDTHS:
                more = self._scored(Narrow(encoder, width, kept), ["debian", "stsb"], f"@{width}")
                scores, items = scores | more[0], items | more[1]
        scores |= self._space(encoder)
        if geometry:
            values = token_values(encoder, self._texts(200))
            scores |= {name: sum(each) / len(each) for name, each in values.items()}
            items |= {name: _text(each, 4) for name, each in values.items()}
        return {"scores": {name: round(value, 4) for name, value in scores.items()}, "items": items}

    def _scored(self, encoder: Encoder, names: Sequence[str], suffix: str) -> tuple[dict[str, float], dict[str, str]]:
        from embedsmith.evaluate import evaluate

        found = evaluate(encoder, [self.tasks[name] for name in names], progress=False)
        results = dict(zip(names, found, strict=True))
        scores = {name + suffix: 100 * result.main_score for name, result in results.items()}
        return scores, {name + suffix: _items(result) for name, result in results.items() if name != "stsb-test"}

    def _space(self, encoder: Any) -> dict[str, float]:
        """Mean cosine and uniformity of the vectors of unrelated texts."""
        from embedsmith.evaluate.geometry import Space

        space = Space(encoder.encode(self._texts(500), role="document"))
        return {"mean_cosine": space.mean_cosine(), "uniformity": space.uniformity()}

    def _texts(self, count: int) -> list[str]:
        from embedsmith.evaluate.model_geometry import Sample

        return list(Sample.of(self.tasks["debian"], count).texts)


@dataclass(frozen=True)
class Narrow:
    """An encoder's leading coordinates; `kept` holds whole vectors, so that several widths cost one encoding."""

    encoder: Encoder
    width: int | None = None
    kept: dict[Any, Dense] = field(default_factory=dict, repr=False)

    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        key = (role, task, tuple(texts))
        if key not in self.kept:
            dense = self.encoder.represent(texts, role=role, task=task, outputs=outputs)["dense"]
            assert isinstance(dense, Dense)
            self.kept[key] = dense
        whole = self.kept[key]
        return {"dense": whole if self.width is None else whole.truncate(self.width)}


def token_values(encoder: Any, texts: Sequence[str]) -> dict[str, list[float]]:
    """CoDiEmb's four measures of every text's token states (reconstructed; the condition number as its logarithm,
    base 10, since its mean would be that of the worst texts)."""
    import math

    from embedsmith.core.reps import MultiVector
    from embedsmith.evaluate.geometry import MatrixShape

    states = encoder.represent(texts, role="document", outputs=("tokens",))["tokens"]
    assert isinstance(states, MultiVector)
    rows = zip(states.vector_NTD, states.mask_NT, strict=True)
    shapes = [MatrixShape.of(vector_TD[mask_T].double().numpy()) for vector_TD, mask_T in rows if int(mask_T.sum()) > 1]
    return {
        "token_similarity": [shape.similarity for shape in shapes],
        "token_rank": [shape.relative_rank for shape in shapes],
        "token_entropy": [shape.entropy for shape in shapes],
        "token_condition": [math.log10(shape.condition) for shape in shapes],
    }


def replaced(metrics: Path) -> dict[str, float]:
    """How many hard negatives a run replaced; nothing of a run that refreshes none."""
    lines = read_lines(metrics) if metrics.exists() else []
    counts = [value for line in lines for name, value in line.items() if name.startswith("negatives_replaced/")]
    return {"replaced": sum(counts)} if counts else {}


def save_lines(path: Path, rows: Sequence[Any]) -> None:
    """Rows as JSON lines; the file appears whole or not at all."""
    import json

    from embedsmith.core.files import atomic_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _items(result: TaskResult) -> str:
    """Single values of the main score: a query's nDCG times 100, or a pair's cosine."""
    if result.metric in result.items:
        return _text([100 * value for value in result.items[result.metric]], 2)
    return _text(result.items["cosine"].tolist(), 4)


def _text(values: Sequence[float], digits: int) -> str:
    """Many numbers on one line of JSON."""
    return " ".join(f"{value:.{digits}f}".rstrip("0").rstrip(".") for value in values)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split())
