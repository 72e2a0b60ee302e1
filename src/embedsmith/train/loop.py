"""The training loop. Read it top to bottom: build, then for every step draw, encode, differentiate, update, report."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from embedsmith.core.batch import Progress
from embedsmith.core.collectives import (
    average_gradients,
    max_over_ranks,
    on_first_rank,
    rank,
    world_size,
)
from embedsmith.core.progress import log, progress_bar
from embedsmith.core.reps import Reps
from embedsmith.core.seeds import derive_seed, seed_everything
from embedsmith.core.tokens import TokenBatch
from embedsmith.models import Embedder, load
from embedsmith.report.folder import report_run
from embedsmith.report.page import save_environment
from embedsmith.train import parallel as shard
from embedsmith.train.build import (
    RunLength,
    build_extras,
    build_feed,
    derive_memory,
    from_checkpoint,
    make_accelerator,
    run_length,
)
from embedsmith.train.checkpoint import Checkpoints, RunState, claim_output, finish, open_output
from embedsmith.train.config import Recipe
from embedsmith.train.feed import Feed
from embedsmith.train.journal import Journal, Meter, RunManifest, open_manifest
from embedsmith.train.live_negatives import LiveMining, with_live_negatives
from embedsmith.train.optim import make_optimizer, set_learning_rate
from embedsmith.train.parallel import Shards, Zero, check_zero
from embedsmith.train.scoring import Development
from embedsmith.train.step import Memory, Part, StepOutput, run_step


@dataclass
class Run:
    """Everything a step touches."""

    recipe: Recipe
    accelerator: Accelerator
    model: Embedder
    extras: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    feed: Feed
    memory: Memory
    length: RunLength
    state: RunState
    mining: LiveMining
    shards: Shards | None = None

    def encode(self, tokens: TokenBatch, heads: Any) -> Reps:
        """The model's forward pass on a ragged chunk, under autocast."""
        padded = tokens.pad(self.model.pad_id, self.accelerator.device, left=self.model.padding_left)
        with self.accelerator.autocast():
            reps: Reps = self.model(padded, heads)
        return reps

    def parameters(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *self.extras.parameters()]

    def whole_model(self) -> Embedder:
        """The model with all its weights, to be saved by the first rank. Collective."""
        return self.model if self.shards is None else self.shards.gathered(self.model)


def train(recipe: Recipe, *, overwrite: bool = False) -> Path:
    """Train as the recipe says, or continue where a stopped run of the same recipe was; returns the model's folder.

    Errors: `RecipeError`, `DataError`, `ModelError` before the first step; `CheckpointError` for an output folder
    that is finished or not ours, or a full disk; `TrainingError` when a value is not finite. In every case the
    last checkpoint stays whole.
    """
    accelerator = make_accelerator(recipe)
    output = Path(recipe.output)
    resume = on_first_rank(lambda: open_output(output, recipe, overwrite))
    checkpoints = Checkpoints(output, recipe.train.keep_checkpoints)
    run = build(recipe, accelerator, model_folder=None if resume is None else checkpoints.model_folder(resume))
    if resume is not None:
        run.state = checkpoints.load(resume, run.extras, run.optimizer)
        if run.mining.sources:
            run.mining.load_state_dict(checkpoints.load_mining(resume))
        log.info("continuing %s at step %d", output, resume)
    claim_output(output, recipe)
    on_first_rank(lambda: save_environment(output))
    manifest = open_manifest(output, run.feed, run.state.step)
    journal = Journal(output, accelerator, recipe, recipe.train.log_with, run.state.step)
    validation = build_feed(recipe, run.model, recipe.evaluate.validation) if recipe.evaluate.validation else None
    extras, best = dict(run.extras.items()), recipe.train.final == "best"
    development = Development(
        recipe.evaluate, run.model, run.encode, run.memory, extras, validation, output, only_best=best
    )
    try:
        with stop_signals() as stop:
            if before := development.before(run.state):
                journal.write(0, before)
            run_steps(run, checkpoints, manifest, journal, development, stop)
    finally:
        journal.close()
    manifest.save(run.state.step, finished=True)
    final_step = run.state.best_step if recipe.train.final == "best" else None
    model = run.whole_model() if final_step is None else load(str(checkpoints.model_folder(final_step)))
    summary = {"steps": run.state.step, "best_step": run.state.best_step, "best_score": run.state.best_score}
    folder = finish(output, model, summary)
    on_first_rank(lambda: report_run(output, folder))
    return folder


def rehearse(recipe: Recipe) -> str:
    """A dry run: everything is built and one step is taken, nothing is written. Returns what would be done."""
    run = build(recipe, make_accelerator(recipe))
    output, rate, norm = update(run, run.feed.parts(0))
    lines = [f"model: {recipe.model.path}, {sum(p.numel() for p in run.parameters()):,} parameters"]
    for lane in run.feed.lanes:
        lines += [f"source {line}" for line in lane.plan.summary()]
        lines += [f"loss of {supply.records.name}: {supply.loss}" for supply in lane.supplies]
    lines.append(
        f"steps: {run.length.steps} ({run.feed.steps_per_epoch} an epoch), on {world_size()} process(es), "
        f"{run.accelerator.device}, {run.accelerator.mixed_precision}"
    )
    lines.append(f"memory: {run.memory}")
    lines.append(
        f"first step: loss {float(output.value):.4f}, learning rate {rate:.2e}, gradient norm {norm:.3f}, "
        f"{output.tokens} tokens"
    )
    return "\n".join(lines)


def build(recipe: Recipe, accelerator: Accelerator, model_folder: Path | None = None) -> Run:
    """Model, data, plan and optimizer. On resume the model comes from a checkpoint instead of its origin."""
    seed_everything(recipe.train.seed)
    model = load(recipe.model if model_folder is None else from_checkpoint(recipe.model, model_folder))
    model.to(accelerator.device).train()
    shards = None
    if recipe.train.shard == "zero2":
        check_zero()
    elif recipe.train.shard:
        shard.check(recipe)
        shards = Shards(model)
    feed = with_live_negatives(build_feed(recipe, model, recipe.data, recipe.train.balance), recipe.train.mining)
    extras = build_extras([supply.loss for supply in feed.supplies], model).to(accelerator.device)
    named = [*model.named_parameters(), *((f"extras.{name}", p) for name, p in extras.named_parameters())]
    optimizer: torch.optim.Optimizer = (adamw := make_optimizer(named, recipe.train))
    if recipe.train.shard == "zero2":
        optimizer = Zero(nn.ModuleList([model, extras]), adamw, recipe.train.clip_norm)
    # Ranks start from the same weights but draw their own dropout.
    seed_everything(derive_seed(recipe.train.seed, rank()))
    memory = replace(derive_memory(recipe.train, accelerator.device), packed=recipe.model.packing)
    if shards is not None:
        memory = replace(memory, agreed=partial(shard.agreed, device=accelerator.device))
    length = run_length(recipe.train, feed.steps_per_epoch)
    return Run(
        recipe, accelerator, model, extras, optimizer, feed, memory, length, RunState(), LiveMining(feed), shards
    )


def run_steps(
    run: Run,
    checkpoints: Checkpoints,
    manifest: RunManifest,
    journal: Journal,
    development: Development,
    stop: Stop,
) -> None:
    """All steps from the run's state on, with reports, evaluations and checkpoints at their times."""
    config, steps = run.recipe.train, run.length.steps
    if development.exhausted(run.state):  # stopped between its last checkpoint and its end
        return
    meter = Meter()
    run.mining.begin(run.state.step)
    with progress_bar("train", total=steps, done=run.state.step) as bar:
        for parts in run.feed.run_ahead(run.state.step, steps):
            output, rate, norm = update(run, parts)
            refresh(run)
            run.state = replace(run.state, step=run.state.step + 1)
            step = run.state.step
            meter.add(output)
            if step % config.log_every == 0 or step == steps:
                journal.write(step, meter.report(rate, norm, bar) | run.mining.curves())
            bar.advance()
            evaluated = development.due(step, steps)
            if evaluated:
                run.state, scores = development.run(run.state, steps)
                journal.write(step, scores)
            interrupted = stop.agreed(run.accelerator.device)
            if interrupted or evaluated or step == steps or step % run.length.checkpoint_every == 0:
                checkpoints.save(run.whole_model(), run.extras, run.optimizer, run.state, run.mining.state_dict())
                manifest.save(step)
            if interrupted:
                log.warning("stopped after step %d; the same command continues", step)
                raise KeyboardInterrupt
            if development.exhausted(run.state):
                log.info("stopping early: no better score in %d evaluations", run.state.evaluations_without_gain)
                return


def update(run: Run, parts: list[Part]) -> tuple[StepOutput, float, float]:
    """One optimizer step; returns its output, learning rate and gradient norm (before clipping)."""
    config = run.recipe.train
    rate = set_learning_rate(run.optimizer, config, run.state.step, run.length.steps)
    run.optimizer.zero_grad(set_to_none=True)
    run.model.progress = run.state.step / run.length.steps
    with run.optimizer.reducing() if isinstance(run.optimizer, Zero) else nullcontext():
        output = run_step(
            run.encode, parts, run.memory, dict(run.extras.items()), Progress(run.state.step, run.length.steps)
        )
    norm = 0.0 if isinstance(run.optimizer, Zero) else _average_and_clip(run)
    run.optimizer.step()
    return output, rate, run.optimizer.norm if isinstance(run.optimizer, Zero) else norm


def _average_and_clip(run: Run) -> float:
    """Gradients over ranks, and their norm before clipping."""
    parameters = run.parameters()
    average_gradients(p for p in parameters if not isinstance(p, DTensor))  # FSDP2 averages its own
    clip = nn.utils.clip_grad_norm_ if run.shards is None else shard.clip
    return float(clip(parameters, run.recipe.train.clip_norm or float("inf")))


def refresh(run: Run) -> None:
    """Tell live negatives how hard they were in the step just taken."""
    progress = Progress(run.state.step, run.length.steps)
    run.mining.after_step(run.state.step, run.encode, run.memory, dict(run.extras.items()), progress)


class Stop:
    """A request to stop: the first Ctrl-C (or SIGTERM) ends the step and saves, the second ends at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.default_int_handler(signum, frame)
        self.asked = True
        log.warning("stopping after this step and saving; press Ctrl-C again to stop at once")

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop."""
        return bool(max_over_ranks(int(self.asked), device))


@contextmanager
def stop_signals() -> Iterator[Stop]:
    stop = Stop()
    previous = {}
    for name in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[name] = signal.signal(name, stop)
        except ValueError:  # not in the main thread: the caller keeps its own handling
            break
    try:
        yield stop
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
