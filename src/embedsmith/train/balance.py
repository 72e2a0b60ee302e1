"""How the tasks of one step move the model together (`train.balance`).

Without it a step has one batch of one source. With it a step has a batch of every task. Conan's balance is a fixed
weight and a layout over the ranks. Every other rule gives each task's gradient a factor a step:

    g = sum over tasks k of c_k g_k

and all that it needs to find them is the inner products of the gradients, G_jk = g_j . g_k, over all that is trained,
and the losses. So a rule is a function of a small matrix and a short vector: the gradients themselves, the ranks and
the shards are the business of `by_task.py`. What a rule remembers from step to step (`State`) goes into checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from embedsmith.core.errors import RecipeError, TrainingError
from embedsmith.core.settings import Count, NotNegative, Positive, did_you_mean, name_of
from embedsmith.core.shelf import balances

State = Mapping[str, Tensor]
"""What a rule remembers: tensors by name, in float64 on the CPU, the same on every rank."""

Told = Literal["task", "source"]
"""What counts as one task: all sources of a task together, or every source for itself."""


@balances.register("conan", formula="L_retrieval + beta L_similarity", source="Conan-embedding (2408.15710), 3.3")
@dataclass(frozen=True)
class ConanBalance:
    """Conan's cross-GPU balance: every step has a retrieval part and a similarity part, which move the model together
    with loss L_retrieval + beta L_similarity (Conan-embedding, section 3.3).

    - `mode`: `balanced`, every rank computes both parts; `split`, the last `sts_ranks` ranks do the similarity part
      and the others the retrieval part.
    - `beta`: the weight of the similarity part beside the retrieval part.
    - `spread_negatives`: all ranks have the same queries and each another slice of their negatives (the paper's
      figure). Without it each has its own queries with all their negatives, which gives the same loss and encodes
      less. For the balanced mode.
    - `sts_ranks`: how many ranks do the similarity part in the mode `split`.
    """

    mode: Literal["balanced", "split"] = "balanced"
    beta: NotNegative = 0.8
    spread_negatives: bool = False
    sts_ranks: Count = 1

    def __post_init__(self) -> None:
        if self.mode == "split" and self.spread_negatives:
            raise RecipeError("spread_negatives belongs to the balanced mode", fix="remove one of the two")


@dataclass(frozen=True)
class TaskRule(ABC):
    """A batch of every task in each step, and a factor for the gradient of each.

    by: what counts as one task: `task`, all sources of a task, which take turns; or `source`, every source for itself.
    """

    by: Told = "task"

    def begin(self, names: Sequence[str]) -> State:
        """What it remembers before the first step, of tasks of these names."""
        return {}

    @abstractmethod
    def __call__(self, gram_KK: Tensor, loss_K: Tensor, state: State, seed: int) -> tuple[Tensor, State]:
        """factor_K of this step, and what to remember. `gram_KK`: inner products of the tasks' gradients; `loss_K`:
        their losses; `seed`: of this step, for what is drawn. Float64 on the CPU."""


@balances.register("fixed", formula="g = sum_k w_k g_k", source="-")
@dataclass(frozen=True)
class Fixed(TaskRule):
    """Weights that stay as they are: what the other rules are to be compared with.

    weights: a weight by the name of the task (or source); 1 for those that are not named.

    Errors: `RecipeError` for a name that no task has.
    """

    weights: dict[str, NotNegative] = field(default_factory=dict)

    def begin(self, names: Sequence[str]) -> State:
        for name in self.weights:
            if name not in names:
                raise RecipeError(
                    f"train.balance.weights: no {self.by} is called {name!r}{did_you_mean(name, names)}",
                    expected=", ".join(names),
                )
        return {"weight_K": torch.tensor([self.weights.get(name, 1.0) for name in names], dtype=torch.float64)}

    def __call__(self, gram_KK: Tensor, loss_K: Tensor, state: State, seed: int) -> tuple[Tensor, State]:
        return state["weight_K"], state


@balances.register(
    "pcgrad",
    formula="g = sum_i g_i', where g_i' -= (g_i' . g_j) / |g_j|^2 g_j for every j with g_i' . g_j < 0",
    source="Yu et al. 2020 (2001.06782), algorithm 1",
)
@dataclass(frozen=True)
class PCGrad(TaskRule):
    """Projecting conflicting gradients: each task's gradient loses what points against another task's.

        g_i' = g_i;   for every other task j in an order drawn anew, where g_i' . g_j < 0:
        g_i' -= (g_i' . g_j) / |g_j|^2 g_j;        g = sum_i g_i'

    The others' gradients are the original ones, as in the paper. Without conflict it is the plain sum.
    """

    def __call__(self, gram_KK: Tensor, loss_K: Tensor, state: State, seed: int) -> tuple[Tensor, State]:
        chance, tasks = np.random.default_rng(seed), len(gram_KK)
        share_KK = torch.eye(tasks, dtype=gram_KK.dtype)  # row i: of what g_i' is made
        for one in range(tasks):
            for other in chance.permutation(tasks):
                inner = share_KK[one] @ gram_KK[:, other]
                if other != one and inner < 0:
                    share_KK[one, other] -= inner / gram_KK[other, other]
        return share_KK.sum(0), state


@balances.register(
    "uncertainty",
    formula="L = sum_k e^{-s_k} L_k + s_k / 2, the log-variances s_k learned",
    source="Kendall et al. 2018 (1705.07115), equation 10 with s = log sigma^2",
)
@dataclass(frozen=True)
class Uncertainty(TaskRule):
    """Weights from learned uncertainties: a task of large loss counts less.

        L = sum_k L_k / sigma_k^2 + log sigma_k = sum_k e^{-s_k} L_k + s_k / 2,    s_k = log sigma_k^2, 0 at the start

    Every s_k goes down its own gradient, 1/2 - e^{-s_k} L_k, at a rate of its own and without momentum: the rate of the
    weights of a model would hardly move it. It comes to rest where e^{-s_k} = 1 / (2 L_k). (For a Gaussian likelihood
    the paper halves L_k, which is another constant in s_k.)

    rate: the learning rate of the log-variances.

    Errors: `TrainingError` for a loss below 0, whose weight would grow without end.
    """

    rate: Positive = 0.01

    def begin(self, names: Sequence[str]) -> State:
        return {"log_variance_K": torch.zeros(len(names), dtype=torch.float64)}

    def __call__(self, gram_KK: Tensor, loss_K: Tensor, state: State, seed: int) -> tuple[Tensor, State]:
        _refuse_negative(loss_K, self)
        log_variance_K = state["log_variance_K"]
        factor_K = torch.exp(-log_variance_K)
        return factor_K, {"log_variance_K": log_variance_K - self.rate * (0.5 - factor_K * loss_K)}


@balances.register(
    "gradnorm",
    formula="w_k goes down sum_k | w_k |g_k| - mean(w |g|) r_k^alpha |,  r_k = (L_k / L_k(0)) / mean(L / L(0))",
    source="Chen et al. 2018 (1711.02257), algorithm 1; norms over all that is trained",
)
@dataclass(frozen=True)
class GradNorm(TaskRule):
    """Weights under which all tasks pull alike, and those that learned less so far a little more.

        F(w) = sum_k | w_k |g_k| - m r_k^alpha |,   m = mean_k w_k |g_k|,   r_k = (L_k / L_k(0)) / mean_j (L_j / L_j(0))
        w_k -= rate / m  dF/dw_k    (m r_k^alpha held fixed),   then all w are scaled to a sum of K

    A step uses the weights from before its update, as in the paper. Other than there the norms are those of the whole
    gradient, not of the last shared layer alone, and the update is divided by m, so that `rate` does not depend on the
    scale of the losses. No weight falls below 0.01. L_k(0) is the first loss above 0.

    alpha: how strongly tasks that lag behind are helped; with 0 all norms become equal.
    rate: the learning rate of the weights.

    Errors: `TrainingError` for a loss below 0, whose progress has no ratio.
    """

    alpha: NotNegative = 1.5
    rate: Positive = 0.025

    def begin(self, names: Sequence[str]) -> State:
        zero_K = torch.zeros(len(names), dtype=torch.float64)
        return {"weight_K": zero_K + 1, "first_loss_K": zero_K}

    def __call__(self, gram_KK: Tensor, loss_K: Tensor, state: State, seed: int) -> tuple[Tensor, State]:
        _refuse_negative(loss_K, self)
        weight_K, before_K = state["weight_K"], state["first_loss_K"]
        first_K = torch.where(before_K > 0, before_K, loss_K)
        progress_K = torch.where(first_K > 0, loss_K / first_K.clamp_min(1e-300), 1.0)
        rate_K = progress_K / progress_K.mean().clamp_min(1e-300)
        norm_K = gram_KK.diagonal().clamp_min(0).sqrt()
        pull_K = weight_K * norm_K
        mean = pull_K.mean()
        if mean <= 0:  # no task says anything in this step
            return weight_K, {"weight_K": weight_K, "first_loss_K": first_K}
        slope_K = torch.sign(pull_K - mean * rate_K**self.alpha) * norm_K
        moved_K = (weight_K - self.rate / mean * slope_K).clamp_min(0.01)
        return weight_K, {"weight_K": moved_K * len(moved_K) / moved_K.sum(), "first_loss_K": first_K}


def _refuse_negative(loss_K: Tensor, rule: TaskRule) -> None:
    if (loss_K < 0).any():
        raise TrainingError(
            f"train.balance={name_of(rule)} with a loss below 0 ({float(loss_K.min()):.4g})",
            fix="take pcgrad or fixed, which read no losses",
        )


@dataclass(frozen=True)
class _ConanUnlessNamed:
    """Annotates `train.balance`: settings without a `type` are Conan's, as in recipes from before there were others."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        def named(value: Any) -> Any:
            return {"type": "conan", **value} if isinstance(value, Mapping) and "type" not in value else value

        return core_schema.no_info_before_validator_function(named, handler(source))


Balance = Annotated[ConanBalance | TaskRule, balances, _ConanUnlessNamed()]
"""A rule, or in a recipe its name or mapping."""
