"""Flat JSON configs of F2LLM and of the decoder toolkit built on it: every field name, turned into a recipe.

What differs on purpose, because it was a defect there: the full width is always part of a Matryoshka loss; uniformity
is taken on each side by itself, and only where in-batch rows are no relatives; validation rows are chosen by a hash of
the query; the run has one folder, `output_dir/experiment_id`. `train_batch_size` counts rows a process there and is
multiplied by the processes of the launch here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.progress import log
from embedsmith.core.recipe import apply_override, parse, read_tree
from embedsmith.core.settings import section
from embedsmith.data.token_manifest import MANIFEST, Manifest
from embedsmith.train.config import Recipe

POOLINGS = {"eos": "last", "mean": "mean", "weighted_mean": "weighted_mean", "cls": "cls", "max": "max"}
HELD_OUT = 0.99


@section
@dataclass(frozen=True)
class Reference:
    """The fields of a flat config with the defaults of the reference's code. Aliases of F2LLM v2: use_mrl,
    teacher_model_path, kd_weight, scheduler_type, num_hard_neg_clustering.

    `model_path`: becomes `model.path`; with an adapter `model.base`.
    `train_data_path`: a folder of Parquet files, or a token cache; a file each becomes a source.
    `output_dir`: with `experiment_id` the recipe's `output`.
    `experiment_id`: the run's folder inside `output_dir`.
    `tb_dir`: accepted; TensorBoard's files lie in the run's folder.
    `cache_dir`: becomes `cache` of every source.
    `num_hard_neg`: hard negatives of a query.
    `num_hard_neg_clustering`: the same in clustering data; by default `num_hard_neg`. Classification has one.
    `max_seq_length`: tokens of a text.
    `train_batch_size`: rows a process; the recipe counts all processes together.
    `train_epochs`: passes over the data, unless `train_steps` is above 0.
    `train_steps`: optimizer steps; -1 leaves it to `train_epochs`.
    `checkpointing_steps`: steps between checkpoints.
    `validation_steps`: steps between validations on held-out rows; `None` holds none out.
    `log_interval`: steps between lines of the log.
    `learning_rate`: at its peak.
    `min_lr`: at the end of the schedule.
    `weight_decay`: of AdamW.
    `warmup_steps`: steps over which the learning rate rises.
    `scheduler_type`: `cosine`, or `constant_with_warmup`.
    `mrl_enabled`: learns leading parts of the vectors too (Matryoshka).
    `use_mrl`: the same, by F2LLM v2's name and weights.
    `mrl_dims`: widths of Matryoshka.
    `mrl_dim_weights`: weight of each width; by default equal.
    `spread_enabled`: adds uniformity on each side where in-batch rows are no relatives.
    `spread_weight`: weight of uniformity.
    `spread_t`: the t of exp(-t |x - y|^2).
    `lora_enabled`: trains adapters instead of the weights.
    `lora_r`: rank of the adapters.
    `lora_alpha`: their scale times the rank.
    `lora_dropout`: share of inputs dropped.
    `lora_bias`: which biases are trained.
    `lora_task_type`: accepted; there is one kind here.
    `lora_target_modules`: names of layers, or `auto`.
    `lora_adapter_path`: an adapter to go on with.
    `bi_attn_enabled`: bidirectional attention; otherwise causal.
    `attn_implementation`: as in transformers.
    `pooling_mode`: `eos`, `mean`, `weighted_mean`, `cls` or `max`.
    `skip_instruction`: leaves the instruction out of the pooling.
    `instruction_separator`: accepted; where the prompt ends is known from its characters.
    `train_subset_rows`: rows taken of every dataset.
    `valid_subset_rows`: rows taken for validation.
    `read_rows_limit`: as `train_subset_rows`, which goes first.
    `max_datasets`: only the first so many datasets, by name.
    `fast_split`: accepted; rows are held out by a hash of the query in any case.
    `teacher_model_path`: a model whose vectors are learned from as well.
    `kd_weight`: weight of the teacher's term.
    `temperature`: of the contrastive loss.
    `loss_form`: `split`, in-batch and hard negatives as two terms, or `joint`, as one.
    `inbatch_task_types`: kinds of data that use in-batch negatives.
    `false_neg_margin`: with `joint`, negatives above the positive's score plus this are left out.
    `dataset_types`: kind of task by dataset; by default retrieval.
    `dataset_weights`: how often a dataset is drawn, by its name; by default 1.
    `gradient_checkpointing`: computes layers again in the backward pass.
    `padding_side`: `left` or `right`; by default right.
    `append_eos`: an end token behind every text.
    `eos_token`: the text of that token.
    `token_budget`: padded tokens encoded at once.
    `adam_betas`: of AdamW.
    `max_grad_norm`: length to which gradients are cut.
    `seed`: of the order of rows and of new weights.
    """

    model_path: str
    train_data_path: str
    output_dir: str
    experiment_id: str = ""
    tb_dir: str | None = None
    cache_dir: str | None = None
    num_hard_neg: int = 7
    num_hard_neg_clustering: int | None = None
    max_seq_length: int = 2048
    train_batch_size: int = 8
    train_epochs: float = 5
    train_steps: int = -1
    checkpointing_steps: int | None = None
    validation_steps: int | None = None
    log_interval: int = 10
    learning_rate: float = 1e-4
    min_lr: float = 1e-6
    weight_decay: float = 1e-2
    warmup_steps: int = 100
    scheduler_type: Literal["cosine", "constant_with_warmup"] = "cosine"
    mrl_enabled: bool = False
    use_mrl: bool = False
    mrl_dims: tuple[int, ...] = ()
    mrl_dim_weights: tuple[float, ...] | None = None
    spread_enabled: bool = False
    spread_weight: float = 0.0
    spread_t: float = 2.0
    lora_enabled: bool = False
    lora_r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    lora_task_type: str = "FEATURE_EXTRACTION"
    lora_target_modules: Literal["auto"] | tuple[str, ...] = "auto"
    lora_adapter_path: str | None = None
    bi_attn_enabled: bool = False
    attn_implementation: str | None = None
    pooling_mode: str = "eos"
    skip_instruction: bool = False
    instruction_separator: str = "Query:"
    train_subset_rows: int | None = None
    valid_subset_rows: int | None = None
    read_rows_limit: int | None = None
    max_datasets: int | None = None
    fast_split: bool = False
    teacher_model_path: str | None = None
    kd_weight: float = 1.0
    temperature: float = 0.05
    loss_form: Literal["split", "joint"] = "split"
    inbatch_task_types: tuple[str, ...] = ("retrieval",)
    false_neg_margin: float | None = None
    dataset_types: Mapping[str, str] = field(default_factory=dict)
    dataset_weights: Mapping[str, float] = field(default_factory=dict)
    gradient_checkpointing: bool = True
    padding_side: Literal["left", "right"] | None = None
    append_eos: bool | None = None
    eos_token: str | None = None
    token_budget: int | None = None
    adam_betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mrl_dim_weights is not None and len(self.mrl_dim_weights) != len(self.mrl_dims):
            raise RecipeError(
                f"mrl_dim_weights has {len(self.mrl_dim_weights)} entries for {len(self.mrl_dims)} mrl_dims"
            )
        if self.pooling_mode not in POOLINGS:
            raise RecipeError(f"pooling_mode {self.pooling_mode!r}", expected=f"one of {', '.join(POOLINGS)}")


def translated(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The recipe's tree of a flat config."""
    if "limits" in tree:
        raise RecipeError(
            "limits: training has no such key, and mteb ignored it",
            where=where,
            fix="remove it; score a sample of the queries with embedsmith evaluate",
        )
    flat = parse(Reference, dict(tree), where=where)
    _remark(flat)
    names = _datasets(flat)
    sources = [_source(flat, name, path) for name, path in names.items()]
    rows = flat.train_subset_rows or flat.read_rows_limit
    recipe: dict[str, Any] = {
        "model": _model(flat),
        "data": [{**source, "part": [0, HELD_OUT], "limit": rows} for source in sources],
        "train": _train(flat),
        "output": str(Path(flat.output_dir) / flat.experiment_id),
    }
    if flat.validation_steps:
        held_out = [{**source, "part": [HELD_OUT, 1], "limit": flat.valid_subset_rows} for source in sources]
        recipe["evaluate"] = {"every": flat.validation_steps, "validation": held_out}
    return recipe


def _remark(flat: Reference) -> None:
    """What a reader of the file might not expect."""
    if flat.lora_enabled and flat.learning_rate < 5e-5:
        log.warning("learning_rate %g moves adapters hardly; 1e-4 is usual", flat.learning_rate)
    if flat.pooling_mode == "eos" and flat.bi_attn_enabled:
        log.warning("eos pooling of bidirectional attention: legal, mean is the usual choice")
    if flat.pooling_mode == "mean" and not flat.bi_attn_enabled:
        log.warning("mean pooling of causal attention: legal, weighted_mean or eos is the usual choice")
    if flat.spread_enabled and flat.spread_weight > 0 and flat.train_batch_size < 4:
        log.warning("spread_weight with %d rows a process: there is little to spread", flat.train_batch_size)
    if flat.skip_instruction and flat.pooling_mode == "eos":
        log.warning("skip_instruction changes nothing under eos pooling: the end token is never an instruction")
    if flat.mrl_enabled and not flat.mrl_dims:
        raise RecipeError("mrl_enabled without mrl_dims", fix="list the widths")


def _model(flat: Reference) -> dict[str, Any]:
    lora = {
        "r": flat.lora_r,
        "alpha": flat.lora_alpha,
        "dropout": flat.lora_dropout,
        "bias": flat.lora_bias,
        "targets": flat.lora_target_modules,
    }
    return {
        "path": flat.lora_adapter_path or flat.model_path,
        "base": flat.model_path if flat.lora_adapter_path else None,
        "attention": "bidirectional" if flat.bi_attn_enabled else "causal",
        "pooling": POOLINGS[flat.pooling_mode],
        "include_prompt": not flat.skip_instruction,
        "max_length": flat.max_seq_length,
        "attn_implementation": flat.attn_implementation,
        "gradient_checkpointing": flat.gradient_checkpointing,
        "padding_side": flat.padding_side or "right",
        "append_eos": flat.append_eos,
        "eos_token": flat.eos_token,
        "lora": lora if flat.lora_enabled else None,
    }


def _train(flat: Reference) -> dict[str, Any]:
    by_steps = flat.train_steps > 0
    return {
        "steps": flat.train_steps if by_steps else None,
        "epochs": None if by_steps else flat.train_epochs,
        "batch_size": flat.train_batch_size * int(os.environ.get("WORLD_SIZE", "1")),
        "learning_rate": flat.learning_rate,
        "min_learning_rate": flat.min_lr,
        "schedule": "cosine" if flat.scheduler_type == "cosine" else "constant",
        "warmup": flat.warmup_steps,
        "weight_decay": flat.weight_decay,
        "betas": list(flat.adam_betas),
        "clip_norm": flat.max_grad_norm,
        "token_budget": flat.token_budget,
        "seed": flat.seed,
        "log_every": flat.log_interval,
        "checkpoint_every": flat.checkpointing_steps,
    }


def _source(flat: Reference, name: str, path: Path) -> dict[str, Any]:
    """A dataset with its loss; hard negatives are counted by what kind of task it is."""
    kind = flat.dataset_types.get(name, "retrieval")
    counts = {"classification": 1, "clustering": flat.num_hard_neg_clustering or flat.num_hard_neg}
    source: dict[str, Any] = {
        "path": str(path),
        "name": name,
        "task": kind,
        "negatives": counts.get(kind, flat.num_hard_neg),
        "weight": flat.dataset_weights.get(name, 1.0),
        "loss": _loss(flat, kind),
        "cache": flat.cache_dir,
        "teacher": flat.teacher_model_path,
    }
    if path.is_dir():
        return {**source, "split": name}
    columns = pq.read_schema(path).names
    negatives = [column for column in columns if column.startswith("negative_") and column[9:].isdecimal()]
    return {**source, "columns": {"query": "query", "positives": "passage", "negatives": negatives}}


def _loss(flat: Reference, kind: str) -> dict[str, Any]:
    in_batch = kind in flat.inbatch_task_types
    loss: dict[str, Any] = {"type": "f2llm", "temperature": flat.temperature, "in_batch": in_batch}
    if flat.loss_form == "joint":
        own = "all" if in_batch else "own"
        loss = {"type": "infonce", "temperature": flat.temperature, "negatives": own, "margin": flat.false_neg_margin}
    if flat.mrl_enabled or flat.use_mrl:
        given = None if flat.mrl_dim_weights is None else list(flat.mrl_dim_weights)
        weighting = "f2llm" if flat.use_mrl and given is None else "ones"
        shape = {"dims": list(flat.mrl_dims), "weights": given, "weighting": weighting, "normalise": False}
        loss = {"type": "matryoshka", "inner": loss, **shape}
    parts, weights = [loss], [1.0]
    if flat.spread_enabled and flat.spread_weight > 0 and in_batch:
        parts, weights = [*parts, {"type": "uniformity", "t": flat.spread_t}], [*weights, flat.spread_weight]
    if flat.teacher_model_path is not None:
        parts, weights = [*parts, {"type": "teacher_vectors"}], [*weights, flat.kd_weight]
    return loss if len(parts) == 1 else {"type": "sum", "parts": parts, "weights": weights}


def _datasets(flat: Reference) -> dict[str, Path]:
    """Datasets by name: those of a token cache, or one a Parquet file of texts."""
    folder = Path(flat.train_data_path)
    if (folder / MANIFEST).is_file():
        found = {name: folder for name in sorted(Manifest.load(folder).datasets)}
    else:
        found = {file.stem: file for file in sorted(folder.glob("**/*.parquet"))}
    if not found:
        raise DataError(
            "train_data_path has no datasets",
            where=folder,
            expected=f"Parquet files with query, passage, negative_1, ..., or a token cache with {MANIFEST}",
            fix="download the data, or make a cache with embedsmith tokenize",
        )
    return dict(list(found.items())[: flat.max_datasets])


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from YAML or JSON, or from a flat config of the reference; overrides name fields of either.

    Errors: `RecipeError` naming the file and the key, with the nearest known key.
    """
    tree = read_tree(path)
    if "model_path" in tree:
        flat = {f.name for f in fields(Reference)}
        old = [override for override in overrides if override.partition("=")[0] in flat]
        for override in old:
            apply_override(tree, override)
        tree = translated(tree, str(path))
        overrides = [override for override in overrides if override not in old]
    for override in overrides:
        apply_override(tree, override)
    return parse(Recipe, tree, where=str(path))
