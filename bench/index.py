"""An index of 10,000 documents with three heads: build time, size, queries per second, and recall against exact scores.

    python -m bench.index [--documents 10000] [--queries 200]

MiniLM with new sparse and multi-vector heads (64 numbers a token) on debian-dev: the heads are not trained, which
changes neither the work nor what is compared, the index's best 10 with the best 10 of scoring every pair. Texts are cut
at 128 tokens. Encoding is timed apart from writing. Results: bench/results/index.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench.common import RESULTS, WORK, data_path, environment, minilm, write_json
from bench.encode_speed import rows
from embedsmith.core.reps import Reps, each_head
from embedsmith.index import Document, EdgeStore, HybridIndex, WeightedSum, open_index, read_documents
from embedsmith.models import load
from embedsmith.search import TopK
from embedsmith.search.hybrid import M3_WEIGHTS, Hybrid

HEADS = ("dense", "sparse", "multivector")
MIXES: dict[str, dict[str, float]] = {
    "dense": {"dense": 1.0},
    "sparse": {"sparse": 1.0},
    "dense + sparse": {"dense": 1.0, "sparse": 0.3},
    "all": dict(M3_WEIGHTS),
}


class Prepared:
    """An encoder whose representations are made before the clock runs."""

    def __init__(self, encoder: Any, documents: Sequence[str], queries: Sequence[str]) -> None:
        self._name = encoder.fingerprint()
        self.sides: dict[str, tuple[dict[str, int], Reps]] = {}
        start = time.perf_counter()
        for role, texts in (("document", ["a", *documents]), ("query", queries)):
            reps = encoder.represent(texts, role=role, outputs=HEADS)
            self.sides[role] = ({text: n for n, text in enumerate(texts)}, reps)
        self.seconds = time.perf_counter() - start

    def fingerprint(self) -> str:
        return str(self._name)

    def represent(self, texts: Sequence[str], *, role: str, task: Any = None, outputs: Sequence[str] = HEADS) -> Reps:
        place, reps = self.sides[role]
        index = torch.tensor([place[text] for text in texts])
        return each_head({name: reps[name] for name in outputs}, lambda rep: rep.rows(index))


def exact(encoder: Prepared, queries: Sequence[str], documents: Sequence[str], mix: dict[str, float]) -> list[set[str]]:
    """The best 10 documents of every query, every pair scored."""
    sides = [encoder.represent(texts, role=role) for texts, role in ((queries, "query"), (documents, "document"))]
    query, document = (Hybrid(tuple(reps[head] for head in mix), tuple(mix.values())) for reps in sides)
    best = TopK(query, 10)
    best.add_in_blocks(document)
    return [{documents[int(column)] for column in row} for row in best.result()[1]]


def recall(index: HybridIndex, encoder: Prepared, queries: list[str], documents: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, mix in MIXES.items():
        truth = exact(encoder, queries, documents, mix)
        seconds, kept = [], []
        for query, best in zip(queries, truth, strict=True):
            start = time.perf_counter()
            (hits,) = index.search([query], 10, fusion=WeightedSum(mix))
            seconds.append(time.perf_counter() - start)
            kept.append(len(best & {hit.text for hit in hits}) / len(best))
        start = time.perf_counter()
        index.search(queries, 10, fusion=WeightedSum(mix))
        batched = len(queries) / (time.perf_counter() - start)
        found[name] = {
            "recall@10": statistics.mean(kept),
            "p50_ms": 1000 * statistics.median(seconds),
            "p95_ms": 1000 * statistics.quantiles(seconds, n=20)[-1],
            "queries_per_second_batched": batched,
        }
        print(name, {key: round(value, 3) for key, value in found[name].items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=200)
    arguments = parser.parse_args()
    chosen = islice(read_documents(data_path("retrieval/debian-dev")), arguments.documents)
    documents = list({document.text: document for document in chosen}.values())
    queries = [row["text"] for row in islice(rows(data_path("retrieval/debian-dev/queries.jsonl")), arguments.queries)]
    torch.manual_seed(0)
    model = load(minilm(), heads=HEADS, new_heads=True, multivector_dim=64, max_length=128)
    encoder = Prepared(model, [document.text for document in documents], queries)
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        index = open_index(encoder, EdgeStore(Path(folder) / "index"), heads=HEADS, create=True)
        start = time.perf_counter()
        index.add([Document(str(n), document.text) for n, document in enumerate(documents)])
        built = time.perf_counter() - start
        size = sum(path.stat().st_blocks * 512 for path in Path(folder).rglob("*") if path.is_file())
        result = {
            "documents": len(documents),
            "encode_seconds": encoder.seconds,
            "write_seconds": built,
            "size_MiB": size / 2**20,
            "search": recall(index, encoder, queries, [document.text for document in documents]),
            "environment": environment(),
        }
        index.store.close()
    print(json.dumps(result, indent=1))
    if arguments.documents >= 10_000:
        write_json(RESULTS / "index.json", result)


if __name__ == "__main__":
    main()
