"""What a loss is: a frozen dataclass from a batch to a `LossOutput`. It never sees a model, a rank or a token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from embedsmith.core.batch import Batch


@dataclass(frozen=True)
class LossOutput:
    """`value_W` to differentiate, one entry a Matryoshka width (one entry without Matryoshka), and detached named
    terms for logs, mining and the report."""

    value_W: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def value(self) -> Tensor:
        """The scalar of a loss outside Matryoshka."""
        return self.value_W.sum()


class Loss(ABC):
    """Base of every objective. Hyper-parameters are the dataclass's fields; wrappers hold other losses."""

    batches: ClassVar[tuple[type[Batch], ...]]
    """The kinds of batch it can read."""

    @abstractmethod
    def __call__(self, batch: Batch) -> LossOutput:
        """The loss of one batch, this rank's share: averaged over ranks it is the loss of the whole batch."""

    def heads(self) -> frozenset[str]:
        """The heads it reads; the model computes no others."""
        return frozenset({getattr(self, "head", "dense")})

    def extras(self, dimension: int) -> Mapping[str, nn.Module]:
        """New trainable modules it needs, by the name under which the batch will hold them."""
        return {}

    def check(self, dimension: int) -> None:
        """Raise `RecipeError` if it cannot work with embeddings of this dimension."""
        return None
