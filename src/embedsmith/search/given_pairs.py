"""Scores of given pairs, each a row of one side with a row of the other, where both lie, in bounded memory."""

import torch
from torch import Tensor

from embedsmith.core.errors import SearchError
from embedsmith.core.reps import Representation
from embedsmith.core.transfer import to_device
from embedsmith.search.exact import IndexArray

_PAIRS = 2**14  # scored at once on a CPU
_NUMBERS = 2**28  # of both sides and their products, at once on a GPU: 1 GB


def one_to_one(query: Representation, document: Representation, row_E: IndexArray, index_E: IndexArray) -> list[Tensor]:
    """The scores of query `row_E[e]` with document `index_E[e]`, piece after piece of them, on the device of both.
    Where a GPU has no room for a piece, it is scored by halves.

    Errors: `SearchError` for a GPU that has no room for one pair.
    """
    device = query.tensors()[0].device

    def scored(pairs: slice) -> Tensor:
        sides = ((query, row_E), (document, index_E))
        left, right = (side.rows(to_device(place_E[pairs], device)) for side, place_E in sides)
        return left.paired(right)[0]

    size = _PAIRS if device.type == "cpu" else max(_NUMBERS // _numbers_of_pair(query, document), 1)
    waiting = [slice(start, min(start + size, len(row_E))) for start in range(0, len(row_E), size)][::-1]
    found: list[Tensor] = []
    while waiting:
        pairs = waiting.pop()
        try:
            found.append(scored(pairs))
            continue
        except torch.OutOfMemoryError as error:
            if pairs.stop - pairs.start == 1:
                raise SearchError(
                    f"{device} has no memory left to score one pair", fix="free some, or search on the CPU"
                ) from error
        half = (pairs.start + pairs.stop) // 2
        waiting += [slice(half, pairs.stop), slice(pairs.start, half)]
    return found


def _numbers_of_pair(query: Representation, document: Representation) -> int:
    """What a pair takes: both its rows, the scores of its tokens, and of a sparse head a row of all words that queries
    have on either side."""
    rows = sum(tensor[:1].numel() for side in (query, document) for tensor in side.tensors())
    words = sum(tensor.numel() for tensor in query.tensors() if tensor.dtype == torch.int64)
    return max(rows + query.token_count * document.token_count + 2 * words, 1)
