"""A loss: the Huber distance of a pair's cosine to its label. In a recipe: `loss: {type: huber, delta: 0.2}`."""

from dataclasses import dataclass

import torch.nn.functional as F

from embedsmith.core.batch import Batch, Loss, LossOutput, PairBatch
from embedsmith.core.settings import Positive
from embedsmith.core.shelf import losses


@losses.register("huber", formula="mean over pairs of huber_delta(s - y)", source="Huber 1964")
@dataclass(frozen=True)
class Huber(Loss):
    """The cosine of a pair should be its label; far misses count linearly.

    delta: the distance from which on they do.
    """

    batches = (PairBatch,)

    delta: Positive = 0.2

    def __call__(self, batch: Batch) -> LossOutput:
        score_WN = batch.scores()
        label_N = batch.label_N.to(score_WN).expand_as(score_WN)
        return LossOutput(batch.mean_over_rows(F.huber_loss(score_WN, label_N, "none", self.delta)))
