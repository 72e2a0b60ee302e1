"""Residual codes of token vectors: bytes and recall beside the exact search.

    python -m bench.residual [--documents 1400]

The token states of all-MiniLM-L6-v2 of cranfield (its documents and queries), 384 numbers a token, under 1, 2, 4 and 8
bits: bytes in the place of fp32, and the share of the exact best 10 that is found. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.nn.functional as F

from bench.common import DATA, RESULTS, environment, minilm, write_json
from embedsmith.core.reps import MultiVector
from embedsmith.evaluate import load_tasks
from embedsmith.models import load
from embedsmith.search import exact_top_k
from embedsmith.search.residual import BITS, ResidualStore, share_of_exact


def tokens_of(model: Any, texts: list[str], role: Any) -> MultiVector:
    """The states of all words, of length 1."""
    made = model.represent(texts, role=role, outputs=("tokens",))["tokens"]
    vector_NTD = F.normalize(made.vector_NTD, dim=-1).masked_fill(~made.mask_NT[..., None], 0.0)
    return MultiVector(vector_NTD, made.mask_NT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1400)
    options = parser.parse_args()
    (task,) = load_tasks(["cranfield"], data_dir=str(DATA))
    ids = list(task.corpus)[: options.documents]  # type: ignore[attr-defined]
    model = load(minilm(), max_length=128)
    document = tokens_of(model, [task.corpus[id_] for id_ in ids], "document")  # type: ignore[attr-defined]
    queries = list(task.queries)  # type: ignore[attr-defined]
    query = tokens_of(model, [task.queries[id_] for id_ in queries], "query")  # type: ignore[attr-defined]
    _, exact = exact_top_k(query, document, 10)
    whole = int(document.mask_NT.sum()) * document.vector_NTD.shape[2] * 4
    found: dict[str, Any] = {"environment": environment(), "fp32": {"bytes": whole, "recall": 1.0}}
    print(f"fp32: {whole / 2**20:.1f} MiB")
    for bits in BITS:
        torch.manual_seed(0)
        started = time.perf_counter()
        store = ResidualStore.build([document], bits)
        built = time.perf_counter() - started
        started = time.perf_counter()
        _, best = store.top(query, 10)
        share = share_of_exact(best, exact)
        seconds = {"build": round(built, 1), "search": round(time.perf_counter() - started, 1)}
        found[f"{bits} bits"] = {"bytes": store.bytes, "recall": round(share, 4), "seconds": seconds}
        print(
            f"{bits} bits: {store.bytes / 2**20:.1f} MiB ({whole / store.bytes:.1f} times less), recall@10 {share:.3f}"
        )
    write_json(RESULTS / "residual.json", found)


if __name__ == "__main__":
    main()
