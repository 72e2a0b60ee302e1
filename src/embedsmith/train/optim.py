"""Parameter groups and the learning rate. The rate is a pure function of the step: there is no scheduler to prepare,
to step once too often on several ranks, or to checkpoint."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from embedsmith.core.errors import RecipeError
from embedsmith.train.config import TrainConfig


def adamw(model: nn.Module, extras: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW for all parameters that are trained. Vectors (norms, biases, a temperature) are not decayed; a name that
    matches a pattern of `group_learning_rates` gets that rate, the first match wins. Parameters of the losses' extras
    are named `extras.NAME`."""
    named = [*model.named_parameters(), *((f"extras.{name}", p) for name, p in extras.named_parameters())]
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
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
        groups.setdefault((rate, decay, isinstance(parameter, DTensor)), []).append(parameter)
    if unmatched:
        raise RecipeError(
            f"train.group_learning_rates: no parameter matches {sorted(unmatched)}", fix="correct the pattern"
        )
    settings: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay, _), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, betas=config.betas, fused=True)


def learning_rate(config: TrainConfig, step: int, steps: int, peak: float) -> float:
    """Rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then decay to `min_learning_rate`."""
    warm = math.ceil(config.warmup * steps) if config.warmup < 1 else int(config.warmup)
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(steps - warm, 1)
    left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[config.schedule]
    floor = min(config.min_learning_rate, peak)
    return floor + (peak - floor) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, steps: int) -> float:
    """Set every group's rate for this step; returns the main one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step, steps, group["peak_lr"])
    return learning_rate(config, step, steps, config.learning_rate)
