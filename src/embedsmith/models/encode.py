"""Encoding without gradient, as a pipeline of windows of texts; and how finished vectors are compared.
`Embedder.represent`, `Embedder.encode` and `encode` of files are made of this.

While a GPU computes one window the next is read and tokenized in a thread (the tokenizer's own code uses all cores),
and the results of the window before travel back and are used. Of the texts, tokens and results no more than three
windows exist at a time. On a CPU all cores compute, and windows follow each other.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from threading import Barrier
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embedsmith.core.ahead import one_ahead
from embedsmith.core.device import cpu_multiplies_bf16
from embedsmith.core.errors import DeviceMemoryError
from embedsmith.core.progress import log
from embedsmith.core.quantize import AnyArray, FloatArray
from embedsmith.core.reps import Reps, concatenate, each_head
from embedsmith.core.tokens import IntArray, PaddedTokens, TokenBatch, chunk_rows, packed_rows
from embedsmith.models.config import ComputeType, Similarity

BLOCK = 8192
"""Texts tokenised and sorted together: enough for chunks of near-equal length, little enough memory to stream."""
ON_GPU = 4096
"""The same on a GPU, where chunks are large and the first window should not take long to tokenize."""
WITH_TOKENS = 512
"""The same on a GPU for a vector a token: what travels back lies in memory that is pinned."""

Compute = Literal["auto", "float32", "bfloat16", "float16"]
"""What a forward pass computes in; `auto` is `derive_dtype`."""


@dataclass
class WindowEncoder:
    """How windows are computed: `compute` gives the representations of some rows of one on `device`, in chunks of at
    most `chunk_tokens` padded tokens (with `packing`, real ones). Where a card is out of memory the window is computed
    again in chunks of half the size, and the new size is kept. `side_by_side`: on a CPU every core computes a chunk of
    its own, unless `compute` takes all of them by itself."""

    compute: Callable[[TokenBatch, IntArray], Reps]
    device: torch.device
    chunk_tokens: int
    dtype: ComputeType | None = None
    packing: bool = False
    advance: Callable[[int], None] = lambda rows: None
    side_by_side: bool = True

    def run(self, windows: Iterator[TokenBatch]) -> Iterator[Reps]:
        """Representations of each window in row order, on the CPU. On a GPU one window is used while the next is
        computed."""
        flying: Callable[[], Reps] | None = None
        for tokens in one_ahead(windows) if works_ahead(self.device) else windows:
            launched = self._launch(tokens)
            if self.device.type != "cuda":
                yield launched()
                continue
            if flying is not None:
                yield flying()
            flying = launched
        if flying is not None:
            yield flying()

    def _launch(self, tokens: TokenBatch) -> Callable[[], Reps]:
        """Compute a window, longest chunk first, and start the way back of its results; what is returned waits for
        them, which is the one time a window that the host waits for a GPU."""
        while True:
            chunks = chunks_of(tokens.length_N, self.chunk_tokens, self.device, self.packing)
            try:
                parts = self._computed(tokens, chunks)
                break
            except _TooLargeError as error:
                length_R = tokens.length_N[error.rows]
            self._halve(length_R)  # here, where the failed pass and all it held is gone
        arrived = None
        if self.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self.device))

        def landed() -> Reps:
            if arrived is not None:
                arrived.synchronize()
            order = torch.from_numpy(np.argsort(np.concatenate(chunks), kind="stable"))
            joined = concatenate(parts)  # outside inference mode: ordinary tensors, which a loss may use
            return each_head(joined, lambda rep: rep.rows(order))

        return landed

    def _computed(self, tokens: TokenBatch, chunks: Sequence[IntArray]) -> list[Reps]:
        def home(tensor: Tensor) -> Tensor:  # into pinned memory, without waiting, where it comes from a GPU
            return tensor.to("cpu", non_blocking=tensor.device.type == "cuda")

        def of(rows: IntArray) -> Reps:
            with torch.inference_mode(), autocast(self.device, self.dtype):  # both are settings of the thread
                try:
                    return each_head(self.compute(tokens, rows), lambda rep: rep.map(home))
                except torch.OutOfMemoryError as error:
                    raise _TooLargeError(rows) from error

        parts: list[Reps] = []
        done = 0
        try:  # an outer autocast keeps what it made of the weights from chunk to chunk
            with autocast(self.device, self.dtype if self.device.type == "cuda" else None):
                workers = derive_workers(self.device, len(chunks)) if self.side_by_side else 1
                computed = _spread(of, chunks, workers)
                for rows, part in zip(chunks, computed, strict=True):
                    parts.append(part)
                    done += len(rows)
                    self.advance(len(rows))
        except _TooLargeError:
            self.advance(-done)
            raise
        return parts

    def _halve(self, length_R: IntArray) -> None:
        """Errors: `DeviceMemoryError` where what did not fit is one text."""
        if len(length_R) == 1:
            raise DeviceMemoryError(
                f"one text of {length_R[0]:,} tokens does not fit the memory of {self.device}",
                fix="lower max_length, compute in bfloat16, or free the memory that other programs hold there",
            )
        size = int(length_R.sum()) if self.packing else int(length_R.max()) * len(length_R)
        self.chunk_tokens = max(size // 2, 1)
        log.warning(
            "%s is out of memory at a chunk of %s tokens: the window is computed again in chunks of at most %s",
            self.device,
            f"{size:,}",
            f"{self.chunk_tokens:,}",
        )


class _TooLargeError(Exception):
    """The card was out of memory at these rows."""

    def __init__(self, rows: IntArray) -> None:
        super().__init__(rows)
        self.rows = rows


def run_windows(
    model: Any,
    forward: Callable[[PaddedTokens], Reps],
    windows: Iterator[TokenBatch],
    token_budget: int | None,
    dtype: Compute | None,
    advance: Callable[[int], None],
    side_by_side: bool = True,
) -> Iterator[Reps]:
    """What `forward` makes of windows for a model that is in evaluation mode meanwhile. A chunk has `token_budget`
    tokens, or as many as fit the device; where these were too many, `model.fitting` keeps how many do fit."""

    def compute(tokens: TokenBatch, rows: IntArray) -> Reps:
        return forward(tokens.pad(model.pad_id, model.device, model.padding_left, rows))

    known = model.fitting if token_budget is None else token_budget
    size = known or fitting_tokens(model.device, model.backbone.config)
    chosen = settled_dtype(dtype, model.device)
    engine = WindowEncoder(compute, model.device, size, chosen, model.packing, advance, side_by_side)
    was_training = model.training  # training goes on after an evaluation
    model.eval()
    try:
        yield from engine.run(windows)
    finally:
        model.train(was_training)
        if engine.chunk_tokens < size:
            model.fitting = engine.chunk_tokens


def works_ahead(device: torch.device) -> bool:
    """Whether the next window is made while one is computed: where the host's cores are free for it."""
    return device.type != "cpu"


def chunks_of(length_N: IntArray, chunk_tokens: int, device: torch.device, packing: bool) -> list[IntArray]:
    """Rows in chunks of similar length, by real tokens where a card computes no padding. On a CPU a chunk ends where
    texts get shorter: a few texts that came together from anywhere are mostly padding otherwise."""
    if packing and device.type == "cuda":
        return packed_rows(length_N, chunk_tokens)
    return chunk_rows(length_N, chunk_tokens, least_tokens=_WORTH if device.type == "cpu" else None)


def window_rows(device: torch.device, with_tokens: bool) -> int:
    """Texts in a window; `with_tokens`: something is given for every token."""
    if device.type != "cuda":
        return BLOCK
    return WITH_TOKENS if with_tokens else ON_GPU


_WORTH = 128
"""Padded tokens with which one core is about as quick, token by token, as with more."""


def fitting_tokens(device: torch.device, config: Any) -> int:
    """Tokens in a chunk. A CPU is fastest while a chunk's states stay in its cache; a GPU wants to be filled, with no
    more than half of its free memory: a layer's states are about eight vectors of the width and three of the inner
    width a token, in fp32."""
    if device.type == "cpu":
        return 1024
    if device.type != "cuda":
        return 32768
    text = config.get_text_config()
    width = int(getattr(text, "hidden_size", None) or 4096)
    inner = int(getattr(text, "intermediate_size", None) or 4 * width)
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(max(free // 2 // (4 * (8 * width + 3 * inner)), 512), 65536)


def derive_dtype(device: torch.device) -> ComputeType:
    """16 bits where the processor multiplies them itself: bfloat16, on a GPU without it float16; else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if device.type == "cpu" and cpu_multiplies_bf16() else "float32"


def settled_dtype(dtype: Compute | None, device: torch.device) -> ComputeType | None:
    """What is computed in; what `auto` chose is said, and where bfloat16 is slow is warned of, once."""
    if dtype == "auto":
        dtype = derive_dtype(device)
        _say_once(f"dtype=auto: computes in {dtype} on {device}")
    elif dtype == "bfloat16" and device.type == "cpu" and cpu_multiplies_bf16() is False:
        _warn_once(
            "this processor has no arithmetic in bfloat16 (neither avx512_bf16 nor amx_bf16): it is several times "
            "slower there than float32; leave dtype out, or give dtype=auto"
        )
    elif dtype == "bfloat16" and device.type == "cuda" and derive_dtype(device) != "bfloat16":
        _warn_once(
            f"{torch.cuda.get_device_name(device)} has no arithmetic in bfloat16, which is slower there than float16; "
            "give dtype=auto, or float16"
        )
    return dtype


@cache
def _say_once(text: str) -> None:
    log.info(text)


@cache
def _warn_once(text: str) -> None:
    log.warning(text)


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
    pool = _pool_of(workers, os.getpid())
    futures = [pool.submit(compute, rows) for rows in chunks]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


@cache
def _pool_of(workers: int, process: int) -> ThreadPoolExecutor:
    """Threads of one core each, which stay: a server would make new ones several times a second, and the library of
    matrix products keeps memory for every thread it has seen. `process`: a forked one has none of its parent's threads.
    """
    threads, begun = torch.get_num_threads(), Barrier(workers + 1)

    def begin() -> None:
        torch.set_num_threads(1)  # the default of threads to come, which a thread takes when it first looks
        torch.get_num_threads()
        begun.wait()

    pool = ThreadPoolExecutor(workers, "one core", initializer=begin)
    try:
        for _ in range(workers):  # none is idle before all have begun, so that each call makes a thread
            pool.submit(int)
        begun.wait()
    except RuntimeError:  # the system gives no more threads: those that have begun must not wait for ever
        begun.abort()
        raise
    finally:
        torch.set_num_threads(threads)
    return pool


def autocast(device: torch.device, dtype: ComputeType | None) -> AbstractContextManager[Any]:
    """Computation in `dtype` with the weights as they are; nothing for `None` and float32."""
    if dtype is None or dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


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
