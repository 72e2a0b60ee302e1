"""CoDiEmb's objective for similarity data: four terms over one batch of labelled pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from embedsmith.core import recipe as checks
from embedsmith.core.batch import ABSENT, Batch, Loss, LossOutput, PairBatch, RetrievalBatch
from embedsmith.core.shelf import losses
from embedsmith.losses.retrieval import InfoNCE
from embedsmith.losses.sts import PRO, Pearson, RankKL


def as_retrieval(batch: PairBatch, threshold: float) -> RetrievalBatch:
    """Pairs read as a retrieval batch: left texts search for the right text of each pair labelled `threshold` or
    more; every right text is a candidate. The same leaves."""
    positive_N = batch.right_id_N.where(batch.label_N >= threshold, ABSENT)
    return RetrievalBatch(
        **batch.shared(),
        query=batch.left,
        document=batch.right,
        query_id_Q=batch.left_id_N,
        positive_id_QP=positive_N[:, None],
        negative_id_QM=batch.left_id_N.new_empty(len(batch.left_id_N), 0),
        document_id_N=batch.right_id_N,
    )


@losses.register(
    "mid_nce",
    formula="mean over y_i >= theta of -log( e^{s(u_i,v_i)/t} / sum_j e^{s(u_i,v_j)/t} )",
    source="CoDiEmb (2508.11442), released code",
)
@dataclass(frozen=True)
class MidNCE(Loss):
    """In-batch contrast over the pairs labelled as alike, by default on the model's middle layer.

        A = { i : y_i >= threshold },   L = 1/|A| sum over A of -log( e^{s(u_i,v_i)/t} / sum_j e^{s(u_i,v_j)/t} )

    One direction, left to right; every right text of the batch is a candidate, whatever its label.

    temperature: t. threshold: labels must be scaled so that "the same" reaches it; floats just below it are left out.
    head: `middle`, or any other. mask_false_negatives: right texts that another pair names as alike to the same left
    text are no negatives (the published code keeps them). cross_device, block_size: as in `cosent` and `infonce`.

    Batches: pairs. No pair reaches the threshold: 0, connected. Source: CoDiEmb's code.
    """

    batches = (PairBatch,)

    temperature: float = 0.02
    threshold: float = 1.0
    head: str = "middle"
    mask_false_negatives: bool = True
    cross_device: bool = True
    block_size: int | None = None

    def __post_init__(self) -> None:
        checks.above_zero(self, "temperature", "block_size")
        checks.finite(self, "threshold")
        checks.not_empty(self, "head")

    def __call__(self, batch: Batch) -> LossOutput:
        assert isinstance(batch, PairBatch)
        contrast = InfoNCE(
            self.temperature,
            self.head,
            mask_false_negatives=self.mask_false_negatives,
            block_size=self.block_size,
        )
        return contrast(as_retrieval(batch if self.cross_device else batch.alone(), self.threshold))


@losses.register(
    "codiemb_sts",
    formula="1 MidNCE + 2 Pearson + 0.5 PRO + 5 RankKL (reference reduction)",
    source="CoDiEmb (2508.11442), released code (the paper leaves the weights open)",
)
@dataclass(frozen=True)
class CoDiEmbSTS(Loss):
    """CoDiEmb's loss for similarity data.

        L = 1 L_MidNCE + 2 L_Pearson + 0.5 L_PRO + 5 L_RankKL

    weights: of the four terms, by name; a term of weight 0 is left out, and with `mid_nce: 0` no middle layer is
    needed. rank_temperature (RankKL and PRO), mid_temperature, threshold, reduction: as in the terms.
    head, middle_head: the representations of the first three terms and of MidNCE.
    cross_device: False is CoDiEmb's own form, each rank's pairs on their own.
    Parts: `mid_nce`, `pearson`, `pro`, `rank_kl`, without their weights.

    Batches: pairs. Errors: `RecipeError` for an unknown or negative weight. Source: CoDiEmb's code and scripts.
    """

    batches = (PairBatch,)

    weights: Mapping[str, float] = field(
        default_factory=lambda: {"mid_nce": 1.0, "pearson": 2.0, "pro": 0.5, "rank_kl": 5.0}
    )
    rank_temperature: float = 0.05
    mid_temperature: float = 0.02
    threshold: float = 1.0
    reduction: Literal["sum", "reference"] = "reference"
    head: str = "dense"
    middle_head: str = "middle"
    cross_device: bool = True

    def __post_init__(self) -> None:
        checks.above_zero(self, "rank_temperature", "mid_temperature")
        checks.finite(self, "threshold")
        checks.one_of(self, "reduction", "sum", "reference")
        checks.not_empty(self, "head", "middle_head", "weights")
        for name, weight in self.weights.items():
            if name not in ("mid_nce", "pearson", "pro", "rank_kl") or not 0 <= weight < float("inf"):
                raise checks.wrong(self, f"weights has {name}: {weight}", "mid_nce, pearson, pro, rank_kl, 0 or more")
        if not any(self.weights.values()):
            raise checks.wrong(self, "every weight is 0", "at least one term")

    def terms(self) -> dict[str, Loss]:
        """The terms that carry a weight."""
        everything: dict[str, Loss] = {
            "mid_nce": MidNCE(self.mid_temperature, self.threshold, self.middle_head, cross_device=self.cross_device),
            "pearson": Pearson(self.head, self.cross_device),
            "pro": PRO(self.rank_temperature, head=self.head, cross_device=self.cross_device),
            "rank_kl": RankKL(self.rank_temperature, self.reduction, self.head, self.cross_device),
        }
        return {name: term for name, term in everything.items() if self.weights.get(name, 0.0) > 0}

    def heads(self) -> frozenset[str]:
        return frozenset().union(*(term.heads() for term in self.terms().values()))

    def __call__(self, batch: Batch) -> LossOutput:
        outputs = {name: term(batch) for name, term in self.terms().items()}
        values: list[Tensor] = [self.weights[name] * output.value_W for name, output in outputs.items()]
        parts = {name: output.value_W[0].detach() for name, output in outputs.items()}
        return LossOutput(sum(values[1:], values[0]), parts)
