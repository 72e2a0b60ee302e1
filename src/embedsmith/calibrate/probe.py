"""The texts that calibrated merges read: small samples of training sources, drawn once, with frozen candidates; and the
batches of them for losses and gradients at any place of a live model."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from embedsmith.calibrate.live_model import LiveMerge, cosines
from embedsmith.core.batch import Progress
from embedsmith.core.encoder import Role
from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import progress_bar
from embedsmith.core.seeds import derive_seed
from embedsmith.core.settings import Count, Range, section
from embedsmith.core.tokens import TokenBatch
from embedsmith.data import RecordSet, Source, read_source, text_id
from embedsmith.merge.method import Base, Job, Method
from embedsmith.merge.recipe import Granularity, MergeRecipe
from embedsmith.train.build import build_extras, derive_memory, make_supply
from embedsmith.train.config import TrainConfig
from embedsmith.train.feed import Supply
from embedsmith.train.step import Memory, Part, evaluate_parts, run_step

ROLES: tuple[Role, ...] = ("query", "document")
ALIKE = 0.8
"""A graded pair from this score on counts as a query and its answer, where a method needs some."""


@section
@dataclass(frozen=True, kw_only=True)
class Probe:
    """Which texts, and how many.

    `sources`: where they come from. For methods that read every parent on its own task: one a parent in the
    parents' order, or a single one for all. `examples`: at most so many of each source. `negatives`: K, candidates of
    a query beside its own document: its own negatives first, then other records' documents. `max_length`: tokens of a
    text that are read, by default all that the model reads; the merged model's own length stays. `seed`: of the sample.
    """

    sources: tuple[Source, ...]
    examples: Count = 512
    negatives: Count = 7
    max_length: Annotated[int, Range(ge=4)] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise RecipeError("probe.sources: at least one source is needed")

    @classmethod
    def of_recipe(cls, recipe: MergeRecipe, files: Sequence[str]) -> Self | None:
        """The files named on the command line, else the texts that the recipe's own method reads."""
        if files:
            return cls(sources=tuple(Source(path=file) for file in files))
        own = getattr(recipe.method, "probe", None)
        return own if isinstance(own, cls) else None

    def read(self) -> list[RecordSet]:
        """A sample of every source, in the order of its file, the same for the same seed."""
        sets = [read_source(one).texts_only("a merge that reads data", one.path) for one in self.sources]
        for place, one in enumerate(sets):
            if len(one.records) > self.examples:
                draw = random.Random(derive_seed("probe", self.seed, one.name))
                rows = sorted(draw.sample(range(len(one.records)), self.examples))
                sets[place] = replace(one, records=[one.records[row] for row in rows])
        return sets

    def of_parents(self, parents: int) -> list[RecordSet]:
        """One sample a parent. Errors: `RecipeError` when the numbers do not fit."""
        sets = self.read()
        if len(sets) not in (1, parents):
            raise RecipeError(f"{len(sets)} probe sources for {parents} parents", expected=f"1 or {parents}")
        return sets * parents if len(sets) == 1 else sets


@dataclass(frozen=True, kw_only=True)
class ProbedMethod(Method):
    """What every merging method that reads texts has.

    `probe`: the texts it reads.
    """

    base: ClassVar[Base] = "optional"

    probe: Probe

    def live(self, job: Job, granularity: Granularity = "model") -> LiveMerge:
        """The job's models as one that reads the probe's texts at the probe's length."""
        length = self.probe.max_length
        return LiveMerge.of(job.parents, job.base, granularity=granularity, max_length=length)


def distinct_texts(records: RecordSet) -> list[tuple[str, Role]]:
    """Every distinct text with its role, for methods that need no labels. Both sides of a scored pair are queries."""
    found: dict[tuple[str, Role], None] = {}
    for record in records.records:
        found[record.query, "query"] = None
        for text in record.positives:
            found[text, "query" if record.task == "sts" else "document"] = None
    return list(found)


@dataclass(frozen=True)
class FrozenCandidates:
    """One query, its instruction, and its frozen list of documents: the right one first."""

    query: str
    documents: tuple[str, ...]
    instruction: str | None = None


def frozen_candidates(records: RecordSet, negatives: int, seed: int) -> list[FrozenCandidates]:
    """The candidate lists of the per-query losses: d+ and K others, drawn once.

    Scored pairs take part from a score of 0.8 on. A text that is one of the query's positives is never a negative; a
    pool with fewer than K others gives shorter lists.
    Errors: `RecipeError` for records without any query and document.
    """
    usable = []
    for record in records.records:
        score = record.positive_scores[0] if record.positive_scores else None
        # a record's first document answers its query; of scored pairs only where those are alike
        if record.positives and (record.task != "sts" or (score is not None and score >= ALIKE)):
            usable.append(record)
    pool = list({text_id(record.positives[0]): record.positives[0] for record in usable}.items())
    if len(pool) < 2:
        raise RecipeError(
            f"{records.name} has {len(pool)} documents that answer a query",
            expected="at least 2: retrieval records, or scored pairs of which some are alike",
            fix="use a definition that needs no labels: method.definition=embedding",
        )
    lists = []
    for place, record in enumerate(usable):
        chance = random.Random(derive_seed("candidates", seed, place))
        taken = {text_id(text) for text in (*record.positives, record.query)}
        chosen: list[str] = []
        own = [(text_id(text), text) for text in record.negatives]
        for id_, text in [*own, *chance.sample(pool, len(pool))]:
            if len(chosen) == negatives:
                break
            if id_ not in taken:
                taken.add(id_)
                chosen.append(text)
        lists.append(FrozenCandidates(record.query, (record.positives[0], *chosen), record.instruction))
    return lists


Drawn = tuple[TokenBatch, Part]
"""Texts of one task, and what its loss needs to know of them."""


@dataclass(frozen=True)
class TaskBatches:
    """Batches of every task: the same step always gives the same batch, so that starts and modes are compared on the
    same texts. `train` and `held_out` are row numbers of each supply."""

    live: LiveMerge
    supplies: Sequence[Supply]
    train: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    extras: Mapping[str, nn.Module]
    memory: Memory
    seed: int
    size: int

    @classmethod
    def whole(
        cls, live: LiveMerge, sources: Sequence[Source], sets: Sequence[RecordSet], batch_size: int, seed: int
    ) -> Self:
        """Nothing kept back: all examples are on both sides."""
        pairs = zip(sources, sets, strict=True)
        supplies = [make_supply(source, records, batch_size, live.model) for source, records in pairs]
        extras = build_extras([supply.loss for supply in supplies], live.model).to(live.model.device)
        rows = [list(range(len(records.records))) for records in sets]
        memory = derive_memory(TrainConfig(), live.model.device)
        return cls(live, supplies, rows, rows, dict(extras.items()), memory, seed, batch_size)

    def split(self, share: float) -> Self:
        """With `share` of every task's examples held out. Errors: `RecipeError` for a task with too few to split."""
        train, held_out = [], []
        for supply in self.supplies:
            count = len(supply.records.records)
            kept_back = round(share * count)
            if kept_back < 2 or count - kept_back < 2:
                raise RecipeError(
                    f"{count} probe examples of {supply.records.name}", expected="enough for two parts", fix="take more"
                )
            order = _shuffled(count, derive_seed("split", self.seed))
            train.append(order[kept_back:])
            held_out.append(order[:kept_back])
        return replace(self, train=train, held_out=held_out)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(supply.records.name for supply in self.supplies)

    def at(self, step: int) -> list[Drawn]:
        """One part a task, each with an equal share: the mean over tasks of each task's mean loss. The rows of a step
        are cut from shuffled passes over all rows."""
        parts = []
        for task, (supply, rows) in enumerate(zip(self.supplies, self.train, strict=True)):
            size = min(supply.batch_size or self.size, len(rows))
            a_pass, place = divmod(step, max(len(rows) // size, 1))
            order = _shuffled(len(rows), derive_seed(derive_seed(self.seed, task), a_pass))
            parts.append(self._part(task, [rows[row] for row in order[place * size : (place + 1) * size]], step))
        return parts

    def held_out_parts(self) -> list[list[Drawn]]:
        """The held-out examples in batches, each task's losses averaged over its batches."""
        parts = []
        for n, (supply, rows) in enumerate(zip(self.supplies, self.held_out, strict=True)):
            size = min(supply.batch_size or self.size, len(rows))
            starts = range(0, len(rows) - size + 1, size)
            parts.append([self._part(n, rows[start : start + size], 0, len(starts)) for start in starts])
        return parts

    def _part(self, task: int, rows: Sequence[int], visit: int, shares: int = 1) -> Drawn:
        tokens, part = self.supplies[task].draw(self.live.model, rows, self.seed, visit)
        return tokens, replace(part, weight=1 / (len(self.supplies) * shares))

    def loss(self, drawn: Drawn) -> float:
        """The weighted loss of a part at the live model's weights, without gradient."""
        tokens, part = drawn
        return float(evaluate_parts(self.live.encode, tokens, [part], self.memory, self.extras, Progress()))

    def parent_losses(self) -> list[float]:
        """Each parent's loss on the held-out examples, the mean over the tasks."""
        parts = self.held_out_parts()
        losses = []
        for parent in range(self.live.parents):
            self.live.place_parent(parent)
            losses.append(sum(self.loss(part) for task in parts for part in task))
        return losses

    def losses_at(self, coefficient_GM: Tensor) -> list[float]:
        """Mean loss of every task on its held-out examples at theta_0 + sum_i c_i V_i."""
        self.live.place(coefficient_GM)
        count = len(self.supplies)
        return [count * sum(self.loss(part) for part in parts) for parts in self.held_out_parts()]

    def backward(self, drawn: Sequence[Drawn]) -> float:
        """The weighted loss of several parts together, with its gradient left in the live model's parameters."""
        tokens, parts = TokenBatch.concatenate([each for each, _ in drawn]), [part for _, part in drawn]
        return float(run_step(self.live.encode, tokens, parts, self.memory, self.extras, Progress()).value)

    def along_length(self, coefficient_GM: Tensor, lengths: Sequence[float]) -> list[dict[str, Any]]:
        """Losses at lambda times the merge."""
        rows = []
        with progress_bar("losses along the length", len(lengths)) as bar:
            for length in lengths:
                losses = self.losses_at(length * coefficient_GM)
                rows.append({"length": length, **dict(zip(self.tasks, losses, strict=True))})
                bar.advance()
        return rows

    def barriers(self, coefficient_GM: Tensor, points: int = 7) -> list[dict[str, Any]]:
        """Losses on the segment from each parent to the merge; `barrier`: the most that a task's loss rises above the
        straight line between its ends."""
        live = self.live
        rows = []
        for place, name in enumerate(live.names):
            start_GM = torch.eye(live.parents, dtype=torch.float64)[place].expand_as(coefficient_GM)
            shares = torch.linspace(0, 1, points, dtype=torch.float64)
            losses_PT = torch.tensor([self.losses_at((1 - s) * start_GM + s * coefficient_GM) for s in shares])
            line_PT = (1 - shares[:, None]) * losses_PT[0] + shares[:, None] * losses_PT[-1]
            rise = (losses_PT - line_PT).amax(0).tolist()
            rows += [{"parent": name, "task": task, "barrier": r} for task, r in zip(self.tasks, rise, strict=True)]
        return rows

    def gradient_cosines(self, coefficient_GM: Tensor) -> list[list[float]]:
        """cos(grad L_i, grad L_j) [T, T] at a merge, on one batch of each task: below 0 where tasks pull apart."""
        live = self.live
        live.place(coefficient_GM)
        gradients = []
        for part in self.at(0):
            live.model.zero_grad(set_to_none=True)
            self.backward([part])
            flat = [p.grad.flatten().double() for p in live.model.parameters() if p.grad is not None]
            gradients.append(torch.cat(flat))
        live.model.zero_grad(set_to_none=True)
        stacked = torch.stack(gradients)
        rows: list[list[float]] = cosines(stacked @ stacked.T).tolist()
        return rows


def _shuffled(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
