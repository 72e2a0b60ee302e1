"""Multi-vector documents in a tenth of their size: for each token the number of a centroid and a few bits a coordinate
for what is left.

    e_t ~ normalise( c_j + r ),   j the centroid nearest to e_t by inner product,
    r_d one of 2^b values: the medians of as many equally frequent ranges of all residuals

A vector of D numbers takes D b / 8 bytes and 4 for its centroid: 36 bytes of 128 numbers at 2 bits, 512 in fp32.
Scores are exact MaxSim scores of the vectors that come back, a block of documents at a time. Centroids are found by
k-means on a sample, as many as 16 times the root of the number of tokens, in a power of two.

Source: ColBERTv2 (Santhanam et al., 2022), section 3.3 and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from embedsmith.core.encoder import Encoder, Role, fingerprint, represent
from embedsmith.core.errors import SearchError
from embedsmith.core.files import atomic_file
from embedsmith.core.reps import MultiVector, Reps
from embedsmith.search.exact import FloatArray, IndexArray, TopK

BITS = (1, 2, 4, 8)
"""Bits a coordinate may have: those of which a byte holds a whole number."""
SAMPLE, ITERATIONS = 2**17, 12
"""Tokens that centroids are found on, and rounds of k-means."""
_BLOCK = 2**15  # tokens that are coded, or come back, together
_SCORES = 2**24  # numbers of tokens against centroids alive at once


@dataclass(frozen=True)
class Codebook:
    """How token vectors are coded. `value_Y`: the 2^bits values of a residual, rising; `border_Y`: those between them,
    one fewer."""

    centroid_CD: Tensor
    value_Y: Tensor
    border_Y: Tensor

    @property
    def bits(self) -> int:
        return int(math.log2(len(self.value_Y)))

    @staticmethod
    def learned(vector_SD: Tensor, bits: int = 2, count: int | None = None, seed: int = 0) -> Codebook:
        """From a sample of token vectors. `count`: centroids, by default as above; at most one a token.

        Errors: `SearchError` for no vectors, or bits of which a byte holds no whole number.
        """
        if bits not in BITS:
            raise SearchError(f"bits is {bits}", expected=f"one of {', '.join(map(str, BITS))}")
        if len(vector_SD) == 0:
            raise SearchError("no token vectors to learn a code from")
        order_S = torch.from_numpy(np.random.default_rng(seed).permutation(len(vector_SD)))
        vector_SD = vector_SD.float()[order_S[:SAMPLE]]
        wanted = count or 2 ** int(math.log2(16 * math.sqrt(len(order_S))))
        centroid_CD = _centroids(vector_SD, min(wanted, len(vector_SD)))
        residual = (vector_SD - centroid_CD[_nearest(vector_SD, centroid_CD)]).flatten()
        share = torch.arange(2 * 2**bits + 1, dtype=torch.float64)[1:-1] / (2 * 2**bits)
        quantiles = torch.from_numpy(np.quantile(residual.double().numpy(), share.numpy())).float()
        return Codebook(centroid_CD, quantiles[0::2].contiguous(), quantiles[1::2].contiguous())

    def encode(self, vector_SD: Tensor) -> tuple[Tensor, Tensor]:
        """code_S, the centroid of each vector, and packed_SB, its residual in bytes."""
        codes: list[Tensor] = []
        packed: list[Tensor] = []
        for block_SD in vector_SD.float().split(_BLOCK):
            code_S = _nearest(block_SD, self.centroid_CD)
            bucket_SD = torch.bucketize(block_SD - self.centroid_CD[code_S], self.border_Y)
            codes.append(code_S.to(torch.int32))
            packed.append(_packed(bucket_SD.to(torch.uint8), self.bits))
        return torch.cat(codes), torch.cat(packed)

    def decode(self, code_S: Tensor, packed_SB: Tensor) -> Tensor:
        """vector_SD, of length 1."""
        bucket_SD = _unpacked(packed_SB, self.bits)[:, : self.centroid_CD.shape[1]]
        return F.normalize(self.centroid_CD[code_S.long()] + self.value_Y[bucket_SD.long()], dim=-1)


@dataclass(frozen=True)
class ResidualStore:
    """Documents under a codebook: tokens `offset_P[n]` to `offset_P[n + 1]` are those of document n."""

    book: Codebook
    code_S: Tensor
    packed_SB: Tensor
    offset_P: Tensor

    @staticmethod
    def build(pieces: Iterable[MultiVector], bits: int = 2, book: Codebook | None = None) -> ResidualStore:
        """Code documents that come in pieces. Without a codebook one is learned from the first piece, which should then
        be a sample of all. Errors: those of `Codebook.learned`; `SearchError` for documents of another kind or width.
        """
        parts: list[tuple[Tensor, Tensor]] = []
        lengths: list[Tensor] = []
        for piece in pieces:
            if not isinstance(piece, MultiVector):
                raise SearchError(f"residual codes hold token vectors, not {type(piece).__name__}")
            vector_SD = piece.vector_NTD[piece.mask_NT]
            book = Codebook.learned(vector_SD, bits) if book is None else book
            if vector_SD.shape[1] != book.centroid_CD.shape[1]:
                what = f"token vectors of {vector_SD.shape[1]} numbers"
                raise SearchError(what, expected=f"{book.centroid_CD.shape[1]}, as those before")
            parts.append(book.encode(vector_SD))
            lengths.append(piece.mask_NT.sum(1))
        if book is None:
            raise SearchError("no documents to store")
        code_S, packed_SB = (torch.cat(list(column)) for column in zip(*parts, strict=True))
        offset_P = F.pad(torch.cat(lengths).cumsum(0), (1, 0))
        return ResidualStore(book, code_S, packed_SB, offset_P)

    def __len__(self) -> int:
        return len(self.offset_P) - 1

    @property
    def bytes(self) -> int:
        """What it holds, the codebook included."""
        tensors = (self.code_S, self.packed_SB, self.offset_P, self.book.centroid_CD)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def rows(self, start: int, stop: int) -> MultiVector:
        """Some documents as they come back, padded."""
        offset_P = self.offset_P[start : stop + 1]
        here = slice(int(offset_P[0]), int(offset_P[-1]))
        vector_SD = self.book.decode(self.code_S[here], self.packed_SB[here])
        length_N = offset_P.diff()
        mask_NT = torch.arange(max(int(length_N.max()), 1))[None, :] < length_N[:, None]
        vector_NTD = vector_SD.new_zeros(*mask_NT.shape, vector_SD.shape[1])
        vector_NTD[mask_NT] = vector_SD
        return MultiVector(vector_NTD, mask_NT)

    def blocks(self) -> Iterator[MultiVector]:
        """All documents, as many at a time as keep memory bounded."""
        start, count = 0, len(self)
        while start < count:
            limit = int(self.offset_P[start]) + _BLOCK
            stop = max(int(torch.searchsorted(self.offset_P, limit, right=True)) - 1, start + 1)
            yield self.rows(start, min(stop, count))
            start = stop

    def top(self, query: MultiVector, k: int) -> tuple[FloatArray, IndexArray]:
        """score_Qk and index_Qk of the best documents of each query, best first: all are scored."""
        best = TopK(query, k)
        for block in self.blocks():
            best.add(block)
        return best.result()

    def save(self, path: Path) -> None:
        """One file, whole or not at all."""
        tensors = {"code_S": self.code_S, "packed_SB": self.packed_SB, "offset_P": self.offset_P}
        tensors |= {"centroid_CD": self.book.centroid_CD, "value_Y": self.book.value_Y, "border_Y": self.book.border_Y}
        with atomic_file(path, "wb") as file:
            file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"kind": "residual"}))

    @staticmethod
    def load(path: Path) -> ResidualStore:
        """Errors: `SearchError` for a file that is no store or not whole."""
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("kind") != "residual":
                    raise ValueError("another kind of file")
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            book = Codebook(found["centroid_CD"], found["value_Y"], found["border_Y"])
            store = ResidualStore(book, found["code_S"], found["packed_SB"], found["offset_P"])
            if not len(store.code_S) == len(store.packed_SB) == int(store.offset_P[-1]):
                raise ValueError("its parts differ in length")
            return store
        except (OSError, SafetensorError, LookupError, ValueError) as error:
            raise SearchError(f"no store of residual codes ({error})", where=path, fix="make it again") from error


@dataclass
class ResidualEncoder:
    """An encoder whose token vectors of documents come back from residual codes of so many bits: what an evaluation of
    a compressed store reads. The codebook is learned from the documents it is first asked for."""

    encoder: Encoder
    bits: int = 2
    book: Codebook | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("multivector",)

    def represent(
        self,
        texts: Sequence[str],
        *,
        role: Role,
        task: str | None = None,
        outputs: Sequence[str] = ("multivector",),
        instruction: Sequence[str | None] | None = None,
    ) -> Reps:
        """As the encoder gives them, but for the token vectors of documents."""
        reps = represent(self.encoder, texts, role=role, task=task, outputs=outputs, instruction=instruction)
        made = reps.get("multivector")
        if role != "document" or not isinstance(made, MultiVector) or len(made) == 0:
            return reps
        store = ResidualStore.build([made], self.bits, self.book)
        self.book = store.book
        return {**reps, "multivector": store.rows(0, len(store))}

    def fingerprint(self) -> str:
        return f"{fingerprint(self.encoder)}-residual{self.bits}"


def share_of_exact(found_Qk: IndexArray, exact_Qk: IndexArray) -> float:
    """The share of the exact best k of each query that is among those found, the mean over queries."""
    both = [len(set(mine) & set(best)) / len(best) for mine, best in zip(found_Qk.tolist(), exact_Qk.tolist())]
    return float(np.mean(both))


def _centroids(vector_SD: Tensor, count: int) -> Tensor:
    """centroid_CD by k-means on the sphere, from the first vectors of the sample; a centroid that nobody is near starts
    again at the vector that is farthest from its own."""
    centroid_CD = F.normalize(vector_SD[:count], dim=-1)
    for _ in range(ITERATIONS):
        code_S = _nearest(vector_SD, centroid_CD)
        total_CD = torch.zeros_like(centroid_CD).index_add_(0, code_S, vector_SD)
        empty_C = torch.bincount(code_S, minlength=count) == 0
        if empty := int(empty_C.sum()):
            near_S = (vector_SD * centroid_CD[code_S]).sum(1)
            total_CD[empty_C] = vector_SD[torch.argsort(near_S, stable=True)[:empty]]
        moved_CD = F.normalize(total_CD, dim=-1)
        if torch.equal(moved_CD, centroid_CD):
            break
        centroid_CD = moved_CD
    return centroid_CD


def _nearest(vector_SD: Tensor, centroid_CD: Tensor) -> Tensor:
    """code_S: the centroid of the largest inner product."""
    rows = max(_SCORES // len(centroid_CD), 1)
    return torch.cat([(some_SD @ centroid_CD.T).argmax(1) for some_SD in vector_SD.split(rows)])


def _packed(bucket_SD: Tensor, bits: int) -> Tensor:
    """Buckets in bytes, the first in the lowest bits; the last byte filled up with zeros."""
    per_byte = 8 // bits
    bucket_SD = F.pad(bucket_SD, (0, -bucket_SD.shape[1] % per_byte))
    shift_Y = torch.arange(per_byte, dtype=torch.int32) * bits
    packed_SB: Tensor = (bucket_SD.unflatten(1, (-1, per_byte)).int() << shift_Y).sum(-1)
    return packed_SB.to(torch.uint8)


def _unpacked(packed_SB: Tensor, bits: int) -> Tensor:
    shift_Y = torch.arange(8 // bits, dtype=torch.int32) * bits
    bucket_SBY: Tensor = (packed_SB.int()[..., None] >> shift_Y) & (2**bits - 1)
    return bucket_SBY.flatten(1)
