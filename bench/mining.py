"""Do refreshed hard negatives help? MiniLM's first three layers on 3,000 queries of debian-en-train.

`python -m bench.mining` trains every arm with every seed for the same number of steps on the same number of texts a
step, and scores nDCG@10 on debian-dev (2,000 of its documents: all positives of 500 queries, others drawn by seed 0):

- `in_batch`: 64 queries a step, no hard negatives;
- `mined`: 32 queries with two negatives each, ranks 9 and 10 of what the initial model finds;
- `refreshed`: begins with the same two and replaces them by Conan's rule of each loss, from a pool of 60;
- `scheduled`: the same by the first paper's rule; `remined`: the second rule, and new pools from the live model;
  `guarded`: the same without candidates above 0.95 times the positive's score;
- `fewer`: 32 queries without negatives, so that each is seen as often as in the arms with negatives.

`--miner full` takes the pools from the whole MiniLM instead of the initial model, whose candidates are easier for the
trained model than those it would find itself.

Runs resume where they were stopped, scores are appended to bench/results/mining.json under `quality`, and whatever is
there is not done again. `--parts overhead` measures what live mining adds to a step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from bench.common import RESULTS, WORK, data_path, environment, minilm, read_json, write_json
from bench.quality_joint import read_lines, spread

ARMS = ("in_batch", "mined", "refreshed", "scheduled", "remined", "guarded", "fewer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("quality", "overhead"), default=["quality", "overhead"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS[:3]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--queries", type=int, default=3000)
    parser.add_argument("--corpus", type=int, default=10_000, help="texts negatives are mined from")
    parser.add_argument("--documents", type=int, default=2000, help="of the pooled part of debian-dev")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--miner", choices=("start", "full"), default="start")
    parser.add_argument("--work", type=Path, default=WORK / "mining")
    parser.add_argument("--results", type=Path, default=RESULTS / "mining.json")
    arguments = parser.parse_args()
    arguments.work = arguments.work / f"{arguments.queries}-{arguments.corpus}-{arguments.max_length}"
    start, pool = prepare(arguments)
    if "overhead" in arguments.parts:
        overhead(arguments, start, pool)
    if "quality" in arguments.parts:
        for seed in arguments.seeds:
            for arm in arguments.arms:
                record(arguments, arm, seed, start, pool)
        summarise(arguments)


def prepare(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The initial model, and the training rows with pools of 60 negatives mined by it (once)."""
    import embedsmith
    from embedsmith.cli.stages import run_mine

    folder = arguments.work
    mark = marked(arguments)
    start, pool, few = folder / "start", folder / f"pool{mark}.jsonl", folder / f"few{mark}.jsonl"
    if not start.exists():
        embedsmith.load(minilm(), layers=3, max_length=arguments.max_length).save(start)
    rows = read_lines(data_path("pairs/debian-en-train.jsonl.gz"))
    chosen = random.Random(0).sample(rows, max(arguments.queries, arguments.corpus))
    if not (folder / "pairs.jsonl").exists():
        write_lines(folder / "pairs.jsonl", chosen[: arguments.queries])
        write_lines(folder / "corpus.jsonl", [{"text": row["pos"][0]} for row in chosen[: arguments.corpus]])
    tree = {
        "data": {"path": str(folder / "pairs.jsonl")},
        "corpus": [{"path": str(folder / "corpus.jsonl")}],
        "output": str(pool),
        "searchers": [{"type": "embedding", "model": minilm() if mark else str(start)}],
        "candidates": 100,
        "select": {"negatives": 60},
    }
    print(run_mine(tree).lines(), flush=True)
    if not few.exists():
        mined = read_lines(pool)
        write_lines(few, [{"query": r["query"], "pos": r["positives"], "neg": r["negatives"][8:10]} for r in mined])
    return start, pool


def marked(arguments: argparse.Namespace) -> str:
    """What tells files and arms of another miner from those of the initial model."""
    return "" if arguments.miner == "start" else f"-{arguments.miner}"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def recipe_of(arguments: argparse.Namespace, arm: str, seed: int, start: Path, pool: Path) -> dict[str, Any]:
    """128 texts a step in every arm; steps are those of the arms with negatives."""
    contrasts = arm not in ("in_batch", "fewer")
    few = arguments.work / f"few{marked(arguments)}.jsonl"
    steps = max(round(arguments.epochs * (arguments.queries // 32)), 1)
    anew = {"rule": "each_loss", "remine_every": max(steps // 3, 1), "pool": 60}
    mining: dict[str, Any] | None = {
        "refreshed": {"rule": "each_loss"},
        "scheduled": {"rule": "scheduled"},
        "remined": anew,
        "guarded": anew | {"guard": 0.95},
    }.get(arm)
    return {
        "model": {"path": str(start), "max_length": arguments.max_length},
        "data": [
            {
                "path": str(few if arm in ("in_batch", "fewer", "mined") else pool),
                "name": "debian",
                "task": "retrieval",
                "negatives": 2 if contrasts else 0,
                "batch_size": 64 if arm == "in_batch" else 32,
                "loss": {"type": "infonce", "temperature": 0.05},
            }
        ],
        "train": {
            "steps": steps,
            "learning_rate": arguments.learning_rate,
            "seed": seed,
            "checkpoint_every": 50,
            "log_with": [],
            "mining": mining,
        },
        "output": str(arguments.work / f"{arm}{marked(arguments)}-{steps}-{seed}"),
    }


def record(arguments: argparse.Namespace, arm: str, seed: int, start: Path, pool: Path) -> None:
    """Train (or go on), score, append; nothing where the result is there."""
    from embedsmith.core.recipe import parse
    from embedsmith.train import Recipe, train

    tree = recipe_of(arguments, arm, seed, start, pool)
    sizes = {"queries": arguments.queries, "corpus": arguments.corpus, "documents": arguments.documents}
    settings = sizes | {"steps": tree["train"]["steps"], "learning_rate": arguments.learning_rate}
    runs = read_json(arguments.results, {}).get("quality", {}).get("runs", [])
    done = (f"{arm}{marked(arguments)}", seed, settings)
    if any((run["arm"], run["seed"], run["settings"]) == done for run in runs):
        return
    output, arm = Path(tree["output"]), f"{arm}{marked(arguments)}"
    print(f"{arm}, seed {seed} ...", flush=True)
    started = time.perf_counter()
    if not (output / "finished.json").exists():
        train(parse(Recipe, tree))
    minutes = (time.perf_counter() - started) / 60
    entry = {"arm": arm, "seed": seed, "settings": settings, "minutes": minutes, "environment": environment()}
    entry |= {"ndcg_at_10": score(arguments, output / "model"), "curves": curves(output)}
    entry |= {"max_length": arguments.max_length}
    table = read_json(arguments.results, {})  # another process may have added to it
    runs = table.setdefault("quality", {}).setdefault("runs", [])
    if not any(run["arm"] == "untrained" and run["settings"] == settings for run in runs):
        base = {"arm": "untrained", "seed": 0, "settings": settings, "minutes": 0.0, "curves": {}}
        runs.append(base | {"ndcg_at_10": score(arguments, start), "environment": environment()})
    runs.append(entry)
    write_json(arguments.results, table)
    print(f"{arm}, seed {seed}: nDCG@10 {100 * entry['ndcg_at_10']:.2f}, {minutes:.1f} minutes", flush=True)


def curves(output: Path) -> dict[str, Any]:
    """Replacements in all, and hardness and the suspected share at the first and the last report."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if "negatives_replaced/debian" in line]
    if not found:
        return {}
    keys = ("negatives_hardness/debian", "negatives_suspect/debian", "negatives_exhausted/debian")
    return {
        "replaced": sum(line["negatives_replaced/debian"] for line in found),
        "first": {key: found[0][key] for key in keys},
        "last": {key: found[-1][key] for key in keys},
        "remine_seconds": found[-1].get("remine_seconds", 0.0),
    }


def score(arguments: argparse.Namespace, model: Path) -> float:
    import embedsmith
    from embedsmith.evaluate import evaluate, load_task

    encoder = embedsmith.load(str(model), max_length=arguments.max_length)
    return float(evaluate(encoder, [load_task(str(part_of_dev(arguments)))])[0].main_score)


def part_of_dev(arguments: argparse.Namespace) -> Path:
    """A BEIR folder of 500 queries, their judged documents, and others up to the wanted number."""
    folder: Path = arguments.work / f"dev-{arguments.documents}"
    source = data_path("retrieval/debian-dev")
    if (folder / "qrels" / "test.tsv").exists():
        return folder
    header, *judged = (source / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()
    queries = read_lines(source / "queries.jsonl")
    chosen = random.Random(0).sample(queries, min(500, arguments.documents // 4, len(queries)))
    names = {row["_id"] for row in chosen}
    kept = [line for line in judged if line.split("\t")[0] in names]
    wanted = {line.split("\t")[1] for line in kept}
    corpus = read_lines(source / "corpus.jsonl")
    others = [row for row in corpus if row["_id"] not in wanted]
    more = {row["_id"] for row in random.Random(0).sample(others, max(arguments.documents - len(wanted), 0))}
    write_lines(folder / "corpus.jsonl", [row for row in corpus if row["_id"] in wanted | more])
    write_lines(folder / "queries.jsonl", chosen)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    (folder / "qrels" / "test.tsv").write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")
    return folder


def summarise(arguments: argparse.Namespace) -> None:
    table = read_json(arguments.results, {})
    runs = table.get("quality", {}).get("runs", [])
    newest = runs[-1]["settings"] if runs else None
    by_arm: dict[str, list[float]] = {}
    for run in (run for run in runs if run["settings"] == newest):
        by_arm.setdefault(run["arm"], []).append(100 * run["ndcg_at_10"])
    table.setdefault("quality", {})["summary"] = {arm: spread(values) for arm, values in by_arm.items()}
    write_json(arguments.results, table)
    for arm, row in table["quality"]["summary"].items():
        print(f"{arm:12} {row['mean']:6.2f} ± {row['standard_error']:.2f} ({row['runs']} runs)")


def overhead(arguments: argparse.Namespace, start: Path, pool: Path, steps: int = 30) -> None:
    """The share of a step's time that the per-loss rule takes: drawing, scoring its negatives, deciding."""
    from embedsmith.core.recipe import parse
    from embedsmith.mining.live import LiveState
    from embedsmith.train import Recipe
    from embedsmith.train import live_negatives as module
    from embedsmith.train.build import make_accelerator
    from embedsmith.train.loop import build, update

    tree = recipe_of(arguments, "refreshed", 0, start, pool)
    recipe = parse(Recipe, tree)
    run = build(recipe, make_accelerator(recipe))
    spent: list[float] = []
    for owner, name in ((LiveState, "draw"), (module, "slot_scores"), (module.LiveMining, "after_step")):
        setattr(owner, name, timed(getattr(owner, name), spent))
    shares: list[float] = []
    for step in range(steps):
        spent.clear()
        started = time.perf_counter()
        update(run, run.feed.draw(step))
        assert run.mining is not None
        run.mining.after_step(step, run.loss)
        run.state = module.replace(run.state, step=step + 1)
        shares.append(sum(spent) / (time.perf_counter() - started))
    table = read_json(arguments.results, {})
    result = {"median": statistics.median(shares), "highest": max(shares[1:]), "steps": steps}
    table.setdefault("overhead", []).append(result | {"environment": environment()})
    write_json(arguments.results, table)
    print(f"live mining takes {result['median']:.2%} of a step (at most {result['highest']:.2%})", flush=True)


def timed(act: Any, spent: list[float]) -> Any:
    def measured(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return act(*arguments, **options)
        finally:
            spent.append(time.perf_counter() - started)

    return measured


if __name__ == "__main__":
    main()
