"""MiniLM as a graph: how close its vectors stay, what it scores, and how quick it is, beside the model in torch.

    python -m bench.export [--texts 2000] [--rounds 5] [--graphs onnx:fp32 onnx:int8 openvino:fp32 openvino:int8]

Texts are the descriptions of debian-dev, as many again are sentences of stsb-en-test: long and short ones. Rounds are
interleaved (torch, then every graph), on as many threads as torch has (OMP_NUM_THREADS); the figure is the median of
the rounds' ratios. 8 bits are calibrated on texts of the same kinds from the training splits, of which nothing is
measured here, or with `--sample` on the small sample in several languages that comes with embedsmith. The
score is Spearman's correlation on stsb-en-test, times 100.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import embedsmith
from bench.common import RESULTS, data_path, environment, minilm, write_json
from bench.encode_speed import documents, rows
from embedsmith.evaluate import evaluate, load_task

GRAPHS = ("onnx:fp32", "onnx:int8", "openvino:fp32", "openvino:int8")
TARGETS = {
    "onnx:fp32": (None, 1e-5),
    "onnx:int8": (2.0, None),
    "openvino:fp32": (1.2, 1e-5),
    "openvino:int8": (2.0, None),
}
"""Times torch's speed, and the largest difference of a number."""


def texts_of(count: int) -> dict[str, list[str]]:
    pairs = rows(data_path("sts/stsb-en-test.jsonl"))
    sentences = [text for row in pairs for text in (row["text1"], row["text2"])]
    return {"descriptions": documents(count), "sentences": sentences[:count]}


def training_texts(count: int) -> list[str]:
    """What a user would calibrate with: as many descriptions as sentences, of the training splits."""
    sentences = (row["text1"] for row in rows(data_path("sts/stsb-en-train.jsonl")))
    descriptions = (row["pos"][0] for row in rows(data_path("pairs/debian-en-train.jsonl.gz")))
    return [*islice(sentences, count // 2), *islice(descriptions, count // 2)]


def timed(model: Any, texts: list[str]) -> tuple[float, Any]:
    start = time.perf_counter()
    vectors = model.encode(texts, show_progress=False)
    return time.perf_counter() - start, vectors


def measured(models: dict[str, Any], texts: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Speed and closeness of every graph, beside torch."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    vectors: dict[str, Any] = {}
    for model in models.values():
        timed(model, texts[:64])
    for _ in range(rounds):
        for name, model in models.items():
            elapsed, vectors[name] = timed(model, texts)
            seconds[name].append(elapsed)
    found = {}
    for name in models:
        cosine = (vectors[name] * vectors["torch"]).sum(1)
        ratios = [one / other for one, other in zip(seconds["torch"], seconds[name], strict=True)]
        found[name] = {
            "texts_per_second": round(len(texts) / statistics.median(seconds[name]), 1),
            "times_torch": round(statistics.median(ratios), 2),
            "max_difference": float(np.abs(vectors[name] - vectors["torch"]).max()),
            "mean_cosine": round(float(cosine.mean()), 5),
            "least_cosine": round(float(cosine.min()), 5),
        }
    return found


def table(results: dict[str, Any]) -> str:
    columns = (
        "| graph | MB | stsb-en-test | lost | mean cosine | least | largest difference | times torch: {} | verdict |"
    )
    kinds = list(results["texts"])
    lines = [columns.format(" | ".join(kinds)), "|" + "---|" * (8 + len(kinds))]
    for name, score in results["scores"].items():
        each = [results["texts"][kind][name] for kind in kinds]
        cells = [name, f"{results['megabytes'][name]:.0f}", f"{score:.2f}", f"{results['scores']['torch'] - score:.2f}"]
        cells += [f"{min(one['mean_cosine'] for one in each):.4f}", f"{min(one['least_cosine'] for one in each):.4f}"]
        cells += [f"{max(one['max_difference'] for one in each):.1e}", *(f"{one['times_torch']:.2f}" for one in each)]
        lines.append("| " + " | ".join([*cells, verdict(name, results, each)]) + " |")
    return "\n".join(lines)


def verdict(name: str, results: dict[str, Any], each: list[dict[str, float]]) -> str:
    """What is missed of the targets."""
    speed, difference = TARGETS.get(name, (None, None))
    missed = []
    if speed is not None and min(one["times_torch"] for one in each) < speed:
        missed.append(f"below {speed} times torch")
    if difference is not None and max(one["max_difference"] for one in each) > difference:
        missed.append(f"more than {difference:g} apart")
    if name.endswith("int8"):
        if min(one["mean_cosine"] for one in each) < 0.985:
            missed.append("mean cosine below 0.985")
        if results["scores"]["torch"] - results["scores"][name] > 0.3:
            missed.append("more than 0.3 points lost")
    return "; ".join(missed) or "reached"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--graphs", nargs="+", default=list(GRAPHS), metavar="BACKEND:DTYPE")
    parser.add_argument("--sample", action="store_true", help="calibrate as where no texts are given")
    parser.add_argument("--keep", type=Path, help="folder for the graphs; those that are there are not made again")
    parser.add_argument("--out", type=Path, default=RESULTS / "export.json")
    args = parser.parse_args()
    torch_model = embedsmith.load(minilm(), device="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        models: dict[str, Any] = {"torch": torch_model}
        megabytes = {"torch": sum(4 * one.numel() for one in torch_model.parameters()) / 1e6}
        for name in args.graphs:
            backend, _, dtype = name.partition(":")
            folder = (args.keep or Path(scratch)) / name.replace(":", "-")
            if not folder.exists():
                texts = () if args.sample else training_texts(256)
                print(embedsmith.export(torch_model, folder, backend, dtype=dtype, texts=texts), file=sys.stderr)  # type: ignore[arg-type]
            megabytes[name] = sum(one.stat().st_size for one in (folder / backend).iterdir()) / 1e6
            models[name] = embedsmith.load(folder)
        task = load_task(str(data_path("sts/stsb-en-test.jsonl")))
        results: dict[str, Any] = {"environment": environment(), "threads": torch.get_num_threads()}
        results["megabytes"] = megabytes
        results["scores"] = {name: 100 * evaluate(one, [task]).tasks[0].main_score for name, one in models.items()}
        results["texts"] = {kind: measured(models, texts, args.rounds) for kind, texts in texts_of(args.texts).items()}
    write_json(args.out, results)
    print(table(results))
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
