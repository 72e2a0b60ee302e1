"""The best k documents of every query: by scoring them all, or by codes that take little memory and the full vectors of
the best of these."""

from collections.abc import Sequence

import numpy as np
import torch

from embedsmith.core.collectives import Group, objects_of_all_ranks
from embedsmith.core.reps import Representation
from embedsmith.search.exact import FloatArray, IndexArray, TopK, Vectors, check_matrix, search_device
from embedsmith.search.quantised import RESCORE, Quantised, SearchPrecision

_QUERIES = 512  # scored together


def exact_top_k(
    query: Vectors,
    document: Vectors,
    k: int,
    *,
    precision: SearchPrecision = "float32",
    rescore: int = RESCORE,
    block: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[FloatArray, IndexArray]:
    """score_Qk and index_Qk of the `min(k, K)` best documents of each query, best first; ties go to the lower index.

    The score is the inner product of dense vectors, or whatever `Representation.scores` says. Documents are read in
    blocks of `block` rows (derived from a budget of 4 MB by default, 512 MB on a GPU), so neither [Q, K] nor a
    memory-mapped matrix is ever held whole. `device`: where scores are computed; by default where the queries lie,
    if that is no CPU, else on a GPU where there is one. There every block is sent once, for all queries.

    `precision`: int8 and binary look for dense documents by codes, held in a quarter and a thirty-second of the memory,
    and score `rescore` times k of them by their full vectors. Codes for more than one search are made once:
    `Quantised.of(document, precision)`.
    Errors: `SearchError` for shapes that do not match, `k` below 1, and scores that are not a number.
    """
    if precision != "float32":
        return Quantised.of(document, precision).top_k(query, k, rescore, device)
    device = search_device(query, device)
    if device.type != "cpu" or isinstance(query, Representation):
        return _searched(query, document, k, block, device)
    in_memory = isinstance(document, np.ndarray | torch.Tensor) and not isinstance(document, np.memmap)
    if not in_memory or len(query) <= _QUERIES:
        return _searched(query, document, k, block, device)
    # Documents in memory may be read again for every part of the queries: what is kept of one part fits the cache.
    check_matrix(query, "the queries")
    starts = range(0, len(query), _QUERIES)
    parts = [_searched(query[start : start + _QUERIES], document, k, block, device, start) for start in starts]
    return np.concatenate([score for score, _ in parts]), np.concatenate([index for _, index in parts])


def merged_top_k(found: Sequence[tuple[FloatArray, IndexArray]], k: int) -> tuple[FloatArray, IndexArray]:
    """score_Qk and index_Qk of the best `k` in the whole corpus, from those of its parts: what one search gives.

    `found`: `score_Qk, index_Qk` of each part, with indices in the whole corpus. Ties go to the lower index.
    """
    if len(found) == 1:
        return found[0]
    score_QX, index_QX = (np.concatenate(column, axis=1) for column in zip(*found, strict=True))
    order_Qk = np.lexsort((index_QX, -score_QX))[:, :k]
    return np.take_along_axis(score_QX, order_Qk, 1), np.take_along_axis(index_QX, order_Qk, 1)


def top_k_of_ranks(mine: tuple[FloatArray, IndexArray], k: int, group: Group = None) -> tuple[FloatArray, IndexArray]:
    """The same of what each rank has found in its share of the corpus. Collective."""
    return merged_top_k(objects_of_all_ranks(mine, group), k)


def _searched(
    query: Vectors, document: Vectors, k: int, block: int | None, device: torch.device, first: int = 0
) -> tuple[FloatArray, IndexArray]:
    best = TopK(query, k, first, device)
    best.add_in_blocks(document, block)
    return best.result()
