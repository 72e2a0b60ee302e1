"""Joint fine-tuning on retrieval and similarity, against sentence-transformers' own trainer with the same everything.

`python -m bench.quality_joint` trains MiniLM on `debian-en-train` and `stsb-en-train` with each arm and seed, then
scores every model on two tests of the domain (debian-dev, stsb-en-test) and two outside it (stsb-en-dev, cranfield).
Both arms read the same rows (drawn by the seed), take the same number of steps, with the same batch sizes, learning
rate, warm-up, decay and length. Whatever is already trained or scored is kept, so the command can be stopped and
continued. The results, with the machine and the versions, are in bench/results/quality_joint.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.common import RESULTS, ROOT, WORK, data_path, environment, minilm, read_json, write_json

ARMS = ("untrained", "sentence-transformers", "embedsmith")
TASKS = {
    "debian-dev": "retrieval/debian-dev",
    "stsb-en-test": "sts/stsb-en-test.jsonl",
    "stsb-en-dev": "sts/stsb-en-dev.jsonl",
    "cranfield": "retrieval/cranfield",
}
BATCH_SIZE = 64
LEARNING_RATE = 2e-5
TRAIN_LENGTH = 128
EVALUATION_LENGTH = 256
_CLI = [sys.executable, "-c", "from embedsmith.cli import main; main()"]


def overrides(retrieval: Path, sts: Path, steps: int, seed: int, output: Path) -> list[str]:
    """What the embedsmith arm changes in recipes/joint.yaml so that both arms do the same."""
    return [
        f"model.path={minilm()}",
        f"model.max_length={TRAIN_LENGTH}",
        f"data.0.path={retrieval}",
        f"data.1.path={sts}",
        "data.1.score_range=[0,1]",
        f"data.0.batch_size={BATCH_SIZE}",
        f"data.1.batch_size={BATCH_SIZE}",
        f"train.steps={steps}",
        f"train.learning_rate={LEARNING_RATE}",
        "train.warmup=0.1",
        "train.schedule=linear",
        "train.weight_decay=0.0",
        "train.clip_norm=1.0",
        "train.precision=fp32",
        "train.log_with=[]",
        f"train.seed={seed}",
        f"output={output}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30, help="steps of each task (a run takes twice as many)")
    parser.add_argument("--work", type=Path, default=WORK / "quality_joint")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality_joint.json")
    parser.add_argument("--train-only", action="store_true", help="leave the scores to a later call")
    arguments = parser.parse_args()
    for arm, seed in runs(arguments.arms, arguments.seeds):
        model, minutes = trained(arm, seed, arguments.steps, arguments.work.resolve())
        if not arguments.train_only:
            record(arguments.results, arm, seed, arguments.steps, model, minutes)
    if not arguments.train_only:
        summarise(arguments.results, arguments.steps)


def runs(arms: list[str], seeds: list[int]) -> Iterator[tuple[str, int]]:
    """Seed by seed, so that a study cut short still compares the arms."""
    if "untrained" in arms:
        yield "untrained", 0
    for seed in seeds:
        yield from ((arm, seed) for arm in arms if arm != "untrained")


def draw(work: Path, seed: int, steps: int) -> tuple[Path, Path]:
    """One epoch of both files for this seed, the same for both arms: `steps` batches of each, scores in 0..1."""
    folder = work / "data" / f"steps-{steps}-seed-{seed}"
    paths = folder / "retrieval.jsonl", folder / "sts.jsonl"
    if not (paths[0].exists() and paths[1].exists()):
        pairs = read_lines(data_path("pairs/debian-en-train.jsonl.gz"))
        graded = [row | {"score": row["score"] / 5} for row in read_lines(data_path("sts/stsb-en-train.jsonl"))]
        folder.mkdir(parents=True, exist_ok=True)
        for path, rows in zip(paths, (pairs, graded), strict=True):
            chosen = random.Random(seed).sample(rows, min(steps * BATCH_SIZE, len(rows)))
            path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return paths


def read_lines(path: Path) -> list[dict[str, Any]]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.decode("utf-8").splitlines()]


def trained(arm: str, seed: int, steps: int, work: Path) -> tuple[Path, float | None]:
    """The arm's model folder and the minutes its training took; trained now, in a process of its own, if missing."""
    if arm == "untrained":
        return Path(minilm()), None
    folder = work / f"{arm}-steps-{steps}-seed-{seed}"
    done = folder.with_suffix(".json")
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        retrieval, sts = draw(work, seed, steps)
        print(f"training {arm}, seed {seed} ...", flush=True)
        started = time.perf_counter()
        subprocess.run(command(arm, retrieval, sts, 2 * steps, seed, folder), check=True, cwd=ROOT)
        write_json(done, {"minutes": (time.perf_counter() - started) / 60, "environment": environment()})
    minutes = read_json(done, {})["minutes"]
    print(f"{arm}, seed {seed}: {minutes:.1f} minutes", flush=True)
    return (folder / "model" if arm == "embedsmith" else folder), minutes


def command(arm: str, retrieval: Path, sts: Path, steps: int, seed: int, folder: Path) -> list[str]:
    if arm == "embedsmith":
        return [*_CLI, "train", "recipes/joint.yaml", *overrides(retrieval, sts, steps, seed, folder)]
    settings = {"batch-size": BATCH_SIZE, "learning-rate": LEARNING_RATE, "max-length": TRAIN_LENGTH}
    options = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    files = ["--retrieval", str(retrieval), "--sts", str(sts)]
    return [
        *(sys.executable, "-m", "bench.peer_trainer", str(folder)),
        *files,
        *("--steps", str(steps), "--seed", str(seed)),
        *options,
    ]


def score(model: Path) -> dict[str, float]:
    """nDCG@10 of the retrieval tasks, Spearman of the similarity tasks, times 100; both arms are read by embedsmith."""
    import embedsmith
    from embedsmith.evaluate import evaluate, load_task

    encoder = embedsmith.load(str(model), max_length=EVALUATION_LENGTH)
    results = evaluate(encoder, [load_task(str(data_path(path))) for path in TASKS.values()])
    return {name: 100 * result.main_score for name, result in zip(TASKS, results, strict=True)}


def record(results: Path, arm: str, seed: int, steps: int, model: Path, minutes: float | None) -> None:
    """Append one run's scores, unless they are there."""
    table = read_json(results, {"runs": []})
    if any((run["arm"], run["seed"], run["steps"]) == (arm, seed, steps) for run in table["runs"]):
        return
    print(f"scoring {arm}, seed {seed} ...", flush=True)
    run = {"arm": arm, "seed": seed, "steps": steps, "minutes": minutes, "scores": score(model)}
    table["runs"].append(run | {"environment": environment()})
    write_json(results, table)


def summarise(results: Path, steps: int) -> None:
    """Mean and standard error of each arm, and the difference of the two trainers, printed and stored."""
    table = read_json(results, {"runs": []})
    by_arm: dict[str, dict[str, list[float]]] = {}
    for run in (run for run in table["runs"] if run["steps"] == steps or run["arm"] == "untrained"):
        measures = run["scores"] | {"mean": statistics.fmean(run["scores"].values())}
        for name, value in measures.items():
            by_arm.setdefault(run["arm"], {}).setdefault(name, []).append(value)
    table["summary"] = {arm: {name: spread(v) for name, v in values.items()} for arm, values in by_arm.items()}
    write_json(results, table)
    print(f"{'arm':24}" + "".join(f"{name:>18}" for name in (*TASKS, "mean")))
    for arm, row in table["summary"].items():
        cells = "".join(f"{row[name]['mean']:10.2f} ± {row[name]['standard_error']:.2f} " for name in (*TASKS, "mean"))
        print(f"{arm:24}{cells}")


def spread(values: list[float]) -> dict[str, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "standard_error": error, "runs": len(values)}


if __name__ == "__main__":
    main()
