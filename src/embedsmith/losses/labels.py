"""Losses over classes: contrast by label, and a softmax head on the embedding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedsmith.core.batch import ABSENT, Batch, Loss, LossOutput, RetrievalBatch
from embedsmith.core.errors import DataError
from embedsmith.core.reps import Dense, in_fp32
from embedsmith.core.settings import Count, Positive, Range, Word
from embedsmith.core.shelf import losses
from embedsmith.core.transfer import to_device
from embedsmith.losses.candidates import in_blocks, masked_logsumexp, own_rows, rows_of


@losses.register(
    "supervised_contrastive",
    formula="mean_i mean_{p: same class} -log( e^{s_ip/t} / sum_{a != i} e^{s_ia/t} )",
    source="Khosla et al. 2020 (2004.11362), the form L_out",
)
@dataclass(frozen=True)
class SupervisedContrastive(Loss):
    """Texts of one class together, texts of other classes apart, over the queries of all ranks.

        L = mean over i of  mean over p with y_p = y_i, p != i  of  -log( e^{s_ip/t} / sum over a != i of e^{s_ia/t} )

    A text that occurs several times counts once; a text without another of its class is no anchor. Contrast between
    texts and documents by label is `infonce` on a batch with labels.

    Batches: retrieval with labels. No anchor: 0, connected. Errors: `DataError` when the batch has no labels.
    """

    batches = (RetrievalBatch,)

    temperature: Positive = 0.1
    head: Word = "dense"
    block_size: Count | None = None

    def __call__(self, batch: Batch) -> LossOutput:
        assert isinstance(batch, RetrievalBatch)
        label_Q = _labels(batch)
        everyone = batch.query.all(self.head)
        id_G, label_G = batch.query_id_G, batch.query.all_ids(label_Q)
        first_G = (rows_of(id_G, id_G) == torch.arange(len(id_G))) & (label_G != ABSENT)
        known, device = (id_G, batch.query_id_Q, label_G, label_Q, first_G), everyone.tensors()[0].device
        id_G, id_Q, label_G, label_Q, first_G = (to_device(one, device) for one in known)
        anchor_Q = first_G[own_rows(batch.query)]

        def block(start: int, score_WQB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            here = slice(start, start + score_WQB.shape[-1])
            other_QB = first_G[here] & (id_G[here] != id_Q[:, None])
            same_QB = other_QB & (label_G[here] == label_Q[:, None])
            logit_WQB = score_WQB / self.temperature
            return masked_logsumexp(logit_WQB, other_QB), (logit_WQB * same_QB).sum(-1), same_QB.sum(-1)

        blocks = in_blocks([(batch.query.local[self.head], everyone, batch.widths)], self.block_size, block)
        lse_XWQ, total_XWQ, count_XQ = (torch.stack(list(column)) for column in zip(*blocks, strict=True))
        count_Q = count_XQ.sum(0)
        value_WQ = lse_XWQ.logsumexp(0) - total_XWQ.sum(0) / count_Q.clamp_min(1)
        return LossOutput(batch.mean_over_rows(value_WQ, anchor_Q & (count_Q > 0)))


@losses.register(
    "classifier",
    formula="mean_i -log softmax(A x_i + b)_{y_i}",
    source="softmax regression on the embedding; CoDiEmb's classifier option",
)
@dataclass(frozen=True)
class Classifier(Loss):
    """A trainable linear layer on the embedding predicts the class of a query's text.

        L = mean over i of -log softmax(A x_i + b)[y_i]

    Under Matryoshka the leading columns of A read the leading coordinates of x. The layer is not part of the embedding.

    classes: how many there are, 2 or more.
    smoothing: share of the target that is spread over all classes, from 0 (the default, none) to below 1.
    name: the name of the layer; sources with different classes need different names.
    head: the dense head that is read.

    Batches: retrieval with labels (a label of -1 is unknown). Errors: `DataError` for a label of `classes` or above,
    or a batch without labels.
    """

    batches = (RetrievalBatch,)

    classes: Annotated[int, Range(ge=2)]
    smoothing: Annotated[float, Range(ge=0, lt=1)] = 0.0
    name: Word = "classifier"
    head: Word = "dense"

    def extras(self, dimension: int) -> Mapping[str, nn.Module]:
        return {self.name: nn.Linear(dimension, self.classes)}

    def __call__(self, batch: Batch) -> LossOutput:
        assert isinstance(batch, RetrievalBatch)
        label_Q = _labels(batch)
        lowest, highest = (int(label_Q.min()), int(label_Q.max())) if len(label_Q) else (ABSENT, ABSENT)
        if not -1 <= lowest <= highest < self.classes:
            raise DataError(
                f"a label of {highest} (lowest {lowest})",
                where=batch.source or "classifier",
                expected=f"classes from 0 to {self.classes - 1}",
            )
        layer, dense = batch.extras[self.name], batch.query.local[self.head]
        assert isinstance(layer, nn.Linear)
        assert isinstance(dense, Dense)
        known_Q = (label_Q != ABSENT) & (batch.query_id_Q != ABSENT)
        class_Q = to_device(label_Q.clamp_min(0), dense.vector_ND.device)

        def at(width: int | None) -> Tensor:
            vector_QD = in_fp32(dense.vector_ND) if width is None else dense.truncate(width).vector_ND
            logit_QC = F.linear(vector_QD, layer.weight[:, :width].to(vector_QD), layer.bias.to(vector_QD))
            return F.cross_entropy(logit_QC, class_Q, reduction="none", label_smoothing=self.smoothing)

        value_WQ = torch.stack([at(width) for width in batch.widths or (None,)])
        return LossOutput(batch.mean_over_rows(value_WQ, known_Q))


def _labels(batch: RetrievalBatch) -> Tensor:
    if batch.label_Q is None:
        raise DataError("no labels in this batch", where=batch.source or None, expected="a class for every query")
    return batch.label_Q
