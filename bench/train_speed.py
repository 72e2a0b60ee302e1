"""Training steps per second against sentence-transformers' trainer: same model, same rows, same batch, same loss.

`python -m bench.train_speed` fine-tunes MiniLM on one-line queries and whole package descriptions (mixed lengths, cut
at --max-length tokens) with each engine in a process of its own, in turn, several rounds. Every round has new rows,
the same for all engines. Only training steps are timed, tokenisation included, the first step left out. The figure is
the median over rounds of the ratio within a round. bf16 is timed where the processor multiplies it, or with
--engines. Results: bench/results/train_speed.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import RESULTS, ROOT, WORK, data_path, environment, minilm, write_json
from bench.quality_joint import read_lines
from embedsmith.core.device import cpu_multiplies_bf16

BASELINE = "sentence-transformers fp32"
ENGINES = (BASELINE, "embedsmith fp32", "embedsmith bf16", "sentence-transformers bf16")
TARGET = {"embedsmith fp32": 1.5}


def quick_here() -> list[str]:
    return [name for name in ENGINES if name.endswith("fp32") or cpu_multiplies_bf16()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=quick_here())
    parser.add_argument("--results", type=Path, default=RESULTS / "train_speed.json")
    parser.add_argument("--measure", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps({"seconds": measure(arguments)}))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """All engines in every round, in an order that turns by one each round."""
    rows = read_lines(data_path("pairs/debian-en-train.jsonl.gz"))
    engines = [BASELINE, *(name for name in arguments.engines if name != BASELINE)]
    rounds: list[dict[str, float]] = []
    WORK.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            path = Path(folder) / "rows.jsonl"
            chosen = random.Random(number).sample(rows, arguments.batch_size * (arguments.steps + 1))
            path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
            turn = number % len(engines)
            rate = {name: steps_per_second(name, path, arguments) for name in engines[turn:] + engines[:turn]}
        rounds.append(rate)
        print("  ".join(f"{name} {rate[name]:.3f}/s" for name in engines), flush=True)
    report(engines, rounds, arguments)


def steps_per_second(engine: str, rows: Path, arguments: argparse.Namespace) -> float:
    sizes = {"steps": arguments.steps, "batch-size": arguments.batch_size, "max-length": arguments.max_length}
    options = [str(part) for key, value in sizes.items() for part in (f"--{key}", value)]
    command = [sys.executable, "-m", "bench.train_speed", "--measure", engine, "--rows", str(rows), *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    seconds: float = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return arguments.steps / seconds


def report(engines: list[str], rounds: list[dict[str, float]], arguments: argparse.Namespace) -> None:
    ratios = {name: [rate[name] / rate[BASELINE] for rate in rounds] for name in engines}
    summary = {
        name: {
            "steps_per_second": statistics.median(rate[name] for rate in rounds),
            "ratio": statistics.median(ratios[name]),
            "lowest": min(ratios[name]),
            "highest": max(ratios[name]),
            "target": TARGET.get(name),
        }
        for name in engines
    }
    settings = {key: getattr(arguments, key) for key in ("steps", "rounds", "batch_size", "max_length")}
    value = {"settings": settings, "environment": environment(), "summary": summary, "rounds": rounds}
    write_json(arguments.results, value)
    for name, row in summary.items():
        print(f"{name:28} {row['steps_per_second']:.3f} steps/s  ratio {row['ratio']:.2f} "
              f"({row['lowest']:.2f} to {row['highest']:.2f})")  # fmt: skip


def measure(arguments: argparse.Namespace) -> float:
    """Seconds of the timed steps of one engine, in this process."""
    engine, precision = arguments.measure.split()
    run = embedsmith_seconds if engine == "embedsmith" else peer_seconds
    with tempfile.TemporaryDirectory() as folder:
        return run(arguments, precision, Path(folder))


def embedsmith_seconds(arguments: argparse.Namespace, precision: Any, folder: Path) -> float:
    from embedsmith.data import Source
    from embedsmith.losses import InfoNCE
    from embedsmith.models import ModelConfig
    from embedsmith.train import Recipe, TrainConfig
    from embedsmith.train.build import make_accelerator
    from embedsmith.train.loop import build, update

    source = Source(
        path=str(arguments.rows), task="retrieval", loss=InfoNCE(temperature=0.05), batch_size=arguments.batch_size
    )
    steps = arguments.steps + 1
    recipe = Recipe(
        model=ModelConfig(path=minilm(), max_length=arguments.max_length),
        data=(source,),
        output=str(folder),
        train=TrainConfig(steps=steps, precision=precision, weight_decay=0.0, log_with=()),
    )
    run = build(recipe, make_accelerator(recipe))
    ends = []
    for draw in run.feed.run_ahead(0, steps):
        update(run, draw)
        ends.append(time.perf_counter())
    return ends[-1] - ends[0]


def peer_seconds(arguments: argparse.Namespace, precision: str, folder: Path) -> float:
    from sentence_transformers import SentenceTransformer
    from transformers import TrainerCallback

    from bench.peer_trainer import build_trainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    model = SentenceTransformer(minilm(), device="cpu")
    model.max_seq_length = arguments.max_length
    options = {"max_steps": arguments.steps + 1, "per_device_train_batch_size": arguments.batch_size}
    trainer = build_trainer(
        model, arguments.rows, None, folder, **options, learning_rate=2e-5, bf16=precision == "bf16", logging_steps=1000
    )
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.ends[-1] - clock.ends[0]


if __name__ == "__main__":
    main()
