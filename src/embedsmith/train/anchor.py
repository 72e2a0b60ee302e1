"""What holds a model to its start (`train.anchor`), so that it forgets less: L2-SP on its weights, and on texts without
labels the vectors that it gave them before the first step (learning without forgetting).

The start is read again from the recipe's model, also when a run goes on from a checkpoint; that it is still the same
is checked by its fingerprint. The texts are a lane of the feed (`build.py`), whose part of a step has the start as its
teacher; what stands here is the start itself and the pull on the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from embedsmith.core.collectives import sum_over_ranks
from embedsmith.core.errors import CheckpointError
from embedsmith.models import Model
from embedsmith.train.config import AnchorConfig


@dataclass(frozen=True)
class Anchor:
    """L2-SP (Li et al. 2018, equation 3): alpha/2 |w - w_start|^2 over the weights of the model, beta/2 |w|^2 over
    those that losses brought along. `held`: each weight that is trained with its start (`None` for the latter)."""

    config: AnchorConfig
    fingerprint: str
    held: Sequence[tuple[nn.Parameter, Tensor | None]]

    @staticmethod
    def of(config: AnchorConfig, start: Model, model: Model, extras: nn.Module) -> Anchor:
        """Once the model is spread over the ranks as it will be trained."""
        held: list[tuple[nn.Parameter, Tensor | None]] = []
        if config.l2_sp:
            began = dict(start.named_parameters())
            for name, p in model.named_parameters():
                if p.requires_grad:
                    whole = began[name].detach().to(p.device, p.dtype)
                    if isinstance(p, DTensor):  # in shards where the weight is
                        whole = distribute_tensor(whole, p.device_mesh, p.placements)
                    held.append((p, whole))
        if config.l2_new:
            held += [(p, None) for p in extras.parameters() if p.requires_grad]
        return Anchor(config, start.fingerprint(), held)

    def refuse_other(self, fingerprint: str | None) -> None:
        """Errors: `CheckpointError` where a run began with another model than the one that the recipe names now."""
        if fingerprint not in (None, self.fingerprint):
            raise CheckpointError(
                "train.anchor: the model that the run began with is not what the recipe's model.path holds now",
                fix="put that model back; or start anew in another output",
            )

    @torch.no_grad()
    def pull(self, scale: float) -> Tensor:
        """Add the gradient of the penalty, times `scale`, to those of all ranks; returns the penalty. A weight that no
        loss reads is where it was, and stays without gradient."""
        device = self.held[0][0].device
        of_shards, of_whole = torch.zeros((), device=device), torch.zeros((), device=device)
        for parameter, began in self.held:
            if parameter.grad is None:
                continue
            strength = self.config.l2_new if began is None else self.config.l2_sp
            apart = parameter.detach() if began is None else parameter.detach() - began
            parameter.grad.add_(apart, alpha=strength * scale)
            if isinstance(apart, DTensor):
                of_shards += strength / 2 * apart.to_local().square().sum()
            else:
                of_whole += strength / 2 * apart.square().sum()
        sharded = any(isinstance(parameter, DTensor) for parameter, _ in self.held)
        return of_whole + (sum_over_ranks(of_shards) if sharded else 0.0)
