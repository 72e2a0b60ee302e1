"""Encoding without gradient: chunks of similar length, several at once on a CPU; and what is done to finished vectors
(quantising, comparing). `Embedder.represent` and `Embedder.encode` are made of this."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from embedsmith.core.errors import ModelError
from embedsmith.core.reps import Reps, concatenate, each_head
from embedsmith.core.tokens import IntArray, TokenBatch, chunk_rows
from embedsmith.models.config import ComputeType, Similarity

BLOCK = 8192
"""Texts tokenised and sorted together: enough for chunks of near-equal length, little enough memory to stream."""


def encode_block(
    tokens: TokenBatch,
    compute: Callable[[TokenBatch, IntArray], Reps],
    device: torch.device,
    token_budget: int | None,
    dtype: ComputeType | None,
    advance: Callable[[int], None],
) -> Reps:
    """Representations of one block on the CPU: computed longest chunk first, returned in row order."""
    # A CPU is fastest while a chunk's states stay in its cache; a GPU wants to be filled.
    chunks = chunk_rows(tokens.length_N, token_budget or (1024 if device.type == "cpu" else 32768))

    def of(rows: IntArray) -> Reps:
        with torch.inference_mode(), autocast(device, dtype):  # both are settings of the thread
            return each_head(compute(tokens, rows), lambda rep: rep.map(torch.Tensor.cpu))

    parts: list[Reps] = []
    for rows, part in zip(chunks, _spread(of, chunks, derive_workers(device, len(chunks))), strict=True):
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


Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
FloatArray = npt.NDArray[np.float32]
AnyArray = npt.NDArray[Any]


def value_ranges(vector_ND: FloatArray) -> FloatArray:
    """[2, D]: minimum and maximum of every coordinate, for `quantize`."""
    return np.stack([vector_ND.min(0), vector_ND.max(0)]).astype(np.float32)


def quantize(vector_ND: FloatArray, precision: Precision, ranges: FloatArray | None = None) -> AnyArray:
    """Smaller vectors, bit for bit as sentence-transformers makes them.

    int8, uint8: 255 equal steps between the coordinate's minimum and maximum (`ranges`, or those of the given
    vectors; two at least). binary, ubinary: the signs, eight to a byte, [N, ceil(D / 8)], offset by -128 for binary.
    """
    if precision not in get_args(Precision):
        raise ModelError(f"unknown precision {precision!r}", expected=f"one of {', '.join(get_args(Precision))}")
    if precision == "float32":
        return vector_ND.astype(np.float32, copy=False)
    if precision in ("binary", "ubinary"):
        packed = np.packbits(vector_ND > 0, axis=-1)
        return packed if precision == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)
    if ranges is None:
        if len(vector_ND) == 1:
            raise ModelError(
                f"{precision} cannot be calibrated on one vector",
                fix="give ranges, for example value_ranges() of a sample of documents",
            )
        ranges = value_ranges(vector_ND) if len(vector_ND) else np.zeros((2, vector_ND.shape[1]), np.float32)
    start_D = ranges[0].astype(np.float32)
    step_D = (ranges[1].astype(np.float32) - start_D) / 255
    level_ND: FloatArray = np.clip(np.floor((vector_ND - start_D) / np.where(step_D == 0, 1, step_D)), 0, 255)
    return level_ND.astype(np.uint8) if precision == "uint8" else (level_ND - 128).astype(np.int8)


def compare(left: AnyArray | Tensor, right: AnyArray | Tensor, similarity: Similarity = "cosine") -> FloatArray:
    """Every row with every row, [N, M] in fp32, larger is closer; a single vector is one row. As in
    sentence-transformers, distances are negative."""
    left_ND, right_MD = (torch.atleast_2d(torch.as_tensor(side)).float() for side in (left, right))
    if similarity in ("euclidean", "manhattan"):
        made_NM = -torch.cdist(left_ND, right_MD, p=2.0 if similarity == "euclidean" else 1.0)
    elif similarity == "dot":
        made_NM = left_ND @ right_MD.T
    else:
        made_NM = F.normalize(left_ND, dim=-1) @ F.normalize(right_MD, dim=-1).T
    return np.asarray(made_NM.numpy(), np.float32)
