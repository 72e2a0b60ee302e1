"""Texts to representations without gradient: long lists in blocks, each block in chunks of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from embedsmith.core.encoder import Role
from embedsmith.core.progress import progress_bar
from embedsmith.core.reps import Reps, concatenate, each_head
from embedsmith.core.tokens import IntArray, TokenBatch, chunk_rows
from embedsmith.models.config import ComputeType
from embedsmith.models.tokenize import Instruction

if TYPE_CHECKING:
    from embedsmith.models.embedder import Embedder

BLOCK = 8192
"""Texts tokenised and sorted together: enough for chunks of near-equal length, little enough memory to stream."""


@dataclass(frozen=True)
class Inference:
    """How to compute; see `Embedder.represent`."""

    token_budget: int | None = None
    dtype: ComputeType | None = None
    show_progress: bool | None = None


def represent(
    model: Embedder,
    texts: Sequence[str],
    how: Inference,
    *,
    role: Role,
    task: str | None,
    outputs: Sequence[str],
    instruction: Instruction,
) -> Reps:
    """See `Embedder.represent`. No text gives representations of zero rows."""
    if len(texts) == 0:  # the shapes of one text, without its row
        one = represent(model, [""], how, role=role, task=task, outputs=outputs, instruction=None)
        return each_head(one, lambda rep: rep.rows(slice(0, 0)))
    parts: list[Reps] = []
    with _evaluating(model), progress_bar("encode", len(texts), visible=_worth_showing(how, len(texts))) as bar:
        for start in range(0, len(texts), BLOCK):
            rows = slice(start, start + BLOCK)
            own = instruction if instruction is None or isinstance(instruction, str) else instruction[rows]
            tokens = model.tokenize(texts[rows], role, task, own)
            parts.append(_block(model, tokens, how, outputs, bar.advance))
    return parts[0] if len(parts) == 1 else concatenate(parts)


def derive_token_budget(device: torch.device) -> int:
    """Padded tokens in a chunk. A CPU is fastest while a chunk's states stay in its cache; a GPU wants to be filled."""
    return 1024 if device.type == "cpu" else 32768


def _block(
    model: Embedder, tokens: TokenBatch, how: Inference, outputs: Sequence[str], advance: Callable[[int], None]
) -> Reps:
    """Representations of one block: computed longest chunk first, returned in row order."""
    device = model.device
    chunks = chunk_rows(tokens.length_N, how.token_budget or derive_token_budget(device))

    def compute(rows: IntArray) -> Reps:
        with torch.inference_mode(), autocast(device, how.dtype):  # both are settings of the thread
            padded = tokens.take(rows).pad(model.pad_id, device, model.padding_left)
            return each_head(model(padded, outputs), lambda rep: rep.map(torch.Tensor.cpu))

    parts: list[Reps] = []
    for rows, part in zip(chunks, _spread(compute, chunks, derive_workers(device, len(chunks))), strict=True):
        parts.append(part)
        advance(len(rows))
    order = torch.from_numpy(np.argsort(np.concatenate(chunks), kind="stable"))
    joined = concatenate(parts)  # outside inference mode: ordinary tensors, which a loss may use
    return each_head(joined, lambda rep: rep.rows(order))


def derive_workers(device: torch.device, chunks: int) -> int:
    """Chunks computed side by side. On a CPU one a core: small products gain little from several cores, and a busy
    core then delays its own chunk instead of every product. A few chunks get all cores each."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return threads if chunks >= 2 * threads else 1


def _spread(compute: Callable[[IntArray], Reps], chunks: Sequence[IntArray], workers: int) -> Iterator[Reps]:
    """`map(compute, chunks)` over threads of one core each."""
    if workers == 1:
        yield from map(compute, chunks)
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(compute, chunks)
    finally:
        torch.set_num_threads(threads)  # a worker's setting is also the default of threads to come


def autocast(device: torch.device, dtype: ComputeType | None) -> AbstractContextManager[Any]:
    """Computation in `dtype` with the weights as they are; nothing for `None` and float32."""
    if dtype is None or dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


@contextmanager
def _evaluating(model: Embedder) -> Iterator[None]:
    """Dropout off; afterwards the model is as it was (training goes on after an evaluation)."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _worth_showing(how: Inference, count: int) -> bool | None:
    """A few texts take no time: no bar for them unless asked for."""
    return False if how.show_progress is None and count < 512 else how.show_progress
