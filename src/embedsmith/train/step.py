"""One optimizer step's forward and backward: the only place that decides what is kept in memory and what is replayed.

The texts of a step are encoded in chunks of similar length. Each chunk's representations are cut from its graph; the
loss is computed once on all of them, whatever the memory; its gradient is then pushed back chunk by chunk. Chunks
that fit the budget keep their graph from the forward pass, the others are encoded without one and replayed under the
same random state (GradCache, Gao et al. 2021). So plain, accumulated and cached training are one mechanism and give
the same gradient (proof: tests/train/test_step.py).

Nothing here waits for the device where `deferred` is asked for: whether all values are finite is then read once, with
the norm of the gradient, before the weights are updated (`Health`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedsmith.core.batch import Batch, GroupIds, Loss, PairIds, Progress, RetrievalIds, Side
from embedsmith.core.collectives import Group, highest_over_ranks, world_size
from embedsmith.core.errors import TrainingError
from embedsmith.core.reps import GUIDE, TEACHER, Representation, Reps, Sparse
from embedsmith.core.seeds import TorchRandom
from embedsmith.core.tokens import IntArray, TokenBatch, chunk_rows, packed_rows
from embedsmith.core.transfer import read, to_device
from embedsmith.losses.terms import without_memory

Encode = Callable[[TokenBatch, Sequence[str], IntArray], Reps]
"""A model's forward pass: the wanted heads of some rows of a ragged batch of tokens."""

Together = Callable[[Callable[[], None]], None]
"""Does a part of a step that holds no collective, so that all ranks learn of it where one of them lacked memory."""


@dataclass(frozen=True)
class Part:
    """Rows of one source on this rank: who belongs to whom among their texts, and the loss that reads them.

    A step usually has one part. It has several, each with a weight and a group of ranks, where losses of different
    tasks must move the model together (Conan's cross-GPU balance). The texts stand in the step's tokens, part after
    part, the first side (queries, or what stands left in pairs) before the second. `given`: vectors of other
    models of both sides (`teacher`, `guide`). `watch`: shown the batch once it is encoded. `holds`: it holds the model
    to its start and is no task.
    """

    source: str
    task: str
    ids: RetrievalIds | PairIds | GroupIds
    loss: Loss
    weight: float = 1.0
    group: Group = None
    given: Mapping[str, tuple[Representation, Representation]] = field(default_factory=dict)
    watch: Callable[[Batch], None] | None = None
    holds: bool = False


@dataclass(frozen=True)
class Chunk:
    """`rows` that are encoded together, which make the model compute `tokens` tokens. `keep`: whether their graph
    stays alive until their backward pass. `idle`: encoded only because other ranks have more chunks."""

    rows: IntArray
    tokens: int
    keep: bool
    idle: bool = False


@dataclass(frozen=True)
class Memory:
    """`chunk_tokens`: padded tokens encoded at once. `kept_tokens`: padded tokens whose graph may be alive together
    (`None`: all). `max_rows`: texts in a chunk, and then also the texts whose graphs are kept (`None`: no limit).
    `least_tokens`: from so many on a chunk ends where texts get shorter, to save padding (`None`: only when full).
    `packed`: the model computes no padding, so only real tokens count. `agreed`: makes the chunks of all ranks alike
    where a forward pass is a collective (FSDP2), given their lengths too."""

    chunk_tokens: int
    kept_tokens: int | None = None
    max_rows: int | None = None
    least_tokens: int | None = None
    packed: bool = False
    agreed: Callable[[list[Chunk], IntArray], list[Chunk]] | None = None

    def chunks(self, length_N: IntArray, max_rows: int | None) -> list[Chunk]:
        """Texts of such lengths in chunks of similar length, longest first, none of which keeps its graph."""
        if self.packed:
            cut = packed_rows(length_N, self.chunk_tokens, max_rows)
            return [Chunk(rows, int(length_N[rows].sum()), keep=False) for rows in cut]
        cut = chunk_rows(length_N, self.chunk_tokens, max_rows, self.least_tokens)
        return [Chunk(rows, len(rows) * int(length_N[rows].max(initial=1)), keep=False) for rows in cut]

    def plan(self, length_N: IntArray) -> list[Chunk]:
        """The chunks of a step: those that keep their graph come last, as many as the budget allows."""
        chunks = self.chunks(length_N, self.max_rows)
        tokens_left = float("inf") if self.kept_tokens is None else max(self.kept_tokens, chunks[-1].tokens)
        rows_left = float("inf") if self.max_rows is None else self.max_rows
        planned: list[Chunk] = []
        for chunk in reversed(chunks):
            tokens_left, rows_left = tokens_left - chunk.tokens, rows_left - len(chunk.rows)
            planned.append(replace(chunk, keep=tokens_left >= 0 and rows_left >= 0))
        planned.reverse()
        return planned if self.agreed is None else self.agreed(planned, length_N)


@dataclass(frozen=True)
class Health:
    """Whether the values of a step are finite, on the device and not read yet. `fault_F`: 1 where a representation is
    not finite on any rank, 1 where the loss is not, and this rank's loss. `where`: the step and its sources."""

    fault_F: Tensor
    where: str

    def check(self, faults: Sequence[float]) -> None:
        """Errors: `TrainingError` where the numbers of `fault_F` tell of one, on every rank at once."""
        representation, loss, value = faults
        if representation or loss:
            what = "a representation" if representation else "the loss"
            raise TrainingError(f"{what} is not finite (loss {value:g})", where=self.where)


@dataclass(frozen=True)
class StepOutput:
    """`value` is this rank's share of the loss (the mean over ranks is the loss), `parts` its named terms by source.
    `health`: what is left to be checked before the weights are updated, of a step that has not checked it. `averaged`:
    whether the gradient is that of all ranks already."""

    value: Tensor
    parts: dict[str, dict[str, Tensor]]
    tokens: int
    padded_tokens: int
    replayed_chunks: int
    health: Health | None = None
    averaged: bool = False


def run_step(
    encode: Encode,
    tokens: TokenBatch,
    parts: Sequence[Part],
    memory: Memory,
    extras: Mapping[str, nn.Module] | None = None,
    progress: Progress = Progress(),  # noqa: B008  (frozen)
    *,
    scale: float = 1.0,
    deferred: bool = False,
    together: Together = lambda act: act(),
) -> StepOutput:
    """Add the gradient of the parts' weighted losses, times `scale`, to the parameters.

    `tokens`: the texts of all parts, side after side. Gradients are this rank's; the caller averages them over ranks.
    `deferred`: leave the check of the values to the caller, in the output's `health`.
    Errors: `TrainingError` when a representation or a loss is not finite, on every rank at once, before any gradient
    is touched (unless `deferred`); and where the loss of several ranks lacks memory.
    """
    heads = sorted(frozenset().union(*(part.loss.heads() for part in parts)))
    chunks = memory.plan(tokens.length_N)
    states: list[TorchRandom] = []
    pieces: list[Reps] = []

    def forward() -> None:
        for keep in (False, True):  # those without a graph come first in the plan too
            for chunk in (chunk for chunk in chunks if chunk.keep is keep):
                states.append(TorchRandom.capture())
                with torch.set_grad_enabled(keep):
                    pieces.append(encode(tokens, heads, chunk.rows))
            if not keep:  # not every torch casts again what it cast without a graph: the weight would get no gradient
                torch.clear_autocast_cache()

    def backward() -> None:
        after = TorchRandom.capture()
        for chunk, piece in zip(chunks, pieces, strict=True):  # kept graphs first: none is alive beside a replayed one
            if chunk.keep:
                _push(piece, chunk, gradient)
        for chunk, state in zip(chunks, states, strict=True):
            if not chunk.keep:
                state.restore()
                _push(encode(tokens, heads, chunk.rows), chunk, gradient)
        after.restore()

    together(forward)
    batches = _batches(pieces, chunks, parts, extras or {}, progress)
    value, named, health = _loss(parts, batches, scale, deferred)
    gradient = _row_gradients(batches, list(pieces[0]))
    together(backward)
    for part, batch in zip(parts, batches, strict=True):
        part.loss.remember(batch)
    computed, replayed = sum(chunk.tokens for chunk in chunks), sum(not chunk.keep for chunk in chunks)
    return StepOutput(value, named, len(tokens.id_S), computed, replayed, health)


def evaluate_parts(
    encode: Encode,
    tokens: TokenBatch,
    parts: Sequence[Part],
    memory: Memory,
    extras: Mapping[str, nn.Module],
    progress: Progress,
) -> Tensor:
    """The loss of the parts without gradient: what validation reports."""
    heads = sorted(frozenset().union(*(part.loss.heads() for part in parts)))
    with torch.no_grad():
        chunks = memory.chunks(tokens.length_N, None)
        chunks = chunks if memory.agreed is None else memory.agreed(chunks, tokens.length_N)
        pieces = [encode(tokens, heads, chunk.rows) for chunk in chunks]
        batches = _batches(pieces, chunks, parts, without_memory(extras), progress)
        return torch.stack([p.weight * p.loss(b).value for p, b in zip(parts, batches, strict=True)]).sum()


@torch.no_grad()
def _batches(
    pieces: list[Reps], chunks: list[Chunk], parts: Sequence[Part], extras: Mapping[str, nn.Module], progress: Progress
) -> list[Batch]:
    """Representations back in row order, cut from their graphs and into the sides of each part's batch."""
    busy = [place for place, chunk in enumerate(chunks) if not chunk.idle]
    device = next(iter(pieces[0].values())).tensors()[0].device
    place_N = to_device(np.argsort(np.concatenate([chunks[place].rows for place in busy]), kind="stable"), device)
    made = {head: [pieces[place][head] for place in busy] for head in pieces[0]}
    batches: list[Batch] = []
    start = 0
    for part in parts:
        sides: list[Side] = []
        for number, size in enumerate(part.ids.sizes):
            local = {head: each[0].of_pieces(each, place_N[start : start + size]) for head, each in made.items()}
            for name, given in part.given.items():
                local[name] = given[number].map(partial(to_device, device=device))
            sides.append(Side(local, part.group))
            start += size
        about: dict[str, Any] = {"task": part.task, "source": part.source, "group": part.group}
        batch = part.ids.with_sides(*sides, progress=progress, extras=extras, **about)
        if part.watch is not None:
            part.watch(batch)
        batches.append(batch)
    return batches


def _loss(
    parts: Sequence[Part], batches: list[Batch], scale: float, deferred: bool
) -> tuple[Tensor, dict[str, dict[str, Tensor]], Health | None]:
    """The weighted sum of the parts' losses, differentiated down to the leaves, gathered rows settled.

    Errors: `TrainingError` in place of a lack of memory on several ranks: the others wait in a collective of the loss,
    and no rank can tell them to begin anew.
    """
    values: list[Tensor] = []
    named: dict[str, dict[str, Tensor]] = {}
    try:
        for part, batch in zip(parts, batches, strict=True):
            output = part.loss(batch)
            value = output.value_W.sum()
            values.append(part.weight * value)
            named[part.source] = {"loss": value.detach(), **output.parts, **sparse_activity(batch.sides())}
        total = torch.stack(values).sum()
        health = _health(batches, total.detach())
        if not deferred:
            health.check(read(health.fault_F))
        (total if scale == 1 else total * scale).backward()
        for batch in batches:
            for side in batch.sides():
                side.settle()
        return total.detach(), named, health if deferred else None
    except torch.OutOfMemoryError as error:
        if world_size() == 1:
            raise
        raise TrainingError(
            f"the loss needs more memory than this rank's device has ({str(error).splitlines()[0]})",
            where=f"step {batches[0].progress.step}",
            fix="lower train.token_budget or train.batch_size, or block_size of the loss",
        ) from error


def sparse_activity(sides: Iterable[Side]) -> dict[str, Tensor]:
    """Of every sparse head: `HEAD_active`, the mean number of weights a text that are not 0, `HEAD_empty`, the share of
    texts without any, and `HEAD_zero`, the share of weights that are 0 (padding among them)."""
    found: dict[str, list[Tensor]] = {}
    for side in sides:
        for head, rep in side.local.items():
            if isinstance(rep, Sparse):
                found.setdefault(head, []).append(rep.weight_NT)
    values: dict[str, Tensor] = {}
    for head, weights in found.items():
        active_N = torch.cat([(weight_NT != 0).sum(1) for weight_NT in weights]).float()
        slots = sum(weight_NT.numel() for weight_NT in weights)
        values[f"{head}_active"] = active_N.mean()
        values[f"{head}_empty"] = (active_N == 0).float().mean()
        values[f"{head}_zero"] = 1 - active_N.sum() / max(slots, 1)
    return values


def _health(batches: list[Batch], total: Tensor) -> Health:
    every = [pair for batch in batches for side in batch.sides() for pair in side.local.items()]
    made = [representation for head, representation in every if head not in (TEACHER, GUIDE)]
    tensors = [tensor for representation in made for tensor in representation.floating()]
    healthy = torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all()
    fault_2 = highest_over_ranks(torch.stack([~healthy, ~torch.isfinite(total)]).to(total.dtype))
    names = ", ".join(batch.source for batch in batches)
    return Health(torch.cat([fault_2, total[None]]), f"step {batches[0].progress.step}, source {names}")


def _row_gradients(batches: list[Batch], heads: Sequence[str]) -> dict[str, list[Tensor]]:
    """Gradient of every floating field of the model's heads, rows of all sides in order; a missing one is zero."""

    def of(tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad

    flat = [side for batch in batches for side in batch.sides()]
    return {
        head: [
            torch.cat(column) for column in zip(*([of(t) for t in s.local[head].floating()] for s in flat), strict=True)
        ]
        for head in heads
    }


def _push(piece: Reps, chunk: Chunk, gradient: dict[str, list[Tensor]]) -> None:
    """Backward through one chunk. Token axes were padded to the longest chunk; the chunk takes its own part back. An
    idle one takes zeros."""
    tensors: list[Tensor] = []
    gradients: list[Tensor] = []
    row_N = to_device(chunk.rows, next(iter(gradient.values()))[0].device)
    for head, representation in piece.items():
        for tensor, whole in zip(representation.floating(), gradient[head], strict=True):
            own = whole[row_N]
            own = torch.zeros_like(own) if chunk.idle else own
            if tensor.requires_grad:  # not where all that a head is made of is frozen
                tensors.append(tensor)
                gradients.append(own[:, : tensor.shape[1]].to(tensor.dtype))
    if tensors:
        torch.autograd.backward(tensors, gradients)
