"""Self-Positioning (2410.15035): merging against joint training, the search's cost, lengths and directions.

Rows of bench.merging.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from bench.reproduce.claim import MEAN, RETRIEVAL, STS, Bench, Check, Claim, Measure, Row

RESAMPLED = tuple(f"joint {ratio}" for ratio in (0.1, 0.3, 0.5, 0.7, 0.9))
STATIC = ("average", "task_arithmetic", "ties", "fisher", "regmean")
PAPER = "Self-Positioning, arXiv 2410.15035"


SIZES_OF_A_RUN = ("steps", "layers", "items", "documents", "probe")


def newest(table: dict[str, Any], parts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Runs of these parts, of the settings of the last one."""
    runs = [run for run in table.get("runs", []) if run["part"] in parts]
    return [run for run in runs if all(run[name] == runs[-1][name] for name in SIZES_OF_A_RUN)]


def sizes_of(*parts: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The settings of the newest run of these parts."""
    return lambda table: {name: newest(table, parts)[-1][name] for name in SIZES_OF_A_RUN}


def read_table(table: dict[str, Any]) -> list[Row]:
    """Parents, joint models and merges; `best joint` is the best of the plain and re-sampled ones of a seed."""
    rows = [
        Row(run["arm"], None if run["arm"] == "base" else run["seed"], _scores(run))
        for run in newest(table, ("table",))
    ]
    joint = [row for row in rows if row.arm in ("joint", *RESAMPLED)]
    for seed in dict.fromkeys(row.seed for row in joint):
        own = [row for row in joint if row.seed == seed]
        if len(own) == 1 + len(RESAMPLED):
            best = max(own, key=lambda row: row.scores["debian"] + row.scores["stsb"])
            rows.append(Row("best joint", seed, best.scores))
    return rows


def _scores(run: dict[str, Any]) -> dict[str, float]:
    """Names of this study; thousands of texts encoded."""
    found = {"debian": run["scores"]["debian-dev"], "stsb": run["scores"]["stsb-en-dev"]}
    return found | {"texts": run["texts"] / 1000}


def read_plane(table: dict[str, Any]) -> list[Row]:
    """Each seed's best point of the grid, which cost the texts of the whole grid, beside Self-Positioning."""
    plane = newest(table, ("plane",))
    rows = read_table(table)
    for seed in dict.fromkeys(run["seed"] for run in plane):
        own = [run for run in plane if run["seed"] == seed]
        best = max(own, key=lambda run: run["scores"]["mean"])
        rows.append(Row("best of grid", seed, _scores(best) | {"texts": sum(run["texts"] for run in own) / 1000}))
    return rows


def read_growth(table: dict[str, Any]) -> list[Row]:
    """Lengths by size of data, as shares of the largest size's, and angles of joint models to the parents."""
    runs = newest(table, ("growth",))
    rows = [_length(run) for run in runs if not run["arm"].startswith("joint")]
    joint = [run for run in runs if run["arm"].startswith("joint")]
    names = ("to retrieval", "to sts")
    return rows + [Row(run["arm"], run["seed"], dict(zip(names, run["degrees"], strict=True))) for run in joint]


def _length(run: dict[str, Any]) -> Row:
    task, steps = run["arm"].split(" ")
    place = round(8 * int(steps) / run["steps"])
    return Row(f"{task} x{place}/8", run["seed"], {"length": run["norm"]})


def bench_of(read: Callable[[dict[str, Any]], list[Row]], *parts: str) -> Bench:
    return Bench("bench.merging", ("--parts", *parts), "merging.json", read, sizes_of(*parts))


TEXTS = Measure("thousand texts encoded", ("texts",), lower_is_better=True, digits=0, least=1.0)
LENGTH = Measure("length of the task vector", ("length",), digits=3, least=0.01)
TO_RETRIEVAL = Measure("degrees to the retrieval model", ("to retrieval",), lower_is_better=True, digits=1)
TO_STS = Measure("degrees to the similarity model", ("to sts",), lower_is_better=True, digits=1)
SIZES = (1, 2, 4, 8, 16)

SETTING = (
    "bench.merging: from MiniLM, a retrieval model (debian-en-train) and a similarity model (stsb-en-train and "
    "sick-train), and joint models of as many steps as both together; parts of debian-dev (nDCG@10) and stsb-en-dev "
    "(Spearman)."
)
FULL = (
    "A base model, and one model for each of the tasks of an embedding training set (about a million rows each): a "
    "day on eight GPUs, and as long for the joint models they are compared with. The merge itself takes minutes on one."
)
RECIPES = ("merge-self-positioning.yaml", "joint.yaml")

LIKE = "As in self-positioning-joint."
MORE = "As for self-positioning-joint."

CLAIMS = (
    Claim(
        name="self-positioning-joint",
        system="Self-Positioning",
        says="Merging models of single tasks beats training on all tasks at once, re-sampled or not, and keeps what "
        "each parent can do.",
        source=f"{PAPER}, abstract; Qwen3-Embedding, arXiv 2506.05176, table 5",
        measured="0.7 above joint training on the MTEB average, and above re-sampling. Qwen3-Embedding-0.6B gains 1.77 "
        "(multilingual), 2.52 (English) and 1.57 (Chinese) by merging.",
        setting=SETTING
        + " Re-sampled: five shares of retrieval from 0.1 to 0.9; the best of them is chosen on the very "
        "tasks that are scored, which favours joint training.",
        full=FULL,
        recipes=RECIPES,
        checks=(
            Check("above joint training", "self_positioning", "joint"),
            Check("above the best re-sampled joint model", "self_positioning", "best joint"),
            Check("98 % of the retrieval model's retrieval", "self_positioning", "retrieval", RETRIEVAL, share=0.98),
            Check("98 % of the similarity model's similarity", "self_positioning", "sts", STS, share=0.98),
        ),
        bench=bench_of(read_table, "table"),
        beside=("base", "slerp"),
    ),
    Claim(
        name="self-positioning-methods",
        system="Self-Positioning",
        says="Learned positions beat the other methods, and of those SLERP is the best.",
        source=f"{PAPER}, comparison of methods (the table could not be read)",
        measured="SLERP is the best of the tuned static methods, Self-Positioning above it.",
        setting=LIKE + " Every method at its defaults, which the source tuned.",
        full=MORE,
        recipes=("merge-self-positioning.yaml", "merge.yaml", "merge-ties.yaml"),
        checks=(
            Check("Self-Positioning above SLERP", "self_positioning", "slerp"),
            *(Check(f"SLERP above {name}", "slerp", name) for name in STATIC),
        ),
        bench=bench_of(read_table, "table"),
    ),
    Claim(
        name="self-positioning-cost",
        system="Self-Positioning",
        says="Gradient descent on a small probe finds the place that a grid over direction and length finds, at a "
        "fraction of its cost.",
        source=f"{PAPER}, abstract and section on cost",
        measured="Better than re-sampling at lower cost; figures could not be read.",
        setting=LIKE
        + " The grid over direction and length is scored on the very tasks it is judged by. Cost: texts encoded, "
        "a backward pass counts as two.",
        full=MORE,
        recipes=RECIPES,
        checks=(
            Check("within 0.2 of the grid's best point, or above", "self_positioning", "best of grid", margin=-0.2),
            Check("for at most half its texts", "self_positioning", "best of grid", TEXTS, share=0.5),
        ),
        bench=bench_of(read_plane, "table", "plane"),
        shown=(RETRIEVAL, STS, MEAN, TEXTS),
    ),
    Claim(
        name="self-positioning-geometry",
        system="Self-Positioning",
        says="A task vector grows with the size of its data, and a joint model's points towards the task with the "
        "larger share: so imbalance is a matter of length and direction.",
        source=f"{PAPER}, figures 3 to 5",
        measured="Lengths grow with the amount of data, and the joint model turns to the larger one; values could not "
        "be read.",
        setting=LIKE
        + " Lengths at five sizes of data, from an eighth of the parents' to twice as much; joint models with five "
        "shares of retrieval.",
        full=MORE + " `python -m bench.merging --parts growth` draws the curves.",
        recipes=("merge-self-positioning.yaml",),
        checks=(
            *(
                Check(
                    f"{task}: longer with {large}/8 than with {small}/8 of the data",
                    f"{task} x{large}/8",
                    f"{task} x{small}/8",
                    LENGTH,
                )
                for task in ("retrieval", "sts")
                for small, large in itertools.pairwise(SIZES)
            ),
            Check(
                "nine tenths of retrieval lie nearer to the retrieval model than one",
                "joint 0.9",
                "joint 0.1",
                TO_RETRIEVAL,
            ),
            Check(
                "nine tenths of similarity lie nearer to the similarity model than one",
                "joint 0.1",
                "joint 0.9",
                TO_STS,
            ),
        ),
        bench=bench_of(read_growth, "growth"),
        beside=("joint 0.3", "joint 0.5", "joint 0.7"),
        shown=(LENGTH, TO_RETRIEVAL, TO_STS),
    ),
)
