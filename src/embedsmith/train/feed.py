"""From a step's number to its tokens. Everything here is a pure function of the plan, so it can run ahead of training
in a background thread, and a resumed run draws the same texts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, cast

import numpy as np

from embedsmith.core.batch import Batch, Loss, PairBatch, PairIds, RetrievalBatch, RetrievalIds
from embedsmith.core.collectives import Group
from embedsmith.core.encoder import Role
from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import log
from embedsmith.core.seeds import derive_seed
from embedsmith.core.tokens import IntArray, TokenBatch
from embedsmith.data import (
    BatchPlan,
    PlanConfig,
    RecordSet,
    RowFacts,
    joined,
    pair_texts,
    retrieval_texts,
    row_facts,
)
from embedsmith.data.record import Record, Text
from embedsmith.data.stream import HasOrder
from embedsmith.data.token_records import tokens_of
from embedsmith.models import Embedder
from embedsmith.train.step import Part


class Negatives(Protocol):
    """What chooses a source's negatives while the model trains (`LiveSource`)."""

    @property
    def generation(self) -> int:
        """Grows when what was drawn ahead is void: the pools were mined anew."""
        ...

    def records(self, row_Q: IntArray, step: int) -> list[Record[Text]]:
        """Some rows, with the negatives in use at a step in place of their own."""
        ...

    def watch(self, records: Sequence[Record[Text]]) -> Callable[[Batch], None]:
        """What is to be shown the batch of these records, once it is encoded."""
        ...


# The sources of a run, ready to be planned: which of them are put together, and how their rows become batches.


@dataclass(frozen=True)
class Supply:
    """One source, ready to draw from: its records, its loss, the rows of a step (all ranks together; `None`: as the
    plan's token budget or table says), how often an epoch sees a row, and how many texts a query draws. `live`: what
    chooses its negatives while the model trains."""

    records: RecordSet[Text]
    loss: Loss
    batch_size: int | None
    weight: float
    positives: int
    negatives: int
    teacher: Embedder | None = None
    shuffle: float = 0.0
    live: Negatives | None = None

    @property
    def in_pairs(self) -> bool:
        """Whether its batches are scored pairs; a loss that reads both kinds takes what the task is."""
        return PairBatch in self.loss.batches and (
            RetrievalBatch not in self.loss.batches or self.records.task == "sts"
        )

    @property
    def rows(self) -> int:
        return len(self.records.records)

    @property
    def texts_a_row(self) -> int:
        return 2 if self.in_pairs else 1 + self.positives + self.negatives

    @property
    def streamed(self) -> bool:
        """Whether its records come in an order of their own, and nothing is known of them before."""
        return isinstance(self.records.records, HasOrder)

    def like(self, other: Supply) -> bool:
        """Whether rows of both may be in one batch: same task, loss and draw."""
        mine, theirs = ((one.records.task, one.loss, one.positives, one.shuffle, one.teacher) for one in (self, other))
        return mine == theirs and self.in_pairs == other.in_pairs and not (self.streamed or other.streamed)


@dataclass(frozen=True)
class Planner:
    """Makes the plan of some sources for a number of ranks. `max_length`: tokens at which the model cuts a text."""

    config: PlanConfig = PlanConfig()
    seed: int = 0
    max_length: int | None = None

    def __call__(self, supplies: Sequence[Supply], world: int) -> BatchPlan:
        """Errors: `RecipeError` of `BatchPlan`; for a stream that should go by length or be free of duplicates."""
        apart = [_apart(supply, self.config) for supply in supplies]
        records = [supply.records.records for supply in supplies]
        return BatchPlan(
            sizes=tuple(supply.rows for supply in supplies),
            batch_sizes=tuple(supply.batch_size for supply in supplies),
            weights=tuple(supply.weight for supply in supplies),
            names=tuple(supply.records.name for supply in supplies),
            tasks=tuple(supply.records.task for supply in supplies),
            texts=tuple(supply.texts_a_row for supply in supplies),
            apart=tuple(apart),
            facts=tuple(
                _facts(supply, self.max_length) if wanted or self.config.by_length else None
                for supply, wanted in zip(supplies, apart, strict=True)
            ),
            orders=tuple(one.order if isinstance(one, HasOrder) else None for one in records),
            seed=self.seed,
            world=world,
            config=self.config,
        )


def _apart(supply: Supply, config: PlanConfig) -> bool:
    """Whether rows of a batch must share no text: by default where they are contrasted with each other."""
    if not supply.streamed:
        return config.duplicates == "forbid" or (config.duplicates is None and not supply.in_pairs)
    if config.by_length or config.duplicates == "forbid":
        raise RecipeError(
            "a stream knows neither the lengths of its rows nor which of them share a text",
            where=f"source {supply.records.name!r}",
            fix="leave out plan.lengths, plan.batch_tokens and plan.duplicates=forbid, or `streaming` of the source",
        )
    return False


def _facts(supply: Supply, max_length: int | None) -> RowFacts:
    facts = row_facts(supply.records.records)
    return facts if max_length is None else replace(facts, length_N=np.minimum(facts.length_N, max_length))


def put_together(supplies: Sequence[Supply], name: str | None = None) -> Supply:
    """Sources of one kind as one."""
    records = joined([supply.records for supply in supplies])
    return replace(
        supplies[0],
        records=records if name is None else replace(records, name=name),
        negatives=max(supply.negatives for supply in supplies),
    )


def merge_small(supplies: Sequence[Supply], config: PlanConfig) -> list[Supply]:
    """Small sources put together with the other small ones of their kind, or where there is none, with the smallest
    of the others. One without its like stays as it is: its batches shrink."""
    if config.small != "merge":
        return list(supplies)
    left = list(supplies)
    while True:
        small = sorted((one for one in left if _is_small(one, config)), key=lambda one: one.rows)
        pair = next(((one, mate) for one in small if (mate := _mate(one, left)) is not None), None)
        if pair is None:
            return left
        together = put_together([one for one in left if one is pair[0] or one is pair[1]])
        log.info("sources %s are put together: a batch has more rows than %s", together.records.name, pair[0].rows)
        left = [together if one is pair[1] else one for one in left if one is not pair[0]]


def _mate(one: Supply, supplies: Sequence[Supply]) -> Supply | None:
    alike = [
        other
        for other in supplies
        if other is not one and one.like(other) and (one.batch_size, one.weight) == (other.batch_size, other.weight)
    ]
    return min(alike, key=lambda other: other.rows, default=None)


def _is_small(supply: Supply, config: PlanConfig) -> bool:
    if supply.batch_size is not None:
        return supply.rows < supply.batch_size
    if supply.streamed:  # without a batch size it is refused by the planner
        return False
    if config.batch_sizes is not None:
        return supply.rows < max(config.batch_sizes)
    longest = int(row_facts(supply.records.records).length_N.max())
    return config.batch_tokens is not None and supply.rows * supply.texts_a_row * longest < config.batch_tokens


def mixed_supplies(supplies: Sequence[Supply], batch_size: int, world: int) -> list[Supply]:
    """The baseline of batches of all sources: one supply a kind, whose rows a step are its share of all rows.

    Errors: `RecipeError` where weights or batch sizes of sources say something else, or a batch cannot hold all kinds.
    """
    if any(supply.weight != 1 or supply.batch_size != batch_size for supply in supplies):
        raise RecipeError(
            "plan.batches=mixed draws from all rows alike",
            fix="leave out weight, cap and batch_size of the sources, and plan.batch_tokens",
        )
    kinds: list[list[Supply]] = []
    for supply in supplies:
        alike = next((kind for kind in kinds if kind[0].like(supply)), None)
        if alike is None:
            kinds.append([supply])
        else:
            alike.append(supply)
    counts = [sum(supply.rows for supply in kind) for kind in kinds]
    slots = batch_size // world
    if slots * world != batch_size or slots < len(kinds):
        raise RecipeError(
            f"batch_size {batch_size} cannot hold rows of {len(kinds)} kinds on each of {world} ranks",
            fix=f"set train.batch_size to a multiple of {world} from {world * len(kinds)} on",
        )
    shares = [max(round(slots * count / sum(counts)), 1) for count in counts]
    shares[int(np.argmax(shares))] += slots - sum(shares)
    return [
        replace(put_together(kind) if len(kind) > 1 else kind[0], batch_size=share * world)
        for kind, share in zip(kinds, shares, strict=True)
    ]


AHEAD = 2
"""Batches drawn while an earlier one trains; also how many steps a replaced negative waits (`mining/live_state.py`)."""

Draw = tuple[TokenBatch, list[Part]]
"""The texts of a step, side after side, and the parts that they belong to."""


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

    def draw(self, model: Embedder, step: int, seed: int) -> tuple[TokenBatch, Part]:
        """This rank's rows of a step."""
        planned = self.plan.at(step)
        rows = planned.rows if self.spread else planned.rows_of(self.rank, self.world)
        share = (self.rank, self.world) if self.spread else (0, 1)
        tokens, part = make_part(model, self.supplies[planned.source], rows, seed, planned.visit, step, share)
        return tokens, replace(part, weight=self.weight, group=self.group)


@dataclass(frozen=True)
class Feed:
    """The draws of all steps, for one rank: one lane as a rule, several where Conan's balance or a mixed batch moves
    tasks together."""

    model: Embedder
    lanes: Sequence[Lane]
    steps_per_epoch: int
    seed: int

    @property
    def supplies(self) -> list[Supply]:
        return [supply for lane in self.lanes for supply in lane.supplies]

    def draw(self, step: int) -> Draw:
        """The texts and parts of a step: a function of its number (and of the live negatives in use then)."""
        drawn = [lane.draw(self.model, step, self.seed) for lane in self.lanes]
        return TokenBatch.concatenate([tokens for tokens, _ in drawn]), [part for _, part in drawn]

    def run_ahead(self, start: int, stop: int, ahead: int = AHEAD) -> Iterator[Draw]:
        """The draws of steps `start` to `stop - 1` in order, a few prepared while the model trains. Where pools of
        negatives were mined anew, what was drawn ahead is void and drawn again."""
        live = [supply.live for supply in self.supplies if supply.live is not None]
        generations = [negatives.generation for negatives in live]
        with ThreadPoolExecutor(max_workers=1) as worker:
            waiting: deque[Future[Draw]] = deque()
            for step in range(start, stop):
                if generations != (now := [negatives.generation for negatives in live]):
                    generations = now
                    waiting.clear()
                while len(waiting) <= ahead and step + len(waiting) < stop:
                    waiting.append(worker.submit(self.draw, step + len(waiting)))
                yield waiting.popleft().result()


def make_part(
    model: Embedder,
    supply: Supply,
    rows: IntArray | Sequence[int],
    seed: int,
    visit: int = 0,
    step: int = 0,
    share: tuple[int, int] = (0, 1),
) -> tuple[TokenBatch, Part]:
    """Draw and tokenize the texts of some rows, for the kind of batch the loss reads. Both sides of a pair are queries:
    neither is a document to be found.

    A row's draw depends on (`seed`, `visit`, row) alone: not on the rank, nor on the other rows. `step`: the live
    negatives in use at it are taken. `share`: see `retrieval_texts`.
    """
    if supply.live is None:
        records = [supply.records.records[int(row)] for row in rows]
    else:
        records = supply.live.records(np.asarray(rows), step)
    seeds = [derive_seed(seed, visit, int(row)) for row in rows]
    task = supply.records.task
    instructions = [record.instruction for record in records]
    own = instructions if any(instruction is not None for instruction in instructions) else None
    ids: RetrievalIds | PairIds
    sides: list[tuple[list[Text], Role, list[str | None] | None]]
    if supply.in_pairs:
        left, right, ids = pair_texts(records, seeds=seeds)
        sides = [(left, "query", own), (right, "query", own)]
    else:
        counts = {"positives": supply.positives, "negatives": supply.negatives}
        queries, documents, ids = retrieval_texts(records, **counts, seeds=seeds, share=share, shuffle=supply.shuffle)
        sides = [(queries, "query", own), (documents, "document", None)]
    tokens = TokenBatch.concatenate(
        [tokens_of(model.tokenize, texts, role, task, given) for texts, role, given in sides]
    )
    teacher = None
    if supply.teacher is not None:
        plain = [(cast(list[str], texts), role) for texts, role, _ in sides]  # a source of tokens has no teacher
        vectors = [supply.teacher.represent(texts, role=role, task=task)["dense"] for texts, role in plain]
        teacher = (vectors[0], vectors[1])
    watch = supply.live.watch(records) if supply.live else None
    return tokens, Part(supply.records.name, task, ids, supply.loss, teacher=teacher, watch=watch)
