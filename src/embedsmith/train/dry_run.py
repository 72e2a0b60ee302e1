"""A dry run: everything is built, one step is taken, nothing is written, and what a run would do is said in words."""

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedsmith.core.collectives import on_first_rank, world_size
from embedsmith.core.outputs import check_claim
from embedsmith.core.settings import name_of, to_plain
from embedsmith.core.tokens import TokenBatch
from embedsmith.evaluate import Task, load_tasks
from embedsmith.evaluate.overlap import warn_of_overlap
from embedsmith.models import Model
from embedsmith.models.cut import cut_of
from embedsmith.train.build import make_accelerator
from embedsmith.train.checkpoint import Checkpoints
from embedsmith.train.config import Recipe
from embedsmith.train.feed import Feed, Supply
from embedsmith.train.held_out import with_held_out
from embedsmith.train.loop import Run, build, update
from embedsmith.train.rank_memory import RankMemory, Shard, in_bytes, kept_for_backward, rank_memory, weight_facts

SHARDS: tuple[Shard, ...] = (False, True, "zero2")


def rehearse(recipe: Recipe, *, overwrite: bool = False) -> str:
    """A dry run: everything is built and one step is taken, nothing is written. Returns what would be done.

    Errors: those of `train` before its first step, also for tasks that cannot be read and an output that it would not
    write to.
    """
    accelerator = make_accelerator(recipe)
    on_first_rank(lambda: check_claim(recipe.output, "train"))
    on_first_rank(lambda: Checkpoints(Path(recipe.output), recipe.train.keep_checkpoints).check(recipe, overwrite))
    parts = on_first_rank(lambda: tempfile.mkdtemp(prefix="embedsmith-"))
    try:
        recipe = with_held_out(recipe, Path(parts))
        tasks = load_tasks(recipe.evaluate.tasks, data_dir=recipe.evaluate.data)
        run = build(recipe, accelerator)
        known = [supply.records for supply in run.feed.supplies]
        on_first_rank(lambda: warn_of_overlap(tasks, known, recipe.evaluate.probes_of(tasks)))
        draw = run.feed.draw(0)
        output, rate, norm = update(run, draw)
        held = _memory_in_words(run, draw[0])
    finally:
        on_first_rank(lambda: shutil.rmtree(parts, ignore_errors=True))
    step = (
        f"the first step was taken: loss {float(output.value):.4f}, learning rate {rate:.2e}, "
        f"gradient norm {norm:.3f}, {output.tokens:,} tokens"
    )
    return "\n".join(
        [*_in_words(run, tasks), *held, step, f"nothing was written; a run would write to {recipe.output}"]
    )


def _in_words(run: Run, tasks: Sequence[Task]) -> list[str]:
    """What a run would do, a line a thing."""
    config, count = run.recipe.train, sum(one.numel() for part in (run.model, run.extras) for one in part.parameters())
    memory, kept = run.memory, run.memory.kept_tokens
    bound = "all graphs of a step are kept" if kept is None else f"graphs of {kept:,} tokens are kept"
    bound = bound if memory.max_rows is None else f"graphs of {memory.max_rows:,} texts are kept"
    evaluated = run.recipe.evaluate
    times = ["before the first step"] * evaluated.before + [f"every {evaluated.every} steps"] * bool(evaluated.every)
    when = f"{', '.join(times)} and at the end" if times else "at the end"
    scored = f"{', '.join(task.name for task in tasks)}, {when}" if tasks else "nothing: evaluate.tasks is empty"
    return [
        f"model: {run.recipe.model.path}, {count:,} parameters, texts of up to {run.model.max_length:,} tokens",
        *_sources_in_words(run.model, run.feed),
        f"steps: {run.steps:,}, of which {run.feed.steps_per_epoch:,} are an epoch, at a learning rate of up to "
        f"{config.learning_rate:g}",
        f"on: {world_size()} process{'es' * (world_size() > 1)}, {run.accelerator.device}, {run.precision}",
        f"memory: {memory.chunk_tokens:,} padded tokens are encoded at once; {bound}",
        f"packing: {run.model.packs}; fused kernels: {run.model.fused}",
        f"evaluated: {scored}",
    ]


def _memory_in_words(run: Run, tokens: TokenBatch) -> list[str]:
    """What a rank holds, as the run is spread and as `train.shard` would spread it over more ranks, which share the
    rows of a step. Collective under FSDP2."""
    config, model, ranks = run.recipe.train, run.model, world_size()
    chunks = run.memory.plan(tokens.length_N)
    replayed = max((chunk.tokens for chunk in chunks if not chunk.keep), default=0)
    alive = sum(chunk.tokens for chunk in chunks if chunk.keep) + replayed
    longest = np.repeat(np.argmax(tokens.length_N), 2)
    heads = sorted(frozenset().union(*(supply.loss.heads() for supply in run.feed.supplies)))
    passes = [lambda rows=longest[:count]: run.encode(tokens, heads, rows) for count in (1, 2)]
    one, two = (kept_for_backward(act, model.parameters()) for act in passes)
    of_a_token = (two - one) / max(int(tokens.length_N.max()), 1)
    facts = weight_facts(model, run.extras)

    def under(shard: Shard, count: int) -> RankMemory:
        return rank_memory(
            facts,
            shard=shard,
            ranks=min(config.shard_ranks or count, count) if shard is True else count,
            optimizer=config.optimizer,
            half=run.precision != "fp32",
            replayed_layers=run.recipe.model.gradient_checkpointing,
            activations=of_a_token * alive * ranks / count,
        )

    lines = [
        f"a rank holds {under(config.shard, ranks)}",
        f"  its graphs: {alive:,} tokens of the first step at once, {in_bytes(of_a_token)} each, measured here",
    ]
    if config.optimizer == "adamw" and run.recipe.task == "embed":
        count = ranks if ranks > 1 else 8
        others = [f"train.shard={str(name).lower()} {in_bytes(under(name, count).total)}" for name in SHARDS]
        lines.append(f"  on {count} ranks: {', '.join(others)}")
    return lines


def _sources_in_words(model: Model, feed: Feed) -> list[str]:
    """What every source gives to an epoch, the loss on its batches, and what of its texts is cut."""
    lines = []
    for lane in feed.lanes:
        for supply, line in zip(lane.supplies, lane.plan.summary(), strict=True):
            found = cut_of(model, supply.records)
            lines += [f"source {line}", f"  loss: {_loss_in_words(supply)}", *([f"  {found}"] if found else [])]
    return lines


def _loss_in_words(supply: Supply) -> str:
    """The name of a loss and the settings that are not its defaults."""
    plain = to_plain(supply.loss)
    settings: Any = supply.loss
    usual = {field.name: field.default for field in dataclasses.fields(settings)}
    changed = [f"{key} {value}" for key, value in plain.items() if key != "type" and value != to_plain(usual.get(key))]
    return ", ".join([name_of(supply.loss), *changed])
