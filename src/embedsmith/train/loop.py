"""The training loop. Read it top to bottom: build, then for every step draw, encode, differentiate and update; and once
in a while mine negatives, log, evaluate, save a checkpoint, stop."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from embedsmith.core.batch import Progress
from embedsmith.core.collectives import agreed_by_hosts, lost_ranks, on_first_rank, rank, refuse_different, world_size
from embedsmith.core.device import cores
from embedsmith.core.errors import ModelError, TrainingError
from embedsmith.core.outputs import claimed, delivered
from embedsmith.core.progress import log, progress_bar
from embedsmith.core.reps import Reps
from embedsmith.core.seeds import TorchRandom, derive_seed, seed_everything
from embedsmith.core.settings import to_plain
from embedsmith.core.tokens import IntArray, TokenBatch
from embedsmith.data.split import HELD_OUT
from embedsmith.evaluate import load_tasks
from embedsmith.evaluate.overlap import warn_of_overlap
from embedsmith.models import CrossEncoder, Embedder, Model, ModelConfig, load, load_reranker
from embedsmith.models.backbone import stops_compiling
from embedsmith.models.config import ComputeType
from embedsmith.models.encode import autocast
from embedsmith.models.lora import has_adapter
from embedsmith.report.page import save_environment
from embedsmith.report.run_folder import report_run
from embedsmith.train.anchor import Anchor
from embedsmith.train.budget import Card, at_most, card_of, halved, measured_budget
from embedsmith.train.build import build_extras, build_feed, choose_precision, derive_memory, make_accelerator
from embedsmith.train.by_task import ByTask
from embedsmith.train.checkpoint import FIRST_SCALE, Checkpoints, RunState, base_of, flat
from embedsmith.train.config import Recipe
from embedsmith.train.engine import Engine, check_shard, make_engine, set_learning_rate
from embedsmith.train.feed import Draw, Feed
from embedsmith.train.freeze import freeze, trained_in_words
from embedsmith.train.held_out import with_held_out
from embedsmith.train.journal import Journal, Meter, RunManifest, tell_of_cut
from embedsmith.train.live_negatives import LiveMining, with_live_negatives
from embedsmith.train.scoring import Development, tell_watch
from embedsmith.train.step import Memory, Part, StepOutput, evaluate_parts, run_step
from embedsmith.train.trained import Trained

_PLACE = re.compile(r"model\.(path|base)|((data|evaluate\.validation)\.\d+|train\.anchor\.texts)\.(path|cache)")
"""Keys that say where something lies, which machines may see elsewhere; what lies there is compared by content."""

_DTYPE: Mapping[str, ComputeType | None] = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}
WORKERS = 4
"""Threads that draw and tokenize steps ahead of a card."""


@dataclass
class Run:
    """Everything a step touches. `steps`: of the whole run. `card`: what bounds the memory of a step, if anything does;
    `fitted`: whether it has been asked. `deferred`: whether values are checked together with the norm, in one read of
    the device. `by_task`: what goes task by task; `anchor`: what holds the model to its start."""

    recipe: Recipe
    accelerator: Accelerator
    model: Model
    extras: nn.ModuleDict
    engine: Engine
    feed: Feed
    memory: Memory
    steps: int
    state: RunState
    mining: LiveMining | None
    by_task: ByTask
    anchor: Anchor | None = None
    precision: str = "fp32"
    card: Card | None = None
    fitted: bool = False
    deferred: bool = False

    def encode(self, tokens: TokenBatch, heads: Any, rows: IntArray | None = None) -> Reps:
        """The model's forward pass on some rows of a ragged batch, under autocast."""
        padded = tokens.pad(self.model.pad_id, self.accelerator.device, left=self.model.padding_left, rows=rows)
        with autocast(self.accelerator.device, _DTYPE[self.precision]):
            reps: Reps = self.model(padded, heads)
        return reps

    def draws(self) -> Iterator[Draw]:
        """The draws of the steps to come. A card leaves the cores to the tokenizer; a CPU needs them itself."""
        workers = 1 if self.card is None else min(WORKERS, cores())
        return self.feed.run_ahead(self.state.step, self.steps, workers)

    def one_cast(self) -> AbstractContextManager[None]:
        """Around a step: what autocast made of the weights is kept from chunk to chunk, for which an outermost context
        must stay open. Weights in shards are not kept whole."""
        if self.precision == "fp32" or self.engine.agreed is not None:
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, enabled=False)

    def together(self, act: Callable[[], None]) -> None:
        """Do a part of a step. Errors: `OutOfMemoryError` on all ranks where one of them lacks memory."""
        if self.card is None or not self.engine.repeats:
            act()
            return
        lacking = None
        try:
            act()
        except torch.OutOfMemoryError as error:
            lacking = str(error)
        if agreed_by_hosts(int(lacking is not None)):
            raise torch.OutOfMemoryError(lacking or "another rank is out of memory")

    def probe(self, texts: int) -> int:
        """A forward and backward pass of texts of full length, as a step would do it; returns their tokens."""
        tokens = full_length(self.model, texts)
        heads = sorted(frozenset().union(*(supply.loss.heads() for supply in self.feed.supplies)))
        try:
            with self.one_cast():
                made = self.encode(tokens, heads).values()
                self.engine.try_backward(torch.stack([t.float().sum() for rep in made for t in rep.floating()]).sum())
            return len(tokens.id_S)
        except Exception as error:
            if not (self.engine.repeats and stops_compiling(self.model.backbone, error)):
                raise
        return self.probe(texts)

    def loss(self, tokens: TokenBatch, parts: Sequence[Part]) -> Tensor:
        """The loss of some parts by the model as it is, without gradient."""
        progress, extras = Progress(self.state.step, self.steps), dict(self.extras.items())
        while True:
            try:
                return evaluate_parts(self.encode, tokens, parts, self.memory, extras, progress)
            except torch.OutOfMemoryError:
                if self.card is None or world_size() > 1:  # the others wait in a collective of the loss
                    raise
            self.halve(self.card, tokens)

    def halve(self, card: Card, tokens: TokenBatch) -> None:
        """After a lack of memory: encode half as much at once, from here on and after a resume. Collective.

        Errors: `TrainingError` where texts were encoded one by one already.
        """
        card.free()  # gives back what lies in pieces of the old size
        self.memory = halved(self.memory, tokens.length_N, card)
        self.state = replace(self.state, token_budget=self.memory.chunk_tokens, card=card.name)
        log.warning(
            "step %d: out of memory on %s; it is done again with at most %s tokens at once, as are all steps from here",
            *(self.state.step, card.name, f"{self.memory.chunk_tokens:,}"),
        )

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
    with delivered(recipe.output, "train") as place, ExitStack() as claim:
        recipe = replace(recipe, output=place)
        accelerator = make_accelerator(recipe)
        settings = {key: value for key, value in flat(to_plain(recipe)).items() if not _PLACE.fullmatch(key)}
        refuse_different(settings, fix="start every process with the same recipe and overrides")
        on_first_rank(lambda: claim.enter_context(claimed(place, "train")))
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
    begun = on_first_rank((output / "recipe.yaml").exists)
    stated, recipe = recipe, with_held_out(recipe, output / HELD_OUT, begun=begun)
    tasks = load_tasks(recipe.evaluate.tasks, data_dir=recipe.evaluate.data)
    run = build(recipe, accelerator, model_folder=None if resume is None else checkpoints.model_folder(resume))
    if resume is not None:
        run.state = checkpoints.load(resume, run.extras, run.engine.optimizer)
        if run.anchor is not None:
            run.anchor.refuse_other(run.state.start)
        if run.mining is not None:
            run.mining.load_state_dict(checkpoints.load_mining(resume))
        log.info("continuing %s at step %d", output, resume)
    checkpoints.claim(stated)
    on_first_rank(lambda: save_environment(output))
    probes = recipe.evaluate.probes_of(tasks)
    on_first_rank(lambda: warn_of_overlap(tasks, [supply.records for supply in run.feed.supplies], probes))
    on_first_rank(lambda: tell_of_cut(run.model, [supply.records for supply in run.feed.supplies], output))
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
    development = Development(recipe.evaluate, tasks, run.model, run.loss, validation, output, best, probes)
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
    if final_step is None:
        model = run.engine.whole_model()
    else:
        model = load_trained(recipe, ModelConfig(path=str(checkpoints.model_folder(final_step))))
    folder = checkpoints.finish(model, run.state.summary())
    on_first_rank(lambda: report_run(output, folder))
    if tasks:
        on_first_rank(lambda: log.info("%s", Trained.of(output)))
    return folder


def build(recipe: Recipe, accelerator: Accelerator, model_folder: Path | None = None) -> Run:
    """Model, data, plan and optimizer. On resume the model comes from a checkpoint instead of its origin."""
    config = recipe.train
    seed_everything(config.seed)
    origin = recipe.model if model_folder is None else recipe.model.continued(str(model_folder))
    model = load_trained(recipe, origin, new_heads=model_folder is None)
    model.to(accelerator.device).train()
    freeze(model, config.freeze)
    precision = choose_precision(config)
    if world_size() > 1:
        facts: dict[str, object] = {"the model (weights, settings, tokenizer)": model.fingerprint()}
        facts |= {"the device": accelerator.device.type, "train.precision": precision}
        refuse_different(facts, fix="give every machine the same model, and set train.precision")
    check_shard(recipe)
    start = None if config.anchor is None else start_of(recipe, accelerator.device)
    teacher = start if isinstance(start, Embedder) else None
    feed = with_live_negatives(build_feed(recipe, model, recipe.data, config.balance, teacher), config.mining)
    extras = build_extras([supply.loss for supply in feed.supplies], model).to(accelerator.device)
    trained = trained_in_words(model, extras)
    on_first_rank(lambda: log.info("%s", trained))
    engine = make_engine(model, extras, config)
    by_task = ByTask.of(feed, model, extras, config)
    anchor = None
    if config.anchor is not None and start is not None:
        anchor = Anchor.of(config.anchor, start, model, extras)
    # Ranks start from the same weights but draw their own dropout.
    seed_everything(derive_seed(config.seed, rank()))
    memory = replace(derive_memory(config, accelerator.device), packed=model.packing, agreed=engine.agreed)
    steps = config.steps or math.ceil((config.epochs or 1) * feed.steps_per_epoch)
    began = None if anchor is None else anchor.fingerprint
    state = RunState(loss_scale=FIRST_SCALE if precision == "fp16" else None, start=began)
    run = Run(recipe, accelerator, model, extras, engine, feed, memory, steps, state, LiveMining.of(feed), by_task)
    run = replace(run, anchor=anchor, precision=precision)
    return replace(run, card=card_of(accelerator.device), deferred=accelerator.device.type != "cpu")


def start_of(recipe: Recipe, device: torch.device) -> Model:
    """The model before the first step, with the heads that were made for it, to hold the trained one to."""
    random = TorchRandom.capture()
    seed_everything(recipe.train.seed)
    start = load_trained(recipe, recipe.model, new_heads=True)
    random.restore()
    return start.to(device).eval().requires_grad_(False)


def load_trained(recipe: Recipe, config: ModelConfig, new_heads: bool = False) -> Model:
    """The kind of model that the recipe trains."""
    return load_reranker(config, new_heads=new_heads) if recipe.task == "rerank" else load(config, new_heads=new_heads)


def full_length(model: Model, texts: int) -> TokenBatch:
    """Texts, or pairs of them, as long as the model reads any."""
    filler = ["a " * model.max_length] * texts
    return model.tokenize(filler, filler) if isinstance(model, CrossEncoder) else model.tokenize(filler)


def run_steps(
    run: Run, checkpoints: Checkpoints, manifest: RunManifest, journal: Journal, development: Development, stop: Stop
) -> None:
    """All steps from the run's state on, with what is due after each of them."""
    config, evaluate, steps = run.recipe.train, run.recipe.evaluate, run.steps
    tenth = max(steps // 10, 1) if steps < 1000 else 100 * round(steps / 1000)
    every = run.feed.steps_per_epoch if config.checkpoint_every == "epoch" else config.checkpoint_every or tenth
    if run.out_of_patience:  # stopped between its last checkpoint and its end
        return
    if run.mining is not None:
        run.mining.begin(run.state.step)
    meter = Meter()
    with progress_bar("train", total=steps, done=run.state.step) as bar:
        for draw in meter.waiting(run.draws()):
            output, rate, norm = update(run, draw)
            meter.add(output)
            bar.advance()

            if run.mining is not None:  # mine: how hard were the negatives of this step, and which ones come next?
                run.mining.after_step(run.state.step, run.loss)

            before, run.state = run.state.overflowed_steps, run.state.after(norm)
            overflowed = run.state.overflowed_steps > before
            step, last = run.state.step, run.state.step == steps
            if run.by_task.meter is not None:  # do the gradients of the tasks disagree?
                if math.isfinite(norm):
                    run.by_task.after_step(step - 1, draw)
                if measured := run.by_task.meter.taken():
                    journal.write(step, measured)
            if not math.isfinite(norm):
                write_left_out(run, journal, overflowed)

            if step % config.log_every == 0 or last:
                report = meter.report(rate, norm, bar) | ({} if run.mining is None else run.mining.curves())
                report |= {} if run.state.loss_scale is None else {"loss_scale": run.state.loss_scale}
                if overflowed:  # that is no news of the model
                    del report["gradient_norm"]
                journal.write(step, report)

            evaluated = last or (evaluate.every is not None and step % evaluate.every == 0)
            evaluated = evaluated and bool(evaluate.tasks or evaluate.validation)
            if evaluated:
                run.state, scores = development.run(run.state)
                journal.write(step, scores)

            stopping = bool(agreed_by_hosts(int(stop.asked)))  # whether any rank was asked to
            if stopping or evaluated or last or step % every == 0:
                negatives = None if run.mining is None else run.mining.state_dict()
                checkpoints.save(run.engine.whole_model(), run.extras, run.engine.optimizer, run.state, negatives)
                manifest.save(step)

            if stopping:
                log.warning("stopped after step %d; the same command continues", step)
                raise KeyboardInterrupt
            if evaluated and run.out_of_patience:
                log.info("stopping early: no better score in %d evaluations", run.state.evaluations_without_gain)
                return
            if evaluated and not last:
                tell_watch(checkpoints.output)


def write_left_out(run: Run, journal: Journal, overflowed: bool) -> None:
    """Of a step whose gradient is not finite, and which changed no weight. The first one that is a fault of the run is
    warned of. Errors: `TrainingError` for more than `max_skipped_steps` of them in a row."""
    state, limit = run.state, run.recipe.train.max_skipped_steps
    if overflowed:
        journal.write(state.step, {"overflowed_steps": state.overflowed_steps})
    if not state.skipped_in_a_row:
        return
    journal.write(state.step, {"skipped_steps": state.skipped_steps})
    if state.skipped_steps == 1:
        log.warning("step %d is skipped: its gradient is not finite; metrics.jsonl counts skipped_steps", state.step)
    if state.skipped_in_a_row > limit:
        raise TrainingError(
            f"the gradient is not finite, {state.skipped_in_a_row} steps in a row (train.max_skipped_steps={limit})",
            where=f"step {state.step}",
        )


def update(run: Run, draw: Draw) -> tuple[StepOutput, float, float]:
    """One optimizer step; returns its output, learning rate and gradient norm (before clipping)."""
    if run.card is not None and not run.fitted:
        fit_to_card(run, run.card)
    rate = set_learning_rate(run.engine.optimizer, run.recipe.train, run.state.step, run.steps)
    run.model.progress = run.state.step / run.steps
    output = differentiated(run, draw)
    try:
        norm = run.engine.step(output.health, run.state.loss_scale or 1.0, output.averaged)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory while the weights are updated ({str(error).splitlines()[0]})",
            where=f"step {run.state.step}",
            fix="set train.optimizer=adamw8bit, a smaller train.token_budget, or train.shard=true on several cards",
        ) from error
    return output, rate, norm


def differentiated(run: Run, draw: Draw) -> StepOutput:
    """The gradients of a step and its output. Where the card runs out of memory, the step is begun anew with half as
    much of it at once, which gives the same gradient; where it cannot be compiled, without.

    Errors: `TrainingError` where texts are encoded one by one already, or where the step cannot be begun anew.
    """
    random, scale, step = TorchRandom.capture(), run.state.loss_scale or 1.0, run.state.step
    lacking = True
    progress, extras = Progress(step, run.steps), dict(run.extras.items())

    def gradient_of(some: Draw) -> StepOutput:
        given = (run.encode, *some, run.memory, extras, progress)
        return run_step(*given, scale=scale, deferred=run.deferred, together=run.together)

    while True:
        run.engine.optimizer.zero_grad(set_to_none=True)
        try:
            with run.engine.backward(), run.one_cast():
                if run.by_task.separate:  # something is made of the gradients of all parts
                    seed = derive_seed(run.recipe.train.seed, "balance", step)
                    output = run.by_task.step(gradient_of, run.engine.average, draw, step, seed, scale)
                else:
                    output = gradient_of(draw)
                return output if run.anchor is None else pulled_to_start(run, run.anchor, output, scale)
        except torch.OutOfMemoryError as error:
            lacking = True
            if run.card is None or not run.engine.repeats:
                taken = min(run.memory.chunk_tokens, len(draw[0]) * int(draw[0].length_N.max(initial=1)))
                raise TrainingError(
                    f"out of memory ({str(error).splitlines()[0]})",
                    where=f"step {step}",
                    fix=f"set train.token_budget={max(taken // 2, 1)}, and half of it if need be",
                ) from error
        except Exception as error:
            lacking = False
            if not (run.engine.repeats and stops_compiling(run.model.backbone, error)):
                raise
        run.engine.optimizer.zero_grad(set_to_none=True)  # outside the handler: what the error held is free again
        if lacking and run.card is not None:
            run.halve(run.card, draw[0])
        random.restore()


def pulled_to_start(run: Run, anchor: Anchor, output: StepOutput, scale: float) -> StepOutput:
    """The step with the pull of the start on its gradient."""
    if not anchor.held:
        return output
    if not output.averaged:
        run.engine.average()
    penalty = anchor.pull(scale)
    return replace(output, parts={**output.parts, "l2_sp": {"loss": penalty}}, averaged=True)


def fit_to_card(run: Run, card: Card) -> None:
    """Before the first step on a card: let a step be one chunk unless it does not fit. A run that goes on takes what it
    had on such a card before; the recipe's own budget is taken as it is. Collective."""
    run.fitted, config = True, run.recipe.train
    before = run.state.token_budget if run.state.card == card.name else None
    if not agreed_by_hosts(int(before is None)):
        assert before is not None
        run.memory = at_most(run.memory, before)
    elif config.micro_batch is None and config.token_budget is None:
        longest = len(full_length(run.model, 1).id_S)
        weights = sum(weight.numel() for group in run.engine.optimizer.param_groups for weight in group["params"])
        held = run.engine.to_hold + 4 * weights * run.by_task.kept
        budget = measured_budget(card, run.probe, longest, held, repeats=run.engine.repeats)
        run.memory, run.state = at_most(run.memory, budget), replace(run.state, token_budget=budget, card=card.name)


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
