"""One optimizer step's forward and backward: the only place that decides what is kept in memory and what is replayed.

The texts of a step are encoded in chunks of similar length. Each chunk's representations are cut from its graph; the
loss is computed once on all of them, whatever the memory; its gradient is then pushed back chunk by chunk. Chunks
that fit the budget keep their graph from the forward pass, the others are encoded without one and replayed under the
same random state (GradCache, Gao et al. 2021). So plain, accumulated and cached training are one mechanism and give
the same gradient (proof: tests/train/test_step.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from embedsmith.core.batch import Batch, Loss, Progress, Side
from embedsmith.core.collectives import Group, max_over_ranks
from embedsmith.core.errors import TrainingError
from embedsmith.core.progress import log
from embedsmith.core.reps import TEACHER, Representation, Reps, Sparse, concatenate, each_head
from embedsmith.core.seeds import TorchRandom
from embedsmith.core.tokens import IntArray, TokenBatch, chunk_rows, packed_rows

# How alive the sparse vectors of a step are: what shows at once that a sparse head dies.

DEAD = 0.5
"""From this share of empty vectors on a warning is given."""


def sparse_activity(sides: Iterable[Side]) -> dict[str, Tensor]:
    """Of every sparse head: `HEAD_active`, the mean number of weights above 0 a text, `HEAD_empty`, the share of texts
    without any, and `HEAD_zero`, the share of weights that are 0 (padding among them)."""
    found: dict[str, list[Tensor]] = {}
    for side in sides:
        for head, rep in side.local.items():
            if isinstance(rep, Sparse):
                found.setdefault(head, []).append(rep.weight_NT.detach())
    values: dict[str, Tensor] = {}
    for head, weights in found.items():
        active_N = torch.cat([(weight_NT > 0).sum(1) for weight_NT in weights]).float()
        slots = sum(weight_NT.numel() for weight_NT in weights)
        values[f"{head}_active"] = active_N.mean()
        values[f"{head}_empty"] = (active_N == 0).float().mean()
        values[f"{head}_zero"] = 1 - active_N.sum() / max(slots, 1)
    return values


class DeadHeads:
    """Warns once for each head and source of which most vectors are empty."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def watch(self, report: Mapping[str, float]) -> None:
        """`report`: the numbers of one log line, named `HEAD_empty/SOURCE`."""
        for name, value in report.items():
            key, _, source = name.partition("/")
            if key.endswith("_empty") and value > DEAD and name not in self._told:
                self._told.add(name)
                log.warning(
                    "%s: %.0f%% of the texts have an empty %s vector; a smaller learning rate, a larger weight of this "
                    "head or distillation from the start may revive it",
                    source,
                    100 * value,
                    key.removesuffix("_empty"),
                )


Encode = Callable[[TokenBatch, Sequence[str]], Reps]


@dataclass(frozen=True)
class Part:
    """Rows of one source on this rank, with the loss that reads them.

    A step usually has one part. It has several, each with a weight and a group of ranks, where losses of different
    tasks must move the model together (Conan's cross-GPU balance).
    """

    source: str
    first: TokenBatch
    second: TokenBatch
    assemble: Callable[[Side, Side, Mapping[str, nn.Module], Progress], Batch]
    loss: Loss
    weight: float = 1.0
    group: Group = None
    teacher: tuple[Representation, Representation] | None = None


@dataclass(frozen=True)
class Memory:
    """`chunk_tokens`: padded tokens encoded at once. `kept_tokens`: padded tokens whose graph may be alive together
    (`None`: all). `max_rows`: texts in a chunk, and then also the texts whose graphs are kept (`None`: no limit).
    `least_tokens`: from so many on a chunk ends where texts get shorter, to save padding (`None`: only when full).
    `packed`: the model computes no padding, so only real tokens count. `agreed`: makes the chunks of all ranks alike
    where a forward pass is a collective (FSDP2)."""

    chunk_tokens: int
    kept_tokens: int | None = None
    max_rows: int | None = None
    least_tokens: int | None = None
    packed: bool = False
    agreed: Callable[[list[Chunk]], list[Chunk]] | None = None


@dataclass(frozen=True)
class Chunk:
    rows: IntArray
    keep: bool
    idle: bool = False


@dataclass(frozen=True)
class StepOutput:
    """`value` is this rank's share of the loss (the mean over ranks is the loss), `parts` its named terms by source."""

    value: Tensor
    parts: dict[str, dict[str, Tensor]]
    tokens: int
    padded_tokens: int
    replayed_chunks: int


def plan_chunks(length_N: IntArray, memory: Memory) -> list[Chunk]:
    """Chunks of similar length, longest first; those that keep their graph come last, as many as the budget allows."""
    chunks = _chunked(length_N, memory, memory.max_rows)
    sizes = [_computed(length_N[rows], memory) for rows in chunks]
    tokens_left = float("inf") if memory.kept_tokens is None else max(memory.kept_tokens, sizes[-1])
    rows_left = float("inf") if memory.max_rows is None else memory.max_rows
    planned: list[Chunk] = []
    for rows, size in zip(reversed(chunks), reversed(sizes), strict=True):
        tokens_left, rows_left = tokens_left - size, rows_left - len(rows)
        planned.append(Chunk(rows, keep=tokens_left >= 0 and rows_left >= 0))
    return planned[::-1]


def _chunked(length_N: IntArray, memory: Memory, max_rows: int | None) -> list[IntArray]:
    if memory.packed:
        return packed_rows(length_N, memory.chunk_tokens, max_rows)
    return chunk_rows(length_N, memory.chunk_tokens, max_rows, memory.least_tokens)


def _computed(length_N: IntArray, memory: Memory) -> int:
    """Tokens that a chunk of such rows makes the model compute."""
    return int(length_N.sum()) if memory.packed else len(length_N) * int(length_N.max(initial=1))


def run_step(
    encode: Encode,
    parts: Sequence[Part],
    memory: Memory,
    extras: Mapping[str, nn.Module] | None = None,
    progress: Progress = Progress(),  # noqa: B008  (frozen)
) -> StepOutput:
    """Add the gradient of the parts' weighted losses to the parameters.

    `encode` is the model's forward pass on a ragged batch of tokens, for the heads asked for. Gradients are this
    rank's; the caller averages them over ranks. Errors: `TrainingError` when a representation or a loss is not
    finite, on every rank at once, before any gradient is touched.
    """
    tokens, heads = _texts(parts)
    chunks = plan_chunks(tokens.length_N, memory)
    chunks = chunks if memory.agreed is None else memory.agreed(chunks)
    states: list[TorchRandom] = []
    pieces: list[Reps] = []
    for chunk in chunks:
        states.append(TorchRandom.capture())
        with torch.set_grad_enabled(chunk.keep):
            pieces.append(encode(tokens.take(chunk.rows), heads))
    sides = _sides(pieces, chunks, parts)
    value, named = _loss(parts, sides, extras or {}, progress)
    gradient = _row_gradients(sides)
    after = TorchRandom.capture()
    for chunk, piece in zip(chunks, pieces, strict=True):  # kept graphs first: none is alive beside a replayed one
        if chunk.keep:
            _push(piece, chunk, gradient)
    for chunk, state in zip(chunks, states, strict=True):
        if not chunk.keep:
            state.restore()
            _push(encode(tokens.take(chunk.rows), heads), chunk, gradient)
    after.restore()
    padded = sum(_computed(tokens.length_N[chunk.rows], memory) for chunk in chunks)
    return StepOutput(value, named, len(tokens.id_S), padded, sum(not chunk.keep for chunk in chunks))


def evaluate_parts(
    encode: Encode, parts: Sequence[Part], memory: Memory, extras: Mapping[str, nn.Module], progress: Progress
) -> Tensor:
    """The loss of the parts without gradient: what validation reports."""
    with torch.no_grad():
        tokens, heads = _texts(parts)
        chunks = [Chunk(rows, keep=False) for rows in _chunked(tokens.length_N, memory, None)]
        chunks = chunks if memory.agreed is None else memory.agreed(chunks)
        sides = _sides([encode(tokens.take(chunk.rows), heads) for chunk in chunks], chunks, parts)
        batches = [part.assemble(*pair, extras, progress) for part, pair in zip(parts, sides, strict=True)]
        return torch.stack([p.weight * p.loss(b).value for p, b in zip(parts, batches, strict=True)]).sum()


def _texts(parts: Sequence[Part]) -> tuple[TokenBatch, list[str]]:
    """All texts of a step as one list, side after side, and the heads that its losses read."""
    tokens = TokenBatch.concatenate([side for part in parts for side in (part.first, part.second)])
    return tokens, sorted(frozenset().union(*(part.loss.heads() for part in parts)))


def _sides(pieces: list[Reps], chunks: list[Chunk], parts: Sequence[Part]) -> list[tuple[Side, Side]]:
    """Representations back in row order, cut into the sides of each part."""
    busy = [(piece, chunk) for piece, chunk in zip(pieces, chunks, strict=True) if not chunk.idle]
    pieces, chunks = [piece for piece, _ in busy], [chunk for _, chunk in busy]
    detached = [each_head(piece, lambda r: r.map(torch.Tensor.detach)) for piece in pieces]
    place_N = torch.from_numpy(np.argsort(np.concatenate([chunk.rows for chunk in chunks]), kind="stable"))
    everything = concatenate(detached)
    pairs: list[tuple[Side, Side]] = []
    start = 0
    for part in parts:
        both: list[Side] = []
        for place, length in enumerate((len(part.first), len(part.second))):
            rows_N = place_N[start : start + length]
            local = each_head(everything, partial(_rows, rows_N=rows_N))
            if part.teacher is not None:
                local[TEACHER] = part.teacher[place].map(partial(torch.Tensor.to, device=_device(everything)))
            both.append(Side(local, part.group))
            start += length
        pairs.append((both[0], both[1]))
    return pairs


def _device(reps: Reps) -> torch.device:
    return next(iter(reps.values())).tensors()[0].device


def _rows(representation: Representation, rows_N: Tensor) -> Representation:
    return representation.rows(rows_N.to(representation.tensors()[0].device))


def _loss(
    parts: Sequence[Part], sides: list[tuple[Side, Side]], extras: Mapping[str, nn.Module], progress: Progress
) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    """The weighted sum of the parts' losses, differentiated down to the leaves, gathered rows settled."""
    values: list[Tensor] = []
    named: dict[str, dict[str, Tensor]] = {}
    batches: list[Batch] = []
    for part, pair in zip(parts, sides, strict=True):
        batch = part.assemble(*pair, extras, progress)
        output = part.loss(batch)
        values.append(part.weight * output.value)
        named[part.source] = {"loss": output.value.detach(), **output.parts, **sparse_activity(pair)}
        batches.append(batch)
    total = torch.stack(values).sum()
    _check_finite(parts, sides, total, progress.step)
    total.backward()
    for batch in batches:
        batch.settle()
    return total.detach(), named


def _check_finite(parts: Sequence[Part], sides: list[tuple[Side, Side]], total: Tensor, step: int) -> None:
    made = [r for pair in sides for side in pair for head, r in side.local.items() if head != TEACHER]
    tensors = [tensor for representation in made for tensor in representation.floating()]
    healthy = [torch.isfinite(tensor).all() for tensor in tensors]
    fine = torch.isfinite(total) & torch.stack(healthy).all()
    if max_over_ranks(int(not fine), total.device):
        names = ", ".join(part.source for part in parts)
        what = "the loss" if all(healthy) else "a representation"
        raise TrainingError(
            f"{what} is not finite (loss {float(total.detach()):g})",
            where=f"step {step}, source {names}",
            fix="lower train.learning_rate or set train.precision=fp32; the last checkpoint is intact",
        )


def _row_gradients(sides: list[tuple[Side, Side]]) -> dict[str, list[Tensor]]:
    """Gradient of every floating field of every head, rows of all sides in order; a missing one is zero."""

    def of(tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad

    flat = [side for pair in sides for side in pair]
    return {
        head: [
            torch.cat(column) for column in zip(*([of(t) for t in s.local[head].floating()] for s in flat), strict=True)
        ]
        for head in flat[0].local
    }


def _push(piece: Reps, chunk: Chunk, gradient: dict[str, list[Tensor]]) -> None:
    """Backward through one chunk. Token axes were padded to the longest chunk; the chunk takes its own part back. An
    idle one takes zeros."""
    tensors: list[Tensor] = []
    gradients: list[Tensor] = []
    for head, representation in piece.items():
        for tensor, whole in zip(representation.floating(), gradient[head], strict=True):
            own = whole[torch.from_numpy(chunk.rows).to(whole.device)]
            own = torch.zeros_like(own) if chunk.idle else own
            tensors.append(tensor)
            gradients.append(own[:, : tensor.shape[1]].to(tensor.dtype))
    torch.autograd.backward(tensors, gradients)
