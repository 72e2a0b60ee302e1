"""From a step's number to its tokens. Everything here is a pure function of the plan, so it can run ahead of training
in a background thread, and a resumed run draws the same texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from embedsmith.core.batch import Batch, PairBatch, Progress, RetrievalBatch, Side
from embedsmith.core.loss import Loss
from embedsmith.data import BatchPlan, PairTexts, Record, RecordSet, RetrievalTexts, Source, pair_texts, retrieval_texts
from embedsmith.models import Embedder
from embedsmith.train.step import Part


@dataclass(frozen=True)
class Feed:
    """The parts of any step, for one rank."""

    model: Embedder
    sources: Sequence[Source]
    sets: Sequence[RecordSet]
    objectives: Sequence[Loss]
    plan: BatchPlan
    seed: int
    rank: int
    world: int

    def parts(self, step: int) -> list[Part]:
        planned = self.plan.at(step)
        index = planned.source
        records = self.sets[index].records
        rows = planned.rows_of(self.rank, self.world)
        seeds = [(self.seed, planned.epoch, int(row)) for row in rows]
        return [
            make_part(
                self.model,
                self.sources[index],
                self.sets[index],
                self.objectives[index],
                [records[int(row)] for row in rows],
                seeds,
            )
        ]

    def run_ahead(self, start: int, stop: int, ahead: int = 2) -> Iterator[list[Part]]:
        """The parts of steps `start` to `stop - 1` in order, a few prepared while the model trains."""
        with ThreadPoolExecutor(max_workers=1) as worker:
            waiting: list[Future[list[Part]]] = []
            for step in range(start, min(start + ahead, stop)):
                waiting.append(worker.submit(self.parts, step))
            for step in range(start, stop):
                ready = waiting.pop(0).result()
                if step + ahead < stop:
                    waiting.append(worker.submit(self.parts, step + ahead))
                yield ready


def make_part(
    model: Embedder,
    source: Source,
    record_set: RecordSet,
    loss: Loss,
    records: Sequence[Record],
    seeds: Sequence[Any],
) -> Part:
    """Tokenize the records of one batch for the kind of batch the loss reads."""
    if PairBatch in loss.batches:
        return _pair_part(model, record_set, loss, pair_texts(records, seeds=seeds))
    texts = retrieval_texts(records, positives=source.positives, negatives=source.negatives_kept, seeds=seeds)
    return _retrieval_part(model, record_set, loss, texts)


def _retrieval_part(model: Embedder, record_set: RecordSet, loss: Loss, texts: RetrievalTexts) -> Part:
    task = record_set.task
    ids = {
        name: None if getattr(texts, name) is None else torch.from_numpy(getattr(texts, name))
        for name in (
            "query_id_Q",
            "positive_id_QP",
            "negative_id_QM",
            "document_id_N",
            "label_Q",
            "positive_score_QP",
            "negative_score_QM",
        )
    }
    return Part(
        record_set.name,
        model.tokenize(texts.queries, role="query", task=task, instruction=texts.instructions),
        model.tokenize(texts.documents, role="document", task=task),
        _assembler(RetrievalBatch, ("query", "document"), ids, task, record_set.name),
        loss,
    )


def _pair_part(model: Embedder, record_set: RecordSet, loss: Loss, texts: PairTexts) -> Part:
    ids = {name: torch.from_numpy(getattr(texts, name)) for name in ("left_id_N", "right_id_N", "label_N")}
    first, second = (model.tokenize(side, role="query", task=record_set.task) for side in (texts.left, texts.right))
    assemble = _assembler(PairBatch, ("left", "right"), ids, record_set.task, record_set.name)
    return Part(record_set.name, first, second, assemble, loss)


def _assembler(
    kind: Callable[..., Batch], names: tuple[str, str], ids: Mapping[str, Tensor | None], task: str, source: str
) -> Callable[[Side, Side, Mapping[str, nn.Module], Progress], Batch]:
    def assemble(first: Side, second: Side, extras: Mapping[str, nn.Module], progress: Progress) -> Batch:
        device = next(iter(first.local.values())).tensors()[0].device
        moved = {name: None if tensor is None else tensor.to(device) for name, tensor in ids.items()}
        sides = dict(zip(names, (first, second), strict=True))
        return kind(task=task, source=source, progress=progress, extras=extras, group=first.group, **sides, **moved)

    return assemble
