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
from typing import Annotated, Any, Literal

import pyarrow.parquet as pq

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.inputs import local_path
from embedsmith.core.progress import log
from embedsmith.core.recipe import apply_override, parse, read_tree
from embedsmith.core.settings import Count, NotNegative, Positive, Range, Share, Width, did_you_mean, section
from embedsmith.data import Source, part_of, read_source
from embedsmith.data.f2llm import f2llm_source, parquet_files
from embedsmith.data.formats.file_kinds import parquet_schema, readable_parquet
from embedsmith.data.record import TASKS
from embedsmith.data.token_cache import MANIFEST, Manifest
from embedsmith.train.config import Beta, Recipe

POOLINGS = {"eos": "last", "mean": "mean", "weighted_mean": "weighted_mean", "cls": "cls", "max": "max"}
HELD_OUT = 0.99
SMALL = 2000
"""Rows of a dataset below which a hundredth may be nothing to validate on."""
Number = Annotated[int, Range(ge=0)]


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
    `skip_instruction`: leaves the instruction of a query, all up to `instruction_separator`, out of the pooling, and
        the end token of every text out of its mean.
    `instruction_separator`: the text behind which the query itself begins.
    `train_subset_rows`: rows taken of every dataset; 0 takes all.
    `valid_subset_rows`: rows taken for validation; 0 takes all.
    `read_rows_limit`: as `train_subset_rows`, which goes first.
    `max_datasets`: only the first so many datasets, by name; 0 takes all.
    `fast_split`: accepted; rows are held out by a hash of the query in any case.
    `teacher_model_path`: a model whose vectors are learned from as well.
    `kd_weight`: weight of the teacher's term.
    `temperature`: of the contrastive loss.
    `loss_form`: `split`, in-batch and hard negatives as two terms, or `joint`, as one.
    `inbatch_task_types`: kinds of data that use in-batch negatives.
    `false_neg_margin`: with `joint`, negatives above the positive's score plus this are left out.
    `dataset_types`: kind of task by dataset; by default what a token cache says, else what F2LLM's scripts know
        (`data/f2llm.py`).
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
    num_hard_neg: Number = 7
    num_hard_neg_clustering: Number | None = None
    max_seq_length: Annotated[int, Range(ge=4)] = 2048
    train_batch_size: Count = 8
    train_epochs: Positive = 5
    train_steps: int = -1
    checkpointing_steps: Count | None = None
    validation_steps: Number | None = None
    log_interval: Count = 10
    learning_rate: Positive = 1e-4
    min_lr: NotNegative = 1e-6
    weight_decay: NotNegative = 1e-2
    warmup_steps: NotNegative = 100
    scheduler_type: Literal["cosine", "constant_with_warmup"] = "cosine"
    mrl_enabled: bool = False
    use_mrl: bool = False
    mrl_dims: tuple[Width, ...] | None = None
    mrl_dim_weights: tuple[Positive, ...] | None = None
    spread_enabled: bool = False
    spread_weight: NotNegative = 0.0
    spread_t: Positive = 2.0
    lora_enabled: bool = False
    lora_r: Width = 8
    lora_alpha: Positive = 16
    lora_dropout: Share = 0.05
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    lora_task_type: str = "FEATURE_EXTRACTION"
    lora_target_modules: Literal["auto"] | tuple[str, ...] | None = None
    lora_adapter_path: str | None = None
    bi_attn_enabled: bool = False
    attn_implementation: str | None = None
    pooling_mode: str = "eos"
    skip_instruction: bool = False
    instruction_separator: str = "Query:"
    train_subset_rows: Number | None = None
    valid_subset_rows: Number | None = None
    read_rows_limit: Number | None = None
    max_datasets: Number | None = None
    fast_split: bool = False
    teacher_model_path: str | None = None
    kd_weight: NotNegative = 1.0
    temperature: Positive = 0.05
    loss_form: Literal["split", "joint"] = "split"
    inbatch_task_types: tuple[str, ...] = ("retrieval",)
    false_neg_margin: float | None = None
    dataset_types: Mapping[str, str] = field(default_factory=dict)
    dataset_weights: Mapping[str, Positive] = field(default_factory=dict)
    gradient_checkpointing: bool = True
    padding_side: Literal["left", "right"] | None = None
    append_eos: bool = True
    eos_token: str | None = None
    token_budget: Count | None = None
    adam_betas: tuple[Beta, Beta] = (0.9, 0.98)
    max_grad_norm: Positive = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        dims = self.mrl_dims or ()
        if self.mrl_dim_weights and len(self.mrl_dim_weights) != len(dims):
            raise RecipeError(f"mrl_dim_weights has {len(self.mrl_dim_weights)} entries for {len(dims)} mrl_dims")
        if self.pooling_mode not in POOLINGS:
            raise RecipeError(f"pooling_mode {self.pooling_mode!r}", expected=f"one of {', '.join(POOLINGS)}")
        if unknown := [kind for kind in (*self.dataset_types.values(), *self.inbatch_task_types) if kind not in TASKS]:
            raise RecipeError(f"a dataset of the kind {unknown[0]!r}", expected=f"one of {', '.join(TASKS)}")

    def recipe_tree(self) -> dict[str, Any]:
        """The recipe's tree of this flat config. Errors: `DataError` where the folder has no datasets, or one that
        cannot be read as the config says; `RecipeError` for a name that no dataset has."""
        self.warn()
        sources = self.sources()
        rows = self.train_subset_rows or self.read_rows_limit or None
        recipe: dict[str, Any] = {
            "model": self.model(),
            "data": [{**source, "part": [0, HELD_OUT], "limit": rows} for source in sources],
            "train": self.train(),
            "output": str(Path(self.output_dir) / self.experiment_id),
        }
        if self.validation_steps:
            some = {"part": [HELD_OUT, 1], "limit": self.valid_subset_rows or None}
            held_out = [{**source, **some} for source in sources if _can_validate(source)]
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
        if (self.mrl_enabled or self.use_mrl) and not self.mrl_dims:
            raise RecipeError("mrl_enabled without mrl_dims", fix="list the widths")

    def encoding(self) -> dict[str, Any]:
        """How the model turns texts into vectors, as `load` has it."""
        return {
            "attention": "bidirectional" if self.bi_attn_enabled else "causal",
            "pooling": POOLINGS[self.pooling_mode],
            "include_prompt": not self.skip_instruction,
            "pool_special_tokens": False if self.skip_instruction else None,
            "max_length": self.max_seq_length,
            "attn_implementation": self.attn_implementation,
            "padding_side": self.padding_side or "right",
            "append_eos": self.append_eos,
            "eos_token": self.eos_token,
        }

    def model(self) -> dict[str, Any]:
        lora = {
            "r": self.lora_r,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "bias": self.lora_bias,
            "targets": self.lora_target_modules or "auto",
        }
        return {
            "path": self.lora_adapter_path or self.model_path,
            "base": self.model_path if self.lora_adapter_path else None,
            "gradient_checkpointing": self.gradient_checkpointing,
            "lora": lora if self.lora_enabled else None,
            **self.encoding(),
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

    def sources(self) -> list[dict[str, Any]]:
        """All datasets, and a line on those whose rows are no negatives of each other."""
        found = self.datasets()
        for key in ("dataset_types", "dataset_weights"):
            if wrong := [name for name in getattr(self, key) if name not in found]:
                raise RecipeError(
                    f"{key}: no dataset is called {wrong[0]!r}{did_you_mean(wrong[0], list(found))}",
                    expected=f"those of {self.train_data_path}: {', '.join(found)}",
                )
        sources = [self.source(name, path) for name, path in found.items()]
        for kind in sorted({one["task"] for one in sources} - set(self.inbatch_task_types)):
            names = ", ".join(one["name"] for one in sources if one["task"] == kind)
            log.info("%s, without in-batch negatives and spread-out: %s (dataset_types says otherwise)", kind, names)
        return sources

    def source(self, name: str, path: Path) -> dict[str, Any]:
        """A dataset with its loss; hard negatives are counted by what kind of task it is."""
        if path.is_dir():
            task = Manifest.load(path).datasets[name].task
            own: dict[str, Any] = {"path": str(path), "name": name, "split": name, "task": task}
        else:
            own = f2llm_source(name, path)
        kind = self.dataset_types.get(name, own["task"])
        if path.is_dir() and kind != own["task"]:
            raise RecipeError(
                f"dataset_types calls {name} {kind}, and its tokens were made as {own['task']}",
                where=path,
                fix=f"tokenize it again, with --set task={kind}",
            )
        if self.skip_instruction:
            separator = self.instruction_separator or "Query:"
            if not path.is_dir():
                own["instruction_separator"] = separator
            elif self.pooling_mode != "eos":
                _refuse_whole_queries(name, path, f"--model {self.model_path} --set instruction_separator={separator}")
        counts = {"classification": 1, "clustering": self.num_hard_neg_clustering or self.num_hard_neg}
        return own | {
            "task": kind,
            "negatives": counts.get(kind, self.num_hard_neg),
            "weight": self.dataset_weights.get(name, 1.0),
            "loss": self.loss(kind),
            "cache": self.cache_dir or None,
            "teacher": self.teacher_model_path,
        }

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
            given = list(self.mrl_dim_weights) if self.mrl_dim_weights else None
            weighting = "f2llm" if self.use_mrl and given is None else "ones"
            shape = {"dims": list(self.mrl_dims or ()), "weights": given, "weighting": weighting, "normalise": False}
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
            found = dict.fromkeys(sorted(Manifest.load(folder).datasets), folder)
        else:
            found = parquet_files(folder)
        if not found:
            raise DataError(
                "train_data_path has no datasets",
                where=folder,
                expected=f"Parquet files with query, passage, negative_1, ..., or a token cache with {MANIFEST}",
                fix="download the data, or make a cache with embedsmith tokenize",
            )
        return dict(list(found.items())[: self.max_datasets or None])


def _refuse_whole_queries(name: str, folder: Path, options: str) -> None:
    """Errors: `DataError` for tokens that do not say where instructions end, naming the options that make others."""
    path = next(file for file in (folder / f"{name}_query.parquet", folder / f"{name}.parquet") if file.is_file())
    column = "query_body_start"
    with readable_parquet(path):
        known = column in parquet_schema(path).names
        if known and any(
            any(part.column(0).to_pylist()) for part in pq.ParquetFile(path).iter_batches(columns=[column])
        ):
            return
    raise DataError(
        "skip_instruction: these tokens do not say where the instruction of a query ends",
        where=path,
        fix=f"tokenize the texts again: embedsmith tokenize FOLDER --out NEW_FOLDER {options}",
    )


def _can_validate(source: Mapping[str, Any]) -> bool:
    """Whether a hundredth of a dataset holds a row; told where it does not, as in a small file."""
    path = Path(source["path"])
    rows = Manifest.load(path).datasets[source["name"]].rows if path.is_dir() else pq.read_metadata(path).num_rows
    if rows >= SMALL:
        return True
    try:
        part_of(read_source(parse(Source, dict(source), where=source["name"])), (HELD_OUT, 1))
    except DataError as error:
        if "no row falls into part" not in error.what:
            raise
        log.warning(
            "%s has %d rows, and none is in the hundredth held out: it is not validated on", source["name"], rows
        )
        return False
    return True


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from YAML or JSON, or from a flat config of the reference; overrides name fields of either.

    Errors: `RecipeError` naming the file and the key, with the nearest known key.
    """
    return parse(Recipe, recipe_tree(path, overrides), where=str(path))


def recipe_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain tree of the same."""
    tree = read_tree(path)
    if "model_path" in tree or (len(_FLAT & tree.keys()) > 1 and not {"model", "data"} & tree.keys()):
        # a config of the reference: it has some of its keys, and none of a recipe's sections
        changes = [one for one in overrides if _key(one) not in _OF_RECIPE]
        overrides = [one for one in overrides if _key(one) in _OF_RECIPE]
        tree = read_reference(tree, changes, where=path).recipe_tree()
    for override in overrides:
        apply_override(tree, override)
    return tree


_FLAT = {f.name for f in fields(Reference)}
_OF_RECIPE = {f.name for f in fields(Recipe)}


def _key(override: str) -> str:
    return override.partition("=")[0].partition(".")[0]


def read_reference(tree: dict[str, Any], changes: Sequence[str], where: object) -> Reference:
    """A flat config, changed. Errors: `RecipeError` in the words of such configs, with the nearest key."""
    for change in changes:
        if "=" in change and _key(change) not in _FLAT:
            near = did_you_mean(_key(change), sorted(_FLAT)) or did_you_mean(_key(change), sorted(_OF_RECIPE))
            raise RecipeError(
                f"{_key(change)}: a flat config has no such key{near}",
                where=where,
                expected=f"one of its own, or of a recipe's: {', '.join(sorted(_OF_RECIPE))}",
            )
        apply_override(tree, change)
    if "limits" in tree:
        raise RecipeError(
            "limits: training has no such key, and mteb ignored it",
            where=where,
            fix="remove it; score a sample of the queries with embedsmith evaluate",
        )
    return parse(Reference, tree, where=str(where))
