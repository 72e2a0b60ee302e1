"""From a step's number to its texts as tokens: sources become supplies, their rows are planned, and each step is drawn.

    RecordSet + recipe    build.make_supply                        Supply: records, loss, how to draw
      | merge_small, mixed_supplies   which sources are put together
      | plan_of                       data.plan                    BatchPlan
      v
    Lane                  sources of which a step draws one, and the ranks that share its rows
      | plan.at(step).rows_of(rank)   which rows                   PlannedStep, row numbers
      | records[row]                  or live negatives in use     Record
      | retrieval_texts, pair_texts, group_texts   data.draw      texts, and who belongs to whom by id
      | tokenize                      one TokenBatch               TokenBatch
      v
    Feed.draw(step)       the texts of a step, and its parts       Draw = (TokenBatch, [Part])
      | run_ahead                     a few steps ahead, in a background thread
      v
    step.run_step

Everything here is a pure function of the plan (and of the live negatives in use at a step), so it can run ahead of
training, and a resumed run draws the same texts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from embedsmith.core.batch import Batch, Loss, PairBatch, PairIds, RetrievalBatch, RetrievalIds
from embedsmith.core.collectives import Group
from embedsmith.core.encoder import Encoder, Role
from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import log
from embedsmith.core.reps import GUIDE, TEACHER, Dense, Representation
from embedsmith.core.seeds import derive_seed
from embedsmith.core.tokens import IntArray, TokenBatch
from embedsmith.data import (
    BatchPlan,
    PlanConfig,
    PlannedSource,
    RecordSet,
    group_texts,
    joined,
    pair_texts,
    retrieval_texts,
    row_facts,
)
from embedsmith.data.plan.classes import ClassBatches
from embedsmith.data.plan.passes import Order
from embedsmith.data.record import Record, Text
from embedsmith.data.stream import HasOrder
from embedsmith.data.token_records import tokens_of
from embedsmith.models import CrossEncoder, Embedder, Model
from embedsmith.train.balance import Told
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


@dataclass(frozen=True)
class Supply:
    """One source, ready to draw from: its records, its loss, the rows of a step (all ranks together; `None`: as the
    plan's token budget or table says), how often an epoch sees a row, and how many texts a query draws. `live`: what
    chooses its negatives while the model trains. `per_class`: rows of each class in a batch. `in_groups`: its batches
    are groups, for a reranker."""

    records: RecordSet[Text]
    loss: Loss
    batch_size: int | None
    weight: float
    positives: int
    negatives: int
    teacher: Embedder | None = None
    guide: Encoder | None = None
    shuffle: float = 0.0
    live: Negatives | None = None
    per_class: int | None = None
    in_groups: bool = False

    @cached_property
    def in_pairs(self) -> bool:
        """Whether its batches are scored pairs; a loss that reads both kinds takes what the task is."""
        if self.in_groups:
            return False
        return PairBatch in self.loss.batches and (
            RetrievalBatch not in self.loss.batches or self.records.task == "sts"
        )

    @property
    def rows(self) -> int:
        return len(self.records.records)

    @property
    def texts_a_row(self) -> int:
        return 2 if self.in_pairs else (not self.in_groups) + self.positives + self.negatives

    @property
    def streamed(self) -> bool:
        """Whether its records come in an order of their own, and nothing is known of them before."""
        return isinstance(self.records.records, HasOrder)

    def named(self, by: Told) -> str:
        """The task that its batches belong to, or the source itself."""
        return self.records.task if by == "task" else self.records.name

    def like(self, other: Supply) -> bool:
        """Whether rows of both may be in one batch: same task, loss and draw."""
        mine, theirs = (
            (one.records.task, one.loss, one.positives, one.shuffle, one.teacher, one.guide, one.per_class)
            for one in (self, other)
        )
        return mine == theirs and self.in_pairs == other.in_pairs and not (self.streamed or other.streamed)

    @staticmethod
    def of_all(supplies: Sequence[Supply]) -> Supply:
        """Sources of one kind as one."""
        records, negatives = joined([one.records for one in supplies]), max(one.negatives for one in supplies)
        return replace(supplies[0], records=records, negatives=negatives)

    def draw(
        self,
        model: Model,
        rows: IntArray | Sequence[int],
        seed: int,
        visit: int = 0,
        step: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> tuple[TokenBatch, Part]:
        """Draw and tokenize the texts of some rows, for the kind of batch the loss reads. Both sides of a pair are
        queries: neither is a document to be found.

        A row's draw depends on (`seed`, `visit`, row) alone: not on the rank, nor on the other rows. `step`: the live
        negatives in use at it are taken. `share`: see `retrieval_texts`.
        """
        if self.live is None:
            records = [self.records.records[int(row)] for row in rows]
        else:
            records = self.live.records(np.asarray(rows), step)
        seeds = [derive_seed(seed, visit, int(row)) for row in rows]
        if isinstance(model, CrossEncoder):
            return self._groups(model, cast(list[Record], records), seeds)
        task, own = self.records.task, [record.instruction for record in records]
        first: Sequence[Text]
        second: Sequence[Text]
        ids: RetrievalIds | PairIds
        if self.in_pairs:
            first, second, ids = pair_texts(records, seeds=seeds)
            second_role: Role = "query"
            instructions = [*own, *own]
        else:
            counts = {"positives": self.positives, "negatives": self.negatives}
            first, second, ids = retrieval_texts(records, **counts, seeds=seeds, share=share, shuffle=self.shuffle)
            second_role = "document"
            instructions = [*own, *[None] * len(second)]
        first_role: Role = "query"
        roles = [first_role] * len(first) + [second_role] * len(second)
        tokens = tokens_of(model.tokenize, [*first, *second], roles, task, instructions)
        given: dict[str, tuple[Representation, Representation]] = {}
        for name, other in ((TEACHER, self.teacher), (GUIDE, self.guide)):
            if other is not None:
                left, right = cast(list[str], first), cast(list[str], second)  # a source of tokens has no such model
                represent = partial(other.represent, task=task)
                given[name] = (represent(left, role="query")["dense"], represent(right, role=second_role)["dense"])
        if GUIDE in given:  # its scores are cosines
            given[GUIDE] = (_of_length_1(given[GUIDE][0]), _of_length_1(given[GUIDE][1]))
        watch = self.live.watch(records) if self.live else None
        return tokens, Part(self.records.name, task, ids, self.loss, given=given, watch=watch)

    def _groups(self, model: CrossEncoder, records: list[Record], seeds: Sequence[int]) -> tuple[TokenBatch, Part]:
        """Each query beside each of its own documents."""
        counts = {"positives": self.positives, "negatives": self.negatives}
        queries, documents, rows, ids = group_texts(records, **counts, seeds=seeds)
        texts = cast(tuple[list[str], list[str]], (queries, documents))
        tokens = model.tokenize(*texts, [records[row].instruction for row in rows])
        return tokens, Part(self.records.name, self.records.task, ids, self.loss)


def _of_length_1(vectors: Representation) -> Dense:
    assert isinstance(vectors, Dense)
    return vectors.truncate(vectors.vector_ND.shape[1])


def plan_of(
    supplies: Sequence[Supply],
    world: int,
    config: PlanConfig = PlanConfig(),  # noqa: B008  (frozen)
    seed: int = 0,
    max_length: int | None = None,
    model: Embedder | None = None,
) -> BatchPlan:
    """The plan of some sources for a number of ranks. `max_length`: tokens at which the model cuts a text. `model`: by
    whose tokenizer lengths are counted where the plan goes by them; without it they are estimated.

    Errors: `RecipeError` of `BatchPlan`; for a stream that should go by length or be free of duplicates.
    """
    sources = []
    for supply in supplies:
        apart, facts, records = _is_apart(supply, config), None, supply.records.records
        if apart or config.by_length:
            facts = row_facts(records, partial(_lengths, supply, model) if model and config.by_length else None)
        if facts is not None and max_length is not None:
            facts = replace(facts, length_N=np.minimum(facts.length_N, max_length))
        sources.append(
            PlannedSource(
                supply.rows,
                supply.batch_size,
                supply.weight,
                supply.records.name,
                supply.records.task,
                supply.texts_a_row,
                apart,
                facts,
                _order(supply, config),
            )
        )
    return BatchPlan(tuple(sources), seed, world, config)


def _order(supply: Supply, config: PlanConfig) -> Order | None:
    """The order in which the records of a source come, where not any will do.

    Errors: `RecipeError` for batches by class that cannot be made, or not of what the plan asks for besides."""
    records, name = supply.records.records, supply.records.name
    if supply.per_class is None:
        return records.order if isinstance(records, HasOrder) else None
    if supply.streamed or config.by_length or config.duplicates == "forbid":
        raise RecipeError(
            f"per_class={supply.per_class} and another rule of which rows meet in a batch",
            where=f"source {name!r}",
            fix="leave out per_class; or streaming, train.plan.lengths, train.plan.batch_tokens and "
            "train.plan.duplicates",
        )
    return ClassBatches.of(records, supply.batch_size, supply.per_class, name)


def _is_apart(supply: Supply, config: PlanConfig) -> bool:
    """Whether rows of a batch must share no text: by default where they are contrasted with each other. Not in batches
    by class: a text that repeats counts once there."""
    if supply.per_class is not None:
        return False
    if not supply.streamed:
        return config.duplicates == "forbid" or (
            config.duplicates is None and not supply.in_pairs and not supply.in_groups
        )
    if config.by_length or config.duplicates == "forbid":
        raise RecipeError(
            "a stream knows neither the lengths of its rows nor which of them share a text",
            where=f"source {supply.records.name!r}",
            fix="leave out train.plan.lengths, train.plan.batch_tokens and train.plan.duplicates, or streaming of the "
            "source",
        )
    return False


def _lengths(supply: Supply, model: Embedder, records: Sequence[Record[str]]) -> npt.NDArray[np.int32]:
    """Tokens of the longest text of each record, with its prompt and special tokens, as a step tokenizes them."""
    second: Role = "query" if supply.in_pairs else "document"
    texts: list[str] = []
    roles: list[Role] = []
    instructions: list[str | None] = []
    starts: list[int] = []
    for record in records:
        others = (*record.positives, *record.negatives)
        starts.append(len(texts))
        texts += [record.query, *others]
        roles += ["query", *[second] * len(others)]
        instructions += [record.instruction, *[record.instruction if supply.in_pairs else None] * len(others)]
    length_N = model.tokenize(texts, roles, supply.records.task, instructions).length_N
    return np.maximum.reduceat(length_N, starts).astype(np.int32)


def merge_small(supplies: Sequence[Supply], config: PlanConfig) -> list[Supply]:
    """Small sources put together with the other small ones of their kind, or where there is none, with the smallest
    of the others. One without its like stays as it is: its batches shrink."""
    if config.small != "merge":
        return list(supplies)
    left = list(supplies)
    while True:
        for one in sorted((each for each in left if _is_small(each, config)), key=lambda each: each.rows):
            alike = [other for other in left if other is not one and one.like(other)]
            alike = [other for other in alike if (other.batch_size, other.weight) == (one.batch_size, one.weight)]
            if alike:
                break
        else:
            return left
        mate = min(alike, key=lambda other: other.rows)
        together = Supply.of_all([each for each in left if each is one or each is mate])
        log.info("sources %s are put together: a batch has more rows than %s", together.records.name, one.rows)
        left = [together if each is mate else each for each in left if each is not one]


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
            fix="leave out weight, cap and batch_size of the sources, and train.plan.batch_tokens",
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
        replace(Supply.of_all(kind) if len(kind) > 1 else kind[0], batch_size=share * world)
        for kind, share in zip(kinds, shares, strict=True)
    ]


AHEAD = 2
"""Batches drawn while an earlier one trains; also how many steps a replaced negative waits (`mining/live.py`)."""

Draw = tuple[TokenBatch, list[Part]]
"""The texts of a step, side after side, and the parts that they belong to."""


@dataclass(frozen=True)
class Lane:
    """One part of every step: sources of which each step draws one, and the ranks that share its rows.

    `rank` of `world` ranks takes its slice of the rows; with `spread` it takes all rows and its slice of every row's
    negatives instead. `group` is the process group of those ranks (`None`: all), `weight` that of the part's loss.
    `holds`: it holds the model to its start and is no task.
    """

    supplies: Sequence[Supply]
    plan: BatchPlan
    rank: int
    world: int
    weight: float = 1.0
    group: Group = None
    spread: bool = False
    holds: bool = False

    def draw(self, model: Model, step: int, seed: int) -> tuple[TokenBatch, Part]:
        """This rank's rows of a step."""
        planned = self.plan.at(step)
        rows = planned.rows if self.spread else planned.rows_of(self.rank, self.world)
        share = (self.rank, self.world) if self.spread else (0, 1)
        tokens, part = self.supplies[planned.source].draw(model, rows, seed, planned.visit, step, share)
        return tokens, replace(part, weight=self.weight, group=self.group, holds=self.holds)


@dataclass(frozen=True)
class Feed:
    """The draws of all steps, for one rank: one lane as a rule, several where a balance or a mixed batch moves tasks
    together, and one more that holds the model to its start."""

    model: Model
    lanes: Sequence[Lane]
    steps_per_epoch: int
    seed: int

    @property
    def supplies(self) -> list[Supply]:
        return [supply for lane in self.lanes for supply in lane.supplies]

    def draw(self, step: int) -> Draw:
        """The texts and parts of a step: a function of its number (and of the live negatives in use then)."""
        drawn = [lane.draw(self.model, step, self.seed) for lane in self.lanes]
        texts, parts = [tokens for tokens, _ in drawn], [part for _, part in drawn]
        return texts[0] if len(texts) == 1 else TokenBatch.concatenate(texts), parts

    @property
    def _takes_turns(self) -> bool:
        """Whether draws share more than the tokenizer, or set it anew."""
        shared = any(one.live or one.teacher or one.guide or one.streamed for one in self.supplies)
        if not isinstance(self.model, Embedder):
            return shared
        return shared or self.model.settings.echo is not None or bool(self.model.settings.lengths)

    def run_ahead(self, start: int, stop: int, workers: int = 1) -> Iterator[Draw]:
        """The draws of steps `start` to `stop - 1` in order, a few prepared while the model trains, `workers` of them
        side by side where draws do not share more than the tokenizer. Where pools of negatives were mined anew, what
        was drawn ahead is void and drawn again."""
        if workers > 1 and self._takes_turns:
            workers = 1
        if workers > 1 and isinstance(self.model, Embedder):
            self.model.tokenize([""])  # sets the tokenizer up, which only one thread may do
        ahead = AHEAD if workers == 1 else 2 * workers
        live = [supply.live for supply in self.supplies if supply.live is not None]
        generations = [negatives.generation for negatives in live]
        with ThreadPoolExecutor(workers) as worker:
            waiting: deque[Future[Draw]] = deque()
            for step in range(start, stop):
                if generations != (now := [negatives.generation for negatives in live]):
                    generations = now
                    waiting.clear()
                while len(waiting) <= ahead and step + len(waiting) < stop:
                    waiting.append(worker.submit(self.draw, step + len(waiting)))
                yield waiting.popleft().result()
