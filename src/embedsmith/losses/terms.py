"""What may stand in the denominator of a contrastive loss beside the candidates of the batch: other queries, other
positives, and documents of earlier steps. Each is a `Term`: rows against rows, and which of them count."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embedsmith.core.batch import ABSENT, Pair, RetrievalBatch
from embedsmith.core.errors import RecipeError
from embedsmith.core.reps import Dense, in_fp32
from embedsmith.core.transfer import to_device
from embedsmith.losses.candidates import Candidates, Relation, rows_of


@dataclass(frozen=True)
class Term:
    """Each row of the left against all rows of the right, of which `mask(start, size)` says which count in a block.
    `pairs`: left and right as the scored head sees them, then as a guide does, where there is one."""

    pairs: Sequence[Pair]
    mask: Callable[[int, int], Tensor]


def other_queries(batch: RetrievalBatch, heads: Sequence[str], mask_false_negatives: bool) -> Term:
    """Queries against other queries: not the same text, nor (masking false negatives) one with a positive in common.
    All heads but the first are compared at their whole width."""
    id_G, id_GP = batch.query_id_G, batch.positive_id_GP
    place_G, device = torch.arange(len(id_G)), batch.query.local[heads[0]].tensors()[0].device
    counts_G = rows_of(id_G, id_G) == place_G
    excluded = [Relation.between(batch.query_id_Q[:, None], place_G[:, None], id_G)]
    if mask_false_negatives:
        place_E = place_G.repeat_interleave(id_GP.shape[1])
        excluded.append(Relation.between(batch.positive_id_QP, place_E[:, None], id_GP.flatten()))

    def mask(start: int, size: int) -> Tensor:
        counts_B = to_device(counts_G[start : start + size], device)
        mask_QB = counts_B.expand(len(batch.query), size).clone()
        for relation in excluded:
            relation.mark(mask_QB, start, False)
        return mask_QB

    widths = [batch.widths, *[None] * (len(heads) - 1)]
    return Term([(batch.query.local[h], batch.query.all(h), w) for h, w in zip(heads, widths, strict=True)], mask)


def other_positives(pairs: Sequence[Pair], found: Candidates) -> Iterator[Term]:
    """For each slot, its positive against other queries' positives, as several heads see them."""
    for row_Q in to_device(found.positive_row_QP.clamp_min(0), found.device).unbind(1):
        mask = lambda start, size: found.allowed(start, size, "positives")
        yield Term([(document.rows(row_Q), document, widths) for _, document, widths in pairs], mask)


class CrossBatchMemory(nn.Module):
    """Vectors of the documents of earlier steps, newest first: more negatives than a batch has, for the price of their
    scores. They carry no gradient, and are as old as the weights that made them.

    `id_X`: of each text, `ABSENT` where nothing is kept; `key_X`: that of a query (or the class) it was a positive of,
    if any; `source_X`: where it came from, since texts of another source are no negatives by design. All ranks hold the
    same. A checkpoint keeps them with the loss's other extras.

    Source: Wang et al. 2020 (1912.06798), cross-batch memory.
    """

    vector_XD: Tensor
    id_X: Tensor
    key_X: Tensor
    source_X: Tensor

    def __init__(self, size: int, dimension: int) -> None:
        super().__init__()
        self.register_buffer("vector_XD", torch.zeros(size, dimension))
        for name in ("id_X", "key_X", "source_X"):
            self.register_buffer(name, torch.full((size,), ABSENT))

    def term(self, batch: RetrievalBatch, pair: Pair, found: Candidates, mask_false_negatives: bool) -> Term:
        """The query against what is kept of its source: not a text that is among the candidates anyway, nor a positive
        of the query (masking false negatives: of any row or step with the same query or class)."""
        query, _, widths = pair
        if not isinstance(query, Dense):
            raise RecipeError(f"memory of a {type(query).__name__} head", expected="a dense head")
        id_X, key_X, source_X = (one.cpu() for one in (self.id_X, self.key_X, self.source_X))  # a GPU is waited for
        place_X = torch.arange(len(id_X))
        counts_X = (id_X != ABSENT) & (source_X == _number(batch.source))
        counts_X &= rows_of(id_X, id_X) == place_X
        counts_X &= rows_of(id_X, batch.document_id_K) == ABSENT
        key_Q = _keys(batch)
        known = Relation.between(key_Q[:, None], place_X[:, None], key_X)

        def mask(start: int, size: int) -> Tensor:
            counts_B = to_device(counts_X[start : start + size], found.device)
            mask_QB = counts_B.expand(len(query), size).clone()
            if mask_false_negatives:
                known.mark(mask_QB, start, False)
            return mask_QB

        kept = Dense(self.vector_XD.to(in_fp32(query.vector_ND).dtype))
        return Term([(query, kept, widths)], mask)

    @torch.no_grad()
    def add(self, batch: RetrievalBatch, head: str) -> None:
        """Keep the documents of a batch, those of all ranks, each once. In the order of their ids: which of them go
        when there are too many does not depend on the number of ranks."""
        document = batch.document.all(head)
        assert isinstance(document, Dense)
        vector_KD, id_K = in_fp32(document.vector_ND.detach()), batch.document_id_K
        key_G = batch.query.all_ids(_keys(batch))
        row_GP = rows_of(batch.positive_id_GP, id_K)
        asked_GP = row_GP != ABSENT
        largest = torch.iinfo(id_K.dtype).max
        key_K = torch.full_like(id_K, largest)
        key_K.scatter_reduce_(0, row_GP[asked_GP], key_G[:, None].expand_as(row_GP)[asked_GP], reduce="amin")
        key_K = key_K.masked_fill(key_K == largest, ABSENT)
        row_E = (batch.first_of_its_id_K & torch.isfinite(vector_KD).all(1).cpu()).nonzero()[:, 0]
        row_E = row_E[torch.argsort(id_K[row_E])]
        source_E = torch.full_like(row_E, _number(batch.source))
        size = len(self.id_X)
        for kept, new in (
            (self.vector_XD, vector_KD[to_device(row_E, vector_KD.device)].to(self.vector_XD.dtype)),
            (self.id_X, id_K[row_E]),
            (self.key_X, key_K[row_E]),
            (self.source_X, source_E),
        ):
            kept.copy_(torch.cat([to_device(new, kept.device), kept])[:size])


def without_memory(extras: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    """Extras for a batch that looks at itself alone: one seen from its documents, or one that is only measured."""
    return {name: module for name, module in extras.items() if not isinstance(module, CrossBatchMemory)}


def _keys(batch: RetrievalBatch) -> Tensor:
    """What queries with positives in common share: their class where the batch has classes, else their text."""
    return batch.query_id_Q if batch.label_Q is None else batch.label_Q


def _number(source: str) -> int:
    return zlib.crc32(source.encode())
