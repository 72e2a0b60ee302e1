"""Which recipe should `embedsmith demo` have? Chosen without its test set.

`python -m bench.demo_recipe` parts what the demo trains on into three folds, trains on two of them with each recipe,
and scores questions and similarity of titles on the third: what the demo itself holds out is never read. Beside the
demo's recipe stand what it was before and what may be better, each with about the same texts encoded; every model is
also scored part of the way back to the start (`scale`). Results are kept in bench/results/demo_recipe.json: the command
can be stopped and continued. About 15 minutes on two quiet cores; `--folds 0` is a third of it.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.common import RESULTS, WORK
from bench.m3 import keep
from embedsmith.cli import demo
from embedsmith.data import PlanConfig
from embedsmith.evaluate import evaluate, load_tasks
from embedsmith.losses import CoSENT
from embedsmith.models import load
from embedsmith.train import Recipe, train

SCALES = (1.0, 0.8, 0.6)
FOLDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", nargs="+", type=int, choices=FOLDS, default=list(FOLDS))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--work", type=Path, default=WORK / "demo_recipe")
    parser.add_argument("--results", type=Path, default=RESULTS / "demo_recipe.json")
    a = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    work = a.work.resolve()
    for fold in a.folds:
        files = files_of(fold, work)
        for name in ("start", *a.recipes):
            key = {"fold": fold, "recipe": name}
            run = keep(a.results, key, lambda n=name, f=files: {"scales": tried(n, f, work)})
            for scale, scores in run["scales"].items():
                found.setdefault(f"{name}, {scale}", []).append(scores)
    for name, rows in found.items():
        print(f"{name:28}" + "  ".join(f"{t} {statistics.fmean(r[t] for r in rows):6.2f}" for t in rows[0]))


def files_of(fold: int, work: Path) -> demo.Files:
    """The demo's files of its training part alone, with this fold in the place of what it holds out."""

    def inside(text: str) -> bool:
        return hashlib.sha256(text.encode()).digest()[1] % len(FOLDS) == fold

    questions = [each for each in demo.read_faq() if not demo.held_out(each.question)]
    papers = [each for each in demo.read_papers() if not demo.held_out(each.title)]
    return demo.prepare(work / f"fold-{fold}", questions, papers, inside)


def tried(name: str, files: demo.Files, work: Path) -> dict[str, dict[str, float]]:
    """Scores of a recipe's model at each scale."""
    start = load(str(demo.encoder_folder()), max_length=128)
    if name == "start":
        return {"0": scores_of(start, files)}
    recipe = demo.recipe(demo.encoder_folder(), files, work / "run", steps=demo.STEPS)
    recipe = RECIPES[name](recipe)
    model = load(str(train(replace(recipe, evaluate=replace(recipe.evaluate, tasks=())), overwrite=True)))
    began = {key: value.detach().clone() for key, value in start.named_parameters()}
    ended = {key: value.detach().clone() for key, value in model.named_parameters()}
    found = {}
    for scale in SCALES:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(began[key] + scale * (ended[key] - began[key]))
        found[str(scale)] = scores_of(model, files)
    return found


def scores_of(model: Any, files: demo.Files) -> dict[str, float]:
    tasks = load_tasks((str(files.held_out_questions), str(files.held_out_scored)))
    return {name: 100 * score for name, score in evaluate(model, tasks, progress=False).main_scores().items()}


def _shares(recipe: Recipe, retrieval: float, steps: int, **changes: Any) -> Recipe:
    plan = PlanConfig(schedule="ratio", ratio={"retrieval": retrieval, "sts": 1.0}, order="strict")
    return replace(recipe, train=replace(recipe.train, plan=plan, steps=steps, **changes))


def _losses(recipe: Recipe, loss: Any) -> Recipe:
    questions, titles = recipe.data
    return replace(recipe, data=(questions, replace(titles, loss=loss)))


def _before(recipe: Recipe) -> Recipe:
    """As it was: by the sizes of the files, so four of five steps are pairs of titles, by CoSENT."""
    recipe = _losses(recipe, CoSENT(temperature=0.05))
    return replace(recipe, train=replace(recipe.train, plan=PlanConfig(), steps=80, learning_rate=5e-5))


RECIPES: dict[str, Callable[[Recipe], Recipe]] = {
    "demo": lambda recipe: recipe,
    "before": _before,
    "cosent": lambda recipe: _losses(recipe, CoSENT(temperature=0.05)),
    "equal shares": lambda recipe: _shares(recipe, 1.0, 54),
    "rate 2e-5": lambda recipe: replace(recipe, train=replace(recipe.train, learning_rate=2e-5)),
}


if __name__ == "__main__":
    main()
