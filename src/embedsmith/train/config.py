"""The recipe of a training run. These dataclasses are the only schema; what can be computed defaults to None."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from embedsmith.core.errors import RecipeError
from embedsmith.core.settings import section
from embedsmith.data import PlanConfig, Source
from embedsmith.mining.config import LiveNegatives
from embedsmith.models import ModelConfig


@section
@dataclass(frozen=True)
class Balance:
    """Conan's cross-GPU balance: every step has a retrieval part and a similarity part, which move the model together
    with loss L_retrieval + beta L_similarity (Conan-embedding, section 3.3).

    `balanced`: every rank computes both parts. With `spread_negatives` all ranks have the same queries and each
    another slice of their negatives (the paper's figure); without, each has its own queries with all their negatives,
    which gives the same loss and encodes less. `split`: the last `sts_ranks` ranks do the similarity part, the others
    the retrieval part.
    """

    mode: Literal["balanced", "split"] = "balanced"
    beta: float = 0.8
    spread_negatives: bool = False
    sts_ranks: int = 1

    def __post_init__(self) -> None:
        if self.beta < 0 or self.sts_ranks < 1:
            raise RecipeError(f"beta {self.beta}, sts_ranks {self.sts_ranks}", expected="beta >= 0, sts_ranks >= 1")
        if self.mode == "split" and self.spread_negatives:
            raise RecipeError("spread_negatives belongs to the balanced mode", fix="remove one of the two")


@section
@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    `steps` or `epochs` (one epoch by default) say how long; `batch_size` is per optimizer step, all ranks together,
    and the pool of in-batch negatives. `plan` says which rows meet in a batch. `micro_batch` (texts) and
    `token_budget` (padded tokens) only bound memory: they change neither the negatives nor the gradient. `mining`
    replaces hard negatives while the model trains. `group_learning_rates` maps a regular expression on parameter names
    to a learning rate of its own. `warmup` is a share of the run below 1, or a number of steps.
    `shard` spreads the backbone's weights and optimizer state over the ranks (FSDP2); `zero2` the optimizer's state and
    gradients alone (DeepSpeed, extra `deepspeed`).
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 64
    learning_rate: float = 2e-5
    group_learning_rates: dict[str, float] = field(default_factory=dict)
    min_learning_rate: float = 0.0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    shard: bool | Literal["zero2"] = False
    balance: Balance | None = None
    mining: LiveNegatives | None = None
    plan: PlanConfig = PlanConfig()
    micro_batch: int | None = None
    token_budget: int | None = None
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    final: Literal["last", "best"] = "last"
    log_with: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        positive = ("steps", "epochs", "batch_size", "learning_rate", "micro_batch", "token_budget", "log_every")
        for name in (*positive, "checkpoint_every", "keep_checkpoints", "clip_norm"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RecipeError(f"{name} is {value}", expected="a number above 0")
        if self.steps is not None and self.epochs is not None:
            raise RecipeError("steps and epochs are both set", fix="keep one of them")
        if self.micro_batch is not None and self.token_budget is not None:
            raise RecipeError("micro_batch and token_budget are both set", fix="keep one of them")
        if self.warmup < 0 or self.weight_decay < 0 or self.min_learning_rate < 0:
            raise RecipeError("warmup, weight_decay and min_learning_rate cannot be negative")
        if self.balance is not None and (self.plan.batches == "mixed" or self.plan.schedule != "proportional"):
            raise RecipeError(
                "train.balance has both tasks in every step: a schedule or mixed batches mean nothing beside it",
                fix="remove train.balance, or plan.batches and plan.schedule",
            )

    @property
    def rows_a_step(self) -> int | None:
        """Rows of a step of a source that does not say; `None` where they follow from the rows' lengths."""
        return None if self.plan.batch_tokens is not None or self.plan.batch_sizes is not None else self.batch_size


@section
@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure while training.

    `tasks`: names or paths for `embedsmith evaluate`, looked up in `data`; `every`: steps between evaluations (`None`:
    only at the end). `metric`: the task whose main score chooses the best checkpoint (`None`: the mean over tasks).
    `validation`: sources whose loss is reported without training on them. `patience`: evaluations without a better
    score after which training stops early. `before`: score the model before the first step too, so that the report can
    tell what training changed. `geometry`: texts of the first task whose geometry is logged at every evaluation.
    `heads`: outputs beside `dense` that are scored too, logged as `score/TASK/HEAD`. `dims`: widths of the vectors that
    are scored too (Matryoshka), logged as `score/TASK/WIDTH`.
    """

    tasks: tuple[str, ...] = ()
    data: str | None = None
    every: int | None = None
    metric: str | None = None
    validation: tuple[Source, ...] = ()
    patience: int | None = None
    before: bool = True
    geometry: int | None = None
    heads: tuple[Literal["sparse", "multivector", "hybrid"], ...] = ()
    dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.dims):
            raise RecipeError(f"dims are {list(self.dims)}", expected="numbers from 1, such as [64, 128, 256]")
        for name in ("every", "patience", "geometry"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RecipeError(f"{name} is {value}", expected="a number above 0")
        if self.geometry is not None and not self.tasks:
            raise RecipeError("geometry needs texts to look at", fix="set evaluate.tasks")
        if self.patience is not None and not (self.tasks and self.every):
            raise RecipeError("patience needs a score to watch", fix="set evaluate.tasks and evaluate.every")
        if self.metric is not None and self.metric not in self.tasks:
            raise RecipeError(f"metric {self.metric!r} is not one of evaluate.tasks", expected=", ".join(self.tasks))


@section
@dataclass(frozen=True)
class Recipe:
    """Everything a training run depends on."""

    model: ModelConfig
    data: tuple[Source, ...]
    output: str
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __post_init__(self) -> None:
        if not self.data:
            raise RecipeError("data: at least one source is needed")
        if self.train.final == "best" and not self.evaluate.tasks:
            raise RecipeError("train.final=best needs a score", fix="set evaluate.tasks, or train.final=last")
