"""Published retrieval objectives as settings of InfoNCE, under the names people look for."""

from __future__ import annotations

from dataclasses import dataclass

from embedsmith.core.batch import Batch, RetrievalBatch
from embedsmith.core.loss import Loss, LossOutput
from embedsmith.core.registry import losses
from embedsmith.losses import checks
from embedsmith.losses.retrieval import InfoNCE


@losses.register(
    "conan_weak",
    formula="-log( e^{s(x_i,y_i)/t} / sum_j e^{s(x_i,y_j)/t} ), mean over i",
    source="Conan-embedding (2408.15710), eq. 1; the temperature is reconstructed",
)
@dataclass(frozen=True)
class ConanWeak(Loss):
    """Conan's first stage, on weakly related pairs: in-batch contrast in one direction, no hard negatives.

        L = mean_i -log( e^{s(x_i,y_i)/t} / sum_j e^{s(x_i,y_j)/t} ),   y_j the positives of all rows, all ranks

    The same as `infonce` with `negatives: positives`. The paper prints a sum and no temperature; the mean and
    t = 0.02 are reconstructed. symmetric: both directions. block_size: as in `infonce`.

    Batches: retrieval. Source: 2408.15710, eq. 1.
    """

    batches = (RetrievalBatch,)

    temperature: float = 0.02
    symmetric: bool = False
    head: str = "dense"
    block_size: int | None = None

    def __post_init__(self) -> None:
        checks.above_zero(self, "temperature", "block_size")
        checks.not_empty(self, "head")

    def __call__(self, batch: Batch) -> LossOutput:
        return InfoNCE(
            self.temperature,
            self.head,
            negatives="positives",
            symmetric=self.symmetric,
            block_size=self.block_size,
        )(batch)


@losses.register(
    "f2llm",
    formula="L_hard + L_inbatch: softmax over own hard negatives, plus softmax over all positives",
    source="F2LLM (2510.02294), released code",
)
@dataclass(frozen=True)
class F2LLM(Loss):
    """The split form: one softmax over a query's hard negatives, another over the positives of the batch.

        L_hard    = mean_i -log( e^{s(q_i,p_i)/t} / ( e^{s(q_i,p_i)/t} + sum_k e^{s(q_i,n_ik)/t} ) )
        L_inbatch = mean_i -log( e^{s(q_i,p_i)/t} / sum_j e^{s(q_i,p_j)/t} ),   j over all ranks
        L         = L_hard + L_inbatch

    in_batch: leave the second term out for sources that are not retrieval (same-class rows are no negatives).
    block_size: as in `infonce`. Parts: `hard`, `in_batch`.

    Batches: retrieval. Source: F2LLM's code. Its gather carries no gradient; this one does.
    """

    batches = (RetrievalBatch,)

    temperature: float = 0.05
    in_batch: bool = True
    head: str = "dense"
    block_size: int | None = None

    def __post_init__(self) -> None:
        checks.above_zero(self, "temperature", "block_size")
        checks.not_empty(self, "head")

    def __call__(self, batch: Batch) -> LossOutput:
        hard = InfoNCE(self.temperature, self.head, negatives="own", block_size=self.block_size)(batch)
        if not self.in_batch:
            return LossOutput(hard.value_W, {"hard": hard.value.detach()})
        in_batch = InfoNCE(self.temperature, self.head, negatives="positives", block_size=self.block_size)(batch)
        parts = {"hard": hard.value.detach(), "in_batch": in_batch.value.detach()}
        return LossOutput(hard.value_W + in_batch.value_W, parts)


@losses.register(
    "qwen3",
    formula="-log( e^{s(q,p)/t} / Z ), Z over own hard negatives, other positives, q-q and p-p; margin mask 0.1",
    source="Qwen3-Embedding (2506.05176), section 3; details of the term list reconstructed",
)
@dataclass(frozen=True)
class Qwen3(Loss):
    """Qwen3-Embedding's contrastive loss.

        Z_i = e^{s(q_i,p_i)/t} + sum_k m e^{s(q_i,n_ik)/t} + sum_j m e^{s(q_i,p_j)/t}
                               + sum_j m e^{s(q_i,q_j)/t} + sum_j m e^{s(p_i,p_j)/t},      j != i, all ranks
        L   = mean_i -log( e^{s(q_i,p_i)/t} / Z_i )

    with m = 0 where that similarity is above s(q_i,p_i) + margin, or the documents are the same. The same as `infonce`
    with `negatives: positives_and_own`, `include_qq`, `include_dd` and `margin`.

    temperature: the published one is not known; 0.01 is the default of public fine-tuning code. hardness_weight: as in
    `infonce`, on the own hard negatives. block_size: as in `infonce`.

    Batches: retrieval. Source: 2506.05176, section 3.
    """

    batches = (RetrievalBatch,)

    temperature: float = 0.01
    margin: float = 0.1
    hardness_weight: float = 0.0
    head: str = "dense"
    block_size: int | None = None

    def __post_init__(self) -> None:
        checks.above_zero(self, "temperature", "block_size")
        checks.not_negative(self, "margin", "hardness_weight")
        checks.not_empty(self, "head")

    def __call__(self, batch: Batch) -> LossOutput:
        return InfoNCE(
            self.temperature,
            self.head,
            negatives="positives_and_own",
            margin=self.margin,
            include_qq=True,
            include_dd=True,
            hardness_weight=self.hardness_weight,
            block_size=self.block_size,
        )(batch)
