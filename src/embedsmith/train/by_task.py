"""A step task by task: the gradient of each task for itself, what they say about each other, and their sum by a rule.

Batches are of one source. So gradients of several tasks meet in one of two ways:

- under a rule of `train.balance` (or wherever a step has several parts) the parts of a step are differentiated one
  after the other, each by `run_step`, whose gradient is averaged over the ranks and laid aside. All are gradients at
  the same weights; the rule's factors make one of them.
- else a step has one source, and its gradient is compared with those of the steps before it, of other sources
  (`ConflictMeter`): weights move little from step to step.

Inner products of gradients are taken weight by weight and added up by groups of layers. With weights in shards
(FSDP2) each rank has those of its shards, which are then summed over the ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from embedsmith.core.collectives import agreed_by_hosts, mean_over_ranks, sum_over_ranks
from embedsmith.core.errors import RecipeError
from embedsmith.models import Model
from embedsmith.models.self_test import layers_of
from embedsmith.train.balance import State, TaskRule, Told
from embedsmith.train.config import ConflictConfig, TrainConfig
from embedsmith.train.feed import Draw, Feed
from embedsmith.train.step import Health, Part, StepOutput

Gradients = Sequence[Tensor | None]
"""One for each weight that is trained, in their order; none where a task does not read the weight."""

_BANDS = 3
"""Groups into which the layers of a transformer are put."""


class Remembered(nn.Module):
    """What a rule remembers, as buffers: so it is in a checkpoint, and no optimizer touches it."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for name, tensor in state.items():
            self.register_buffer(name, tensor.clone())

    def get(self) -> State:
        return {name: tensor.cpu() for name, tensor in self.named_buffers()}

    def set(self, state: State) -> None:
        for name, buffer in self.named_buffers():
            buffer.copy_(state[name])


@dataclass(frozen=True)
class GroupedWeights:
    """The weights that are trained, and which of them make a group of layers: the embeddings (all of the backbone that
    is in no layer), up to three bands of layers, and the heads with what losses bring."""

    parameters: Sequence[nn.Parameter]
    groups: Mapping[str, Sequence[int]]

    @staticmethod
    def of(model: Model, extras: nn.Module) -> GroupedWeights:
        parameters = [p for part in (model, extras) for p in part.parameters() if p.requires_grad]
        layers, named = layers_of(model.backbone), dict[int, str]()
        for parameter in model.backbone.parameters():
            named[id(parameter)] = "embeddings"
        for band in np.array_split(np.arange(len(layers)), min(_BANDS, max(len(layers), 1))):
            name = f"layers {band[0]}-{band[-1]}" if len(band) > 1 else f"layer {band[0]}" if len(band) else ""
            named |= {id(p): name for layer in band for p in layers[layer].parameters()}
        groups: dict[str, list[int]] = {name: [] for name in dict.fromkeys(named.values())}
        for place, parameter in enumerate(parameters):
            groups.setdefault(named.get(id(parameter), "heads"), []).append(place)
        return GroupedWeights(parameters, {name: places for name, places in groups.items() if places})

    def take(self) -> list[Tensor | None]:
        """The gradients as they are now, which the weights then no longer have."""
        taken = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return taken

    def give(self, factors: Sequence[float], gradients: Sequence[Gradients]) -> None:
        """The sum of gradients, each times its factor, as the gradient of the weights. Uses up the first of each."""
        for parameter, *column in zip(self.parameters, *gradients, strict=True):
            terms = [(factor, each) for factor, each in zip(factors, column, strict=True) if each is not None]
            if not terms:
                continue
            total = terms[0][1] if terms[0][0] == 1 else terms[0][1].mul_(terms[0][0])
            for factor, each in terms[1:]:
                total.add_(each, alpha=factor)
            parameter.grad = total

    def inner_products(self, gradients: Sequence[Gradients]) -> Tensor:
        """gram_PKK: of every weight the inner products of the tasks' gradients, in float64 on the CPU. Collective."""
        count, device = len(gradients), self.parameters[0].device
        gram_PKK = torch.zeros(len(self.parameters), count, count, device=device)
        for place, column in enumerate(zip(*gradients, strict=True)):
            flat = [None if each is None else _local(each).flatten() for each in column]
            for j, left in enumerate(flat):
                for k, right in enumerate(flat[: j + 1]):
                    if left is not None and right is not None:
                        gram_PKK[place, j, k] = gram_PKK[place, k, j] = torch.dot(left, right)
        is_shard_P = torch.tensor([isinstance(p, DTensor) for p in self.parameters], device=device)
        if is_shard_P.any():
            gram_PKK = torch.where(is_shard_P[:, None, None], sum_over_ranks(gram_PKK), gram_PKK)
        return gram_PKK.cpu().double()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass
class ConflictMeter:
    """`train.conflict`: cosines between the gradients of the tasks, and how much of the weights they disagree on.

    Numbers, by pairs of tasks `A~B`: `cosine/A~B` over all weights and `cosine/A~B/GROUP` in a group of layers,
    `conflict_share/A~B`, the share of the weights' tensors in which the cosine is below 0, and `conflict_time`, the
    share of the run's time that measuring took so far.

    A pair of one task, `A~A`, are two batches of it: how alike the gradients of one task are, beside which the others
    are to be read. `held`: gradients of the tasks since the measurement began, of steps of one source.
    """

    config: ConflictConfig
    weights: GroupedWeights
    names: Sequence[str]
    held: dict[str, Gradients] = field(default_factory=dict)
    seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter)
    values: dict[str, float] = field(default_factory=dict)
    _open: bool = False

    def due(self, step: int) -> bool:
        """Whether to measure at this step. Collective where it is time to: all ranks or none."""
        if step % self.config.every:
            return False
        spent = self.seconds / max(time.perf_counter() - self.began, 1e-9)
        return not agreed_by_hosts(int(spent > self.config.share))

    def of_all(self, step: int, names: Sequence[str], gradients: Sequence[Gradients], gram_PKK: Tensor | None) -> None:
        """Of a step with several tasks: measure, if it is time to. `gram_PKK`: inner products that are known."""
        if self.due(step):
            with self._timed():
                self._measure(names, gradients, gram_PKK)

    def of_one(self, step: int, name: str, now: Gradients) -> None:
        """Of a step of one task. A measurement ends when every task was seen, or when the next one begins."""
        if step % self.config.every == 0:
            self.held.clear()
            self._open = self.due(step)
        if not self._open:
            return
        with self._timed():
            for other, theirs in self.held.items():
                self._measure((other, name), (theirs, now))
            if name not in self.held:
                self.held[name] = [None if each is None else each.clone() for each in now]
            if len(self.held) == len(self.names):
                self.held.clear()
                self._open = False

    def taken(self) -> dict[str, float]:
        """What was measured since the last call."""
        values, self.values = self.values, {}
        return values | ({"conflict_time": self.seconds / (time.perf_counter() - self.began)} if values else {})

    def _measure(self, names: Sequence[str], gradients: Sequence[Gradients], gram_PKK: Tensor | None = None) -> None:
        gram_PKK = self.weights.inner_products(gradients) if gram_PKK is None else gram_PKK
        groups = {"": range(len(gram_PKK)), **{f"/{name}": places for name, places in self.weights.groups.items()}}
        for first, second in ((j, k) for k in range(len(names)) for j in range(k)):
            pair = "~".join(sorted((names[first], names[second])))
            for group, places in groups.items():
                if (cosine := _cosine(gram_PKK[list(places)].sum(0), first, second)) is not None:
                    self.values[f"cosine/{pair}{group}"] = cosine
            of_weights = [_cosine(gram_KK, first, second) for gram_KK in gram_PKK]
            known = [cosine for cosine in of_weights if cosine is not None]
            if known:
                self.values[f"conflict_share/{pair}"] = sum(cosine < 0 for cosine in known) / len(known)

    def _timed(self) -> _Timed:
        return _Timed(self)


@dataclass
class _Timed:
    """Counts the time of a measurement, without what the device had still to do before it."""

    meter: ConflictMeter
    start: float = 0.0

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def __enter__(self) -> None:
        self.start = self._now()

    def __exit__(self, *error: object) -> None:
        self.meter.seconds += self._now() - self.start


def _cosine(gram_KK: Tensor, first: int, second: int) -> float | None:
    """`None` where a task has no gradient there."""
    square = float(gram_KK[first, first] * gram_KK[second, second])
    return float(gram_KK[first, second]) / square**0.5 if square > 0 else None


@dataclass
class ByTask:
    """What of a run goes task by task. `names`: of all tasks; of a step with several parts, in their order. `separate`:
    whether the parts of a step are differentiated one after the other."""

    names: Sequence[str]
    by: Told
    weights: GroupedWeights
    separate: bool
    rule: TaskRule | None = None
    remembered: Remembered | None = None
    meter: ConflictMeter | None = None

    @staticmethod
    def of(feed: Feed, model: Model, extras: nn.ModuleDict, config: TrainConfig) -> ByTask:
        """What a rule remembers goes into `extras`. Errors: those of the rule for the names of the tasks; `RecipeError`
        for a comparison of one task with none."""
        rule, conflict = config.balance if isinstance(config.balance, TaskRule) else None, config.conflict
        by = rule.by if rule is not None else (conflict and conflict.by) or "source"
        lanes = [lane for lane in feed.lanes if not lane.holds]
        names = dict.fromkeys(supply.named(by) for lane in lanes for supply in lane.supplies)
        remembered = None if rule is None else Remembered(rule.begin(list(names)))
        if remembered is not None:
            extras["balance"] = remembered
        weights = GroupedWeights.of(model, extras)
        meter = None if conflict is None else ConflictMeter(conflict, weights, list(names))
        if conflict is not None and len(names) < 2:
            raise RecipeError(
                f"train.conflict compares {by}s, and here is one: {next(iter(names))}",
                where="data",
                fix="remove train.conflict" + ("" if by == "source" else ", or set train.conflict.by=source"),
            )
        apart = len(feed.lanes) > 1 or config.anchor is not None  # else a step's gradient is that of one task
        separate = rule is not None or (conflict is not None and apart)
        return ByTask(list(names), by, weights, separate, rule, remembered, meter)

    @property
    def kept(self) -> int:
        """How many gradients may lie aside at once."""
        return len(self.names) if self.separate or self.meter is not None else 0

    def step(
        self,
        each: Callable[[Draw], StepOutput],
        average: Callable[[], None],
        draw: Draw,
        step: int,
        seed: int,
        scale: float,
    ) -> StepOutput:
        """The gradient of a step, part by part, averaged over the ranks. `each`: adds the gradient of a draw to the
        weights; `average`: averages it; `scale`: what the losses are multiplied by."""
        outputs: list[StepOutput] = []
        gradients: list[list[Tensor | None]] = []
        for one in _parts_of(draw):
            outputs.append(each(one))
            average()
            gradients.append(self.weights.take())
        tasks = [place for place, part in enumerate(draw[1]) if not part.holds]
        of_tasks, gram_PKK = [gradients[place] for place in tasks], None
        factors = [1.0] * len(outputs)
        if self.rule is not None and self.remembered is not None:
            gram_PKK = self.weights.inner_products(of_tasks)
            loss_K = mean_over_ranks(torch.stack([outputs[place].value for place in tasks])).cpu().double()
            gram_KK = gram_PKK.sum(0) / scale**2
            if bool(torch.isfinite(gram_KK).all() and torch.isfinite(loss_K).all()):  # else the step is left out
                factor_K, state = self.rule(gram_KK, loss_K, self.remembered.get(), seed)
                self.remembered.set(state)
                for place, factor in zip(tasks, factor_K.tolist(), strict=True):
                    factors[place] = factor
            for place in tasks:
                outputs[place].parts[draw[1][place].source]["weight"] = torch.tensor(factors[place])
        if self.meter is not None and len(tasks) > 1:
            names = [self._name(draw[1][place]) for place in tasks]
            self.meter.of_all(step, names, of_tasks, gram_PKK)
        elif self.meter is not None:
            self.meter.of_one(step, self._name(draw[1][tasks[0]]), of_tasks[0])
        self.weights.give(factors, gradients)
        return joined_outputs(outputs)

    def after_step(self, step: int, draw: Draw) -> None:
        """Of a step whose parts were not told apart, and whose gradient the weights still have."""
        if self.meter is not None and not self.separate:
            self.meter.of_one(step, self._name(draw[1][0]), [each.grad for each in self.weights.parameters])

    def _name(self, part: Part) -> str:
        return part.source if self.by == "source" else part.task


def _parts_of(draw: Draw) -> Iterator[Draw]:
    """Each part of a step, with its texts."""
    tokens, parts = draw
    start = 0
    for part in parts:
        stop = start + sum(part.ids.sizes)
        yield tokens.take(np.arange(start, stop)), [part]
        start = stop


def joined_outputs(outputs: Sequence[StepOutput]) -> StepOutput:
    """The output of a step whose parts were differentiated one after the other."""
    health, healths = None, [output.health for output in outputs if output.health is not None]
    if healths:
        fault_KF = torch.stack([each.fault_F for each in healths])
        fault_F = torch.cat([fault_KF[:, :2].amax(0), fault_KF[:, 2:].sum(0)])
        health = Health(fault_F, "; ".join(each.where for each in healths))
    return StepOutput(
        torch.stack([output.value for output in outputs]).sum(),
        {source: named for output in outputs for source, named in output.parts.items()},
        sum(output.tokens for output in outputs),
        sum(output.padded_tokens for output in outputs),
        sum(output.replayed_chunks for output in outputs),
        health,
        averaged=True,
    )
