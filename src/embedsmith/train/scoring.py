"""Scores while training: tasks through the evaluator, and the loss of validation sources."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from embedsmith.core.collectives import mean_over_ranks, on_first_rank, rank
from embedsmith.core.errors import EvaluationError
from embedsmith.core.files import atomic_file
from embedsmith.core.progress import log
from embedsmith.core.tokens import TokenBatch
from embedsmith.evaluate import Results, Task, evaluate
from embedsmith.evaluate.model_geometry import Geometry, Sample
from embedsmith.evaluate.rerank import Rerank
from embedsmith.evaluate.variants import FULL, score_widths
from embedsmith.models import CrossEncoder, Embedder, Model, load
from embedsmith.search.hybrid import HybridEncoder
from embedsmith.train.checkpoint import RunState
from embedsmith.train.config import EvaluateConfig
from embedsmith.train.feed import Feed
from embedsmith.train.step import Part


@dataclass(frozen=True)
class Development:
    """What `EvaluateConfig` asks for, ready to run at any step. Results with their items go to `output/evaluation/`.
    `loss`: of some parts, by the model as it is. `probes`: those of the tasks that tell what is forgotten."""

    config: EvaluateConfig
    tasks: Sequence[Task]
    model: Model
    loss: Callable[[TokenBatch, Sequence[Part]], Tensor]
    validation: Feed | None
    output: Path
    only_best: bool = False
    probes: Sequence[Task] = ()

    @cached_property
    def sample(self) -> Sample | None:
        count = self.config.geometry
        return None if count is None else Sample.of(self.tasks[0], count)

    @cached_property
    def embedder(self) -> Embedder | None:
        """Whose rankings a reranker puts into order."""
        return None if self.config.embedder is None else load(self.config.embedder).requires_grad_(False)

    @cached_property
    def rerank(self) -> Rerank:
        """The reranker as it is now, with the rankings, which are computed once."""
        assert isinstance(self.model, CrossEncoder)
        return Rerank(self.model, self.config.depth)

    def before(self, state: RunState) -> dict[str, float]:
        """Score the model before the first step; empty on a resume, and where it is not wanted."""
        if state.step > 0 or not self.config.tasks or not self.config.before:
            return {}
        scores = self._scores("before", improved=lambda score: True)
        if self.embedder is not None:
            alone = evaluate(self.embedder, self.tasks, group=None, about={"when": "embedder"})
            scores |= {f"score/{task}/embedder": score for task, score in alone.main_scores().items()}
        return scores

    def run(self, state: RunState) -> tuple[RunState, dict[str, float]]:
        """Score the model as it is. Returns the state with the best score kept up to date, and all scores. The results
        that are kept are the last ones, or with `only_best` those of the best checkpoint. A score that is not finite is
        never the best."""
        best = state.best_score
        better: Callable[[float], bool] = lambda score: math.isfinite(score) and (best is None or score > best)
        losses: dict[str, list[float]] = {}
        self.model.eval()
        draws = [] if self.validation is None else map(self.validation.draw, range(self.validation.steps_per_epoch))
        for tokens, parts in draws:
            try:
                losses.setdefault(parts[0].source, []).append(float(mean_over_ranks(self.loss(tokens, parts))))
            except torch.OutOfMemoryError as error:
                raise EvaluationError(
                    f"out of memory ({str(error).splitlines()[0]})",
                    where=f"validation source {parts[0].source}",
                    fix="lower batch_size of the source (evaluate.validation), or train.token_budget",
                ) from error
        self.model.train()
        values = {f"validation_loss/{source}": sum(each) / len(each) for source, each in losses.items()}
        if not self.config.tasks:
            return state, values
        scores = self._scores("after", better if self.only_best else lambda score: True)
        score = self._overall(scores)
        if better(score):
            state = replace(state, best_score=score, best_step=state.step, evaluations_without_gain=0)
        else:
            state = replace(state, evaluations_without_gain=state.evaluations_without_gain + 1)
        return state, values | scores | on_first_rank(lambda: self._forgetting(scores))

    def _forgetting(self, scores: Mapping[str, float]) -> dict[str, float]:
        """How far each probe lies below its score before the first step, which was saved then."""
        if not self.probes:
            return {}
        try:
            before = Results.load(self.output / "evaluation" / "before.json").main_scores()
        except EvaluationError as error:
            log.warning("nothing is said of forgetting: %s", error)
            return {}
        names = [probe.name for probe in self.probes if probe.name in before]
        return {f"forgetting/{name}": before[name] - scores[f"score/{name}"] for name in names}

    def _scores(self, name: str, improved: Callable[[float], bool]) -> dict[str, float]:
        """Main scores by the names of the tasks, also at every width and of every further head that the recipe names,
        and the geometry that is logged. Collective."""
        self.model.eval()
        about = {"when": name}
        if isinstance(self.model, CrossEncoder):
            columns = {FULL: evaluate(self.embedder, self.tasks, rerank=self.rerank, group=None, about=about)}
        elif self.config.dims:
            columns = dict(score_widths(self.model, self.tasks, self.config.dims, about=about, group=None).columns)
        else:
            columns = {FULL: evaluate(self.model, self.tasks, group=None, about=about)}
        results = columns.pop(FULL)
        geometry = {}
        if isinstance(self.model, Embedder):
            geometry = {} if (sample := self.sample) is None else on_first_rank(partial(sample.logged, self.model))
            for head in self.config.heads:
                encoder = HybridEncoder(self.model) if head == "hybrid" else self.model
                columns[head] = evaluate(encoder, self.tasks, head=head, group=None, about=about)
        values = {f"score/{task}": score for task, score in results.main_scores().items()}
        values |= {f"geometry/{key}": value for key, value in geometry.items()}
        for column, each in columns.items():
            values |= {f"score/{task}/{column}": score for task, score in each.main_scores().items()}
        if rank() == 0 and improved(self._overall(values)):
            self._save(name, results)
        self.model.train()
        return values

    def _save(self, name: str, results: Results) -> None:
        """What the report reads. The whole geometry is measured here: it costs a few hundred texts."""
        folder = self.output / "evaluation"
        results.save(folder / f"{name}.json", items=True)
        if isinstance(self.model, CrossEncoder):
            return
        try:
            geometry = Geometry.of(self.model, self.sample or Sample.of(self.tasks[0], 300))
        except EvaluationError as error:  # a handful of texts, or a task of one's own: the run goes on without
            log.warning("no geometry: %s", error)
            return
        with atomic_file(folder / f"geometry-{name}.json") as file:
            json.dump(geometry.as_dict(), file, allow_nan=False)

    def _overall(self, scores: Mapping[str, float]) -> float:
        """What chooses the best checkpoint: the main score of `metric`, or the mean over tasks."""
        values = [scores[f"score/{task.name}"] for task in self.tasks]
        metric = self.config.metric
        return sum(values) / len(values) if metric is None else values[self.config.tasks.index(metric)]


_watch: ContextVar[Callable[[Path], None] | None] = ContextVar("watch", default=None)


@contextmanager
def watched(watch: Callable[[Path], None]) -> Iterator[None]:
    """Within the block every run tells `watch` its folder after each evaluation but the last one, when the scores are
    in metrics.jsonl and the checkpoint is saved. An error that it raises ends the run."""
    before = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(before)


def tell_watch(output: Path) -> None:
    """Tell whoever watches that the run in a folder has new scores."""
    if (watch := _watch.get()) is not None:
        watch(output)
