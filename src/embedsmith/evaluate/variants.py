"""A model in several variants, side by side: each head alone and heads together with given or tuned weights, or its
vectors at several widths, which is what Matryoshka training is for, and as codes of a byte or a bit a number. Every
text is encoded once for all of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from embedsmith.core.collectives import ALONE, Group
from embedsmith.core.encoder import Encoder, Role, fingerprint
from embedsmith.core.errors import EvaluationError
from embedsmith.core.files import atomic_file
from embedsmith.core.progress import progress_bar
from embedsmith.core.reps import Dense, Representation, Reps
from embedsmith.core.terminal import Printed
from embedsmith.evaluate.encoding import Reader
from embedsmith.evaluate.metrics import Graded, Ranking, ndcg, spearman
from embedsmith.evaluate.result import Results, percent
from embedsmith.evaluate.run import evaluate
from embedsmith.evaluate.tasks.kinds import Task
from embedsmith.evaluate.tasks.pairs import STSTask
from embedsmith.evaluate.tasks.ranking import RetrievalTask, searched_by_codes
from embedsmith.search.cached import CachedEncoder
from embedsmith.search.exact import on_device, search_device, top_of_block
from embedsmith.search.hybrid import M3_WEIGHTS, Hybrid, HybridEncoder
from embedsmith.search.quantised import RESCORE, SearchPrecision

FULL = "full"
"""The column of the whole vectors, beside those of their widths."""
HEADS = ("dense", "sparse", "multivector")
GRID = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Weights that tuning tries for every head beside the first, whose weight is 1."""
DEV_QUERIES = 500
"""Queries of a dev task that tuning looks at, evenly spread."""

Weights = Mapping[str, float]


@dataclass(frozen=True, repr=False)
class HeadScores(Printed):
    """Results by column (heads, in the order of the paper's tables, or widths), and the weights of each column's
    heads. `sizes`: the table also tells what the vectors take."""

    columns: Mapping[str, Results]
    weights: Mapping[str, Weights]
    about: Mapping[str, Any] = field(default_factory=dict)
    sizes: bool = False

    def table(self) -> Table:
        """One row a task: its main score in every column, times 100."""
        table = Table(title=str(self.about.get("model", "")) or None, title_justify="left")
        for name in ("task", "metric"):
            table.add_column(name)
        for name in self.columns:
            table.add_column(name, justify="right")
        first = next(iter(self.columns.values()))
        for place, result in enumerate(first):
            scores = (percent(results[place].main_score) for results in self.columns.values())
            table.add_row(result.task, result.metric, *scores)
        mixed = {name: weights for name, weights in self.weights.items() if len(weights) > 1}
        words = {name: " ".join(f"{head} {w:g}" for head, w in weights.items()) for name, weights in mixed.items()}
        table.caption = "; ".join(f"{name}: {text}" for name, text in words.items()) or None
        for place, result in enumerate(first):
            if self.sizes:
                held = (results[place].counts.get("bytes", 0) / 2**20 for results in self.columns.values())
                table.add_row(result.task, "MiB of vectors", *(f"{mebibytes:.3g}" for mebibytes in held))
        if self.sizes:
            table.add_row(
                "",
                "bytes a vector",
                *(str(results[0].counts.get("bytes_per_vector", "")) for results in self.columns.values()),
            )
        return table

    def as_dict(self, *, items: bool = False) -> dict[str, Any]:
        columns = {name: results.as_dict(items=items) for name, results in self.columns.items()}
        return {**self.about, "weights": {name: dict(w) for name, w in self.weights.items()}, "columns": columns}

    def save(self, path: str | Path, *, items: bool = False) -> None:
        """Write JSON; the file appears whole or not at all."""
        with atomic_file(path) as file:
            json.dump(self.as_dict(items=items), file, indent=2, ensure_ascii=False, allow_nan=False)


def score_heads(
    encoder: Encoder,
    tasks: Sequence[Task],
    heads: Sequence[str],
    *,
    weights: Weights | None = None,
    tune_on: Sequence[Task] = (),
    about: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
    group: Group = ALONE,
) -> HeadScores:
    """Score every head alone, dense and sparse together, and all heads, each text encoded once for all of them.

    `weights`: of the column `all` (and, where they are there, of `dense+sparse`), M3-Embedding's by default.
    `tune_on`: dev tasks; the weights that score best there, by `tuned_weights`, are one more column. `cache`: a folder
    for vectors, so that a stopped command continues; `group`: see `evaluate`.
    Errors: `EvaluationError` for one head, weights of heads that are not there or all 0, other kinds of dev task.
    """
    if len(heads) < 2:
        raise EvaluationError(f"the model has the heads {', '.join(heads)}", expected="two or more to put side by side")
    unknown = sorted(set(weights or {}) - set(heads))
    sound = all(0 <= weight < float("inf") for weight in (weights or {}).values())
    if unknown or not sound or (weights and not any(weights.values())):
        raise EvaluationError(
            f"the weights are {dict(weights or {})}", expected=f"numbers from 0, not all 0, of {', '.join(heads)}"
        )
    with _encoded_once(encoder, heads, cache) as shared:
        columns: dict[str, Weights] = {head: {head: 1.0} for head in heads}
        given = {head: dict(weights or M3_WEIGHTS).get(head, 0.0) for head in heads}
        pair = {head: given[head] for head in HEADS[:2] if head in given}
        if len(pair) == 2 and len(heads) > 2 and any(pair.values()):
            columns["dense+sparse"] = pair
        columns["all" if len(heads) == len(HEADS) else "+".join(heads)] = given
        if tune_on:
            columns["tuned"] = tuned_weights(shared, tune_on, heads)
        results = {
            name: evaluate(shared, tasks, head=name, group=group)
            if name in heads
            else evaluate(HybridEncoder(shared, of_heads), tasks, head="hybrid", group=group)
            for name, of_heads in columns.items()
        }
    return HeadScores(results, columns, dict(about or {}))


def tuned_weights(encoder: Encoder, tasks: Sequence[Task], heads: Sequence[str]) -> Weights:
    """The weights of `GRID` with the best mean main score on dev tasks (retrieval: nDCG@10, similarity: Spearman);
    of equal ones the first. The first head's weight is 1."""
    with progress_bar("tune weights", len(tasks)) as bar:
        dev = []
        for task in tasks:
            dev.append(_dev_scores(encoder, task, heads))
            bar.advance()
    best, chosen = -float("inf"), (1.0,) * len(heads)
    for others in itertools.product(GRID, repeat=len(heads) - 1):
        tried = (1.0, *others)
        score = float(np.mean([one.score(tried) for one in dev]))
        if score > best:
            best, chosen = score, tried
    return dict(zip(heads, chosen, strict=True))


@dataclass(frozen=True)
class _Ranking:
    """score_HQK of a retrieval task's sampled queries under each head."""

    task: RetrievalTask
    query_ids: Sequence[str]
    document_ids: Sequence[str]
    score_HQK: Tensor

    def score(self, weights: Sequence[float]) -> float:
        total_QK = torch.tensordot(torch.tensor(weights), self.score_HQK, dims=1)
        place = {document: number for number, document in enumerate(self.document_ids)}
        ranking = Ranking(*(part.numpy() for part in top_of_block(total_QK, 11)))
        if self.task.ignore_identical_ids:
            ranking = ranking.without(np.array([place.get(query, -1) for query in self.query_ids]))
        return float(ndcg(Graded.of(ranking, self.task.qrels, self.query_ids, place), 10).mean())


@dataclass(frozen=True)
class _Pairs:
    """score_HN of the pairs of a similarity task under each head."""

    label_N: Any
    score_HN: Tensor

    def score(self, weights: Sequence[float]) -> float:
        total_N = torch.tensordot(torch.tensor(weights), self.score_HN, dims=1)
        return float(np.nan_to_num(spearman(total_N.double().numpy(), self.label_N), nan=-1.0))


def _dev_scores(encoder: Encoder, task: Task, heads: Sequence[str]) -> _Ranking | _Pairs:
    readers = [Reader(encoder, head) for head in heads]
    if isinstance(task, STSTask):
        sides = [reader.sides(task.text1, task.text2, task=task.kind, label=task.name) for reader in readers]
        return _Pairs(np.asarray(task.score), torch.stack([left.paired(right)[0] for left, right in sides]))
    if not isinstance(task, RetrievalTask):
        raise EvaluationError(f"weights are not tuned on {task.kind}", where=task.name, expected="retrieval or sts")
    judged = task.judged()
    query_ids = judged[:: -(-len(judged) // DEV_QUERIES)]
    document_ids = sorted(task.corpus, reverse=True)
    asked, texts = [task.queries[query] for query in query_ids], [task.corpus[document] for document in document_ids]
    score_HQK = []
    for reader in readers:  # a head alone as a hybrid, which is scored in blocks that bound memory
        query = Hybrid((reader.all(asked, role="query", task="retrieval", label=f"{task.name} queries"),), (1.0,))
        device = search_device(query)
        left, blocks = on_device(query, device), []
        for piece in reader.pieces(texts, role="document", task="retrieval", label=f"{task.name} corpus"):
            blocks.append(left.scores(on_device(Hybrid((piece,), (1.0,)), device))[0].cpu())
        score_HQK.append(torch.cat(blocks, dim=1))
    return _Ranking(task, query_ids, document_ids, torch.stack(score_HQK))


@contextmanager
def _encoded_once(encoder: Encoder, heads: Sequence[str], cache: str | Path | None) -> Iterator[_Shared]:
    """An encoder that computes all heads of a text the first time and reads them from a folder after that."""
    if cache is not None:
        yield _Shared(CachedEncoder.of(encoder, Path(cache) / "vectors"), tuple(heads))
        return
    with tempfile.TemporaryDirectory() as folder:
        yield _Shared(CachedEncoder(encoder, Path(folder), "this"), tuple(heads))  # no other model has this folder


@dataclass(frozen=True)
class _Shared:
    """A cached encoder that computes all heads at once when one is missing."""

    cached: CachedEncoder
    heads: tuple[str, ...]

    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        if not all(self.cached.path(texts, role, task, head).is_file() for head in outputs):
            self.cached.represent(texts, role=role, task=task, outputs=self.heads)
        return self.cached.represent(texts, role=role, task=task, outputs=outputs)

    def fingerprint(self) -> str:
        return self.cached.fingerprint()


@dataclass(frozen=True)
class NarrowEncoder:
    """An encoder whose dense vectors are their first `width` numbers, normalised again.

    Errors: `EvaluationError` where the vectors are not wider than that.
    """

    encoder: Encoder
    width: int

    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        reps = self.encoder.represent(texts, role=role, task=task, outputs=outputs)
        narrow: dict[str, Representation] = {}
        for name, rep in reps.items():
            if isinstance(rep, Dense) and self.width >= (whole := rep.vector_ND.shape[1]):
                raise EvaluationError(f"{self.width} of {whole} numbers were asked for", expected=f"1 to {whole - 1}")
            narrow[name] = rep.truncate(self.width) if isinstance(rep, Dense) else rep
        return narrow

    def fingerprint(self) -> str:
        return hashlib.blake2b(f"{fingerprint(self.encoder)} first {self.width}".encode(), digest_size=16).hexdigest()


def score_widths(
    encoder: Encoder,
    tasks: Sequence[Task],
    widths: Sequence[int],
    *,
    precisions: Sequence[SearchPrecision] = (),
    rescore: int = RESCORE,
    about: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
    group: Group = ALONE,
) -> HeadScores:
    """Score the whole vectors (the column `full`), then their first numbers at every width, from wide to narrow. Each
    text is encoded once.

    `precisions`: int8, binary: all are also searched as such codes, with `rescore` times as many documents scored by
    their full vectors (the columns `int8`, `64 int8`); the tasks are retrieval then. `cache`: a folder for vectors and
    results, so that a stopped command continues; `group`: see `evaluate`.
    Errors: `EvaluationError` for no width and no precision, a width that the vectors do not have, and other tasks.
    """
    if not (widths or precisions) or min(widths, default=1) < 1:
        raise EvaluationError(f"the widths are {list(widths)}", expected="numbers from 1, such as 64 128 256")
    as_codes = {
        precision: [searched_by_codes(task, precision, rescore) for task in tasks]
        for precision in dict.fromkeys(precisions)
    }
    folder = None if cache is None else Path(cache) / "results"
    with _encoded_once(encoder, ("dense",), cache) as shared:
        encoders: dict[str, Encoder] = {FULL: shared}
        encoders |= {str(width): NarrowEncoder(shared, width) for width in sorted(set(widths), reverse=True)}
        columns: dict[str, Results] = {}
        for name, each in encoders.items():
            columns[name] = evaluate(each, tasks, about=about, cache=folder, group=group)
            for precision, searched in as_codes.items():
                column = precision if name == FULL else f"{name} {precision}"
                columns[column] = evaluate(each, searched, about=about, cache=folder, group=group)
    return HeadScores(columns, {}, dict(about or {}), sizes=bool(precisions))
