"""Losses of pre-training, masked auto-encoding and next-token prediction: the model computes cross-entropies, these
average them."""

from dataclasses import dataclass
from typing import Literal

import torch

from embedsmith.core.batch import ABSENT, Batch, Loss, LossOutput, RetrievalBatch
from embedsmith.core.collectives import mean_over_ranks
from embedsmith.core.reps import in_fp32
from embedsmith.core.settings import Word
from embedsmith.core.shelf import losses
from embedsmith.core.transfer import to_device
from embedsmith.losses.candidates import own_rows

Texts = Literal["documents", "queries", "both"]


@losses.register(
    "retromae",
    formula="CE of the masked tokens + CE of the decoder's tokens, means over all tokens of the batch",
    source="RetroMAE (2205.12035), enhanced decoding, FlagEmbedding's code; M3-Embedding's first stage",
)
@dataclass(frozen=True)
class RetroMAE(Loss):
    """Masked auto-encoding, with a model that has the head `retromae` (pretrain/retromae.py).

        L = sum CE of masked tokens / their number + sum CE of the decoder's tokens / their number

    over the texts of all ranks. The batch needs no negatives, and pairs serve as texts.

    sides: which texts are learned from: the `documents` (queries are short), the `queries`, or `both`.
    head: the head that computes the cross-entropies.

    Parts: `masked`, `decoded`.

    Batches: retrieval.
    """

    batches = (RetrievalBatch,)

    sides: Texts = "documents"
    head: Word = "retromae"

    def __call__(self, batch: Batch) -> LossOutput:
        sum_4 = _sums(batch, self.sides, self.head)
        count_2 = mean_over_ranks(sum_4[[1, 3]].detach(), batch.group).clamp_min(1e-9)
        masked, decoded = (sum_4[[0, 2]] / count_2).unbind()
        return LossOutput((masked + decoded)[None], {"masked": masked.detach(), "decoded": decoded.detach()})


@losses.register(
    "mntp",
    formula="CE of the hidden tokens at the state before each, mean over all hidden tokens of the batch",
    source="LLM2Vec (2404.05961), masked next-token prediction",
)
@dataclass(frozen=True)
class MNTP(Loss):
    """Masked next-token prediction, with a model that has the head `mntp` (pretrain/mntp.py).

        L = sum CE of hidden tokens / their number

    over the texts of all ranks.

    sides: which texts are learned from: the `documents` (queries are short), the `queries`, or `both`.
    head: the head that computes the cross-entropies.

    Parts: `masked`.

    Batches: retrieval.
    """

    batches = (RetrievalBatch,)

    sides: Texts = "documents"
    head: Word = "mntp"

    def __call__(self, batch: Batch) -> LossOutput:
        total, count = _sums(batch, self.sides, self.head).unbind()
        value = total / mean_over_ranks(count.detach(), batch.group).clamp_min(1e-9)
        return LossOutput(value[None], {"masked": value.detach()})


@losses.register(
    "tsdae",
    formula="CE of each token given those before and the vector of the thinned text, mean over all tokens",
    source="TSDAE (2104.06979)",
)
@dataclass(frozen=True)
class TSDAE(Loss):
    """Denoising auto-encoding, with a model that has the head `tsdae` (pretrain/tsdae.py).

        L = sum CE of the tokens of all texts / their number

    over the texts of all ranks. The batch needs no negatives; rows of a single text (format `texts`) serve.

    sides: which texts are learned from: the `documents`, the `queries`, or `both`.
    head: the head that computes the cross-entropies.

    Parts: `said`.

    Batches: retrieval.
    """

    batches = (RetrievalBatch,)

    sides: Texts = "documents"
    head: Word = "tsdae"

    def __call__(self, batch: Batch) -> LossOutput:
        total, count = _sums(batch, self.sides, self.head).unbind()
        value = total / mean_over_ranks(count.detach(), batch.group).clamp_min(1e-9)
        return LossOutput(value[None], {"said": value.detach()})


def _sums(batch: Batch, sides: Texts, head: str) -> torch.Tensor:
    """The head's numbers, added up over this rank's texts of the sides."""
    assert isinstance(batch, RetrievalBatch)
    own_N = batch.first_of_its_id_K[own_rows(batch.document)]  # a text that several ranks hold counts once
    both = {"queries": (batch.query, batch.query_id_Q != ABSENT), "documents": (batch.document, own_N)}
    rows: list[torch.Tensor] = []
    for name, (side, counts_N) in both.items():
        if sides in (name, "both"):
            sum_N4 = in_fp32(side.local[head].tensors()[0])
            rows.append(sum_N4.masked_fill(~to_device(counts_N, sum_N4.device)[:, None], 0.0))
    return torch.cat(rows).sum(0)
