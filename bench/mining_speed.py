"""Speed and memory of offline mining from given vectors: 10,000 queries against 51,629 documents, top 100.

`python -m bench.mining_speed` compares exact search with a flat FAISS index, and mining with sentence-transformers'
`mine_hard_negatives` (same vectors, same filters), each arm in a process of its own, arms taking turns. Vectors are
made up (unit length, in clusters); time is processor time with one thread. Results are appended to
bench/results/mining.json under `speed`.

Peak memory is what an arm adds to vectors that are already loaded. `search-embedsmith` should stay within `bound`: a
block of scores, twice copied while its best are chosen (13 bytes a score); for every query its vector, the best k with
room for 256 more while they are collected, and the result by parts and as a whole (12 bytes a candidate). Further arms
search with blocks of 512 to 32,768 documents: their memory shows what a block costs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common import RESULTS, ROOT, environment, read_json, resident, write_json

ARMS = ("search-embedsmith", "search-faiss", "mine-embedsmith", "mine-sentence-transformers")
BLOCKS = (512, 8192, 32768)
BLOCK_ARMS = tuple(f"search-block-{block}" for block in BLOCKS)
WIDTH, NEGATIVES, MARGIN, HIGHEST = 384, 10, 0.05, 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--documents", type=int, default=51_629)
    parser.add_argument("--top", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS / "mining.json")
    parser.add_argument("--arm", choices=ARMS + BLOCK_ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        alone(arguments)
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    import numpy as np

    rounds: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS + BLOCK_ARMS}
    out = ROOT / "bench" / "out" / "mining_speed.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, matrix in zip(("queries", "documents"), vectors(arguments), strict=True):
        np.save(out.with_name(f"mining_speed_{name}.npy"), matrix)
    for number in range(arguments.rounds):
        for arm in ARMS + (BLOCK_ARMS if number == 0 else ()):
            sizes = [f"--{name}={getattr(arguments, name)}" for name in ("queries", "documents", "top")]
            command = [sys.executable, "-m", "bench.mining_speed", *sizes, "--arm", arm, "--out", str(out)]
            threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **threads}, stdout=subprocess.DEVNULL)
            rounds[arm].append(read_json(out, {}))
            print(arm, {key: value for key, value in rounds[arm][-1].items() if key != "chosen"}, flush=True)
    report(arguments, rounds)


def report(arguments: argparse.Namespace, rounds: dict[str, list[dict[str, Any]]]) -> None:
    median = lambda arm: sorted(entry["seconds"] for entry in rounds[arm])[len(rounds[arm]) // 2]
    summary = {
        "search_over_faiss": median("search-embedsmith") / median("search-faiss"),
        "mine_over_sentence_transformers": median("mine-embedsmith") / median("mine-sentence-transformers"),
        "same_candidates": agreement(*(rounds[arm][0]["chosen"] for arm in ARMS[:2])),
        "same_negatives": agreement(*(rounds[arm][0]["chosen"] for arm in ARMS[2:])),
        "megabytes": {arm: max(entry["megabytes"] for entry in rounds[arm]) for arm in rounds},
        "bound_megabytes": {arm: bound(arguments, arm) for arm in ("search-embedsmith", *BLOCK_ARMS)},
    }
    print(json.dumps(summary, indent=1))
    slim = {arm: [{k: v for k, v in entry.items() if k != "chosen"} for entry in each] for arm, each in rounds.items()}
    sizes = {name: getattr(arguments, name) for name in ("queries", "documents", "top")}
    table = read_json(arguments.results, {})
    entry = {"sizes": sizes, "rounds": slim, "summary": summary, "environment": environment()}
    table.setdefault("speed", []).append(entry)
    write_json(arguments.results, table)


def bound(arguments: argparse.Namespace, arm: str) -> float:
    """What a search may need, by the sizes of its block and of its result (see above), for blocks of 1,024 queries."""
    rows = int(arm.rpartition("-")[2]) if arm in BLOCK_ARMS else 2048
    block = 13 * min(arguments.queries, 1024) * rows
    kept = arguments.queries * (12 * (3 * arguments.top + 256) + 4 * WIDTH)
    return (block + kept) / 2**20


def agreement(left: list[list[int]], right: list[list[int]]) -> float:
    """Share of the choices that both made."""
    shared = sum(len(set(a) & set(b)) for a, b in zip(left, right, strict=True))
    return shared / max(sum(len(row) for row in left), sum(len(row) for row in right), 1)


def vectors(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Unit vectors in clusters; query i is near document i, its positive."""
    import numpy as np

    chance = np.random.default_rng(0)
    basis = chance.standard_normal((32, WIDTH)).astype(np.float32) * 0.3

    def unit(rows: Any) -> Any:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    noise = chance.standard_normal((arguments.documents, WIDTH), dtype=np.float32) * 0.5
    documents = unit(chance.standard_normal((arguments.documents, 32)).astype(np.float32) @ basis + noise)
    near = chance.standard_normal((arguments.queries, WIDTH), dtype=np.float32) * 0.04
    return unit(documents[: arguments.queries] + near), documents


def alone(arguments: argparse.Namespace) -> None:
    """One arm: time of the work itself, and the memory it adds."""
    import numpy as np

    queries, documents = (
        np.load(arguments.out.with_name(f"mining_speed_{name}.npy")) for name in ("queries", "documents")
    )
    work = {
        "search-embedsmith": _embedsmith_search,
        "search-faiss": _faiss_search,
        "mine-embedsmith": _embedsmith_mine,
        "mine-sentence-transformers": _library_mine,
        **dict.fromkeys(BLOCK_ARMS, _embedsmith_search),
    }[arguments.arm](queries, documents, arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of imports and loading, is forgotten
    before = resident()
    started = time.process_time()
    chosen = work()
    seconds = time.process_time() - started
    write_json(arguments.out, {"seconds": seconds, "megabytes": resident("VmHWM") - before, "chosen": chosen})


def _embedsmith_search(queries: Any, documents: Any, arguments: argparse.Namespace) -> Callable[[], Any]:
    from embedsmith.search import exact_top_k

    block = int(arguments.arm.rpartition("-")[2]) if arguments.arm in BLOCK_ARMS else None
    exact_top_k(queries[:8], documents[:500], 2, block=100)  # what the libraries load at their first use is no block
    return lambda: exact_top_k(queries, documents, arguments.top, block=block)[1][:1000].tolist()


def _faiss_search(queries: Any, documents: Any, arguments: argparse.Namespace) -> Callable[[], Any]:
    import faiss

    faiss.omp_set_num_threads(1)
    first = faiss.IndexFlatIP(documents.shape[1])
    first.add(documents[:500])
    first.search(queries[:8], 2)

    def work() -> Any:
        index = faiss.IndexFlatIP(documents.shape[1])
        index.add(documents)
        return index.search(queries, arguments.top)[1][:1000].tolist()

    return work


def _embedsmith_mine(queries: Any, documents: Any, arguments: argparse.Namespace) -> Callable[[], Any]:
    import torch

    from embedsmith.core.recipe import parse
    from embedsmith.core.reps import Dense
    from embedsmith.data import Record, RecordSet
    from embedsmith.mining import MineRecipe
    from embedsmith.mining.offline import Texts, mine_rows
    from embedsmith.mining.searchers import EmbeddingSearcher, TextReps

    class Given:
        """Text "query 7" has the vector of query 7."""

        def represent(self, texts: Any, *, role: str, task: Any = None, outputs: Any = ("dense",)) -> Any:
            rows = (queries if role == "query" else documents)[[int(text.split()[1]) for text in texts]]
            return {"dense": Dense(torch.from_numpy(rows))}

    corpus = [f"document {number}" for number in range(len(documents))]
    records = [Record(f"query {number}", (corpus[number],)) for number in range(len(queries))]
    limits = {"relative_margin": MARGIN, "max_score": HIGHEST}
    tree = {
        "data": {"path": "given"},
        "output": "unused.jsonl",
        "searchers": [{"type": "embedding", "model": "given"}],
        "candidates": arguments.top,
        "select": {"negatives": NEGATIVES, "near_duplicate": None, "limits": limits},
    }

    def work() -> Any:
        recipe = parse(MineRecipe, tree)
        texts = Texts(RecordSet("given", "retrieval", records, ""), corpus)
        searcher = EmbeddingSearcher(
            TextReps(Given(), texts.queries, "query", None, "dense"),
            TextReps(Given(), corpus, "document", None, "dense"),
        )
        chosen: list[list[int]] = []
        for start in range(0, len(records), recipe.part):
            mined = mine_rows(texts, recipe, [searcher], None, start, min(start + recipe.part, len(records)))
            chosen += [[int(text.split()[1]) for text in record.negatives] for record in mined]
        return chosen

    return work


def _library_mine(queries: Any, documents: Any, arguments: argparse.Namespace) -> Callable[[], Any]:
    import torch
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    class Given:
        """As much of a model as the function asks for."""

        device = torch.device("cpu")

        def encode_query(self, texts: Any, **_: Any) -> Any:
            return queries[[int(text.split()[1]) for text in texts]]

        def encode_document(self, texts: Any, **_: Any) -> Any:
            return documents[[int(text.split()[1]) for text in texts]]

        def similarity(self, left: Any, right: Any) -> Any:
            return torch.as_tensor(left) @ torch.as_tensor(right).T

        def similarity_pairwise(self, left: Any, right: Any) -> Any:
            return (torch.as_tensor(left) * torch.as_tensor(right)).sum(-1)

        def get_embedding_dimension(self) -> int:
            return int(documents.shape[1])

    corpus = [f"document {number}" for number in range(len(documents))]
    rows = {"query": [f"query {n}" for n in range(len(queries))], "positive": corpus[: len(queries)]}

    def work() -> Any:
        found = mine_hard_negatives(
            Dataset.from_dict(rows),
            Given(),
            corpus=corpus,
            range_max=arguments.top,
            relative_margin=MARGIN,
            max_score=HIGHEST,
            num_negatives=NEGATIVES,
            output_format="labeled-list",
            faiss_batch_size=4096,
            verbose=False,
        )
        chosen: list[list[int]] = [[] for _ in range(len(queries))]
        columns = found.column_names
        for row in found:
            place = int(row["query"].split()[1])
            chosen[place] = [int(t.split()[1]) for t, y in zip(row[columns[1]], row["labels"], strict=True) if y == 0]
        return chosen

    return work


if __name__ == "__main__":
    main()
