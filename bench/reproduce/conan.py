"""Conan-embedding (2408.15710, 2509.12892): filter, weak stage, refreshed negatives, balanced loss, oscillation."""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.common import WORK, data_path, minilm
from bench.quality_joint import read_lines
from bench.reproduce.claim import MEAN, RETRIEVAL, STS, TEST, Bench, Check, Claim, Measure, Row
from bench.reproduce.study import COSENT, LENGTH, RETRIEVAL_LOSS, TEMPERATURE, Maker, Study, save_lines

WRONG = 0.3
"""Share of the weak pairs that get another's text: Debian's pairs are cleaner than what is collected from the web."""
THRESHOLD = 0.4
EPOCHS = 4
NEGATIVES = 2
BETA = 0.8
OWN_NEGATIVES = {"type": "cross_batch_balance", "temperature": TEMPERATURE}


def weak_pairs(study: Study, seed: int) -> Path:
    """Half as many pairs again as the weak stage reads, some of them wrong."""
    count = max(study.steps * study.batch * 3 // 4, 2)
    path = study.work / "data" / f"weak-{count}-{seed}.jsonl"
    if not path.exists():
        chance = random.Random(f"weak-{seed}")
        rows = chance.sample(read_lines(data_path("pairs/debian-en-train.jsonl.gz")), count)
        wrong = chance.sample(range(count), max(round(WRONG * count), 2))
        texts = [rows[place]["pos"] for place in wrong]
        for place, other in zip(wrong, texts[1:] + texts[:1]):
            rows[place] = rows[place] | {"pos": other}
        save_lines(path, rows)
    return path


def filtered_pairs(study: Study, seed: int) -> Path:
    """The pairs that all-MiniLM-L6-v2 scores at least 0.4."""
    from embedsmith.api.curating import load_encoder
    from embedsmith.core.recipe import parse
    from embedsmith.curate import CurateRecipe, Tools, curate

    source = weak_pairs(study, seed)
    tree: dict[str, Any] = {
        "input": {"path": str(source)},
        "output": str(source.with_suffix(".filtered.jsonl")),
        "steps": [{"type": "score_filter", "model": minilm(), "threshold": THRESHOLD, "keep_scores": False}],
    }
    if not Path(tree["output"]).exists():
        curate(parse(CurateRecipe, tree), Tools(encoder=load_encoder))
    return Path(tree["output"])


def weak(study: Study, seed: int, clean: bool) -> Path:
    """The weak stage: in-batch negatives, half the steps."""
    path = filtered_pairs(study, seed) if clean else weak_pairs(study, seed)
    data = {"path": str(path), "name": "weak", "task": "retrieval", "negatives": 0, "loss": RETRIEVAL_LOSS}
    arm = "weak stage, filtered" if clean else "weak stage"
    steps = max(study.steps // 2, 1)
    return study.train(arm, seed, [data], steps=steps, checkpoint_every=steps)


def mined(study: Study, seed: int, pools: bool) -> dict[str, Any]:
    """Queries with negatives mined by the whole MiniLM: two each, or pools of 60 that begin with the same two. (What
    three untrained layers find is little harder than random texts.) So few queries that each is seen `EPOCHS` times."""
    from bench.mining import prepare

    whole = study.steps >= 40
    sizes = {"queries": 3000, "corpus": 10_000} if whole else {"queries": 100, "corpus": 200}
    folder = WORK / "mining" if whole else study.work / "mining"
    sizes["max_length"] = LENGTH
    work = folder / "-".join(str(size) for size in sizes.values())
    _, pool = prepare(argparse.Namespace(work=work, miner="full", **sizes))
    rows = read_lines(pool if pools else pool.with_name(pool.name.replace("pool", "few")))
    count = max(study.steps // 2 * study.batch // EPOCHS, study.batch)
    path = study.drawn("pools" if pools else "few", seed, count, rows, order="mined")
    source = {"path": str(path), "name": "mined", "task": "retrieval", "negatives": NEGATIVES}
    return source | {"batch_size": study.batch}


def sequential(study: Study, seed: int, arm: str, start: Path, pools: bool = False) -> Path:
    """The supervised stage as usual: one task a step, in random order, as many steps for each."""
    data = [
        mined(study, seed, pools) | {"loss": RETRIEVAL_LOSS},
        study.graded(seed, study.steps // 2 * study.batch) | {"loss": COSENT},
    ]
    mining = {"rule": "each_loss"} if pools else None
    return study.train(arm, seed, data, start=start, plan={"schedule": "balanced"}, mining=mining)


def balanced(study: Study, seed: int, arm: str, loss: dict[str, Any]) -> Path:
    """Both tasks in every step, half a batch of each: as many texts and steps as `sequential`."""
    half = {"batch_size": max(study.batch // 2, 2)}
    data = [
        mined(study, seed, pools=True) | half | {"loss": loss},
        study.graded(seed, study.steps // 2 * study.batch) | half | {"loss": COSENT},
    ]
    start, balance = weak(study, seed, clean=True), {"mode": "balanced", "beta": BETA}
    return study.train(arm, seed, data, start=start, balance=balance, mining={"rule": "each_loss"})


MAKERS: dict[str, Maker] = {
    "conan base": lambda study, seed: sequential(study, seed, "conan base", weak(study, seed, clean=False)),
    "+ filter": lambda study, seed: sequential(study, seed, "+ filter", weak(study, seed, clean=True)),
    "+ refreshed": lambda study, seed: sequential(
        study, seed, "+ refreshed", weak(study, seed, clean=True), pools=True
    ),
    "+ balanced": lambda study, seed: balanced(study, seed, "+ balanced", OWN_NEGATIVES),
    "+ balanced, in-batch": lambda study, seed: balanced(study, seed, "+ balanced, in-batch", RETRIEVAL_LOSS),
    "weak stage, filtered": lambda study, seed: weak(study, seed, clean=True),
    "weak stage": lambda study, seed: weak(study, seed, clean=False),
}


# Oscillation: every step is followed by the loss of the same probe of each task ---------------------------------------


def oscillation(study: Study, seed: int, together: bool) -> dict[str, float]:
    """Train half the steps and watch. `jump` is the root mean square of the probe loss's change from step to step,
    over its mean; the warm-up does not count."""
    curve = probe_curve(study, seed, together)
    return {f"jump_{task}": jump(values) for task, values in curve.items()} | {
        f"end_{task}": statistics.fmean(values[-max(len(values) // 4, 1) :]) for task, values in curve.items()
    }


def jump(values: list[float]) -> float:
    """100 sqrt(mean (L_t - L_(t-1))^2) / mean L."""
    changes = [b - a for a, b in itertools.pairwise(values)]
    return float(100 * statistics.fmean(change**2 for change in changes) ** 0.5 / statistics.fmean(values))


def probe_curve(study: Study, seed: int, together: bool) -> dict[str, list[float]]:
    """The probe's loss by task after every step past the warm-up."""
    from embedsmith.core.batch import Progress
    from embedsmith.core.recipe import parse
    from embedsmith.train import Recipe
    from embedsmith.train.build import build_feed, make_accelerator
    from embedsmith.train.loop import build, update
    from embedsmith.train.step import evaluate_parts

    steps = max(study.steps // 2, 4)
    recipe = parse(Recipe, watched(study, seed, together, steps))
    run = build(recipe, make_accelerator(recipe))
    probe = build_feed(recipe, run.model, recipe.evaluate.validation)
    draws = [probe.draw(step) for step in range(probe.steps_per_epoch)]
    curve: dict[str, list[float]] = {}
    for step in range(steps):
        update(run, run.feed.draw(step))
        run.state = replace(run.state, step=step + 1)
        if step < steps // 8:
            continue
        run.model.eval()
        for tokens, parts in draws:
            loss = evaluate_parts(
                run.encode, tokens, parts, run.memory, dict(run.extras.items()), Progress(step, steps)
            )
            curve.setdefault(parts[0].source, []).append(float(loss))
        run.model.train()
    return curve


def watched(study: Study, seed: int, together: bool, steps: int) -> dict[str, Any]:
    """The recipe: the same losses either way, similarity weighed by beta; nothing but the schedule differs."""
    rows = study.batch // 2 if together else study.batch
    similarity = COSENT if together else {"type": "weighted", "weight": BETA, "inner": COSENT}
    pairs = mined(study, seed, pools=False)
    graded = study.graded(seed, steps * study.batch)
    data = [
        pairs | {"batch_size": max(rows, 2), "loss": OWN_NEGATIVES},
        graded | {"batch_size": max(rows, 2), "loss": similarity},
    ]
    settings: dict[str, Any] = {"steps": steps, "learning_rate": study.learning_rate, "schedule": "constant",
                                "weight_decay": 0.0, "seed": seed, "log_with": []}  # fmt: skip
    more = {"balance": {"mode": "balanced", "beta": BETA}} if together else {"plan": {"schedule": "balanced"}}
    probe = [
        mined(study, seed + 1000, pools=False) | {"name": "retrieval", "limit": 32, "loss": OWN_NEGATIVES},
        study.graded(seed + 1000, 128) | {"name": "sts", "batch_size": 128, "loss": COSENT},
    ]
    probe[0]["batch_size"] = 32
    return {
        "model": {"path": str(weak(study, seed, clean=True)), "max_length": LENGTH},
        "data": data,
        "train": settings | more,
        "evaluate": {"validation": probe},
        "output": str(study.folder("watched", seed)),
    }


MEASURERS = {
    "sequential tasks": lambda study, seed: oscillation(study, seed, together=False),
    "balanced loss": lambda study, seed: oscillation(study, seed, together=True),
}

REPLACED = Measure("negatives replaced", ("replaced",), digits=0)
JUMP_RETRIEVAL = Measure("jump of the retrieval loss, %", ("jump_retrieval",), lower_is_better=True, least=1.0)
JUMP_STS = Measure("jump of the similarity loss, %", ("jump_sts",), lower_is_better=True, least=1.0)
END = Measure("loss at the end, mean of both", ("end_retrieval", "end_sts"), lower_is_better=True, digits=3, least=0.02)


def read_mining(table: dict[str, Any]) -> list[Row]:
    """Runs of bench.mining of the newest settings."""
    runs = table.get("quality", {}).get("runs", [])
    return [
        Row(run["arm"], None if run["arm"] == "untrained" else run["seed"], {"debian": 100 * run["ndcg_at_10"]})
        for run in runs
        if run["settings"] == runs[-1]["settings"]
    ]


def sizes_of_mining(table: dict[str, Any]) -> dict[str, Any]:
    newest = table["quality"]["runs"][-1]
    length = {"max_length": newest["max_length"]} if "max_length" in newest else {}
    return {**newest["settings"], **length}


SETTING = (
    "MiniLM's first three layers. Weak stage: half the steps, Debian pairs of which 30 % were given another's text. "
    "Supervised stage: all steps; queries with two negatives mined by the whole MiniLM, so few that each is seen four "
    "times, and stsb-en-train; every row is on top of the one before, with as many texts and steps. Scored on a part "
    "of debian-dev (nDCG@10) and on stsb-en-dev (Spearman)."
)
FULL = (
    "An encoder of BERT-large's size, 400 million filtered pairs, 4 million supervised rows: the source took 138 hours "
    "on 64 accelerators and 13 hours on 16. The supervised ablation alone: about a day on eight GPUs."
)
PAPER = "Conan-embedding, arXiv 2408.15710"
RECIPES = ("conan-weak.yaml", "conan-supervised.yaml")

MORE = "As for conan-ablation."

CLAIMS = (
    Claim(
        name="conan-ablation",
        system="Conan",
        says="Filtering weak pairs by score, refreshed negatives and the balanced loss each make the model better.",
        source=f"{PAPER}, ablation table (CMTEB)",
        measured="Average of 35 CMTEB tasks: weak stage 62.9; InfoNCE and CoSENT 68.8; with the balanced loss 70.4; "
        "with refreshed negatives 71.2; with both 72.62. The filter has no row of its own.",
        setting=SETTING + ' "In-batch" is the balanced loss with other queries\' documents as negatives too, which '
        "the printed formula leaves out.",
        full=FULL,
        recipes=RECIPES,
        checks=(
            Check("the filter helps", "+ filter", "conan base"),
            Check("refreshed negatives help", "+ refreshed", "+ filter"),
            Check("the balanced loss helps", "+ balanced", "+ refreshed"),
            Check("all three help", "+ balanced", "conan base"),
        ),
        arms=(
            "untrained",
            "weak stage",
            "weak stage, filtered",
            "conan base",
            "+ filter",
            "+ refreshed",
            "+ balanced",
            "+ balanced, in-batch",
        ),
        shown=(RETRIEVAL, STS, MEAN, TEST, REPLACED),
    ),
    Claim(
        name="conan-oscillation",
        system="Conan",
        says="With one random task a step the losses swing and end higher; with both tasks in every step they are "
        "smooth and end lower.",
        source=f"{PAPER}, section 3.3 and its figure of losses",
        measured="Final loss 0.08 with the balanced loss, 0.38 as the sum of the two separate losses.",
        setting="From the filtered weak stage, half the steps at a constant learning rate, the same losses, texts a "
        "step and beta in both arms. After every step the loss of the same 32 queries and 128 pairs is taken without "
        "dropout; the jump is the root mean square of its change from one step to the next, over its mean. The end "
        "is the mean of the last quarter.",
        full=MORE,
        recipes=RECIPES,
        checks=(
            Check("the retrieval loss swings less", "balanced loss", "sequential tasks", JUMP_RETRIEVAL),
            Check("the similarity loss swings less", "balanced loss", "sequential tasks", JUMP_STS),
            Check("the losses end lower", "balanced loss", "sequential tasks", END),
        ),
        arms=("sequential tasks", "balanced loss"),
        shown=(JUMP_RETRIEVAL, JUMP_STS, END),
    ),
    Claim(
        name="conan-refreshed",
        system="Conan",
        says="Hard negatives that are replaced once the model finds them easy beat negatives mined once; those beat "
        "none.",
        source=f"{PAPER}, section 3.2; rule of the second paper, arXiv 2509.12892",
        measured="With refreshed negatives CMTEB rises from 68.8 to 71.2, retrieval from 72.4 to 73.8.",
        setting="bench.mining: MiniLM's first three layers, 3,000 Debian queries for six epochs, 128 texts a step in "
        "every arm: 64 queries without hard negatives, or 32 with two each, mined once by the untrained model, or "
        "refreshed. `-full`: mined by the whole MiniLM; `fewer`: 32 queries without negatives; others: docs/mining.md.",
        full=MORE,
        recipes=("conan-supervised.yaml",),
        checks=(
            Check("refreshed above mined once", "refreshed", "mined", RETRIEVAL),
            Check("mined above in-batch negatives alone", "mined", "in_batch", RETRIEVAL),
        ),
        bench=Bench("bench.mining", ("--parts", "quality"), "mining.json", read_mining, sizes_of_mining),
        beside=(
            "untrained",
            "fewer",
            "scheduled",
            "remined",
            "guarded",
            "mined-full",
            "refreshed-full",
            "remined-full",
        ),
        shown=(RETRIEVAL,),
    ),
    Claim(
        name="conan-softmask",
        system="Conan",
        says="Going from causal to bidirectional attention gradually beats switching at once.",
        source="Conan-embedding-v2, arXiv 2509.12892",
        measured="Full fine-tuning on MTEB English: 71.50 without, 73.52 with; adapters of rank 16: 72.18 and 72.12.",
        setting="-",
        full="A decoder of about a billion weights and a weak stage of some hundred million pairs (the source: 97 "
        "hours on 16 accelerators). The mechanism is tested here (docs/decoders.md); its gain is not.",
        recipes=("decoder/softmask.yaml",),
        untestable="The gain is that of a long weak stage of a large decoder. In a few hundred steps of a small one "
        "the schedule would be a warm-up of the mask and little else.",
    ),
    Claim(
        name="conan-crosslingual",
        system="Conan",
        says="Retrieval pairs whose query was translated into 26 languages make the model multilingual.",
        source="Conan-embedding-v2, arXiv 2509.12892",
        measured="Multilingual average 61.73 without, 64.45 with such pairs; MKQA nDCG@10 59.1.",
        setting="-",
        full="Three million queries translated by a large language model, then the supervised stage with them as one "
        "more source.",
        recipes=("conan-supervised.yaml",),
        untestable="There is no translation model here, and the multilingual data at hand is small enough to be "
        "learned by heart.",
    ),
)
