"""Optimizers of a run: AdamW, AdamW whose state has 8 bits, and Muon for the matrices of the layers.

All of them are one `torch.optim.Optimizer`: its groups carry the rate at their peak (`peak_lr`), and its `state_dict`
is what a checkpoint holds.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from embedsmith.core.errors import MissingExtraError, RecipeError
from embedsmith.train.config import TrainConfig


def make_optimizer(model: nn.Module, extras: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `train.optimizer` names, over all parameters that are trained. Errors: those of
    `parameter_groups`, `adamw8bit` and `MuonAdamW`."""
    if config.optimizer == "muon":
        return MuonAdamW(model, extras, config)
    return (adamw8bit if config.optimizer == "adamw8bit" else adamw)(model, extras, config)


def adamw(model: nn.Module, extras: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019), fused."""
    return torch.optim.AdamW(parameter_groups(model, extras, config), betas=config.betas, fused=True)


def adamw8bit(model: nn.Module, extras: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with both moments in 8 bits, in blocks of 256 numbers (Dettmers et al., 2022): 2 bytes a weight where
    `adamw` has 8. Tensors below 4,096 numbers keep 32 bits. Errors: `MissingExtraError` without bitsandbytes."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "optim") from error
    optimizer: torch.optim.Optimizer = AdamW8bit(parameter_groups(model, extras, config), betas=config.betas)
    return optimizer


Kind = Callable[[str, nn.Parameter], bool]


def parameter_groups(
    model: nn.Module, extras: nn.Module, config: TrainConfig, kind: Kind = lambda name, parameter: False
) -> list[dict[str, Any]]:
    """Parameters that are trained by rate and decay. Vectors (norms, biases, a temperature) are not decayed; a name
    that matches a pattern of `group_learning_rates` gets that rate, the first match wins. Parameters of the losses'
    extras are named `extras.NAME`. What `kind` picks stands in groups of their own, marked as `muon`.

    Errors: `RecipeError` for a pattern that matches nothing.
    """
    named = [*model.named_parameters(), *((f"extras.{name}", p) for name, p in extras.named_parameters())]
    groups: dict[tuple[float, float, bool, bool], list[nn.Parameter]] = {}
    unmatched = set(config.group_learning_rates)
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        rate = config.learning_rate
        for pattern, own_rate in config.group_learning_rates.items():
            if re.search(pattern, name):
                rate = own_rate
                unmatched.discard(pattern)
                break
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        key = (rate, decay, isinstance(parameter, DTensor), kind(name, parameter))
        groups.setdefault(key, []).append(parameter)
    if unmatched:
        raise RecipeError(
            f"train.group_learning_rates: no parameter matches {sorted(unmatched)}", fix="correct the pattern"
        )
    return [
        {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay} | ({"muon": True} if of_kind else {})
        for (rate, decay, _, of_kind), parameters in groups.items()
    ]


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for the matrices of the backbone's layers, AdamW for the rest: embeddings, heads,
    vectors, what a loss brings. Muon's update is scaled to the size of AdamW's (0.2 sqrt(max(rows, columns)), Liu et
    al., 2025), so rates and decay mean the same for both. Its momentum is 0.95, with Nesterov's step.

    Errors: `RecipeError` where no matrix of a layer is trained.
    """

    def __init__(self, model: nn.Module, extras: nn.Module, config: TrainConfig) -> None:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

        def is_hidden(name: str, parameter: nn.Parameter) -> bool:
            return name.startswith("backbone.") and parameter.dim() == 2 and id(parameter) not in tables

        groups = parameter_groups(model, extras, config, is_hidden)
        hidden, others = ([group for group in groups if ("muon" in group) is wanted] for wanted in (True, False))
        if not hidden:
            raise RecipeError(
                "train.optimizer=muon, and no matrix of the backbone's layers is trained",
                fix="set train.optimizer=adamw",
            )
        self._muon = torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(others, betas=config.betas, fused=True) if others else None
        super().__init__([*hidden, *others], {})
        self._share()

    def _share(self) -> None:
        """Both work on the groups and the state of this one, which are new after a load."""
        for inner, wanted in ((self._muon, True), (self._adamw, False)):
            if inner is not None:
                inner.param_groups = [group for group in self.param_groups if ("muon" in group) is wanted]
                inner.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._muon.step()
        if self._adamw is not None:
            self._adamw.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
