"""Flat JSON configs of F2LLM and of the decoder toolkit built on it: every field name, turned into a recipe.

What differs on purpose, because it was a defect there: the full width is always part of a Matryoshka loss; uniformity
is taken on each side by itself, and only where in-batch rows are no relatives; validation rows are chosen by a hash of
the query; the run has one folder, `output_dir/experiment_id`. `train_batch_size` counts rows a process there and is
multiplied by the processes of the launch here.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.inputs import local_path
from embedsmith.core.progress import log
from embedsmith.core.recipe import apply_override, parse, read_tree
from embedsmith.core.settings import section
from embedsmith.data.formats.files import parquet_schema
from embedsmith.data.token_cache import MANIFEST, Manifest
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

    def recipe_tree(self) -> dict[str, Any]:
        """The recipe's tree of this flat config. Errors: `DataError` where the folder has no datasets."""
        self.warn()
        sources = [self.source(name, path) for name, path in self.datasets().items()]
        rows = self.train_subset_rows or self.read_rows_limit
        recipe: dict[str, Any] = {
            "model": self.model(),
            "data": [{**source, "part": [0, HELD_OUT], "limit": rows} for source in sources],
            "train": self.train(),
            "output": str(Path(self.output_dir) / self.experiment_id),
        }
        if self.validation_steps:
            held_out = [{**source, "part": [HELD_OUT, 1], "limit": self.valid_subset_rows} for source in sources]
            recipe["evaluate"] = {"every": self.validation_steps, "validation": held_out}
        return recipe

    def warn(self) -> None:
        """Log what a reader of the file might not expect. Errors: `RecipeError` for Matryoshka without widths."""
        if self.lora_enabled and self.learning_rate < 5e-5:
            log.warning("learning_rate %g moves adapters hardly; 1e-4 is usual", self.learning_rate)
        if self.pooling_mode == "eos" and self.bi_attn_enabled:
            log.warning("eos pooling of bidirectional attention: legal, mean is the usual choice")
        if self.pooling_mode == "mean" and not self.bi_attn_enabled:
            log.warning("mean pooling of causal attention: legal, weighted_mean or eos is the usual choice")
        if self.spread_enabled and self.spread_weight > 0 and self.train_batch_size < 4:
            log.warning("spread_weight with %d rows a process: there is little to spread", self.train_batch_size)
        if self.skip_instruction and self.pooling_mode == "eos":
            log.warning("skip_instruction changes nothing under eos pooling: the end token is never an instruction")
        if self.mrl_enabled and not self.mrl_dims:
            raise RecipeError("mrl_enabled without mrl_dims", fix="list the widths")

    def model(self) -> dict[str, Any]:
        lora = {
            "r": self.lora_r,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "bias": self.lora_bias,
            "targets": self.lora_target_modules,
        }
        return {
            "path": self.lora_adapter_path or self.model_path,
            "base": self.model_path if self.lora_adapter_path else None,
            "attention": "bidirectional" if self.bi_attn_enabled else "causal",
            "pooling": POOLINGS[self.pooling_mode],
            "include_prompt": not self.skip_instruction,
            "max_length": self.max_seq_length,
            "attn_implementation": self.attn_implementation,
            "gradient_checkpointing": self.gradient_checkpointing,
            "padding_side": self.padding_side or "right",
            "append_eos": self.append_eos,
            "eos_token": self.eos_token,
            "lora": lora if self.lora_enabled else None,
        }

    def train(self) -> dict[str, Any]:
        by_steps = self.train_steps > 0
        return {
            "steps": self.train_steps if by_steps else None,
            "epochs": None if by_steps else self.train_epochs,
            "batch_size": self.train_batch_size * int(os.environ.get("WORLD_SIZE", "1")),
            "learning_rate": self.learning_rate,
            "min_learning_rate": self.min_lr,
            "schedule": "cosine" if self.scheduler_type == "cosine" else "constant",
            "warmup": self.warmup_steps,
            "weight_decay": self.weight_decay,
            "betas": list(self.adam_betas),
            "clip_norm": self.max_grad_norm,
            "token_budget": self.token_budget,
            "seed": self.seed,
            "log_every": self.log_interval,
            "checkpoint_every": self.checkpointing_steps,
        }

    def source(self, name: str, path: Path) -> dict[str, Any]:
        """A dataset with its loss; hard negatives are counted by what kind of task it is."""
        kind = self.dataset_types.get(name, "retrieval")
        counts = {"classification": 1, "clustering": self.num_hard_neg_clustering or self.num_hard_neg}
        source: dict[str, Any] = {
            "path": str(path),
            "name": name,
            "task": kind,
            "negatives": counts.get(kind, self.num_hard_neg),
            "weight": self.dataset_weights.get(name, 1.0),
            "loss": self.loss(kind),
            "cache": self.cache_dir,
            "teacher": self.teacher_model_path,
        }
        if path.is_dir():
            return {**source, "split": name}
        columns = parquet_schema(path).names
        negatives = [column for column in columns if column.startswith("negative_") and column[9:].isdecimal()]
        return {**source, "columns": {"query": "query", "positives": "passage", "negatives": negatives}}

    def loss(self, kind: str) -> dict[str, Any]:
        in_batch = kind in self.inbatch_task_types
        loss: dict[str, Any] = {"type": "f2llm", "temperature": self.temperature, "in_batch": in_batch}
        if self.loss_form == "joint":
            own = "all" if in_batch else "own"
            loss = {
                "type": "infonce",
                "temperature": self.temperature,
                "negatives": own,
                "margin": self.false_neg_margin,
            }
        if self.mrl_enabled or self.use_mrl:
            given = None if self.mrl_dim_weights is None else list(self.mrl_dim_weights)
            weighting = "f2llm" if self.use_mrl and given is None else "ones"
            shape = {"dims": list(self.mrl_dims), "weights": given, "weighting": weighting, "normalise": False}
            loss = {"type": "matryoshka", "inner": loss, **shape}
        parts, weights = [loss], [1.0]
        if self.spread_enabled and self.spread_weight > 0 and in_batch:
            parts, weights = [*parts, {"type": "uniformity", "t": self.spread_t}], [*weights, self.spread_weight]
        if self.teacher_model_path is not None:
            parts, weights = [*parts, {"type": "teacher_vectors"}], [*weights, self.kd_weight]
        return loss if len(parts) == 1 else {"type": "sum", "parts": parts, "weights": weights}

    def datasets(self) -> dict[str, Path]:
        """Datasets by name: those of a token cache, or one a Parquet file of texts."""
        folder = local_path(self.train_data_path)
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
        return dict(list(found.items())[: self.max_datasets])


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from YAML or JSON, or from a flat config of the reference; overrides name fields of either.

    Errors: `RecipeError` naming the file and the key, with the nearest known key.
    """
    return parse(Recipe, recipe_tree(path, overrides), where=str(path))


def recipe_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain tree of the same."""
    tree = read_tree(path)
    if "model_path" in tree:
        flat = {f.name for f in fields(Reference)}
        old = [override for override in overrides if override.partition("=")[0] in flat]
        for override in old:
            apply_override(tree, override)
        if "limits" in tree:
            raise RecipeError(
                "limits: training has no such key, and mteb ignored it",
                where=path,
                fix="remove it; score a sample of the queries with embedsmith evaluate",
            )
        tree = parse(Reference, tree, where=str(path)).recipe_tree()
        overrides = [override for override in overrides if override not in old]
    for override in overrides:
        apply_override(tree, override)
    return tree
