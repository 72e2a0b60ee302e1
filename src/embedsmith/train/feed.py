"""From a step's number to its tokens. Everything here is a pure function of the plan, so it can run ahead of training
in a background thread, and a resumed run draws the same texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from embedsmith.core.batch import Batch, PairBatch, Progress, RetrievalBatch, Side
from embedsmith.core.collectives import Group
from embedsmith.core.encoder import Role
from embedsmith.core.tokens import TokenBatch
from embedsmith.data import (
    BatchPlan,
    PairTexts,
    Record,
    RetrievalTexts,
    pair_texts,
    retrieval_texts,
    row_seeds,
)
from embedsmith.data.tokenread import tokens_of
from embedsmith.models import Embedder
from embedsmith.train.step import Part
from embedsmith.train.supply import Supply as Supply

AHEAD = 2
"""Batches drawn while an earlier one trains; also how many steps a replaced negative waits (`mining/live.py`)."""


@dataclass(frozen=True)
class Lane:
    """One part of every step: sources of which each step draws one, and the ranks that share its rows.

    `rank` of `world` ranks takes its slice of the rows; with `spread` it takes all rows and its slice of every row's
    negatives instead. `group` is the process group of those ranks (`None`: all), `weight` that of the part's loss.
    """

    supplies: Sequence[Supply]
    plan: BatchPlan
    rank: int
    world: int
    weight: float = 1.0
    group: Group = None
    spread: bool = False

    def part(self, model: Embedder, step: int, seed: int) -> Part:
        planned = self.plan.at(step)
        supply = self.supplies[planned.source]
        rows = planned.rows if self.spread else planned.rows_of(self.rank, self.world)
        live = supply.live
        records = live.records(rows, step) if live else [supply.records.records[int(row)] for row in rows]
        share = (self.rank, self.world) if self.spread else (0, 1)
        part = make_part(model, supply, records, row_seeds(seed, planned.visit, rows), share)
        part = live.watch(part, records, supply.negatives) if live else part
        return replace(part, weight=self.weight, group=self.group)


@dataclass(frozen=True)
class Feed:
    """The parts of any step, for one rank: one lane as a rule, several where Conan's balance or a mixed batch moves
    tasks together."""

    model: Embedder
    lanes: Sequence[Lane]
    steps_per_epoch: int
    seed: int

    @property
    def supplies(self) -> list[Supply]:
        return [supply for lane in self.lanes for supply in lane.supplies]

    def parts(self, step: int) -> list[Part]:
        return [lane.part(self.model, step, self.seed) for lane in self.lanes]

    @property
    def generation(self) -> int:
        """Grows when what was drawn ahead is void: pools of negatives were mined anew."""
        return sum(supply.live.state.generation for supply in self.supplies if supply.live)

    def run_ahead(self, start: int, stop: int, ahead: int = AHEAD) -> Iterator[list[Part]]:
        """The parts of steps `start` to `stop - 1` in order, a few prepared while the model trains."""
        generation = self.generation
        with ThreadPoolExecutor(max_workers=1) as worker:
            waiting: list[Future[list[Part]]] = []
            for step in range(start, min(start + ahead, stop)):
                waiting.append(worker.submit(self.parts, step))
            for step in range(start, stop):
                if self.generation != generation:
                    generation = self.generation
                    waiting = [worker.submit(self.parts, later) for later in range(step, min(step + ahead, stop))]
                ready = waiting.pop(0).result()
                if step + ahead < stop:
                    waiting.append(worker.submit(self.parts, step + ahead))
                yield ready


def make_part(
    model: Embedder,
    supply: Supply,
    records: Sequence[Record],
    seeds: Sequence[int],
    share: tuple[int, int] = (0, 1),
) -> Part:
    """Draw and tokenize the texts of one batch, for the kind of batch the loss reads."""
    if supply.in_pairs:
        pairs = pair_texts(records, seeds=seeds)
        return with_teacher(_pair_part(model, supply, pairs), supply, (pairs.left, pairs.right), "query")
    counts = {"positives": supply.positives, "negatives": supply.negatives}
    texts = retrieval_texts(records, **counts, seeds=seeds, share=share, shuffle=supply.shuffle)
    return with_teacher(_retrieval_part(model, supply, texts), supply, (texts.queries, texts.documents), "document")


def with_teacher(part: Part, supply: Supply, texts: tuple[list[str], list[str]], second: Role) -> Part:
    """The part with the teacher's vectors of both sides, where the source has a teacher."""
    if supply.teacher is None:
        return part
    task = supply.records.task
    roles: tuple[Role, Role] = ("query", second)
    vectors = [supply.teacher.represent(side, role=role, task=task)["dense"] for side, role in zip(texts, roles)]
    return replace(part, teacher=(vectors[0], vectors[1]))


_RETRIEVAL_IDS = (
    "query_id_Q",
    "positive_id_QP",
    "negative_id_QM",
    "document_id_N",
    "label_Q",
    "positive_score_QP",
    "negative_score_QM",
)


def _retrieval_part(model: Embedder, supply: Supply, texts: RetrievalTexts) -> Part:
    name, task = supply.records.name, supply.records.task
    query = _tokenize(model, texts.queries, task, texts.instructions)
    document = tokens_of(
        texts.documents,
        False,
        lambda places: model.tokenize([texts.documents[place] for place in places], role="document", task=task),
    )
    assemble = _assembler(RetrievalBatch, ("query", "document"), _tensors(texts, _RETRIEVAL_IDS), task, name)
    return Part(name, query, document, assemble, supply.loss)


def _pair_part(model: Embedder, supply: Supply, texts: PairTexts) -> Part:
    """Both sides of a pair are queries: neither is a document to be found."""
    name, task = supply.records.name, supply.records.task
    left, right = (_tokenize(model, side, task, texts.instructions) for side in (texts.left, texts.right))
    ids = _tensors(texts, ("left_id_N", "right_id_N", "label_N"))
    return Part(name, left, right, _assembler(PairBatch, ("left", "right"), ids, task, name), supply.loss)


def _tokenize(model: Embedder, texts: list[str], task: str, instructions: list[str | None]) -> TokenBatch:
    """Texts in the role of queries. A record's own instruction takes the place of the task's prompt."""

    def tokenize(places: list[int]) -> TokenBatch:
        own = [instructions[place] for place in places]
        given = own if any(instruction is not None for instruction in own) else None
        return model.tokenize([texts[place] for place in places], role="query", task=task, instruction=given)

    return tokens_of(texts, True, tokenize)


def _tensors(texts: RetrievalTexts | PairTexts, names: Sequence[str]) -> dict[str, Tensor | None]:
    arrays = {name: getattr(texts, name) for name in names}
    return {name: None if array is None else torch.from_numpy(array) for name, array in arrays.items()}


def _assembler(
    kind: Callable[..., Batch], names: tuple[str, str], ids: Mapping[str, Tensor | None], task: str, source: str
) -> Callable[[Side, Side, Mapping[str, nn.Module], Progress], Batch]:
    def assemble(first: Side, second: Side, extras: Mapping[str, nn.Module], progress: Progress) -> Batch:
        device = next(iter(first.local.values())).tensors()[0].device
        moved = {name: None if tensor is None else tensor.to(device) for name, tensor in ids.items()}
        sides = dict(zip(names, (first, second), strict=True))
        return kind(task=task, source=source, progress=progress, extras=extras, group=first.group, **sides, **moved)

    return assemble
