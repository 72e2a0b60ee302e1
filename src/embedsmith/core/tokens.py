"""Token ids of N texts, ragged: the form in which texts travel from the tokenizer (or a cache) to the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedsmith.core.transfer import to_device

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenBatch:
    """Row n is `id_S[offset_P[n]:offset_P[n + 1]]`, special tokens included; `offset_P` has N + 1 entries.

    `body_N` counts the leading tokens that belong to a prompt or instruction (found by character offsets): a pooling
    that skips the instruction starts there. `is_query_N` says which texts are queries.
    """

    id_S: IntArray
    offset_P: IntArray
    body_N: IntArray
    is_query_N: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.body_N)

    @property
    def length_N(self) -> IntArray:
        return np.diff(self.offset_P)

    def take(self, rows: IntArray | Sequence[int]) -> TokenBatch:
        rows = np.asarray(rows, dtype=np.int64)
        length_N = self.length_N[rows]
        offset_P = np.concatenate([[0], np.cumsum(length_N)]).astype(np.int64)
        within = np.arange(offset_P[-1]) - np.repeat(offset_P[:-1], length_N)
        id_S = self.id_S[np.repeat(self.offset_P[rows], length_N) + within]
        return TokenBatch(id_S, offset_P, self.body_N[rows], self.is_query_N[rows])

    def pad(
        self, pad_id: int, device: torch.device | str = "cpu", left: bool = False, rows: IntArray | None = None
    ) -> PaddedTokens:
        """Rectangular tensors of all texts, or of some rows. Masks come from lengths, never from `ids != pad`: a pad
        token may be a real one."""
        start_N1, stop_N1 = self.offset_P[:-1, None], self.offset_P[1:, None]
        body_N1, is_query_N = self.body_N[:, None], self.is_query_N
        if rows is not None:
            start_N1, stop_N1, body_N1, is_query_N = start_N1[rows], stop_N1[rows], body_N1[rows], is_query_N[rows]
        width = int((stop_N1 - start_N1).max(initial=1))
        place_NT = np.arange(width)[None, :] + (stop_N1 - width if left else start_N1)
        mask_NT = (start_N1 <= place_NT) & (place_NT < stop_N1)
        id_NT = np.full(mask_NT.shape, pad_id, dtype=np.int64)
        id_NT[mask_NT] = self.id_S[place_NT[mask_NT]]
        body_NT = mask_NT & (place_NT >= start_N1 + body_N1)
        arrays = (id_NT, mask_NT, body_NT, is_query_N, np.flatnonzero(mask_NT))
        return PaddedTokens(*(to_device(array, device) for array in arrays))

    @staticmethod
    def concatenate(parts: Sequence[TokenBatch]) -> TokenBatch:
        lengths = np.concatenate([part.length_N for part in parts])
        return TokenBatch(
            np.concatenate([part.id_S for part in parts]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.concatenate([part.body_N for part in parts]),
            np.concatenate([part.is_query_N for part in parts]),
        )

    @staticmethod
    def from_rows(rows: Iterable[Sequence[int]], body: Sequence[int], is_query: bool | Sequence[bool]) -> TokenBatch:
        """Rows of token ids; `is_query` may be given for all of them or for each."""
        rows = list(rows)
        length_N = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        flat = np.fromiter(chain.from_iterable(rows), np.int64, int(length_N.sum()))
        offset_P = np.concatenate([[0], np.cumsum(length_N)]).astype(np.int64)
        return TokenBatch(flat, offset_P, np.asarray(body, np.int64), np.full(len(rows), np.asarray(is_query, bool)))


@dataclass(frozen=True)
class PaddedTokens:
    """One rectangular chunk, ready for a model: `mask_NT` marks real tokens, `body_NT` those after the instruction.

    `known_place_S`: what `place_S` gives, where it was counted on the host: a GPU is then not waited for.
    """

    id_NT: Tensor
    mask_NT: Tensor
    body_NT: Tensor
    is_query_N: Tensor
    known_place_S: Tensor | None = None

    @property
    def place_S(self) -> Tensor:
        """The real tokens of all texts one after the other: `text * T + column` of each."""
        return self.mask_NT.flatten().nonzero()[:, 0] if self.known_place_S is None else self.known_place_S

    def spread(self, value_S: Tensor) -> Tensor:
        """Values [S, ...] of the real tokens in the rows of the chunk, [N, T, ...]; zeros at the padding."""
        flat = value_S.new_zeros(self.mask_NT.numel(), *value_S.shape[1:])
        return flat.index_copy(0, self.place_S, value_S).view(*self.mask_NT.shape, *value_S.shape[1:])


def one_of(id_NT: Tensor, mark_S: Tensor) -> Tensor:
    """Which tokens are among a few marks. (`torch.isin` says the same, and cannot be exported to ONNX.)"""
    return (id_NT[..., None] == mark_S).any(-1)


def chunk_rows(
    length_N: IntArray, token_budget: int, max_rows: int | None = None, least_tokens: int | None = None
) -> list[IntArray]:
    """Rows in chunks of similar length, longest first, each of at most `token_budget` padded tokens (a single longer
    row stands alone) and at most `max_rows` rows. With `least_tokens` a chunk that has so many padded tokens, and is
    worth a forward pass, ends where texts get shorter than 0.9 of its longest: more chunks, less padding."""
    order = np.argsort(-length_N, kind="stable")
    falling_N = -length_N[order]
    chunks: list[IntArray] = []
    start = 0
    while start < len(order):
        longest = max(-int(falling_N[start]), 1)
        count = max(token_budget // longest, 1)
        count = count if max_rows is None else min(count, max_rows)
        if least_tokens is not None:
            alike = int(np.searchsorted(falling_N, -0.9 * longest, side="right")) - start
            count = min(count, max(alike, -(-least_tokens // longest), 1))
        chunks.append(order[start : start + count])
        start += count
    return chunks


def packed_rows(length_N: IntArray, token_budget: int, max_rows: int | None = None) -> list[IntArray]:
    """Rows in chunks of at most `token_budget` real tokens, longest first, for a model that computes no padding."""
    order = np.argsort(-length_N, kind="stable")
    total_P = np.concatenate([[0], np.cumsum(length_N[order])])
    chunks: list[IntArray] = []
    start = 0
    while start < len(order):
        fitting = int(np.searchsorted(total_P, total_P[start] + token_budget, side="right")) - 1 - start
        count = max(fitting if max_rows is None else min(fitting, max_rows), 1)
        chunks.append(order[start : start + count])
        start += count
    return chunks
