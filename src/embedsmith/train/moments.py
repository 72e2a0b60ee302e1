"""The optimizer's state as one whole, wherever its parameters lie: what a checkpoint holds, for any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Any) -> Any:
    """The full tensor of a shard, on the CPU; anything else as it is. Collective for a shard."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with full tensors. Collective where parameters are sharded."""
    state = optimizer.state_dict()
    moments = {key: {name: whole(value) for name, value in entry.items()} for key, entry in state["state"].items()}
    return {**state, "state": moments}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of `optimizer_state`, on any number of ranks."""
    optimizer.load_state_dict(state)
    for parameter, entry in optimizer.state.items():
        if isinstance(parameter, DTensor):
            for name, value in entry.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and not isinstance(value, DTensor):
                    entry[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
