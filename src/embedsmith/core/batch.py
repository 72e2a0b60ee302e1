"""What a loss sees. The only place where representations cross ranks.

Three kinds: retrieval (local queries against the candidates of all ranks), pairs (two aligned sides with labels), and
groups (a reranker's scores of queries with their own documents).
A batch is assembled on leaves cut from the model's graph. A side is gathered when a loss first asks for it, and after
the loss's backward pass `settle` returns the gradients of gathered rows to the rank they came from. No collective
runs inside autograd, so a loss that is undefined on one rank cannot hang the others; but every rank must ask for the
same gathered views in the same order, so a loss never branches on local data before it has asked.

Who belongs to whom (ids, labels, grades) lies on the host, where it is known before anything is encoded: to compare it
launches nothing, and no device is waited for. What follows from it for scores is sent to where these are (`to_device`).

With gradients averaged over ranks, "local queries against gathered candidates" gives exactly the parameter gradient
of one process on the whole batch (proof: tests/train/test_step.py). Tensor names: `shapes.md`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from embedsmith.core.collectives import (
    ALONE,
    Group,
    agreed_by_hosts,
    gather_by_hosts,
    gather_rows,
    mean_over_ranks,
    rank,
    sum_over_ranks,
    world_size,
)
from embedsmith.core.reps import Representation, Reps, Widths
from embedsmith.core.transfer import to_device

ABSENT = -1
"""The id of a slot that holds nothing: a missing positive or negative, a row added to make ranks equal."""


@dataclass(frozen=True)
class Progress:
    """Where the run stands, for schedules: optimizer steps done before this one, and in the whole run."""

    step: int = 0
    steps: int = 1


class Side:
    """The texts on one side of a batch: this rank's representations, and all ranks' on demand."""

    def __init__(self, local: Reps, group: Group = None) -> None:
        self.group, self.ranks = group, world_size(group)
        self.local: Reps = {head: representation.leaf() for head, representation in local.items()}
        self._gathered: dict[str, Representation] = {}

    def __len__(self) -> int:
        return len(next(iter(self.local.values())))

    @cached_property
    def rows(self) -> int:
        """Rows a rank contributes to the gathered view; shorter ranks are padded and masked by id."""
        return agreed_by_hosts(len(self), self.group)

    def all(self, head: str) -> Any:
        """The representation of all ranks' rows, in rank order. A collective on its first call for a head."""
        if self.ranks == 1:
            return self.local[head]
        if head not in self._gathered:
            mine = self.local[head]
            tokens = agreed_by_hosts(mine.token_count, self.group)
            padded = mine.pad_tokens(tokens).pad_rows(self.rows)
            self._gathered[head] = padded.map(lambda tensor: gather_rows(tensor, self.group)).leaf()
        return self._gathered[head]

    def all_ids(self, id_N: Tensor) -> Tensor:
        """Per-row integers of all ranks, [W*rows, ...], in the row order of `all`; padding is `ABSENT`."""
        if self.ranks == 1:
            return id_N
        padded = id_N.new_full((self.rows, *id_N.shape[1:]), ABSENT)
        padded[: len(id_N)] = id_N
        return gather_by_hosts(padded, self.group)

    def alone(self) -> Side:
        """The same leaves as one rank's batch of its own."""
        view = Side.__new__(Side)
        view.local, view.group, view.ranks, view._gathered = self.local, ALONE, 1, {}
        return view

    def settle(self) -> None:
        """After backward: add to each local row the gradient it received on every rank."""
        for head, gathered in self._gathered.items():
            mine = self.local[head]
            start = rank(self.group) * self.rows
            for local, everywhere in zip(mine.floating(), gathered.floating(), strict=True):
                gradient = everywhere.grad if everywhere.grad is not None else torch.zeros_like(everywhere)
                total = sum_over_ranks(gradient, self.group)[start : start + len(mine)]
                own = total[:, : local.shape[1]] if total.dim() > 1 else total
                local.grad = own.clone() if local.grad is None else local.grad + own


@dataclass(frozen=True, kw_only=True)
class Batch(ABC):
    """What both kinds share.

    `extras`: trainable things outside the backbone (temperature, classifier, projection) by name.
    `widths`: Matryoshka widths at which dense scores are wanted; `None` is the whole vector as the model gave it.
    `named`: what the kind is called in listings.
    """

    named: ClassVar[str]

    task: str
    source: str = ""
    progress: Progress = Progress()
    extras: Mapping[str, nn.Module] = field(default_factory=dict)
    widths: Widths | None = None
    group: Group = None

    @abstractmethod
    def sides(self) -> tuple[Side, ...]:
        """Both sides, in the order of the fields."""

    def alone(self) -> Self:
        """This rank's rows as a batch of their own, on the same leaves: the local form of a loss."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        sides: dict[str, Any] = {name: value.alone() for name, value in values.items() if isinstance(value, Side)}
        return replace(self, group=ALONE, **sides)

    def shared(self) -> dict[str, Any]:
        """The fields that a batch made of the same texts takes over, whatever its kind."""
        return {f.name: getattr(self, f.name) for f in fields(Batch)}

    def mean_over_rows(self, value_WQ: Tensor, valid_Q: Tensor | None = None) -> Tensor:
        """value_W: the mean over the valid rows of all ranks, as this rank's share of it.

        The local sum is divided by the mean number of valid rows a rank, so that the average over ranks is the mean
        over all valid rows even when ranks have different numbers. A connected zero when no row is valid anywhere.
        """
        if valid_Q is None:
            valid_Q = torch.ones(value_WQ.shape[-1], dtype=torch.bool, device=value_WQ.device)
        valid_Q = to_device(valid_Q, value_WQ.device)
        count = mean_over_ranks(valid_Q.sum().to(value_WQ.dtype), self.group)
        return value_WQ.masked_fill(~valid_Q, 0.0).sum(-1) / count.clamp_min(1e-9)


@dataclass(frozen=True, kw_only=True)
class RetrievalIds:
    """Who belongs to whom among this rank's queries and documents, before and after they are encoded.

    Everything is matched by id (a hash of the text): `positive_id_QP` and `negative_id_QM` name a query's own
    documents, `ABSENT` where a slot is empty; `document_id_N` are this rank's candidates, each distinct text once.
    `label_Q`: class of each query's text, or `None` unless every query has one. Teacher scores (`score`) and graded
    relevance (`grade`, from 0 to 1) align with the id slots, NaN where unknown; `None` where no query has any.
    """

    query_id_Q: Tensor
    positive_id_QP: Tensor
    negative_id_QM: Tensor
    document_id_N: Tensor
    label_Q: Tensor | None = None
    positive_score_QP: Tensor | None = None
    negative_score_QM: Tensor | None = None
    positive_grade_QP: Tensor | None = None
    negative_grade_QM: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """How many queries and how many documents there are."""
        return len(self.query_id_Q), len(self.document_id_N)

    def with_sides(self, query: Side, document: Side, **shared: Any) -> RetrievalBatch:
        """The batch of these ids; `shared` are the fields of `Batch`."""
        return RetrievalBatch(query=query, document=document, **shared, **vars(self))


Pair = tuple[Representation, Representation, Widths | None]
"""Queries and candidates as one head represents them, and the widths at which they are compared."""


@dataclass(frozen=True, kw_only=True)
class RetrievalBatch(Batch, RetrievalIds):
    """Local queries against the candidate documents of all ranks."""

    named = "retrieval"

    query: Side
    document: Side

    def sides(self) -> tuple[Side, ...]:
        return (self.query, self.document)

    def with_own_candidates(self) -> RetrievalBatch:
        """The same batch where this rank's queries meet its own documents and queries, and nothing is gathered. Unlike
        in `alone`, means still go over the rows of all ranks."""
        return replace(self, query=self.query.alone(), document=self.document.alone())

    def pair(self, head: str) -> Pair:
        """Local queries and all ranks' candidates as a head represents them."""
        return self.query.local[head], self.document.all(head), self.widths

    @cached_property
    def document_id_K(self) -> Tensor:
        """Ids of all ranks' candidates, in the row order of `document.all`; `ABSENT` marks padding rows."""
        return self.document.all_ids(self.document_id_N)

    @cached_property
    def query_id_G(self) -> Tensor:
        """Ids of all ranks' queries, in the row order of `query.all`."""
        return self.query.all_ids(self.query_id_Q)

    @cached_property
    def positive_id_GP(self) -> Tensor:
        """Positives of all ranks' queries. Slot counts may differ between ranks."""
        if self.query.ranks == 1:
            return self.positive_id_QP
        slots = agreed_by_hosts(self.positive_id_QP.shape[1], self.group)
        missing = slots - self.positive_id_QP.shape[1]
        return self.query.all_ids(torch.nn.functional.pad(self.positive_id_QP, (0, missing), value=ABSENT))

    @cached_property
    def first_of_its_id_K(self) -> Tensor:
        """True for the first candidate of each id: a duplicate counts once, and padding never."""
        _, inverse_K = torch.unique(self.document_id_K, return_inverse=True)
        place_K = torch.arange(len(inverse_K), device=inverse_K.device)
        first_V = torch.full_like(place_K, len(place_K)).scatter_reduce(0, inverse_K, place_K, reduce="amin")
        return (first_V[inverse_K] == place_K) & (self.document_id_K != ABSENT)


@dataclass(frozen=True, kw_only=True)
class PairIds:
    """The ids of both texts of each pair, and the pair's label, higher meaning more alike."""

    left_id_N: Tensor
    right_id_N: Tensor
    label_N: Tensor

    @property
    def sizes(self) -> tuple[int, int]:
        """How many texts either side has."""
        return len(self.left_id_N), len(self.right_id_N)

    def with_sides(self, left: Side, right: Side, **shared: Any) -> PairBatch:
        """The batch of these pairs; `shared` are the fields of `Batch`."""
        return PairBatch(left=left, right=right, **shared, **vars(self))


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch, PairIds):
    """Two aligned sides with a label a pair."""

    named = "pairs"

    left: Side
    right: Side

    def sides(self) -> tuple[Side, ...]:
        return (self.left, self.right)

    def scores(self, head: str = "dense") -> Tensor:
        """score_WN of this rank's pairs."""
        return self.left.local[head].paired(self.right.local[head], self.widths)

    @cached_property
    def label_G(self) -> Tensor:
        return gather_by_hosts(self.label_N, self.group)


@dataclass(frozen=True, kw_only=True)
class GroupIds:
    """Queries with their own documents, each of which is read together with its query: a row a query, a slot a
    document, the first `positives` slots for those that answer it.

    `pair_QX` says which of this rank's pairs stands in a slot, `ABSENT` where none does; `pairs` is how many there are.
    `grade_QX` in [0, 1]: how well the document answers. `teacher_QX`: a teacher's scores, NaN where unknown.
    """

    pair_QX: Tensor
    grade_QX: Tensor
    teacher_QX: Tensor
    positives: int
    pairs: int

    @property
    def sizes(self) -> tuple[int]:
        """How many pairs there are, on the only side."""
        return (self.pairs,)

    def with_sides(self, pair: Side, **shared: Any) -> GroupBatch:
        """The batch of these groups; `shared` are the fields of `Batch`."""
        return GroupBatch(pair=pair, **shared, **vars(self))


@dataclass(frozen=True, kw_only=True)
class GroupBatch(Batch, GroupIds):
    """Queries with their own documents, scored pair by pair by a reranker. Nothing is gathered: no query meets the
    documents of another, and means go over the rows of all ranks."""

    named = "rerank"

    pair: Side

    def sides(self) -> tuple[Side, ...]:
        return (self.pair,)

    def scores(self) -> Tensor:
        """score_WQX, the reranker's outputs as they are, W = 1; an empty slot has that of another pair, to be masked.
        A reranker has one output: it is what every loss reads here, whatever head it names."""
        (representation,) = self.pair.local.values()
        score_N: Tensor = representation.floating()[0][:, 0]
        return score_N[to_device(self.pair_QX.clamp_min(0), score_N.device)][None]


def gather_pair_scores(score_WN: Tensor, group: Group = None) -> Tensor:
    """score_WG of all ranks, with gradient. Cheap: scalars travel, vectors stay. Every rank must go on to compute the
    same function of it (see `_GatherScores`)."""
    if world_size(group) == 1:
        return score_WN
    gathered: Tensor = _GatherScores.apply(score_WN, group)  # type: ignore[no-untyped-call]
    return gathered


class _GatherScores(torch.autograd.Function):
    """All ranks compute the same loss of the same gathered scalars, so the sum over ranks of a score's gradient is
    this rank's own, times the number of ranks: the backward pass needs no communication."""

    @staticmethod
    def forward(ctx: Any, score_WN: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.count = group, score_WN.shape[1]
        return gather_rows(score_WN.T, group).T

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        start = rank(ctx.group) * ctx.count
        own: Tensor = gradients[0][:, start : start + ctx.count]
        return own * world_size(ctx.group), None


# What a loss is: a frozen dataclass from a batch to a `LossOutput`. It never sees a model, a rank or a token.


@dataclass(frozen=True)
class LossOutput:
    """`value_W` to differentiate, one entry a Matryoshka width (one entry without Matryoshka), and detached named
    terms for logs, mining and the report: part_W as the value has them, or one number that has no widths."""

    value_W: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def value(self) -> Tensor:
        """The scalar of a loss outside Matryoshka."""
        return self.value_W.sum()


class Loss(ABC):
    """Base of every objective. Hyper-parameters are the dataclass's fields; wrappers hold other losses.

    What a field of these names means in every loss that says nothing else of it:

    head: the representation that is scored: `dense`, or another head of the model such as `sparse` or `multivector`.
    temperature: scores are divided by it before they are compared; above 0, and the smaller, the sharper.
    cross_device: over the rows of all ranks together (the default), or `false`, over each rank's own.
    mask_false_negatives: whether a document that any row names as a positive of the same query is no negative of it.
    block_size: how many candidates are scored at a time, to save memory; the full score matrix then never exists, and
        scores are computed again in the backward pass. All at once where it is not given.
    """

    batches: ClassVar[tuple[type[Batch], ...]]
    """The kinds of batch it can read."""

    @abstractmethod
    def __call__(self, batch: Batch) -> LossOutput:
        """The loss of one batch, this rank's share: averaged over ranks it is the loss of the whole batch."""

    def heads(self) -> frozenset[str]:
        """The heads it reads; the model computes no others."""
        return frozenset({getattr(self, "head", "dense")})

    def extras(self, dimension: int) -> Mapping[str, nn.Module]:
        """New trainable modules it needs, by the name under which the batch will hold them."""
        return {}

    def check(self, dimension: int) -> None:
        """Raise `RecipeError` if it cannot work with embeddings of this dimension."""
        return None

    def reads(self) -> frozenset[str]:
        """What it reads beside the model's heads: vectors of another model, `teacher` or `guide`."""
        return frozenset()

    def remember(self, batch: Batch) -> None:
        """Called once a training step, when its gradient is known: what later steps need of this batch goes into the
        loss's extras. Collective, like the loss."""
        return None
