"""Texts per second of `encode` against sentence-transformers', same model, same texts, equal vectors.

    python -m bench.encode_speed [--texts 5000] [--rounds 5]

Interleaved rounds (ours, theirs, ours, ...), so that a busy machine slows both; the figure is the median of the
rounds' ratios. sentence-transformers runs with its defaults (batches of 32, fp32). bf16 is timed where the processor
multiplies it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import embedsmith
from bench.common import RESULTS, data_path, environment, minilm, write_json
from embedsmith.core.device import cpu_multiplies_bf16

TOLERANCE = 1e-5


def rows(path: Path) -> Any:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def documents(count: int) -> list[str]:
    corpus = rows(data_path("retrieval/debian-dev/corpus.jsonl"))
    return [f"{row.get('title', '')} {row['text']}".strip() for row in islice(corpus, count)]


def queries(count: int) -> list[str]:
    """The 1,000 short queries of debian-dev, filled up from the training pairs."""
    own = [row["text"] for row in rows(data_path("retrieval/debian-dev/queries.jsonl"))]
    more = (row["query"] for row in rows(data_path("pairs/debian-en-train.jsonl.gz")))
    return [*own, *islice(more, max(count - len(own), 0))][:count]


def timed(encode: Callable[[list[str]], Any], texts: list[str]) -> tuple[float, Any]:
    start = time.perf_counter()
    vectors = encode(texts)
    return time.perf_counter() - start, vectors


def compare(texts: list[str], ours: Any, theirs: Any, rounds: int) -> dict[str, Any]:
    engines: dict[str, Callable[[list[str]], Any]] = {
        "embedsmith": ours.encode,
        "sentence_transformers": theirs.encode,
    }
    if cpu_multiplies_bf16():
        engines["embedsmith_bf16"] = lambda texts: ours.encode(texts, dtype="bfloat16")
    for encode in engines.values():
        encode(texts[:64])  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    vectors: dict[str, Any] = {}
    for _ in range(rounds):
        for name, encode in engines.items():
            elapsed, vectors[name] = timed(encode, texts)
            seconds[name].append(elapsed)
    difference = float(np.abs(vectors["embedsmith"] - vectors["sentence_transformers"]).max())
    assert difference <= TOLERANCE, f"vectors differ by {difference}"
    found: dict[str, Any] = {
        "texts": len(texts),
        "texts_per_second": {name: round(len(texts) / statistics.median(s), 1) for name, s in seconds.items()},
        "ratio_fp32": _ratio(seconds, "embedsmith"),
        "max_difference_fp32": difference,
        "seconds": {name: [round(value, 3) for value in s] for name, s in seconds.items()},
    }
    if "embedsmith_bf16" in engines:
        cosine = (vectors["embedsmith_bf16"] * vectors["sentence_transformers"]).sum(1)
        found["ratio_bf16"] = _ratio(seconds, "embedsmith_bf16")
        found["cosine_bf16"] = {"mean": round(float(cosine.mean()), 6), "min": round(float(cosine.min()), 6)}
    return found


def _ratio(seconds: dict[str, list[float]], name: str) -> float:
    pairs = zip(seconds["sentence_transformers"], seconds[name], strict=True)
    return round(statistics.median(theirs / ours for theirs, ours in pairs), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "encode_speed.json")
    args = parser.parse_args()
    import sentence_transformers

    ours = embedsmith.load(minilm(), device="cpu")
    theirs = sentence_transformers.SentenceTransformer(minilm(), device="cpu")
    results: dict[str, Any] = {"environment": environment(), "rounds": args.rounds}
    for name, make in {"documents": documents, "queries": queries}.items():
        results[name] = compare(make(args.texts), ours, theirs, args.rounds)
        bf16 = f", bf16 {results[name]['ratio_bf16']} times" if "ratio_bf16" in results[name] else ""
        print(f"{name}: fp32 {results[name]['ratio_fp32']} times{bf16}", flush=True)
        print(f"  texts per second: {results[name]['texts_per_second']}")
    write_json(args.out, results)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
