"""A card that is played by torch's `meta` device: it computes shapes alone, so a step runs on it as on a GPU, and what
a GPU would be waited for, or could not compute, is noticed."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CARD = torch.device("meta")
_WAITS = {
    *("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select"),
    *("repeat_interleave", "equal", "is_nonzero", "bincount", "item"),
}
"""Operators whose result has a size, or is a number, that the host has to be told."""
_LAUNCH_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach"}
_COPIES = {"_to_copy", "copy_", "set_", "lift_fresh", "detach"}


class PlayedCard(TorchDispatchMode):
    """Keeps what a host would wait for (`waits`) and which operators got tensors of both sides (`mixes`), and counts
    the operators that would launch something (`operations`)."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.mixes: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        here = [one for one in tensors if one.device == CARD]
        there = [one for one in tensors if one.device != CARD and one.dim() > 0]
        to = kwargs.get("device")
        if here:
            self.operations += not (function.is_view or name in _LAUNCH_NOTHING)
            masks = name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])
            if name in _WAITS or masks or (name in _COPIES and to is not None and torch.device(to) != CARD):
                self.waits.append(name)
            elif there and name not in _COPIES:
                self.mixes.append(name)
        if here and name == "_unique2":  # so many at most: a step can go on
            most = args[0].new_empty(args[0].numel())
            return most, torch.empty_like(args[0], dtype=torch.int64), torch.empty_like(most, dtype=torch.int64)
        sent = name == "_to_copy" and not here and to is not None and torch.device(to) == CARD
        if sent and not kwargs.get("non_blocking", False):
            self.waits.append("a copy to the card that is not queued")
        return function(*args, **kwargs)


def as_on_a_card(monkeypatch) -> None:
    """Autocast, which torch has not for `meta`, is off."""
    monkeypatch.setattr(torch, "autocast", lambda *given, **named: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *given: False)
