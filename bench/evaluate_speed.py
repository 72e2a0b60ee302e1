"""Retrieval evaluation from given vectors: ours, sentence-transformers' evaluator, mteb's.

`python -m bench.evaluate_speed` encodes debian-dev (10,000 documents, 1,000 queries) once with MiniLM and keeps the
vectors; then each evaluator scores them in a process of its own, `--repeats` times, in turn, with one thread and with
two. The same figures are asked of all (six kinds, at 1, 3, 5, 10, 20 and 100); the arm `sentence-transformers-defaults`
computes what that evaluator does when nothing is asked for: fewer cuts. Reported are nDCG@10, the median processor
time and wall time of the first scoring in a process and of the second (nothing is encoded), the peak memory above that
before scoring, and the ratios to ours.

Documents with equal scores: trec_eval, mteb and ours put the larger id first, sentence-transformers the smaller. So its
nDCG@10 is told twice: as it is, and with ids renamed in the opposite order (`alike`), which decides ties as the others
do. Results go to bench/results/evaluate_speed.json. `--tiny` uses 300 documents and random vectors.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import RESULTS, WORK, data_path, environment, minilm, resident, write_json
from embedsmith.core.reps import Dense
from embedsmith.evaluate import RetrievalTask, evaluate, load_task

ARMS = ("embedsmith", "sentence-transformers", "sentence-transformers-defaults", "mteb")
TARGET = 3.0
_FORCED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""Where these say which processor OpenBLAS shall take this one for: libraries choose their own code here."""


def task_of(tiny: bool) -> RetrievalTask:
    task = load_task(data_path("retrieval/debian-dev"))
    assert isinstance(task, RetrievalTask)
    if not tiny:
        return task
    queries = dict(list(task.queries.items())[:50])
    wanted = {document for query in queries for document in task.qrels[query]}
    corpus = {key: text for key, text in task.corpus.items() if key in wanted}
    corpus |= dict(list(task.corpus.items())[:250])
    return RetrievalTask(task.name, queries, corpus, {query: task.qrels[query] for query in queries})


class Given:
    """Vectors by text, to each evaluator in the form it asks for."""

    def __init__(self, task: RetrievalTask, path: Path) -> None:
        texts = list(dict.fromkeys([*task.queries.values(), *task.corpus.values()]))
        self.place = {text: row for row, text in enumerate(texts)}
        self.vector_ND = np.load(path)

    def rows(self, texts: list[str]) -> np.ndarray:
        return self.vector_ND[[self.place[text] for text in texts]]

    def represent(self, texts: Any, *, role: str, task: str | None = None, outputs: Any = ("dense",)) -> Any:
        return {"dense": Dense(torch.from_numpy(self.rows(texts)))}


def make_vectors(task: RetrievalTask, path: Path, tiny: bool) -> None:
    """fp32 unit vectors of queries and documents, in the order of `Given`."""
    texts = list(dict.fromkeys([*task.queries.values(), *task.corpus.values()]))
    if tiny:
        vector_ND = np.random.default_rng(0).normal(size=(len(texts), 384)).astype(np.float32)
        vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    else:
        from embedsmith.models import load

        vector_ND = load(minilm(), max_length=256).encode(texts, show_progress=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, vector_ND)


def ours(task: RetrievalTask, given: Given) -> Callable[[], float]:
    return lambda: evaluate(given, [task], progress=False)[0].scores["ndcg_at_10"]


def sentence_transformers(task: RetrievalTask, given: Given, defaults: bool = False) -> Callable[[], float]:
    from sentence_transformers import SentenceTransformer, models
    from sentence_transformers.evaluation import InformationRetrievalEvaluator

    class Model(SentenceTransformer):
        """The evaluator's model, with the encoding replaced by a look-up."""

        def encode(self, sentences: Any, **_: Any) -> Any:
            return torch.from_numpy(given.rows(list(sentences)))

        encode_query = encode_document = encode

    bag = models.BoW(vocab=["a"])
    model = Model(modules=[bag], similarity_fn_name="cosine", device="cpu")
    relevant = {query: {d for d, grade in task.qrels[query].items() if grade > 0} for query in task.judged()}
    queries = {query: task.queries[query] for query in task.judged()}
    names = ("precision_recall_at_k", "accuracy_at_k", "map_at_k", "ndcg_at_k", "mrr_at_k")
    cuts = {} if defaults else {name: list(task.cuts) for name in names}
    more = {"write_csv": False, "batch_size": 4096}
    judge = InformationRetrievalEvaluator(queries, dict(task.corpus), relevant, name="x", **cuts, **more)
    return lambda: float(judge(model)["x_cosine_ndcg@10"])


def mteb(task: RetrievalTask, given: Given) -> Callable[[], float]:
    import mteb as library

    from embedsmith.evaluate.mteb.run import MtebSearch
    from embedsmith.evaluate.mteb.tasks import as_mteb_task

    class Model:
        """An encoder only, so that the search is mteb's own."""

        mteb_model_meta = MtebSearch.of(given, "local/given", "1").mteb_model_meta

        def encode(self, inputs: Any, **_: Any) -> Any:
            return given.rows([text for batch in inputs for text in batch["text"]])

        def similarity(self, left: Any, right: Any) -> Any:
            return torch.as_tensor(left) @ torch.as_tensor(right).T

        similarity_pairwise = similarity

    theirs, model = as_mteb_task(task), Model()
    theirs.k_values, theirs._top_k = task.cuts, max(task.cuts)
    theirs.load_data()
    options = {"cache": None, "co2_tracker": False, "show_progress_bar": False, "encode_kwargs": {"batch_size": 4096}}
    return lambda: float(library.evaluate(model, [theirs], **options).task_results[0].scores["test"][0]["ndcg_at_10"])


MAKERS: dict[str, Callable[[RetrievalTask, Given], Callable[[], float]]] = {
    "embedsmith": ours,
    "sentence-transformers": sentence_transformers,
    "sentence-transformers-defaults": partial(sentence_transformers, defaults=True),
    "mteb": mteb,
}


def renamed(task: RetrievalTask) -> RetrievalTask:
    """The same task with the documents' ids in the opposite order."""
    name = {document: f"{place:08}" for place, document in enumerate(sorted(task.corpus, reverse=True))}
    corpus = {name[document]: text for document, text in task.corpus.items()}
    qrels = {q: {name[d]: grade for d, grade in grades.items() if d in name} for q, grades in task.qrels.items()}
    return RetrievalTask(task.name, task.queries, corpus, qrels)


def measure(arm: str, path: Path, tiny: bool) -> dict[str, float]:
    """Two scorings in this process. A small one goes first, so that no import is timed."""
    task = task_of(tiny)
    given = Given(task, path)
    small = task_of(True)
    with tempfile.TemporaryDirectory() as folder:
        make_vectors(small, Path(folder) / "v.npy", True)
        MAKERS[arm](small, Given(small, Path(folder) / "v.npy"))()
    score = MAKERS[arm](task, given)
    before = resident("VmHWM")
    first, second = _timed(score), _timed(score)
    alike = MAKERS[arm](renamed(task), given)() if arm.startswith("sentence") else first["ndcg_at_10"]
    again = {"cpu_again": second["cpu"], "wall_again": second["wall"]}
    return {**first, "ndcg_at_10_alike": alike, **again, "memory_mb": resident("VmHWM") - before}


def _timed(score: Callable[[], float]) -> dict[str, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    ndcg = score()
    return {"ndcg_at_10": ndcg, "cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--arm", choices=ARMS, help="measure one evaluator in this process")
    said = parser.parse_args()
    path = WORK / "evaluate_speed" / ("tiny.npy" if said.tiny else "debian-dev.npy")
    if said.arm:
        print(json.dumps(measure(said.arm, path, said.tiny)))
        return
    if not path.exists():
        make_vectors(task_of(said.tiny), path, said.tiny)
    medians = {threads: compared(threads, said.repeats, said.tiny) for threads in said.threads}
    if not said.tiny:
        write_json(RESULTS / "evaluate_speed.json", {"environment": environment(), "threads": medians})


def compared(threads: int, repeats: int, tiny: bool) -> dict[str, Any]:
    """All arms in turn; prints and returns their runs, medians and the verdict."""
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    told = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    left = {name: value for name, value in os.environ.items() if name not in _FORCED}
    for _ in range(repeats):
        for arm in ARMS:
            command = [sys.executable, "-m", "bench.evaluate_speed", "--arm", arm, *(["--tiny"] if tiny else [])]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env={**left, **told})
            runs[arm].append(json.loads(done.stdout.strip().splitlines()[-1]))
    report = {arm: {key: statistics.median(run[key] for run in each) for key in each[0]} for arm, each in runs.items()}
    mine = report["embedsmith"]
    print(f"{threads} thread(s)")
    for arm, row in report.items():
        print(
            f"{arm:31} nDCG@10 {row['ndcg_at_10']:.5f} (ties alike {row['ndcg_at_10_alike']:.5f})"
            f"  processor {row['cpu']:.3f} s ({row['cpu'] / mine['cpu']:.1f} of ours), again {row['cpu_again']:.3f} s"
            f" ({row['cpu_again'] / mine['cpu_again']:.1f})  wall {row['wall']:.3f} s, again {row['wall_again']:.3f} s"
            f"  memory +{row['memory_mb']:.0f} MB"
        )
    apart = max(abs(row["ndcg_at_10_alike"] - mine["ndcg_at_10"]) for row in report.values())
    same = ("sentence-transformers", "mteb")  # the arms that compute the same figures
    clock = "cpu" if threads == 1 else "wall"  # with several, processor time counts threads that wait
    least = {key: min(report[arm][key] for arm in same) / mine[key] for key in (clock, f"{clock}_again")}
    met = apart <= 1e-4 and min(least.values()) >= TARGET
    first, second = least.values()
    times = f"{first:.1f} times faster than the faster peer, {second:.1f} times the second time ({clock})"
    print(f"nDCG apart by {apart:.1e} with ties alike; {times}: {'met' if met else 'MISSED'}")
    return {"runs": runs, "median": report, "apart": apart, "times_faster": least, "met": met}


if __name__ == "__main__":
    main()
