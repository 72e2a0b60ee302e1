"""Nearest vectors by codes of a byte or a bit a number, then by the full vectors of the best of these.

Codes are a quarter (int8) or a thirty-second (binary) of the vectors' size: they stay in memory where the vectors lie
on a disk, and those are read for a few candidates of a query alone. The query is never made a code but for the first
look at binary ones, so what is lost is the documents' rounding alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from embedsmith.core.errors import SearchError
from embedsmith.core.quantize import AnyArray, FloatArray, quantize, value_ranges
from embedsmith.core.reps import Dense, Representation, Widths
from embedsmith.search.exact import IndexArray, TopK, Vectors, check_matrix, rows_between, search_device

SearchPrecision = Literal["float32", "int8", "binary"]
RESCORE = 4
"""Candidates for every hit that are scored by their full vectors."""

_WIDE = 8  # binary: candidates by the bits of both sides, for every one that the query's numbers choose
_COUNTED, _MULTIPLIED = 2**12, 2**16  # documents whose signs are compared at once
_NUMBERS = 2**22  # of the candidates' vectors held at once: 16 MB


@dataclass(frozen=True)
class Bits(Representation):
    """The signs of N vectors, eight to a byte. Score: how many agree less how many differ, by counting bits."""

    byte_NB: Tensor
    width: int = field(default=0, kw_only=True)

    def tensors(self) -> list[Tensor]:
        return [self.byte_NB]

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(change(self.byte_NB), width=self.width)

    def scores(self, other: Self, widths: Widths | None = None) -> Tensor:
        left_QW, right_KW = _words(self.byte_NB), _words(other.byte_NB)
        differ_QK = np.zeros((len(left_QW), len(right_KW)), np.int32)
        for word in range(left_QW.shape[1]):
            differ_QK += np.bitwise_count(left_QW[:, word, None] ^ right_KW[None, :, word])
        return torch.from_numpy((self.width - 2 * differ_QK).astype(np.float32))[None]

    def paired(self, other: Self, widths: Widths | None = None) -> Tensor:
        differ_N = np.bitwise_count(_words(self.byte_NB) ^ _words(other.byte_NB)).sum(1, dtype=np.int32)
        return torch.from_numpy((self.width - 2 * differ_N).astype(np.float32))[None]


def _words(byte_NB: Tensor) -> AnyArray:
    """Bytes in the widest words that they fill."""
    array = np.ascontiguousarray(byte_NB.numpy())
    size = next(size for size in (8, 4, 2, 1) if array.shape[1] % size == 0)
    words: AnyArray = array.view(f"u{size}")
    return words


@dataclass(frozen=True)
class Quantised:
    """Documents as codes, and where their full vectors are. Made by `of`, searched by `top_k`.

    int8: `code` [N, D] counts 255 equal steps between the least and the greatest value that a coordinate has among the
    documents, `ranges` [2, D]. binary: the signs, eight to a byte, [N, ceil(D / 8)]. Both are what `encode` gives
    (`core/quantize.py`). `document`: the full vectors, or `None` where only codes were kept.
    """

    precision: Literal["int8", "binary"]
    code: AnyArray
    width: int
    ranges: FloatArray | None = None
    document: Vectors | None = None

    @classmethod
    def of(cls, document: Vectors, precision: SearchPrecision, block: int = 2**14) -> Self:
        """Read the documents, `block` rows at a time: for int8 twice, for binary once.

        Errors: `SearchError` for another precision, for what is no dense vector, and for values that are not finite.
        """
        if precision not in ("int8", "binary"):
            raise SearchError(f"the precision is {precision!r}", expected="int8 or binary")
        width = _width(document, "the documents")
        starts = range(0, len(document), block)
        ranges: FloatArray | None = None
        if precision == "int8":
            found = [value_ranges(_finite(document, start, start + block)) for start in starts]
            ranges = np.zeros((2, width), np.float32)
            if found:
                ranges = np.stack([np.min([low for low, _ in found], 0), np.max([high for _, high in found], 0)])
        columns = width if precision == "int8" else -(-width // 8)
        code = np.empty((len(document), columns), np.int8 if precision == "int8" else np.uint8)
        stored: Literal["int8", "ubinary"] = "int8" if precision == "int8" else "ubinary"
        for start in starts:
            code[start : start + block] = quantize(_finite(document, start, start + block), stored, ranges)
        return cls(precision, code, width, ranges, document)

    def __len__(self) -> int:
        return len(self.code)

    @property
    def bytes_per_vector(self) -> int:
        return int(self.code.shape[1] * self.code.itemsize)

    def top_k(
        self, query: Vectors, k: int, rescore: int = RESCORE, device: torch.device | str | None = None
    ) -> tuple[FloatArray, IndexArray]:
        """score_Qk and index_Qk of the `min(k, N)` best documents of each query, best first; ties go to the lower
        index.

        Codes choose `rescore` times k candidates, the full vectors the best k of these, with their own scores; so where
        that is all documents, this is the exact search. `rescore=0`: the codes alone, scored by the vectors that they
        stand for (binary: of length 1). Errors: `SearchError` for queries that do not match, `k` below 1, and rescoring
        where only codes were kept.
        """
        if k < 1 or rescore < 0:
            raise SearchError(f"k is {k}, rescore is {rescore}", expected="k from 1, rescore from 0")
        if (width := _width(query, "the queries")) != self.width:
            raise SearchError(
                f"queries and documents have vectors of {width} and {self.width} numbers", expected="the same model"
            )
        asked_QD = _finite(query, 0, len(query), "query")
        device = search_device(query, device)
        score_QC, index_QC = self._candidates(asked_QD, k * max(rescore, 1), device)
        if rescore == 0:
            return score_QC, index_QC
        if self.document is None:
            raise SearchError("there are no full vectors to rescore with", fix="search with rescore 0")
        document = self.document
        return _best_of(asked_QD, index_QC, lambda index: _some(document, index), k, device)

    def _candidates(self, query_QD: FloatArray, count: int, device: torch.device) -> tuple[FloatArray, IndexArray]:
        """The best by the full query and the documents' codes, with scores."""
        if self.ranges is not None:
            low_D, step_D = self.ranges[0], (self.ranges[1] - self.ranges[0]) / 255
            best = TopK(query_QD * step_D, count, device=device)
            best.add_in_blocks(self.code)
            score_QC, index_QC = best.result()
            return score_QC + (query_QD @ (low_D + 128.5 * step_D))[:, None], index_QC  # a code's middle, from -128
        index_QW = self._by_signs(query_QD, count * _WIDE, device)
        scaled_QD = query_QD / np.float32(max(self.width, 1) ** 0.5)
        return _best_of(scaled_QD, index_QW, lambda index: self._signs(self.code[index]), count, device)

    def _by_signs(self, query_QD: FloatArray, count: int, device: torch.device) -> IndexArray:
        """The best by how many signs of both sides agree: bits counted on a CPU, a product of signs on a GPU."""
        counted, bits_QB = counts_bits(device), np.packbits(query_QD > 0, axis=-1)
        rows = _COUNTED if counted else _MULTIPLIED
        best = TopK(self._bits(bits_QB) if counted else Dense(self._signs(bits_QB)), count, device=device)
        for start in range(0, len(self), rows):
            code = self.code[start : start + rows]
            best.add(self._bits(code) if counted else Dense(self._signs(code)))
        return best.result()[1]

    def _bits(self, code: AnyArray) -> Bits:
        return Bits(torch.from_numpy(np.array(code)), width=self.width)

    def _signs(self, code: AnyArray) -> Tensor:
        """-1 and 1."""
        bit_ND = np.unpackbits(code, axis=-1, count=self.width)
        return torch.from_numpy(bit_ND.astype(np.float32) * 2 - 1)


def counts_bits(device: torch.device) -> bool:
    """Whether signs are compared by counting bits: torch has no such kernel, NumPy has one for CPUs."""
    return device.type == "cpu"


def _best_of(
    query_QD: FloatArray, index_QC: IndexArray, read: Callable[[IndexArray], Tensor], k: int, device: torch.device
) -> tuple[FloatArray, IndexArray]:
    """The k best candidates of every query by the vectors that `read` gives, best first; ties go to the lower index."""
    count = index_QC.shape[1]
    index_QC = np.sort(index_QC, axis=1)
    score_QC = np.empty(index_QC.shape, np.float32)
    rows = max(_NUMBERS // max(count * query_QD.shape[1], 1), 1)
    for start in range(0, len(query_QD) if count else 0, rows):
        index_BC = index_QC[start : start + rows]
        vector_BCD = read(index_BC.reshape(-1)).to(device).view(*index_BC.shape, -1)
        asked_BD1 = torch.from_numpy(query_QD[start : start + rows]).to(device)[..., None]
        score_QC[start : start + rows] = torch.bmm(vector_BCD, asked_BD1)[..., 0].cpu().numpy()
    order_Qk = np.argsort(-score_QC, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(score_QC, order_Qk, 1), np.take_along_axis(index_QC, order_Qk, 1)


def _width(vectors: Vectors, name: str) -> int:
    """Errors: `SearchError` for what is not one vector a text."""
    if isinstance(vectors, Representation) and not isinstance(vectors, Dense):
        raise SearchError(f"{name} are {type(vectors).__name__}", expected="dense vectors: only they are quantised")
    check_matrix(vectors, name)
    return int(vectors.vector_ND.shape[1] if isinstance(vectors, Dense) else vectors.shape[1])


def _some(vectors: Vectors, index: IndexArray) -> Tensor:
    """Rows in any order; only they are read from a memory-mapped matrix."""
    if isinstance(vectors, np.ndarray):
        return torch.from_numpy(np.asarray(vectors[index], np.float32))
    tensor = vectors.vector_ND if isinstance(vectors, Dense) else vectors
    assert isinstance(tensor, Tensor)
    return tensor[torch.from_numpy(index).to(tensor.device)].float()


def _finite(vectors: Vectors, start: int, stop: int, name: str = "document") -> FloatArray:
    """Some rows in fp32. Errors: `SearchError` naming the first that is not finite."""
    rep = rows_between(vectors, start, stop)
    assert isinstance(rep, Dense)
    vector_ND: FloatArray = rep.vector_ND.detach().float().cpu().numpy()
    if not np.isfinite(vector_ND.sum(dtype=np.float64)):
        row = int((~np.isfinite(vector_ND)).any(1).argmax())
        raise SearchError(
            f"the vector of {name} {start + row} is not finite", fix="look for NaN or infinite values in the vectors"
        )
    return vector_ND
