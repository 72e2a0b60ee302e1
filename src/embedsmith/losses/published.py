"""Published retrieval objectives as settings of InfoNCE, under the names people look for."""

from dataclasses import dataclass

from embedsmith.core.batch import Batch, Loss, LossOutput, RetrievalBatch
from embedsmith.core.reps import GUIDE
from embedsmith.core.settings import Count, Finite, NotNegative, Positive, Word
from embedsmith.core.shelf import losses
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
    t = 0.02 are reconstructed.

    symmetric: both directions, as in `infonce`.

    Batches: retrieval. Source: 2408.15710, eq. 1.
    """

    batches = (RetrievalBatch,)

    temperature: Positive = 0.02
    symmetric: bool = False
    head: Word = "dense"
    block_size: Count | None = None

    def __call__(self, batch: Batch) -> LossOutput:
        contrast = InfoNCE(
            self.temperature, self.head, negatives="positives", symmetric=self.symmetric, block_size=self.block_size
        )
        return contrast(batch)


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

    in_batch: whether the second term counts; leave it out for sources that are not retrieval (rows of one class are
        no negatives of each other).

    Parts: `hard`, `in_batch`.

    Batches: retrieval. Source: F2LLM's code. Its gather carries no gradient; this one does.
    """

    batches = (RetrievalBatch,)

    temperature: Positive = 0.05
    in_batch: bool = True
    head: Word = "dense"
    block_size: Count | None = None

    def __call__(self, batch: Batch) -> LossOutput:
        hard = InfoNCE(self.temperature, self.head, negatives="own", block_size=self.block_size)(batch)
        if not self.in_batch:
            return LossOutput(hard.value_W, {"hard": hard.value_W.detach()})
        in_batch = InfoNCE(self.temperature, self.head, negatives="positives", block_size=self.block_size)(batch)
        parts = {"hard": hard.value_W.detach(), "in_batch": in_batch.value_W.detach()}
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

    temperature: the temperature t; the published one is not known, and 0.01 is the default of public fine-tuning code.
    margin: by how much a score may be above that of the positive before it is taken for a false negative.
    hardness_weight: as in `infonce`, on the query's own hard negatives.

    Batches: retrieval. Source: 2506.05176, section 3.
    """

    batches = (RetrievalBatch,)

    temperature: Positive = 0.01
    margin: NotNegative = 0.1
    hardness_weight: NotNegative = 0.0
    head: Word = "dense"
    block_size: Count | None = None

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


@losses.register(
    "gist_embed",
    formula="-log( e^{s(q,p)/t} / Z ), Z over documents, queries and positives that the guide holds for farther than p",
    source="GISTEmbed (2402.16829); sentence-transformers' GISTEmbedLoss and CachedGISTEmbedLoss",
)
@dataclass(frozen=True)
class GISTEmbed(Loss):
    """Contrast in which a guide, a model that is better or at least other, drops what it takes for false negatives.

        Z_i = e^{s(q_i,p_i)/t} + sum_d m e^{s(q_i,d)/t} + sum_j m e^{s(q_i,q_j)/t} + sum_j m e^{s(p_i,p_j)/t}
        L   = mean_i -log( e^{s(q_i,p_i)/t} / Z_i )

    over all documents d of the batch but the positive, all other queries and positives, with m = 0 where the guide's
    cosine of the two is above G(q_i,p_i) - margin. The same as `infonce` with `guide_margin`, `include_qq` and
    `include_dd`; what `infonce` never counts (a text twice, another positive of the query) does not count here either.

    The guide is the source's: `data.N.guide: FOLDER`.

    temperature: the temperature t.
    margin: how far below the positive's the guide's score of a negative must be.
    relative_margin: the same as a share of the positive's score, G(q_i,p_i) - relative_margin |G(q_i,p_i)|, in place
        of `margin`.
    queries: whether other queries are among the negatives.
    positives: whether the positive is told apart from other positives.

    Batches: retrieval with a guide. Errors: `DataError` without one. Source: 2402.16829.
    """

    batches = (RetrievalBatch,)

    temperature: Positive = 0.01
    margin: Finite = 0.0
    relative_margin: NotNegative | None = None
    queries: bool = True
    positives: bool = True
    head: Word = "dense"
    block_size: Count | None = None

    def reads(self) -> frozenset[str]:
        return frozenset({GUIDE})

    def __call__(self, batch: Batch) -> LossOutput:
        return InfoNCE(
            self.temperature,
            self.head,
            guide_margin=self.margin if self.relative_margin is None else None,
            guide_relative_margin=self.relative_margin,
            include_qq=self.queries,
            include_dd=self.positives,
            block_size=self.block_size,
        )(batch)
