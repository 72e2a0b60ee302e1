"""What a recipe leaves open, derived: device and precision, memory, losses, batch sizes, the length of the run."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch import nn

from embedsmith.core.batch import GroupBatch, Loss
from embedsmith.core.collectives import join_ranks, objects_of_all_ranks, rank, world_size
from embedsmith.core.device import cpu_multiplies_bf16, has_mps
from embedsmith.core.encoder import Role, tokenizer_json
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.progress import log
from embedsmith.core.reps import GUIDE, TEACHER
from embedsmith.core.settings import name_of
from embedsmith.core.shelf import losses
from embedsmith.data import BatchPlan, RecordSet, Source, negatives_per_query, part_of, read_source
from embedsmith.data.record import Text, typed_for_source
from embedsmith.data.source import TokenizerFacts
from embedsmith.data.store import RecordStore, StoreCounts
from embedsmith.losses import balance_weights
from embedsmith.models import CrossEncoder, Embedder, Model, load
from embedsmith.models.tokenize import added_tokens
from embedsmith.train.balance import ConanBalance, TaskRule
from embedsmith.train.budget import WORTH
from embedsmith.train.config import AnchorConfig, Recipe, TrainConfig
from embedsmith.train.feed import Feed, Lane, Supply, merge_small, mixed_supplies, plan_of
from embedsmith.train.step import Memory

DEFAULT_LOSSES = {"retrieval": "infonce", "sts": "cosent"}


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Device, ranks and trackers. Precision is not its business: it is autocast over fp32 parameters (`Run.encode`),
    never parameters of 16 bits.

    Errors: those of `choose_precision`, before anything is read; `RecipeError` under a launch whose engine would wait
    for a model that it is never given.
    """
    # Engines that want to own the model and its backward pass. Left alone they would do nothing without a word, and
    # every rank would hold everything.
    engines = {"DEEPSPEED": "DeepSpeed", "FSDP": "FSDP", "MEGATRON_LM": "Megatron-LM"}
    for flag, engine in engines.items():
        if parse_flag_from_env(f"ACCELERATE_USE_{flag}"):
            raise RecipeError(
                f"this process was launched for {engine} of accelerate, which a step with replayed chunks cannot drive",
                where="accelerate launch",
                fix="launch with recipes/accelerate/fsdp2.yaml and train.shard=true, which spreads weights, gradients "
                "and optimizer state over the ranks, with zero2.yaml and train.shard=zero2, or with ddp.yaml",
            )
    join_ranks(timedelta(minutes=recipe.train.rank_timeout))
    on_cpu = not torch.cuda.is_available() and not has_mps()
    choose_precision(recipe.train)
    AcceleratorState._reset_state()  # accelerate keeps the first run's device for the whole process
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="no",
        log_with=list(recipe.train.log_with) or None,
        project_dir=recipe.output,
    )


def choose_precision(config: TrainConfig) -> Literal["fp32", "bf16", "fp16"]:
    """What matrices are multiplied in. Errors: `RecipeError` for bf16 on a card that does not multiply it."""
    on_gpu = torch.cuda.is_available()
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_multiplies_bf16()
    if config.precision == "auto":
        return "bf16" if fast else "fp32"
    if config.precision == "bf16" and on_gpu and not fast:
        raise RecipeError(
            f"train.precision=bf16: {torch.cuda.get_device_name()} does not multiply bf16",
            fix="set train.precision=fp16, which scales the loss, or train.precision=fp32",
        )
    return config.precision


def derive_memory(config: TrainConfig, device: torch.device) -> Memory:
    """Chunks are small on a CPU, where padding costs more than it hides, and large on a GPU. On a CUDA card the run's
    first step measures what fits (`budget.py`), unless the recipe says it."""
    chunk, least = (2048, 128) if device.type == "cpu" else (32768, 8192)
    if device.type == "cuda" and (config.micro_batch or config.token_budget):
        chunk, least = 2**31, WORTH
    if config.micro_batch is not None:
        return Memory(chunk, None, config.micro_batch, least)
    if config.token_budget is not None:
        return Memory(min(chunk, config.token_budget), config.token_budget, None, least)
    return Memory(chunk, least_tokens=least)


def build_feed(
    recipe: Recipe,
    model: Model,
    sources: Sequence[Source],
    balance: ConanBalance | TaskRule | None = None,
    start: Embedder | None = None,
) -> Feed:
    """Read every source, choose its loss, and plan the batches. `start`: the model as it was, where the recipe holds
    it by texts."""
    anchor = None if start is None else recipe.train.anchor
    every = [*sources, *([anchor.texts] if anchor is not None and anchor.texts is not None else [])]
    sets = _named_apart(every, [read_source(source) for source in every])
    _check_same_files(sets)
    config = recipe.train
    supplies = [
        make_supply(source, records, config.rows_a_step, model) for source, records in zip(sources, sets, strict=False)
    ]
    planner = partial(plan_of, config=config.plan, seed=config.seed, max_length=model.settings.max_length)
    if isinstance(model, Embedder):
        planner = partial(planner, model=model)
    if isinstance(balance, TaskRule):
        lanes, steps = _lanes_by_task(balance, merge_small(supplies, config.plan), planner)
    elif balance is not None:
        lanes, steps = _balanced_lanes(balance, merge_small(supplies, config.plan), planner)
    elif config.plan.batches == "mixed":
        lanes, steps = _mixed_lanes(supplies, config, planner)
    else:
        supplies = merge_small(supplies, config.plan)
        plan = planner(supplies, world_size())
        lanes, steps = [Lane(supplies, plan, rank(), world_size())], plan.steps_per_epoch
    if anchor is not None and start is not None and len(sets) > len(sources):
        held = [_held_supply(anchor, sets[-1], config.batch_size, model, start)]
        own = replace(config.plan, schedule="proportional", ratio={})  # shares of tasks: its texts are none
        plan = planner(held, world_size(), config=own)
        lanes.append(Lane(held, plan, rank(), world_size(), anchor.weight, holds=True))
    return Feed(model, lanes, steps, config.seed)


Planner = Callable[[Sequence[Supply], int], BatchPlan]


def _lanes_by_task(rule: TaskRule, supplies: Sequence[Supply], planner: Planner) -> tuple[list[Lane], int]:
    """A lane for every task; an epoch ends with the task of most steps, the others are cycled.

    Errors: `RecipeError` where there is one task alone.
    """
    of_tasks: dict[str, list[Supply]] = {}
    for supply in supplies:
        of_tasks.setdefault(supply.named(rule.by), []).append(supply)
    if len(of_tasks) < 2:
        several = rule.by == "task" and len(supplies) > 1
        raise RecipeError(
            f"train.balance={name_of(rule)} needs two {rule.by}s or more, and here is one: {next(iter(of_tasks))}",
            where="data",
            fix="set train.balance.by=source, to tell its sources apart"
            if several
            else "remove train.balance, or add a source of another task",
        )
    plans = [planner(group, world_size()) for group in of_tasks.values()]
    lanes = [Lane(group, plan, rank(), world_size()) for group, plan in zip(of_tasks.values(), plans, strict=True)]
    return lanes, max(plan.steps_per_epoch for plan in plans)


def _held_supply(
    anchor: AnchorConfig, whole: RecordSet[Text], batch_size: int, model: Model, start: Embedder
) -> Supply:
    """Texts on which the model is held to its start. Errors: `RecipeError` for a loss that needs other things than the
    vectors of both; `DataError` for tokens."""
    loss, source = anchor.loss, anchor.texts
    assert source is not None
    if loss.reads() != {TEACHER}:
        known = [entry.name for entry in losses.entries() if entry.name.startswith("teacher_")]
        raise RecipeError(
            f"train.anchor.loss={name_of(loss)} does not learn from the vectors of a teacher",
            expected=f"one of {', '.join(known)}, or a sum of them",
        )
    if missing := sorted(loss.heads() - set(model.outputs)):
        raise RecipeError(
            f"train.anchor.loss={name_of(loss)} reads the head {missing[0]!r}, which the model lacks",
            expected=f"one of {', '.join(model.outputs)}",
            fix="hold the weights instead, train.anchor.l2_sp, or give the model that head (model.heads)",
        )
    loss.check(model.dimension)
    records = part_of(whole, source.part).texts_only("train.anchor.texts", source.path)
    return Supply(
        records,
        loss,
        batch_size=source.batch_size or batch_size,
        weight=1.0,
        positives=source.positives,
        negatives=negatives_per_query(source, whole.records),
        teacher=start,
    )


def _balanced_lanes(balance: ConanBalance, supplies: Sequence[Supply], planner: Planner) -> tuple[list[Lane], int]:
    """Retrieval and similarity in one optimizer step (Conan's cross-GPU batch balance): this rank's lanes, and the
    steps of an epoch (those of the retrieval sources; similarity is cycled).

    Errors: `RecipeError` without a source of each kind, or with too few ranks to split.
    """
    retrieval = [supply for supply in supplies if not supply.in_pairs]
    sts = [supply for supply in supplies if supply.in_pairs]
    if not retrieval or not sts:
        raise RecipeError("train.balance needs a retrieval source and a source of scored pairs", where="data")
    world, me = world_size(), rank()
    if balance.mode == "balanced":
        weight, beta = balance_weights("balanced", world, world, balance.beta)
        shared = 1 if balance.spread_negatives else world
        plan = planner(retrieval, shared)
        lanes = [
            Lane(retrieval, plan, me, world, weight, spread=balance.spread_negatives),
            Lane(sts, planner(sts, world), me, world, beta),
        ]
        return lanes, plan.steps_per_epoch
    first_sts = world - balance.sts_ranks
    weight, beta = balance_weights("split", first_sts, balance.sts_ranks, balance.beta)
    groups = [dist.new_group(list(ranks)) for ranks in (range(first_sts), range(first_sts, world))]
    plan = planner(retrieval, first_sts)
    if me < first_sts:
        lane = Lane(retrieval, plan, me, first_sts, weight, groups[0])
    else:
        lane = Lane(sts, planner(sts, balance.sts_ranks), me - first_sts, balance.sts_ranks, beta, groups[1])
    return [lane], plan.steps_per_epoch


def _mixed_lanes(supplies: Sequence[Supply], config: TrainConfig, planner: Planner) -> tuple[list[Lane], int]:
    """Every step has a part of each kind of source, weighed by its rows; an epoch ends with the kind of most steps."""
    mixed = mixed_supplies(supplies, config.batch_size, world_size())
    plans = [planner([supply], world_size()) for supply in mixed]
    lanes = [
        Lane([supply], plan, rank(), world_size(), weight=plan.rows_per_step[0] / config.batch_size)
        for supply, plan in zip(mixed, plans, strict=True)
    ]
    return lanes, max(plan.steps_per_epoch for plan in plans)


def make_supply(source: Source, whole: RecordSet[Text], batch_size: int | None, model: Model) -> Supply:
    """A source with its loss. Errors: `RecipeError` where the loss cannot read such records."""
    if isinstance(model, CrossEncoder):
        return _group_supply(source, whole, batch_size)
    records = part_of(whole, source.part)
    if source.loss is None and records.task not in DEFAULT_LOSSES:
        what = f"the task {records.task!r} has no default loss"
        raise RecipeError(f"{source.path}: {what}", fix=f"say what is minimised {typed_for_source('loss=NAME')}")
    loss: Loss = source.loss or losses.build(DEFAULT_LOSSES[records.task])
    loss.check(model.dimension)
    if missing := sorted(loss.heads() - set(model.outputs)):
        wanted = f"add it: model.heads=[{', '.join(sorted({*loss.heads(), 'dense'}))}]"
        if missing[0] == "dense":  # a public model of words or tokens
            wanted = f"say what the loss reads {typed_for_source(f'loss.head={model.main_head}')}"
        raise RecipeError(
            f"the loss {type(loss).__name__} reads the head {missing[0]!r}, which the model lacks",
            where=records.name,
            expected=f"one of {', '.join(model.outputs)}",
            fix=wanted,
        )
    _check_models(source, loss, records.name)
    supply = Supply(
        records,
        loss,
        batch_size=source.batch_size or batch_size,
        weight=source.weight if source.cap is None else min(source.weight, source.cap / len(records.records)),
        positives=source.positives,
        negatives=negatives_per_query(source, whole.records),
        shuffle=source.shuffle,
        per_class=source.per_class,
        teacher=None if source.teacher is None else load(source.teacher).requires_grad_(False),
        guide=None if source.guide is None else load(source.guide).requires_grad_(False),
    )
    wants = {"teacher": source.teacher, "guide": source.guide, "shuffle": source.shuffle}
    check_tokens(whole, model, in_pairs=supply.in_pairs, needs_text=[name for name, wanted in wants.items() if wanted])
    if source.instruction_separator is not None and model.settings.templates:
        raise RecipeError(
            "instruction_separator with a template: the query would get its instruction within another",
            where=records.name,
            fix="leave model.template out, or instruction_separator",
        )
    if supply.in_pairs and records.records[0].positive_scores is None:
        raise RecipeError(
            f"the loss {type(loss).__name__} needs a score for every pair",
            where=records.name,
            fix="use a retrieval loss, or give the rows scores",
        )
    return supply


def _check_models(source: Source, loss: Loss, name: str) -> None:
    """Errors: `RecipeError` where the loss reads another model that the source does not name, or reads no guide."""
    for other, given in ((TEACHER, source.teacher), (GUIDE, source.guide)):
        if other in loss.reads() and given is None:
            raise RecipeError(
                f"the loss {name_of(loss)} reads a {other}",
                where=name,
                fix=f"name its folder beside the path of the source, as {other}: FOLDER",
            )
    if source.guide is not None and GUIDE not in loss.reads():
        raise RecipeError(
            f"the loss {name_of(loss)} reads no guide",
            where=name,
            fix="take the loss gist_embed, or set guide_margin: 0 of infonce; or leave guide out",
        )


def _group_supply(source: Source, whole: RecordSet[Text], batch_size: int | None) -> Supply:
    """A source for a reranker, which reads every query beside its own documents. Errors: `RecipeError` for a loss of
    vectors, options that mean nothing here, labels, and queries with nothing to be told apart; `DataError` for tokens.
    """
    records = part_of(whole, source.part).texts_only("task: rerank", source.path)
    if records.task not in ("retrieval", "sts"):
        raise RecipeError(f"{source.path}: a reranker learns from queries and documents, not from {records.task}")
    for name, given in (("teacher", source.teacher), ("shuffle", source.shuffle)):
        if given:
            what = "scores in the data (embedsmith mine, with a teacher)" if name == "teacher" else "no order of parts"
            raise RecipeError(f"{name} of a reranker's source, which takes {what}", where=records.name, fix="remove it")
    loss: Loss = source.loss or losses.build("binary")
    if GroupBatch not in loss.batches:
        kinds = {entry.name: getattr(entry.thing, "batches", ()) for entry in losses.entries()}
        known = [name for name, read in kinds.items() if isinstance(read, tuple) and GroupBatch in read]
        raise RecipeError(
            f"the loss {type(loss).__name__} reads vectors, which a reranker lacks",
            where=records.name,
            expected=f"one of {', '.join(known)}, or a sum of them",
        )
    negatives = negatives_per_query(source, whole.records)
    if records.task == "retrieval" and not negatives and records.records[0].positive_scores is None:
        raise RecipeError(
            "no row has negatives, and a reranker learns by telling documents of a query apart",
            where=records.name,
            fix="find some first: embedsmith mine",
        )
    weight = source.weight if source.cap is None else min(source.weight, source.cap / len(records.records))
    size = source.batch_size or batch_size
    return Supply(records, loss, size, weight, source.positives, negatives, in_groups=True)


def tokenizer_facts(model: Embedder, name: str) -> TokenizerFacts:
    digest = hashlib.sha256(tokenizer_json(model.tokenizer).encode()).hexdigest()
    ends = added_tokens(model.tokenizer)[1]
    return TokenizerFacts(name, digest, model.max_length, ends[-1] if ends else None)


def probes(model: Embedder, task: str, document_role: Role) -> dict[str, list[int]]:
    """The ids of one text in every way a cache tokenizes: they differ if prompts, templates or end tokens do."""
    text = ["Which ids does 1 text have?"]
    return {
        "query": model.tokenize(text, "query", task).id_S.tolist(),
        "instructed": model.tokenize(text, "query", task, ["Compare: "]).id_S.tolist(),
        "document": model.tokenize(text, document_role, task).id_S.tolist(),
    }


def check_tokens(records: RecordSet[Text], model: Embedder, *, in_pairs: bool, needs_text: Sequence[str] = ()) -> None:
    """Whether a model may train on a token cache. Nothing to check for records of texts.

    Errors: `DataError` for another tokenizer (both hashes named), other prompts, longer texts than the model takes, or
    documents tokenized in another role than the loss reads them in; `RecipeError` for options that need texts.
    """
    if records.tokens is None:
        return
    tokenizer, facts = records.tokens
    tokenizer.refuse_other(tokenizer_facts(model, "this one"), records.name)
    if tokenizer.max_length > model.max_length:
        raise DataError(
            f"its texts have up to {tokenizer.max_length} tokens, the model takes {model.max_length}",
            where=records.name,
            fix=f"tokenize again with --max-length {model.max_length}",
        )
    if isinstance(records.records, RecordStore):
        _refuse_beyond_tables(records.records.counts, model, records.name)
    role: Role = "query" if in_pairs else "document"
    if facts.probes and facts.document_role != role:
        raise DataError(
            f"its documents were tokenized as {facts.document_role}, the loss reads them as {role}",
            where=records.name,
            fix="use a loss of the task it was tokenized for, or train on the texts",
        )
    if facts.probes and facts.probes != (now := probes(model, records.task, facts.document_role)):
        changed = ", ".join(name for name in facts.probes if facts.probes[name] != now.get(name))
        raise DataError(
            f"it was tokenized with other prompts than the model's ({changed}); its own: {facts.prompts}",
            where=records.name,
            fix="tokenize again, or set model.prompts to its own",
        )
    if needs_text:
        raise RecipeError(f"{needs_text[0]} needs texts, and this source has only tokens", where=records.name)


def _refuse_beyond_tables(counts: StoreCounts, model: Embedder, name: str) -> None:
    """Errors: `DataError` for tokens, or places in a text, that the model's tables of embeddings do not have."""
    tokens = len(model.backbone.get_input_embeddings().weight)
    places = getattr(model.backbone.config, "max_position_embeddings", None) or counts.longest_text
    for what, found, most in (
        ("token", counts.top_token, tokens - 1),
        ("place in a text", counts.longest_text, places),
    ):
        if found > most:
            raise DataError(
                f"the highest {what} is {found}, the model's table ends at {most}",
                where=name,
                fix="tokenize the texts again for this model: embedsmith tokenize",
            )


def _named_apart(sources: Sequence[Source], sets: Sequence[RecordSet[Text]]) -> list[RecordSet[Text]]:
    """Sources under names of their own: reports, the manifest and live negatives know them by name."""
    named: dict[str, RecordSet[Text]] = {}
    for source, found in zip(sources, sets, strict=True):
        names = (f"{found.name}-{number}" for number in count(2))
        name = found.name if found.name not in named else next(name for name in names if name not in named)
        if name != found.name:
            log.warning(
                "%s: another source is named %r too: this one is called %r; `name` calls it otherwise",
                source.path,
                found.name,
                name,
            )
        named[name] = replace(found, name=name)
    return list(named.values())


def _check_same_files(sets: Sequence[RecordSet[Text]]) -> None:
    seen = objects_of_all_ranks([(record_set.name, record_set.fingerprint) for record_set in sets])
    for other, theirs in enumerate(seen):
        different = [mine[0] for mine, their in zip(seen[0], theirs, strict=True) if mine != their]
        if different:
            raise DataError(
                f"rank {other} reads another content than rank 0: {', '.join(different)}",
                fix="give every machine the same files",
            )


def build_extras(objectives: Sequence[Loss], model: Model) -> nn.ModuleDict:
    """Trainable things the losses bring with them, by name; losses that share a name share the module."""
    modules: dict[str, nn.Module] = {}
    for loss in objectives:
        for name, module in loss.extras(model.dimension).items():
            modules.setdefault(name, module)
    return nn.ModuleDict(modules)
