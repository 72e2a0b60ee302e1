"""Merging on real texts: parents, joint training, every method, the frontier of forgetting, growth with data.

`python -m bench.merging` trains from MiniLM (`--layers 3`: from its first three layers) a retrieval parent
(debian-en-train), an STS parent (stsb-en-train with sick-train) and joint models with the same total number of steps,
and scores parents, joint models and merges on a part of debian-dev (300 queries, 1,000 documents: those judged, and
others at random) and of stsb-en-dev. Every (part, arm, seed) is one entry of bench/results/merging.json, kept as soon
as it is known: the command can be stopped and continued, several may run side by side, and `--parts`, `--arms` and
`--seeds` choose what to run. All parts share the trained models. The verdicts on the targets come last; `--parts none`
prints them from what is there.

parts: train, table, plane (score over direction and length), three (three parents: lambda and mu), forget (against
cranfield), growth (length and direction against data). A forward pass counts as one text encoded, a backward as two.
Texts are cut at 64 tokens and encoded in bf16 (nDCG and Spearman within 2e-4 of float32); merges are in float64.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.common import RESULTS, WORK, data_path
from bench.merging_models import (
    BATCH,
    FORGET_RATE,
    RATIOS,
    SOURCES,
    Study,
    arms_of,
    base_of,
    read_lines,
    rows_of,
    trained,
)
from bench.merging_verdicts import summarise
from embedsmith.calibrate.live_model import LiveMerge
from embedsmith.calibrate.objective import reduced_task
from embedsmith.core.recipe import parse
from embedsmith.evaluate import RetrievalTask, Task, evaluate, load_task
from embedsmith.merge.merge_plan import Plan, make_plan
from embedsmith.merge.recipe import MergeRecipe
from embedsmith.models import load

PARTS = ("train", "table", "plane", "three", "forget", "growth")
MUS = (0.0, 0.01, 0.02, 0.05, 0.1)
LENGTHS = (0.6, 0.8, 1.0, 1.2, 1.5)
DIRECTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
FORGET_LENGTHS = (0.3, 0.5, 0.6, 0.65, 0.7, 1.0)
SOUP = (0, 1, 2)
"""Seeds of the runs that the part `forget` makes one model of."""
GROWTH = (0.125, 0.25, 0.5, 1.0, 2.0)
DESCENT = {
    "steps": 25,
    "check_every": 5,
    "batch_size": 32,
    "learning_rate": 0.1,
    "length_learning_rate": 0.1,
    "mu": 0.0,
}
"""Fewer and longer steps than the default: a descent then costs less than two minutes. Losses are about 0.16 here, and
flat: a mu of 0.01 would outweigh what length gains."""
PROBE_LOSS = {"type": "pearson"}
"""Of graded pairs. CoSENT, which the parents were trained with, falls when cosines are only spread further: descents
then end at great lengths and lose similarity."""
DESCENT_EXAMPLES = 512
IN_BF16 = ("self_positioning", "lm_cocktail")
"""Methods whose texts go through the model under autocast. Fisher and RegMean measure in float32."""
PROBED = {
    "self_positioning": DESCENT,
    "self_positioning karcher": DESCENT | {"mode": "karcher"},
    "self_positioning simplex": DESCENT | {"mode": "simplex"},
    "self_positioning free": DESCENT | {"mode": "free"},
    "self_positioning per_block": DESCENT | {"per_block": True},
    "fisher": {"expectation": "sampled"},
    "fisher embedding": {"definition": "embedding"},
    "regmean": {},
    "lm_cocktail": {},
}
PLAIN = {
    "average": {},
    "average restored": {"restore_norm": True},
    "task_arithmetic": {"scale": 0.7},
    "slerp": {},
    "slerp paper": {"accumulate": "mean"},
    "karcher": {},
    "normalised_mean": {},
    "model_stock": {},
    "ties": {},
    "dare": {},
    "della": {},
    "breadcrumbs": {},
    "sce": {},
    "codiemb layer": {"layer": 1.0, "element": 0.0},
    "codiemb parameter": {"layer": 0.0, "element": 1.0},
    "codiemb hierarchical": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "none"], default=list(PARTS))
    parser.add_argument("--arms", nargs="+", help="only these arms of a part")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=60, help="steps of a parent; joint models take twice as many")
    parser.add_argument("--layers", type=int, default=6, help="of MiniLM's six")
    parser.add_argument("--items", type=int, default=300, help="queries of debian-dev; twice as many pairs")
    parser.add_argument("--documents", type=int, default=1000, help="documents of debian-dev and cranfield")
    parser.add_argument(
        "--probe",
        type=int,
        default=128,
        help="examples a source for Fisher, RegMean, LM-Cocktail",
    )
    parser.add_argument("--work", type=Path, default=WORK / "merging")
    parser.add_argument("--results", type=Path, default=RESULTS / "merging.json")
    a = parser.parse_args()
    study = Study(a.steps, a.layers, a.work.resolve(), a.results, a.items, a.documents, a.probe)
    parts: dict[str, Callable[[Study, int, list[str] | None], None]] = {
        "train": train_part, "table": table_part, "plane": plane_part, "three": three_part, "forget": forget_part,
        "growth": growth_part,
    }  # fmt: skip
    for part in (name for name in PARTS if name in a.parts):
        for seed in a.seeds:
            parts[part](study, seed, a.arms)
    summarise(study)


def train_part(study: Study, seed: int, arms: list[str] | None) -> None:
    for arm, steps in arms_of(study).items():
        if arms is None or arm in arms:
            trained(study, arm, seed, steps)


# Scores ---------------------------------------------------------------------------------------------------------------


def tasks_of(study: Study) -> list[Task]:
    debian = load_task(str(data_path("retrieval/debian-dev")))
    return [
        reduced_task(debian, study.items, study.documents, 0),
        reduced_task(load_task(str(data_path("sts/stsb-en-dev.jsonl"))), 2 * study.items, 1, 0),
    ]


def cranfield(study: Study) -> Task:
    return reduced_task(load_task(str(data_path("retrieval/cranfield"))), study.items, study.documents, 0)


def banking(study: Study) -> Task:
    """Test texts of banking77 in search of training texts of their intent."""
    train_rows, test_rows = (read_lines(data_path(f"labels/banking77-{name}.jsonl")) for name in ("train", "test"))
    chance = random.Random(0)
    documents = dict(enumerate(chance.sample(train_rows, min(study.documents, len(train_rows)))))
    queries = dict(enumerate(chance.sample(test_rows, min(study.items, len(test_rows)))))
    qrels = {
        f"q{q}": {f"d{d}": 1 for d, row in documents.items() if row["label"] == query["label"]}
        for q, query in queries.items()
    }
    texts = {f"q{q}": row["text"] for q, row in queries.items()}
    return RetrievalTask("banking77", texts, {f"d{d}": row["text"] for d, row in documents.items()}, qrels)


def scored(encoder: Any, tasks: list[Task]) -> dict[str, float]:
    """Main scores times 100 and their mean."""
    with torch.autocast("cpu", torch.bfloat16):
        results = evaluate(encoder, tasks, progress=False)
    scores = {name: 100 * value for name, value in results.main_scores().items()}
    return scores | {"mean": sum(scores.values()) / len(scores)}


def opened(study: Study, paths: list[Path], method: dict[str, Any]) -> Plan:
    parents = [{"path": str(path), "id": path.parent.name} for path in paths]
    recipe = {"parents": parents, "base": str(base_of(study)), "method": method, "output": "unused",
              "cache": str(study.work / "cache")}  # fmt: skip
    return make_plan(parse(MergeRecipe, recipe))


def apply(plan: Plan, live: LiveMerge) -> dict[str, Any]:
    """Put the planned merge into the live model, block by block, and nothing on disk; returns the methods' report."""
    report: dict[str, Any] = {}
    place = dict(live.model.named_parameters())
    for method, names in plan.by_method:
        job = plan.job(names)
        combine = method.prepare(job)
        for block in (block for block in job.blocks(by_rows=method.by_rows) if block.name in place):
            with torch.no_grad():
                place[block.name].view(-1)[block.start : block.stop] = combine(block).to(place[block.name])
        report |= job.report
    return report


def probe_of(study: Study, seed: int, names: tuple[str, ...], examples: int) -> dict[str, Any]:
    """Texts of each parent's first source that the parent was not trained on."""
    files = []
    for name in names:
        source = next(iter(SOURCES[name]))
        parent = study.folder(name, seed)
        seen = {json.dumps(row) for row in read_lines(parent.with_name(f"{parent.name}-{source}.jsonl"))}
        path = parent.with_name(f"probe-{seed}-{source}.jsonl")
        if not path.exists():
            rows = [row for row in rows_of(source) if json.dumps(row) not in seen]
            chosen = random.Random(f"probe-{seed}").sample(rows, DESCENT_EXAMPLES)
            path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        files.append({"path": str(path), **({"score_range": [0, 1], "loss": PROBE_LOSS} if name == "sts" else {})})
    return {"sources": files, "examples": examples, "seed": seed}


def pair_of(study: Study, seed: int) -> list[Path]:
    steps = arms_of(study)
    return [trained(study, arm, seed, steps[arm]) for arm in ("retrieval", "sts")]


def merged_scores(study: Study, paths: list[Path], method: dict[str, Any], tasks: list[Task]) -> dict[str, Any]:
    """Merge, score, and what the merge alone cost."""
    started = time.perf_counter()
    plan = opened(study, paths, method)
    live = LiveMerge.of(plan.parents, plan.base)
    with torch.autocast("cpu", torch.bfloat16, enabled=method["type"] in IN_BF16):
        report = apply(plan, live)
    minutes = (time.perf_counter() - started) / 60
    own = report.get(method["type"], {})
    kept = {name: value for name, value in own.items() if name != "trajectory"}
    return {"scores": scored(live, tasks), "texts": kept.get("texts", 0), "minutes": minutes, "report": kept}


# Parts ----------------------------------------------------------------------------------------------------------------


def table_part(study: Study, seed: int, arms: list[str] | None) -> None:
    """Base, parents, joint models, every method; the best point of a grid on the same tasks is the bar."""
    tasks = tasks_of(study)

    def wanted(name: str) -> bool:
        return arms is None or name in arms

    if wanted("base"):
        study.once("table", "base", 0, lambda: {"scores": scored(load(str(base_of(study))), tasks), "texts": 0})
    for arm, steps in arms_of(study).items():
        if wanted(arm):
            path = trained(study, arm, seed, steps)
            cost = study.once("train", arm, seed, dict)
            own = {"texts": cost["texts"], "minutes": cost["minutes"]}
            study.once("table", arm, seed, lambda p=path, o=own: {"scores": scored(load(str(p)), tasks), **o})
    paths = pair_of(study, seed)
    probes = {n: probe_of(study, seed, ("retrieval", "sts"), n) for n in (study.probe, DESCENT_EXAMPLES)}
    counts = {name: DESCENT_EXAMPLES if "steps" in settings else study.probe for name, settings in PROBED.items()}
    methods = PLAIN | {name: settings | {"probe": probes[counts[name]]} for name, settings in PROBED.items()}
    for name, settings in methods.items():
        if wanted(name):
            method = {"type": name.split(" ")[0], **settings}
            study.once("table", name, seed, lambda m=method: merged_scores(study, paths, m, tasks))


def plane_part(study: Study, seed: int, arms: list[str] | None) -> None:
    """Score over direction t = a_sts / (a_retrieval + a_sts) and length lambda: the grid of the table."""
    tasks = tasks_of(study)
    paths = pair_of(study, seed)
    plan = opened(study, paths, {"type": "slerp"})
    live = LiveMerge.of(plan.parents, plan.base)

    def point(t: float, length: float) -> dict[str, Any]:
        live.texts = 0
        own = opened(study, paths, {"type": "slerp", "scale": length})
        own = parse_weights(own, (1 - t, t))
        apply(own, live)
        return {"scores": scored(live, tasks), "texts": live.texts, "t": t, "length": length}

    for t in DIRECTIONS:
        for length in LENGTHS:
            study.once("plane", f"t={t} lambda={length}", seed, lambda t=t, n=length: point(t, n))


def parse_weights(plan: Plan, weights: tuple[float, ...]) -> Plan:
    parents = tuple(replace(parent, weight=weight) for parent, weight in zip(plan.parents, weights, strict=True))
    return replace(plan, parents=parents)


def three_part(study: Study, seed: int, arms: list[str] | None) -> None:
    """Retrieval, STS and Banking77: SLERP at every length, and Self-Positioning at every mu."""
    tasks = [*tasks_of(study), banking(study)]
    paths = [*pair_of(study, seed), trained(study, "banking", seed, {"banking": study.steps})]
    for path in paths:
        name = f"three {path.parent.name.partition('-seed')[0]}"
        study.once("three", name, seed, lambda p=path: {"scores": scored(load(str(p)), tasks), "texts": 0})
    for length in LENGTHS:
        method = {"type": "slerp", "scale": length}
        study.once("three", f"slerp lambda={length}", seed, lambda m=method: merged_scores(study, paths, m, tasks))
    for mu in MUS:
        method = {
            "type": "self_positioning",
            **DESCENT,
            "mu": mu,
            "probe": probe_of(study, seed, ("retrieval", "sts", "banking"), DESCENT_EXAMPLES),
        }
        study.once("three", f"self_positioning mu={mu}", seed, lambda m=method: merged_scores(study, paths, m, tasks))


def forget_part(study: Study, seed: int, arms: list[str] | None) -> None:
    """In-domain gain against the loss on cranfield, for the joint model and every coefficient method at each length.

    Of two parents with weights 1, `slerp`'s accumulations agree and `task_arithmetic` is an average, so neither is
    repeated. `soup` is the mean of three runs of the retrieval parent that saw different texts.
    """
    tasks = [tasks_of(study)[0], cranfield(study)]
    study.once("forget", "base", 0, lambda: {"scores": scored(load(str(base_of(study))), tasks), "texts": 0})
    steps = arms_of(study)
    joint, retrieval, sts = (
        trained(study, f"fast {arm}", seed, steps[arm], FORGET_RATE) for arm in ("joint 0.5", "retrieval", "sts")
    )
    kinds: list[tuple[str, list[Path], dict[str, Any]]] = [
        ("joint", [joint], {"type": "average"}),
        ("retrieval", [retrieval], {"type": "average"}),
        ("soup", [trained(study, "fast retrieval", n, steps["retrieval"], FORGET_RATE) for n in SOUP],
         {"type": "average"}),
        *((name, [retrieval, sts], {"type": name.split(" ")[0], **PLAIN[name]})
          for name in ("average", "average restored", "slerp", "karcher", "normalised_mean")),
    ]  # fmt: skip
    for name, paths, method in kinds:
        for n in FORGET_LENGTHS if arms is None or name in arms else ():
            own = {**method, "scale": n}
            once = 0 if name == "soup" else seed  # the same three runs, whatever the seed
            study.once("forget", f"{name} lambda={n}", once, lambda p=paths, m=own: merged_scores(study, p, m, tasks))
    if arms is None or "model_stock" in arms:
        own = {"type": "model_stock"}
        study.once("forget", "model_stock", seed, lambda: merged_scores(study, [retrieval, sts], own, tasks))


def growth_part(study: Study, seed: int, arms: list[str] | None) -> None:
    """|V| against the number of examples for both tasks, and the joint model's angle to each parent by share."""
    for task in ("retrieval", "sts"):
        for factor in GROWTH:
            steps = max(round(factor * study.steps), 1)
            arm = task if steps == study.steps else f"growth {task} {steps}"
            path = trained(study, arm, seed, {task: steps})
            examples = steps * BATCH
            study.once("growth", f"{task} {steps}", seed, lambda p=path, n=examples: geometry(study, [p], n))
    parents = pair_of(study, seed)
    for ratio in RATIOS:
        joint = trained(study, f"joint {ratio}", seed, arms_of(study)[f"joint {ratio}"])
        study.once("growth", f"joint {ratio}", seed, lambda j=joint, r=ratio: geometry(study, [j, *parents], r))


def geometry(study: Study, paths: list[Path], x: float) -> dict[str, Any]:
    """Length of the first model's task vector, and its angles to the others, in degrees."""
    plan = opened(study, paths, {"type": "slerp", "on_antipodal": "linear"})
    gram_MM = plan.job(tuple(name for _, names in plan.by_method for name in names)).gram
    whole = gram_MM.of(list(gram_MM.full_by_name))
    lengths = whole.diagonal().sqrt()
    angles = [math.degrees(math.acos(float(whole[0, i] / lengths[0] / lengths[i]))) for i in range(1, len(paths))]
    return {"x": x, "norm": float(lengths[0]), "degrees": angles, "texts": 0}


if __name__ == "__main__":
    main()
