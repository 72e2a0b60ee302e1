"""Self-Positioning: find the merge's direction and length by gradient descent on a small probe set.

    min over (a_1 .. a_M, lambda):  mean over tasks of the task's mean loss at theta_0 + lambda U(a)  +  mu lambda

U(a) is the sequential SLERP of the task vectors with weights a. Source: Model merging for embedding models
(2410.15035). The optimiser's settings are our own: the paper's were not readable. No graph runs through the merge:
with g the ordinary gradient of the loss, d/dc_i = <g, V_i>, and d/da is autograd through a function of M numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from embedsmith.calibrate.live import LiveMerge
from embedsmith.core.batch import Progress
from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import progress_bar
from embedsmith.core.seeds import derive_seed
from embedsmith.core.settings import section
from embedsmith.core.tokens import TokenBatch
from embedsmith.data import RecordSet, Source
from embedsmith.merge.methods.formulas import karcher, sequential_slerp
from embedsmith.train.build import build_extras, derive_memory, make_supply
from embedsmith.train.config import TrainConfig
from embedsmith.train.feed import Supply, make_part
from embedsmith.train.step import Memory, Part, evaluate_parts, run_step

Drawn = tuple[TokenBatch, Part]
Mode = Literal["paper", "karcher", "simplex", "free"]


@section
@dataclass(frozen=True)
class PositioningConfig:
    """What is searched, and how.

    `mode`: `paper` is the sequential SLERP with the mean of the earlier weights; `karcher` the spherical mean;
    `simplex` sum_i w_i V_i with w = softmax(log a); `free` sum_i c_i V_i, without lambda, mu on sum |c_i|.
    `per_block`: weights of each block of their own, held to the model's by `block_penalty` times the mean square of
    their distance in log a. `mu`: price of length; below 0.05 as a rule. `batch_size`: examples of each task a step.
    `held_out`: share of the probe the best step is chosen on, looked at every `check_every` steps; training stops
    after `patience` looks without a better one. `starts`: where to begin: equal weights, or weights on the parent
    that is best on the held-out part; the best end counts.
    """

    mode: Mode = "paper"
    per_block: bool = False
    mu: float = 0.01
    steps: int = 200
    batch_size: int = 32
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 1e-2
    length_learning_rate: float = 1e-2
    longest: float = 3.0
    block_penalty: float = 0.1
    held_out: float = 0.2
    check_every: int = 25
    patience: int = 3
    starts: tuple[Literal["uniform", "best_parent"], ...] = ("uniform",)
    seed: int = 0

    def __post_init__(self) -> None:
        positive = (
            "steps",
            "batch_size",
            "learning_rate",
            "length_learning_rate",
            "longest",
            "check_every",
            "patience",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name} is {getattr(self, name)}", expected="a number above 0")
        if self.mu < 0 or not 0 < self.held_out < 1 or not self.starts:
            raise RecipeError("self_positioning: mu >= 0, 0 < held_out < 1 and at least one start are needed")


@dataclass
class Position:
    """Where the merge stands: log weights (of the model, and each block's distance from them) and the length."""

    log_weight_M: Tensor
    offset_GM: Tensor
    length: Tensor

    @staticmethod
    def start(parents: int, groups: int, log_weight_M: Tensor | None = None) -> Position:
        zero_M = torch.zeros(parents, dtype=torch.float64) if log_weight_M is None else log_weight_M
        return Position(
            zero_M.clone().requires_grad_(),
            torch.zeros(groups, parents, dtype=torch.float64).requires_grad_(),
            torch.ones((), dtype=torch.float64).requires_grad_(),
        )

    def coefficients(self, gram_GMM: Tensor, mode: Mode) -> Tensor:
        """coefficient_GM, length included, differentiable in the position.

        Only the ratios of the weights count, so log weights are centred. In mode `free` they are the coefficients
        themselves, less 1/M.
        """
        if mode == "free":
            return 1 / len(self.log_weight_M) + self.log_weight_M + self.offset_GM
        log_GM = self.log_weight_M - self.log_weight_M.mean() + self.offset_GM
        if mode == "simplex":
            return self.length * torch.softmax(log_GM, dim=-1)
        rows = [_direction(gram_MM, log_M.exp(), mode) for gram_MM, log_M in zip(gram_GMM, log_GM, strict=True)]
        return self.length * torch.stack(rows)

    def price(self, coefficient_GM: Tensor, config: PositioningConfig) -> Tensor:
        """mu lambda, and the price of blocks that leave the model's weights."""
        size = coefficient_GM.abs().sum(-1).mean() if config.mode == "free" else self.length
        return config.mu * size + config.block_penalty * self.offset_GM.square().mean()

    def optimizer(self, config: PositioningConfig) -> torch.optim.Optimizer:
        directions = [self.log_weight_M, *([self.offset_GM] if config.per_block else [])]
        groups: list[dict[str, Any]] = [{"params": directions, "lr": config.learning_rate}]
        if config.mode != "free":
            groups.append({"params": [self.length], "lr": config.length_learning_rate})
        return torch.optim.Adam(groups) if config.optimizer == "adam" else torch.optim.SGD(groups)

    def values(self) -> dict[str, Any]:
        """Plain numbers for the report: the weights sum to 1."""
        weights = torch.softmax(self.log_weight_M.detach(), 0).tolist()
        return {"weights": weights, "length": float(self.length.detach())}

    def copy(self) -> Position:
        return Position(
            self.log_weight_M.detach().clone(), self.offset_GM.detach().clone(), self.length.detach().clone()
        )


def _direction(gram_MM: Tensor, weight_M: Tensor, mode: Mode) -> Tensor:
    if mode == "karcher":
        return karcher(gram_MM, weight_M)
    return sequential_slerp(gram_MM, weight_M, accumulate="mean", on_antipodal="linear")


@dataclass(frozen=True)
class ProbeBatches:
    """Batches of every task: the same for the same step, whoever asks, so that starts and modes are compared on the
    same texts. `train` and `held_out` are row numbers of each supply."""

    live: LiveMerge
    supplies: Sequence[Supply]
    train: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    extras: Mapping[str, nn.Module]
    memory: Memory
    seed: int
    size: int

    @staticmethod
    def of(
        live: LiveMerge, sources: Sequence[Source], sets: Sequence[RecordSet], config: PositioningConfig
    ) -> ProbeBatches:
        """Every sample split in two. Errors: `RecipeError` for a task with too few examples to split."""
        splits = [split_rows(records, config) for records in sets]
        whole = ProbeBatches.whole(live, sources, sets, config.batch_size, config.seed)
        return replace(whole, train=[part for part, _ in splits], held_out=[part for _, part in splits])

    @staticmethod
    def whole(
        live: LiveMerge, sources: Sequence[Source], sets: Sequence[RecordSet], batch_size: int, seed: int
    ) -> ProbeBatches:
        """Nothing kept back: all examples are on both sides."""
        pairs = zip(sources, sets, strict=True)
        supplies = [make_supply(source, records, batch_size, live.model) for source, records in pairs]
        extras = build_extras([supply.loss for supply in supplies], live.model).to(live.model.device)
        rows = [list(range(len(records.records))) for records in sets]
        memory = derive_memory(TrainConfig(), live.model.device)
        return ProbeBatches(live, supplies, rows, rows, dict(extras.items()), memory, seed, batch_size)

    def at(self, step: int) -> list[Drawn]:
        """One part a task, each with an equal share: the mean over tasks of each task's mean loss."""
        return [
            self._part(n, _window(rows, step, s.batch_size or self.size, derive_seed(self.seed, n)), step)
            for n, (s, rows) in enumerate(zip(self.supplies, self.train, strict=True))
        ]

    def held_out_parts(self) -> list[list[Drawn]]:
        """The held-out examples in batches, each task's losses averaged over its batches."""
        parts = []
        for n, (supply, rows) in enumerate(zip(self.supplies, self.held_out, strict=True)):
            size = min(supply.batch_size or self.size, len(rows))
            starts = range(0, len(rows) - size + 1, size)
            parts.append([self._part(n, rows[start : start + size], 0, len(starts)) for start in starts])
        return parts

    def _part(self, task: int, rows: Sequence[int], visit: int, shares: int = 1) -> Drawn:
        tokens, part = make_part(self.live.model, self.supplies[task], rows, self.seed, visit)
        return tokens, replace(part, weight=1 / (len(self.supplies) * shares))

    def loss(self, drawn: Drawn) -> float:
        """The weighted loss of a part at the live model's weights, without gradient."""
        tokens, part = drawn
        return float(evaluate_parts(self.live.encode, tokens, [part], self.memory, self.extras, Progress()))


def split_rows(records: RecordSet, config: PositioningConfig) -> tuple[list[int], list[int]]:
    count = len(records.records)
    held_out = round(config.held_out * count)
    if held_out < 2 or count - held_out < 2:
        raise RecipeError(f"{count} probe examples of {records.name}", expected="enough for two parts", fix="take more")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed("split", config.seed))).tolist()
    return order[held_out:], order[:held_out]


def _window(rows: Sequence[int], step: int, size: int, seed: int) -> list[int]:
    """Rows of one step: shuffled passes over the rows, cut into batches."""
    size = min(size, len(rows))
    a_pass, place = divmod(step, max(len(rows) // size, 1))
    generator = torch.Generator().manual_seed(derive_seed(seed, a_pass))
    order = torch.randperm(len(rows), generator=generator).tolist()
    return [rows[row] for row in order[place * size : (place + 1) * size]]


@dataclass(frozen=True)
class Positioned:
    """`coefficient_GM` of the best step of the best start, its held-out objective, and how it was reached.

    `gap` is held-out less training loss at the end: a large one says the probe is too small. `at_bound`: lambda
    ended at its limit, a red flag. `trajectory`: one entry a step of the best start.
    """

    coefficient_GM: Tensor
    weights: tuple[float, ...]
    length: float
    objective: float
    gap: float
    at_bound: bool
    start: str
    trajectory: list[dict[str, Any]] = field(repr=False, default_factory=list)


Watch = Callable[[dict[str, Any]], None]


def self_position(live: LiveMerge, batches: ProbeBatches, config: PositioningConfig) -> Positioned:
    """Gradient descent from every start; the end with the lowest held-out objective counts.

    `live` is left at the result. Errors: `TrainingError` when a loss is not finite.
    """
    live.model.eval()
    gram_GMM = live.gram()
    held_out = batches.held_out_parts()
    ends = []
    with progress_bar("position", config.steps * len(config.starts)) as bar:
        for name in config.starts:
            position = _start(name, live, batches, held_out)
            ends.append(_descend(live, batches, config, gram_GMM, held_out, position, name, bar.advance))
    best = min(ends, key=lambda end: end.objective)
    live.place(best.coefficient_GM)
    return best


def _start(name: str, live: LiveMerge, batches: ProbeBatches, held_out: list[list[Drawn]]) -> Position:
    groups = len(live.group_names)
    if name == "uniform":
        return Position.start(live.parents, groups)
    losses = []
    for parent in range(live.parents):
        live.place_parent(parent)
        losses.append(_held_out_loss(batches, held_out))
    log_weight_M = torch.zeros(live.parents, dtype=torch.float64)
    log_weight_M[losses.index(min(losses))] = 2.0
    return Position.start(live.parents, groups, log_weight_M)


def _descend(
    live: LiveMerge,
    batches: ProbeBatches,
    config: PositioningConfig,
    gram_GMM: Tensor,
    held_out: list[list[Drawn]],
    position: Position,
    name: str,
    advance: Callable[[], None],
) -> Positioned:
    optimizer = position.optimizer(config)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    trajectory: list[dict[str, Any]] = []
    best, best_objective, stale = position.copy(), float("inf"), 0
    for step in range(config.steps + 1):
        if step % config.check_every == 0 or step == config.steps:
            objective = _objective(live, batches, held_out, position, gram_GMM, config)
            better = objective < best_objective
            best, best_objective = (position.copy(), objective) if better else (best, best_objective)
            stale = 0 if better else stale + 1
            trajectory.append({"step": step, "held_out": objective, **position.values()})
        if step == config.steps or stale >= config.patience:
            break
        loss = position_step(live, batches.at(step), batches, position, gram_GMM, config)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            position.length.clamp_(0.0, config.longest)
        trajectory.append({"step": step, "loss": loss, **position.values()})
        advance()
    return _positioned(best, best_objective, gram_GMM, config, name, trajectory)


def position_step(
    live: LiveMerge,
    drawn: Sequence[Drawn],
    batches: ProbeBatches,
    position: Position,
    gram_GMM: Tensor,
    config: PositioningConfig,
) -> float:
    """Leave the gradient of loss + price in the position's tensors; returns the loss.

    One ordinary forward and backward pass at theta_0 + sum_i c_i V_i gives <g, V_i> for every group; the rest is
    autograd through the M coefficients (proof: tests/merge/test_positioning.py).
    """
    coefficient_GM = position.coefficients(gram_GMM, config.mode)
    live.place(coefficient_GM)
    with live.projecting() as projection_GM:
        tokens, parts = TokenBatch.concatenate([each for each, _ in drawn]), [part for _, part in drawn]
        output = run_step(live.encode, tokens, parts, batches.memory, batches.extras, Progress())
    for tensor in (position.log_weight_M, position.offset_GM, position.length):
        tensor.grad = None
    total = (coefficient_GM * projection_GM).sum() + position.price(coefficient_GM, config)
    total.backward()
    return float(output.value)


def _objective(
    live: LiveMerge,
    batches: ProbeBatches,
    held_out: list[list[Drawn]],
    position: Position,
    gram_GMM: Tensor,
    config: PositioningConfig,
) -> float:
    with torch.no_grad():
        coefficient_GM = position.coefficients(gram_GMM, config.mode)
        live.place(coefficient_GM)
        return _held_out_loss(batches, held_out) + float(position.price(coefficient_GM, config))


def _held_out_loss(batches: ProbeBatches, held_out: list[list[Drawn]]) -> float:
    return sum(batches.loss(part) for parts in held_out for part in parts)


def _positioned(
    best: Position,
    objective: float,
    gram_GMM: Tensor,
    config: PositioningConfig,
    start: str,
    trajectory: list[dict[str, Any]],
) -> Positioned:
    coefficient_GM = best.coefficients(gram_GMM, config.mode).detach()
    losses = [entry["loss"] for entry in trajectory if "loss" in entry][-config.check_every :]
    values = best.values()
    price = float(best.price(coefficient_GM, config))
    return Positioned(
        coefficient_GM=coefficient_GM,
        weights=tuple(values["weights"]),
        length=values["length"],
        objective=objective,
        gap=objective - price - sum(losses) / max(len(losses), 1),
        at_bound=not 0.0 < values["length"] < config.longest,
        start=start,
        trajectory=trajectory,
    )
