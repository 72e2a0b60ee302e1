"""Scores while training: tasks through the evaluator, and the loss of validation sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from embedsmith.core.batch import Progress
from embedsmith.core.collectives import mean_over_ranks, on_first_rank
from embedsmith.evaluate import evaluate, load_task
from embedsmith.models import Embedder
from embedsmith.train.checkpoint import RunState
from embedsmith.train.config import EvaluateConfig
from embedsmith.train.feed import Feed
from embedsmith.train.step import Encode, Memory, evaluate_parts


@dataclass(frozen=True)
class Development:
    """What `EvaluateConfig` asks for, ready to run at any step."""

    config: EvaluateConfig
    model: Embedder
    encode: Encode
    memory: Memory
    extras: Mapping[str, nn.Module]
    validation: Feed | None

    def due(self, step: int, steps: int) -> bool:
        if not self.config.tasks and self.validation is None:
            return False
        return step == steps or (self.config.every is not None and step % self.config.every == 0)

    def run(self, state: RunState, steps: int) -> tuple[RunState, dict[str, float]]:
        """Score the model as it is. Returns the state with the best score kept up to date, and all scores."""
        self.model.eval()
        values = self._validation_losses(Progress(state.step, steps))
        scores = on_first_rank(self._task_scores)
        self.model.train()
        values |= {f"score/{name}": score for name, score in scores.items()}
        if not scores:
            return state, values
        score = scores[self.config.metric] if self.config.metric else sum(scores.values()) / len(scores)
        if state.best_score is None or score > state.best_score:
            return replace(state, best_score=score, best_step=state.step, evaluations_without_gain=0), values
        return replace(state, evaluations_without_gain=state.evaluations_without_gain + 1), values

    def exhausted(self, state: RunState) -> bool:
        return self.config.patience is not None and state.evaluations_without_gain >= self.config.patience

    def _task_scores(self) -> dict[str, float]:
        """Main scores by the names the recipe uses for the tasks."""
        if not self.config.tasks:
            return {}
        results = evaluate(self.model, [load_task(name, data_dir=self.config.data) for name in self.config.tasks])
        return {name: result.main_score for name, result in zip(self.config.tasks, results, strict=True)}

    def _validation_losses(self, progress: Progress) -> dict[str, float]:
        if self.validation is None:
            return {}
        values: dict[str, list[float]] = {}
        for step in range(self.validation.steps_per_epoch):
            parts = self.validation.parts(step)
            value = mean_over_ranks(evaluate_parts(self.encode, parts, self.memory, self.extras, progress))
            values.setdefault(parts[0].source, []).append(float(value))
        return {f"validation_loss/{source}": sum(each) / len(each) for source, each in values.items()}
