"""Self-Positioning: find the merge's direction and length by gradient descent on a small probe set.

    min over (a_1 .. a_M, lambda):  mean over tasks of the task's mean loss at theta_0 + lambda U(a)  +  mu lambda

U(a) is the sequential SLERP of the task vectors with weights a. Source: Model merging for embedding models
(2410.15035). The optimiser's settings are our own: the paper's were not readable. No graph runs through the merge:
with g the ordinary gradient of the loss, d/dc_i = <g, V_i>, and d/da is autograd through a function of M numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from embedsmith.calibrate.live_model import LiveMerge
from embedsmith.calibrate.probe import Drawn, Probe, ProbedMethod, TaskBatches
from embedsmith.core.progress import log, progress_bar
from embedsmith.core.settings import Count, NotNegative, Positive, Range, section
from embedsmith.core.shelf import merge_methods
from embedsmith.merge.method import Base, Combine, Job, combine_coefficients
from embedsmith.merge.methods.formulas import karcher, sequential_slerp


@section
@dataclass(frozen=True)
class Descent:
    """What is searched by gradient descent, and how.

    `mode`: `paper` is the sequential SLERP with the mean of the earlier weights; `karcher` the spherical mean;
    `simplex` sum_i w_i V_i with w = softmax(log a); `free` sum_i c_i V_i, without lambda, mu on sum |c_i|.
    `per_block`: every block has weights of its own, held to the model's by `block_penalty`.
    `mu`: price of length; below 0.05 as a rule.
    `steps`: of the optimiser at most. `batch_size`: examples of each task a step. `optimizer`: Adam or plain descent.
    `learning_rate`: of the weights' logarithms, falling to 0 along a cosine. `length_learning_rate`: of the length,
    alike. `longest`: the bound of the length.
    `block_penalty`: of the mean square distance, in log a, of the blocks' weights from the model's.
    `held_out`: share of the probe the best step is chosen on. `check_every`: steps between two looks at it.
    `patience`: looks without a better one after which it stops.
    `starts`: where to begin: equal weights, or weights on the parent that is best on the held-out part; the best end
    counts. `seed`: of the split and the batches.
    """

    mode: Literal["paper", "karcher", "simplex", "free"] = "paper"
    per_block: bool = False
    mu: NotNegative = 0.01
    steps: Count = 200
    batch_size: Count = 32
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Positive = 1e-2
    length_learning_rate: Positive = 1e-2
    longest: Positive = 3.0
    block_penalty: NotNegative = 0.1
    held_out: Annotated[float, Range(gt=0, lt=1)] = 0.2
    check_every: Count = 25
    patience: Count = 3
    starts: Annotated[tuple[Literal["uniform", "best_parent"], ...], Range(min_length=1)] = ("uniform",)
    seed: int = 0

    def batches(self, live: LiveMerge, probe: Probe) -> TaskBatches:
        """Every task's examples, split in two. Errors: `RecipeError` for a task with too few to split."""
        whole = TaskBatches.whole(live, probe.sources, probe.read(), self.batch_size, self.seed)
        return whole.split(self.held_out)


@merge_methods.register(
    "self_positioning",
    formula="min over a, lambda: mean task loss(theta_0 + lambda U(a)) + mu lambda",
    source="2410.15035; optimiser settings are our own",
)
@dataclass(frozen=True, kw_only=True)
class SelfPositioning(ProbedMethod, Descent):
    """Direction and length of the merge by gradient descent on a small probe set. The job's weights are not used."""

    base: ClassVar[Base] = "needed"

    def prepare(self, job: Job) -> Combine:
        granularity = "block" if self.per_block and job.granularity == "model" else job.granularity
        live = self.live(job, granularity)
        found = Positioning(live, self.batches(live, self.probe), self).descend()
        weights = live.by_parent(found.weights)
        job.report["self_positioning"] = {
            "weights": weights,
            "length": found.length,
            "held_out": found.objective,
            "gap": found.gap,
            "texts": live.texts,
            "trajectory": found.trajectory,
        }
        log.info(
            "self_positioning: weights %s, length %.3f, held-out objective %.4f, %d texts encoded",
            ", ".join(f"{name} {weight:.3f}" for name, weight in weights.items()),
            found.length,
            found.objective,
            live.texts,
        )
        if found.at_bound:
            log.warning("self_positioning: the length ended at its bound: raise mu, or take a probe closer to the use")
        return combine_coefficients(live.coefficients_by_name(found.coefficient_GM, job))


@dataclass
class Position:
    """Where the merge stands: log weights (of the model, and each block's distance from them) and the length."""

    log_weight_M: Tensor
    offset_GM: Tensor
    length: Tensor

    @classmethod
    def start(cls, parents: int, groups: int, heavy: int | None = None) -> Self:
        """Equal weights and length 1; a `heavy` parent counts e^2 times as much as another."""
        log_weight_M = torch.zeros(parents, dtype=torch.float64)
        if heavy is not None:
            log_weight_M[heavy] = 2.0
        return cls(
            log_weight_M.requires_grad_(),
            torch.zeros(groups, parents, dtype=torch.float64).requires_grad_(),
            torch.ones((), dtype=torch.float64).requires_grad_(),
        )

    def coefficients(self, gram_GMM: Tensor, mode: str) -> Tensor:
        """coefficient_GM, length included, differentiable in the position.

        Only the ratios of the weights count, so log weights are centred. In mode `free` they are the coefficients
        themselves, less 1/M.
        """
        if mode == "free":
            return 1 / len(self.log_weight_M) + self.log_weight_M + self.offset_GM
        log_GM = self.log_weight_M - self.log_weight_M.mean() + self.offset_GM
        if mode == "simplex":
            return self.length * torch.softmax(log_GM, dim=-1)
        rows = [
            karcher(gram_MM, log_M.exp())
            if mode == "karcher"
            else sequential_slerp(gram_MM, log_M.exp(), accumulate="mean", on_antipodal="linear")
            for gram_MM, log_M in zip(gram_GMM, log_GM, strict=True)
        ]
        return self.length * torch.stack(rows)

    def price(self, coefficient_GM: Tensor, settings: Descent) -> Tensor:
        """mu lambda, and the price of blocks that leave the model's weights."""
        size = coefficient_GM.abs().sum(-1).mean() if settings.mode == "free" else self.length
        return settings.mu * size + settings.block_penalty * self.offset_GM.square().mean()

    def values(self) -> dict[str, Any]:
        """Plain numbers for the report: the weights sum to 1."""
        weights = torch.softmax(self.log_weight_M.detach(), 0).tolist()
        return {"weights": weights, "length": float(self.length.detach())}

    def copy(self) -> Self:
        return type(self)(
            self.log_weight_M.detach().clone(), self.offset_GM.detach().clone(), self.length.detach().clone()
        )


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
    trajectory: list[dict[str, Any]] = field(repr=False, default_factory=list)


@dataclass(frozen=True)
class Positioning:
    """A descent under way: the live model, the batches it is moved by, and the settings."""

    live: LiveMerge
    batches: TaskBatches
    settings: Descent

    @cached_property
    def gram_GMM(self) -> Tensor:
        return self.live.gram()

    @cached_property
    def held_out(self) -> list[list[Drawn]]:
        return self.batches.held_out_parts()

    def descend(self) -> Positioned:
        """Gradient descent from every start; the end with the lowest held-out objective counts.

        The live model is left at the result. Errors: `TrainingError` when a loss is not finite.
        """
        self.live.model.eval()
        count = self.live.parents, len(self.live.group_names)
        starts = []
        for name in self.settings.starts:
            losses = self.batches.parent_losses() if name == "best_parent" else []
            starts.append(Position.start(*count, heavy=losses.index(min(losses)) if losses else None))
        with progress_bar("position", self.settings.steps * len(self.settings.starts)) as bar:
            ends = [self._descend_from(start, bar.advance) for start in starts]
        best = min(ends, key=lambda end: end.objective)
        self.live.place(best.coefficient_GM)
        return best

    def _descend_from(self, position: Position, advance: Callable[[], None]) -> Positioned:
        settings = self.settings
        directions = [position.log_weight_M, *([position.offset_GM] if settings.per_block else [])]
        groups: list[dict[str, Any]] = [{"params": directions, "lr": settings.learning_rate}]
        if settings.mode != "free":
            groups.append({"params": [position.length], "lr": settings.length_learning_rate})
        optimizer = torch.optim.Adam(groups) if settings.optimizer == "adam" else torch.optim.SGD(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
        trajectory: list[dict[str, Any]] = []
        best, best_objective, stale = position.copy(), float("inf"), 0
        for step in range(settings.steps + 1):
            if step % settings.check_every == 0 or step == settings.steps:
                objective = self._objective(position)
                better = objective < best_objective
                best, best_objective = (position.copy(), objective) if better else (best, best_objective)
                stale = 0 if better else stale + 1
                trajectory.append({"step": step, "held_out": objective, **position.values()})
            if step == settings.steps or stale >= settings.patience:
                break
            loss = self.step(self.batches.at(step), position)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                position.length.clamp_(0.0, settings.longest)
            trajectory.append({"step": step, "loss": loss, **position.values()})
            advance()
        return self._end(best, best_objective, trajectory)

    def step(self, drawn: Sequence[Drawn], position: Position) -> float:
        """Leave the gradient of loss + price in the position's tensors; returns the loss.

        One ordinary forward and backward pass at theta_0 + sum_i c_i V_i gives <g, V_i> for every group; the rest is
        autograd through the M coefficients (proof: tests/calibrate/test_self_positioning.py).
        """
        coefficient_GM = position.coefficients(self.gram_GMM, self.settings.mode)
        self.live.place(coefficient_GM)
        with self.live.projecting() as projection_GM:
            loss = self.batches.backward(drawn)
        for tensor in (position.log_weight_M, position.offset_GM, position.length):
            tensor.grad = None
        total = (coefficient_GM * projection_GM).sum() + position.price(coefficient_GM, self.settings)
        total.backward()
        return loss

    @torch.no_grad()
    def _objective(self, position: Position) -> float:
        coefficient_GM = position.coefficients(self.gram_GMM, self.settings.mode)
        self.live.place(coefficient_GM)
        loss = sum(self.batches.loss(part) for parts in self.held_out for part in parts)
        return loss + float(position.price(coefficient_GM, self.settings))

    def _end(self, best: Position, objective: float, trajectory: list[dict[str, Any]]) -> Positioned:
        coefficient_GM = best.coefficients(self.gram_GMM, self.settings.mode).detach()
        losses = [entry["loss"] for entry in trajectory if "loss" in entry][-self.settings.check_every :]
        values = best.values()
        return Positioned(
            coefficient_GM=coefficient_GM,
            weights=tuple(values["weights"]),
            length=values["length"],
            objective=objective,
            gap=objective - float(best.price(coefficient_GM, self.settings)) - sum(losses) / max(len(losses), 1),
            at_bound=not 0.0 < values["length"] < self.settings.longest,
            trajectory=trajectory,
        )
