"""CoDiEmb's objective for similarity data: four terms over one batch of labelled pairs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from torch import Tensor

from embedsmith.core.batch import ABSENT, Batch, Loss, LossOutput, PairBatch, RetrievalBatch
from embedsmith.core.errors import RecipeError
from embedsmith.core.settings import Count, Finite, NotNegative, Positive, Range, Word, name_of
from embedsmith.core.shelf import losses
from embedsmith.losses.retrieval import InfoNCE
from embedsmith.losses.sts import PRO, Pearson, RankKL

TermName = Literal["mid_nce", "pearson", "pro", "rank_kl"]


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

    threshold: the label from which on a pair counts as alike. Labels must be scaled so that "the same" reaches it;
        numbers just below it are left out.
    head: the representation that is scored, by default that of the model's `middle` layer.
    mask_false_negatives: whether right texts that another pair names as alike to the same left text are no negatives
        (the published code keeps them).

    Batches: pairs. No pair reaches the threshold: 0, connected. Source: CoDiEmb's code.
    """

    batches = (PairBatch,)

    temperature: Positive = 0.02
    threshold: Finite = 1.0
    head: Word = "middle"
    mask_false_negatives: bool = True
    cross_device: bool = True
    block_size: Count | None = None

    def __call__(self, batch: Batch) -> LossOutput:
        assert isinstance(batch, PairBatch)
        batch = batch if self.cross_device else batch.alone()
        positive_N = batch.right_id_N.where(batch.label_N >= self.threshold, ABSENT)
        contrast = InfoNCE(
            self.temperature, self.head, mask_false_negatives=self.mask_false_negatives, block_size=self.block_size
        )
        return contrast(
            RetrievalBatch(
                **batch.shared(),
                query=batch.left,
                document=batch.right,
                query_id_Q=batch.left_id_N,
                positive_id_QP=positive_N[:, None],
                negative_id_QM=batch.left_id_N.new_empty(len(batch.left_id_N), 0),
                document_id_N=batch.right_id_N,
            )
        )


@losses.register(
    "codiemb_sts",
    formula="1 MidNCE + 2 Pearson + 0.5 PRO + 5 RankKL (reference reduction)",
    source="CoDiEmb (2508.11442), released code (the paper leaves the weights open)",
)
@dataclass(frozen=True)
class CoDiEmbSTS(Loss):
    """CoDiEmb's loss for similarity data.

        L = 1 L_MidNCE + 2 L_Pearson + 0.5 L_PRO + 5 L_RankKL

    weights: weights of the four terms, by name; a term of weight 0, or without one, is left out, and without
        `mid_nce` no middle layer is needed. The published weights where it is not given.
    rank_temperature: the temperature of RankKL and PRO.
    mid_temperature: the temperature of MidNCE.
    threshold: the label from which on a pair is alike for MidNCE.
    reduction: how RankKL is summed: `sum`, or divided by the number of pairs as in the published code (`reference`).
    head: the representation that Pearson, PRO and RankKL score.
    middle_head: the representation that MidNCE scores.
    cross_device: over the pairs of all ranks, or `false`, CoDiEmb's own form, each rank's pairs on their own.

    Parts: `mid_nce`, `pearson`, `pro`, `rank_kl`, without their weights.

    Batches: pairs. Errors: `RecipeError` for an unknown or negative weight. Source: CoDiEmb's code and scripts.
    """

    batches = (PairBatch,)

    weights: Annotated[Mapping[TermName, NotNegative], Range(min_length=1)] = field(
        default_factory=lambda: {"mid_nce": 1.0, "pearson": 2.0, "pro": 0.5, "rank_kl": 5.0}
    )
    rank_temperature: Positive = 0.05
    mid_temperature: Positive = 0.02
    threshold: Finite = 1.0
    reduction: Literal["sum", "reference"] = "reference"
    head: Word = "dense"
    middle_head: Word = "middle"
    cross_device: bool = True

    def __post_init__(self) -> None:
        if not any(self.weights.values()):
            raise RecipeError("every weight is 0", where=name_of(self), expected="at least one term")

    def terms(self) -> dict[TermName, Loss]:
        """The terms that carry a weight."""
        everything: dict[TermName, Loss] = {
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
        parts: dict[str, Tensor] = {name: output.value_W.detach() for name, output in outputs.items()}
        return LossOutput(sum(values[1:], values[0]), parts)
