"""The training loop. Read it top to bottom: build, then for every step draw, encode, differentiate and update; and once
in a while mine negatives, log, evaluate, save a checkpoint, stop."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from embedsmith.core.batch import Progress
from embedsmith.core.collectives import lost_ranks, max_over_ranks, on_first_rank, rank, refuse_different, world_size
from embedsmith.core.errors import ModelError, TrainingError
from embedsmith.core.outputs import check_claim, claimed
from embedsmith.core.progress import log, progress_bar
from embedsmith.core.reps import Reps
from embedsmith.core.seeds import derive_seed, seed_everything
from embedsmith.core.settings import to_plain
from embedsmith.core.tokens import IntArray, TokenBatch
from embedsmith.models import Embedder, load
from embedsmith.models.lora import has_adapter
from embedsmith.report.page import save_environment
from embedsmith.report.run_folder import report_run
from embedsmith.train.build import build_extras, build_feed, derive_memory, make_accelerator
from embedsmith.train.checkpoint import Checkpoints, RunState, base_of, flat
from embedsmith.train.config import Recipe
from embedsmith.train.engine import Engine, check_shard, make_engine, set_learning_rate
from embedsmith.train.feed import Draw, Feed
from embedsmith.train.journal import Journal, Meter, RunManifest
from embedsmith.train.live_negatives import LiveMining, with_live_negatives
from embedsmith.train.outcome import Trained
from embedsmith.train.scoring import Development, load_tasks
from embedsmith.train.step import Memory, Part, StepOutput, evaluate_parts, run_step

_PLACE = re.compile(r"model\.(path|base)|(data|evaluate\.validation)\.\d+\.(path|cache)")
"""Keys that say where something lies, which machines may see elsewhere; what lies there is compared by content."""


@dataclass
class Run:
    """Everything a step touches. `steps`: of the whole run."""

    recipe: Recipe
    accelerator: Accelerator
    model: Embedder
    extras: nn.ModuleDict
    engine: Engine
    feed: Feed
    memory: Memory
    steps: int
    state: RunState
    mining: LiveMining | None

    def encode(self, tokens: TokenBatch, heads: Any, rows: IntArray | None = None) -> Reps:
        """The model's forward pass on some rows of a ragged batch, under autocast."""
        padded = tokens.pad(self.model.pad_id, self.accelerator.device, left=self.model.padding_left, rows=rows)
        with self.accelerator.autocast():
            reps: Reps = self.model(padded, heads)
        return reps

    def loss(self, tokens: TokenBatch, parts: Sequence[Part]) -> Tensor:
        """The loss of some parts by the model as it is, without gradient."""
        progress = Progress(self.state.step, self.steps)
        return evaluate_parts(self.encode, tokens, parts, self.memory, dict(self.extras.items()), progress)

    @property
    def out_of_patience(self) -> bool:
        """Whether so many evaluations brought no better score that the run ends early."""
        patience = self.recipe.evaluate.patience
        return patience is not None and self.state.evaluations_without_gain >= patience


@lost_ranks()
def train(recipe: Recipe, *, overwrite: bool = False) -> Path:
    """Train as the recipe says, or continue where a stopped run of the same recipe was; returns the model's folder. A
    run that is finished is left as it is.

    Errors: `RecipeError`, `DataError`, `ModelError` before the first step; `CheckpointError` for an output folder
    that is not ours or that another process writes to, or a full disk; `TrainingError` when a value is not finite. In
    every case the last checkpoint stays whole.
    """
    accelerator = make_accelerator(recipe)
    settings = {key: value for key, value in flat(to_plain(recipe)).items() if not _PLACE.fullmatch(key)}
    refuse_different(settings, fix="start every process with the same recipe and overrides")
    with ExitStack() as claim:
        on_first_rank(lambda: claim.enter_context(claimed(recipe.output, "train")))
        return _train(recipe, accelerator, overwrite)


def _train(recipe: Recipe, accelerator: Accelerator, overwrite: bool) -> Path:
    output = Path(recipe.output)
    checkpoints = Checkpoints(output, recipe.train.keep_checkpoints)
    if not overwrite and on_first_rank(lambda: checkpoints.finished(recipe)):
        log.info("%s: finished before; --overwrite trains it again", output)
        if not (output / "report.html").exists():
            on_first_rank(lambda: report_run(output, output / "model"))
        return output / "model"
    resume = on_first_rank(lambda: checkpoints.open(recipe, overwrite))
    tasks = load_tasks(recipe.evaluate)
    run = build(recipe, accelerator, model_folder=None if resume is None else checkpoints.model_folder(resume))
    if resume is not None:
        run.state = checkpoints.load(resume, run.extras, run.engine.optimizer)
        if run.mining is not None:
            run.mining.load_state_dict(checkpoints.load_mining(resume))
        log.info("continuing %s at step %d", output, resume)
    checkpoints.claim(recipe)
    on_first_rank(lambda: save_environment(output))
    if has_adapter(run.model.backbone):
        log.info(
            "%s/model will hold whole weights with the adapter in them; should their precision change the vectors, the "
            "adapter alone, to be loaded with its base %s",
            output,
            base_of(run.model),
        )
    manifest = RunManifest.open(output, run.feed, run.state.step)
    journal = Journal(output, accelerator, recipe, recipe.train.log_with, run.state.step)
    validation = build_feed(recipe, run.model, recipe.evaluate.validation) if recipe.evaluate.validation else None
    best = recipe.train.final == "best"
    development = Development(recipe.evaluate, tasks, run.model, run.loss, validation, output, only_best=best)
    try:
        with Stop() as stop:
            if before := development.before(run.state):
                journal.write(0, before)
            run_steps(run, checkpoints, manifest, journal, development, stop)
    except (TrainingError, ModelError) as error:
        fix = error.fix or checkpoints.way_back()
        raise type(error)(error.what, where=error.where, expected=error.expected, fix=fix) from error
    finally:
        journal.close()
    manifest.save(run.state.step, finished=True)
    final_step = run.state.best_step if best else None
    model = run.engine.whole_model() if final_step is None else load(str(checkpoints.model_folder(final_step)))
    summary = {"steps": run.state.step, "best_step": run.state.best_step, "best_score": run.state.best_score}
    if run.state.skipped_steps:
        summary["skipped_steps"] = run.state.skipped_steps
    folder = checkpoints.finish(model, summary)
    on_first_rank(lambda: report_run(output, folder))
    if tasks:
        on_first_rank(lambda: log.info("%s", Trained.of(output)))
    return folder


def rehearse(recipe: Recipe, *, overwrite: bool = False) -> str:
    """A dry run: everything is built and one step is taken, nothing is written. Returns what would be done.

    Errors: those of `train` before its first step, also for tasks that cannot be read and an output that it would not
    write to.
    """
    accelerator = make_accelerator(recipe)
    on_first_rank(lambda: check_claim(recipe.output, "train"))
    on_first_rank(lambda: Checkpoints(Path(recipe.output), recipe.train.keep_checkpoints).check(recipe, overwrite))
    load_tasks(recipe.evaluate)
    run = build(recipe, accelerator)
    output, rate, norm = update(run, run.feed.draw(0))
    count = sum(parameter.numel() for module in (run.model, run.extras) for parameter in module.parameters())
    lines = [f"model: {recipe.model.path}, {count:,} parameters"]
    for lane in run.feed.lanes:
        lines += [f"source {line}" for line in lane.plan.summary()]
        lines += [f"loss of {supply.records.name}: {supply.loss}" for supply in lane.supplies]
    lines.append(
        f"steps: {run.steps} ({run.feed.steps_per_epoch} an epoch), on {world_size()} process(es), "
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
    config = recipe.train
    seed_everything(config.seed)
    origin = recipe.model if model_folder is None else recipe.model.continued(str(model_folder))
    model = load(origin, new_heads=model_folder is None)
    model.to(accelerator.device).train()
    if world_size() > 1:
        facts = {"the model (weights, settings, tokenizer)": model.fingerprint(), **_hardware(accelerator)}
        refuse_different(facts, fix="give every machine the same model, and set train.precision")
    check_shard(recipe)
    feed = with_live_negatives(build_feed(recipe, model, recipe.data, config.balance), config.mining)
    extras = build_extras([supply.loss for supply in feed.supplies], model).to(accelerator.device)
    engine = make_engine(model, extras, config)
    # Ranks start from the same weights but draw their own dropout.
    seed_everything(derive_seed(config.seed, rank()))
    memory = replace(derive_memory(config, accelerator.device), packed=recipe.model.packing, agreed=engine.agreed)
    steps = config.steps or math.ceil((config.epochs or 1) * feed.steps_per_epoch)
    return Run(recipe, accelerator, model, extras, engine, feed, memory, steps, RunState(), LiveMining.of(feed))


def _hardware(accelerator: Accelerator) -> dict[str, object]:
    return {"the device": accelerator.device.type, "train.precision": accelerator.mixed_precision}


def run_steps(
    run: Run,
    checkpoints: Checkpoints,
    manifest: RunManifest,
    journal: Journal,
    development: Development,
    stop: Stop,
) -> None:
    """All steps from the run's state on, with what is due after each of them."""
    config, evaluate, steps = run.recipe.train, run.recipe.evaluate, run.steps
    tenth = max(steps // 10, 1) if steps < 1000 else 100 * round(steps / 1000)
    if run.out_of_patience:  # stopped between its last checkpoint and its end
        return
    if run.mining is not None:
        run.mining.begin(run.state.step)
    meter = Meter()
    with progress_bar("train", total=steps, done=run.state.step) as bar:
        for draw in run.feed.run_ahead(run.state.step, steps):
            output, rate, norm = update(run, draw)
            meter.add(output)
            bar.advance()

            if run.mining is not None:  # mine: how hard were the negatives of this step, and which ones come next?
                run.mining.after_step(run.state.step, run.loss)

            run.state = run.state.after(norm)
            step, last = run.state.step, run.state.step == steps
            if run.state.skipped_in_a_row:
                journal.write(step, {"skipped_steps": run.state.skipped_steps})
                refuse_more_skipped(run.state, config.max_skipped_steps)

            if step % config.log_every == 0 or last:
                found = {} if run.mining is None else run.mining.curves()
                journal.write(step, meter.report(rate, norm, bar) | found)

            evaluated = last or (evaluate.every is not None and step % evaluate.every == 0)
            evaluated = evaluated and bool(evaluate.tasks or evaluate.validation)
            if evaluated:
                run.state, scores = development.run(run.state)
                journal.write(step, scores)

            stopping = bool(max_over_ranks(int(stop.asked), run.accelerator.device))  # whether any rank was asked to
            if stopping or evaluated or last or step % (config.checkpoint_every or tenth) == 0:
                negatives = None if run.mining is None else run.mining.state_dict()
                model, optimizer = run.engine.whole_model(), run.engine.optimizer
                checkpoints.save(model, run.extras, optimizer, run.state, negatives)
                manifest.save(step)

            if stopping:
                log.warning("stopped after step %d; the same command continues", step)
                raise KeyboardInterrupt
            if evaluated and run.out_of_patience:
                log.info("stopping early: no better score in %d evaluations", run.state.evaluations_without_gain)
                return


def update(run: Run, draw: Draw) -> tuple[StepOutput, float, float]:
    """One optimizer step; returns its output, learning rate and gradient norm (before clipping)."""
    step, steps, optimizer = run.state.step, run.steps, run.engine.optimizer
    rate = set_learning_rate(optimizer, run.recipe.train, step, steps)
    optimizer.zero_grad(set_to_none=True)
    run.model.progress = step / steps
    with run.engine.backward():
        output = run_step(run.encode, *draw, run.memory, dict(run.extras.items()), Progress(step, steps))
    norm = run.engine.step()
    return output, rate, norm


def refuse_more_skipped(state: RunState, limit: int) -> None:
    """After a step that was skipped: say so, the first time. Errors: `TrainingError` beyond the limit."""
    if state.skipped_steps == 1:
        log.warning("step %d is skipped: its gradient is not finite; metrics.jsonl counts skipped_steps", state.step)
    if state.skipped_in_a_row > limit:
        raise TrainingError(
            f"the gradient is not finite, {state.skipped_in_a_row} steps in a row (train.max_skipped_steps={limit})",
            where=f"step {state.step}",
        )


class Stop:
    """A request to stop: the first Ctrl-C (or SIGTERM) ends the step and saves, the second ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[signal.Signals, Any] = {}

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.default_int_handler(signum, frame)
        self.asked = True
        log.warning("stopping after this step and saving; press Ctrl-C again to stop at once")

    def __enter__(self) -> Stop:
        for name in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not in the main thread: the caller keeps its own handling
                self._previous[name] = signal.signal(name, self)
        return self

    def __exit__(self, *error: object) -> None:
        for name, handler in self._previous.items():
            signal.signal(name, handler)
