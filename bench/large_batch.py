"""A batch of thousands in the memory of a batch of 64, and its time beside sentence-transformers' cached loss.

`python -m bench.large_batch` trains MiniLM on one-line queries and package descriptions, every engine in a process of
its own, in turn:

- memory: the peak of the whole process at batch 4096 (kept to the tokens of a batch of 64, scores in blocks) over the
  peak at a plain batch of 64. Target: at most 1.2.
- speed: texts per second of one step, against sentence-transformers' CachedMultipleNegativesRankingLoss with the same
  rows, batch and chunk of 64 texts. Target: above 1.

Results: bench/results/large_batch.json.
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

from bench.common import RESULTS, ROOT, WORK, data_path, environment, minilm, read_json, resident, write_json
from bench.quality_joint import read_lines

CHUNK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=int, default=4096, help="the large batch of the memory figure")
    parser.add_argument("--batch", type=int, default=1024, help="the batch of the speed figure")
    parser.add_argument("--parts", nargs="+", choices=("memory", "speed"), default=["memory", "speed"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--results", type=Path, default=RESULTS / "large_batch.json")
    parser.add_argument("--measure", choices=("plain", "kept", "chunked", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    rows = read_lines(data_path("pairs/debian-en-train.jsonl.gz"))
    found = read_json(arguments.results, {})
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        for part in arguments.parts:
            measured = (memory if part == "memory" else speed)(arguments, rows, Path(folder) / "rows.jsonl")
            found[part] = measured | {"max_length": arguments.max_length, "environment": environment()}
            print(f"{part}: ratio {measured['ratio']:.2f}", flush=True)
    write_json(arguments.results, found)


def memory(arguments: argparse.Namespace, rows: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """Peak of the process at the large batch over that at a plain batch of 64. Target: at most 1.2."""
    write_rows(path, rows, CHUNK, seed=0)
    small = run("plain", path, CHUNK, arguments.max_length)["peak_MiB"]
    write_rows(path, rows, arguments.large, seed=0)
    large = run("kept", path, arguments.large, arguments.max_length)["peak_MiB"]
    return {"batch": arguments.large, "small_MiB": small, "large_MiB": large, "ratio": large / small}


def speed(arguments: argparse.Namespace, rows: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """Time of the peer's step over ours, round by round. Target: above 1."""
    rounds: list[dict[str, float]] = []
    for number in range(arguments.rounds):
        write_rows(path, rows, arguments.batch, seed=1 + number)
        order = ("chunked", "peer") if number % 2 else ("peer", "chunked")
        rounds.append({name: run(name, path, arguments.batch, arguments.max_length)["seconds"] for name in order})
        print({name: f"{2 * arguments.batch / value:.1f} texts/s" for name, value in rounds[-1].items()}, flush=True)
    ratios = [each["peer"] / each["chunked"] for each in rounds]
    ratio = {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return {"batch": arguments.batch, "chunk": CHUNK, **ratio, "seconds": rounds}


def write_rows(path: Path, rows: list[dict[str, Any]], count: int, seed: int) -> None:
    chosen = random.Random(seed).sample(rows, count)
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


def run(name: str, rows: Path, batch: int, max_length: int) -> dict[str, float]:
    options = ["--rows", str(rows), "--batch", str(batch), "--max-length", str(max_length)]
    command = [sys.executable, "-m", "bench.large_batch", "--measure", name, *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of one optimizer step and the peak of this process."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = peer_step(arguments, folder) if arguments.measure == "peer" else own_step(arguments, folder)
    return {"seconds": seconds, "peak_MiB": resident("VmHWM")}


def own_step(arguments: argparse.Namespace, folder: str) -> float:
    from embedsmith.data import Source
    from embedsmith.losses import InfoNCE
    from embedsmith.models import ModelConfig
    from embedsmith.train import Recipe, TrainConfig
    from embedsmith.train.build import make_accelerator
    from embedsmith.train.loop import build, update

    memory: dict[str, Any] = {"plain": {}, "kept": {"token_budget": 2048}, "chunked": {"micro_batch": CHUNK}}
    loss = InfoNCE(temperature=0.05, block_size=None if arguments.measure == "plain" else 512)
    recipe = Recipe(
        model=ModelConfig(path=minilm(), max_length=arguments.max_length),
        data=(Source(path=str(arguments.rows), task="retrieval", loss=loss, batch_size=arguments.batch),),
        output=folder,
        train=TrainConfig(steps=1, warmup=0, precision="fp32", log_with=(), **memory[arguments.measure]),
    )
    run_ = build(recipe, make_accelerator(recipe))
    started = time.perf_counter()
    update(run_, run_.feed.draw(0))
    return time.perf_counter() - started


def peer_step(arguments: argparse.Namespace, folder: str) -> float:
    """The cached loss, one forward, backward and AdamW step; tokenisation included, as on our side."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    rows = read_lines(arguments.rows)
    model = SentenceTransformer(minilm(), device="cpu").train()
    model.max_seq_length = arguments.max_length
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=CHUNK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    started = time.perf_counter()
    sides = ([row["query"] for row in rows], [row["pos"][0] for row in rows])
    value = loss([model.preprocess(side) for side in sides], labels=None)
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
