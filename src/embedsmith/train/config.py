"""The recipe of a training run. These dataclasses are the only schema; what can be computed defaults to None."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

from embedsmith.core.batch import Loss
from embedsmith.core.errors import RecipeError
from embedsmith.core.settings import Count, NotNegative, Positive, Range, Word, did_you_mean, section
from embedsmith.core.shelf import losses
from embedsmith.data import PlanConfig, Source
from embedsmith.losses import TeacherNeighbours
from embedsmith.mining.config import LiveNegatives
from embedsmith.models import ModelConfig
from embedsmith.train.balance import Balance, ConanBalance, TaskRule, Told
from embedsmith.train.freeze import check_grammar

T = TypeVar("T")

Beta = Annotated[float, Range(ge=0, lt=1)]

HeadScored = Literal["sparse", "multivector", "hybrid"]
"""What is scored beside `dense` while training."""


@section
@dataclass(frozen=True)
class ConflictConfig:
    """How the gradients of the tasks point against each other, measured while training. Nothing of the training
    changes.

    - `every`: steps from one measurement to the next.
    - `share`: of the time that measuring may take at most; a measurement that would take more is left out.
    - `by`: what counts as one task: every `source` for itself, or all sources of a `task` together; `None` is that of
      `train.balance`, without it `source`.
    """

    every: Count = 20
    share: Annotated[float, Range(gt=0, le=1)] = 0.03
    by: Told | None = None


@section
@dataclass(frozen=True)
class AnchorConfig:
    """What holds the model to its start, so that it forgets less.

    - `l2_sp`: alpha of L2-SP (Li et al. 2018): alpha/2 |w - w_start|^2 is added to the loss, over all weights that the
      model began with; 0 leaves it out.
    - `l2_new`: its beta: beta/2 |w|^2 over weights that the losses brought along.
    - `texts`: a source of texts without labels on which the model is held to what it was at the start (learning without
      forgetting); every step has a batch of them. Rows with queries and positives serve too, for their texts.
    - `weight`: what the loss on these texts is multiplied by.
    - `loss`: what is minimised on them, with the model at the start as the teacher: `teacher_neighbours`, whom each
      text is near to, or `teacher_vectors`, the vectors themselves.
    """

    l2_sp: NotNegative = 0.0
    l2_new: NotNegative = 0.0
    texts: Source | None = None
    weight: Positive = 1.0
    loss: Annotated[Loss, losses] = TeacherNeighbours()

    def __post_init__(self) -> None:
        if not self.l2_sp and not self.l2_new and self.texts is None:
            raise RecipeError("train.anchor holds nothing", fix="set l2_sp, or texts with the path of a source")
        if self.texts is not None and (given := [key for key in _OWN if getattr(self.texts, key) is not None]):
            raise RecipeError(
                f"train.anchor.texts.{given[0]}: these texts have the loss of train.anchor and the start as teacher",
                fix=f"remove {given[0]} there" + ("; set train.anchor.loss" if given[0] == "loss" else ""),
            )


_OWN = ("loss", "teacher", "guide", "per_class")


@section
@dataclass(frozen=True)
class TrainConfig:
    """How to train. Neither `micro_batch` nor `token_budget` changes the negatives or the gradient.

    - `steps`: optimizer steps of the run, in place of `epochs`.
    - `epochs`: passes over the data, fractions allowed; `None` is one where `steps` is not given either.
    - `batch_size`: rows of an optimizer step, all ranks together, and so the pool of in-batch negatives; a source may
      have its own.
    - `freeze`: what is not trained: `backbone`, `embeddings`, `layers 0-5` (from 0, both included), or a list of them.
    - `learning_rate`: the highest rate, reached after the warm-up.
    - `group_learning_rates`: a rate of their own for parameters whose name matches a regular expression; the first
      match wins.
    - `min_learning_rate`: the rate at which the schedule ends.
    - `schedule`: how the rate falls after the warm-up: in a straight line, as a cosine, or not at all.
    - `warmup`: how long the rate rises, as a share of the run below 1, else as a number of steps.
    - `optimizer`: `adamw`; `adamw8bit`, the same with its state in 8 bits (bitsandbytes, extra `optim`); `muon` for the
      matrices of the backbone's layers, with AdamW for the rest.
    - `weight_decay`: the optimizer's decay of matrices; vectors (norms, biases, temperatures) are not decayed.
    - `betas`: AdamW's decay rates of its two averages of the gradient.
    - `clip_norm`: the norm to which larger gradients are scaled down; `None` leaves them as they are.
    - `max_skipped_steps`: how many steps in a row may be left out because their gradient is not finite; one more ends
      the run.
    - `precision`: `bf16` is autocast over fp32 weights; `auto` takes it where the hardware multiplies bf16. `fp16` is
      autocast with a scaled loss, for cards that do not multiply bf16.
    - `shard`: `true` spreads the backbone's weights, gradients and optimizer state over the ranks (FSDP2), `zero2` the
      optimizer's state and gradients alone (DeepSpeed, extra `deepspeed`).
    - `shard_ranks`: with `shard: true`, how many ranks hold the weights together, such as the cards of one node; every
      so many ranks hold a copy, and between copies travel gradients alone (`None`: all ranks hold one).
    - `balance`: a batch of every task in each step, and the rule by which they move the model together; `None` draws
      one source a step.
    - `anchor`: what holds the model to its start, so that it forgets less.
    - `conflict`: measures how the gradients of the tasks point against each other.
    - `mining`: replaces hard negatives while the model trains; `None` keeps those of the data.
    - `plan`: which rows meet in a batch, and in which order batches come.
    - `micro_batch`: texts encoded at once, to bound memory; `None` does not limit them.
    - `token_budget`: padded tokens whose graphs may be in memory together; `None` keeps all of them on a CPU, and on a
      CUDA card as many as its memory holds, which is measured.
    - `rank_timeout`: minutes that a rank waits for the others, also while the first of them scores or saves; then it
      ends with an error, and a launcher starts all of them again.
    - `seed`: of everything that is drawn.
    - `log_every`: steps between two lines of numbers.
    - `checkpoint_every`: steps between two checkpoints, or `epoch` for one at the end of each; `None` is a tenth of the
      run.
    - `keep_checkpoints`: how many checkpoints stay; the best one is kept besides.
    - `final`: whether the result is the last model or the one with the best score of `evaluate`.
    - `log_with`: trackers that get the numbers too; any that accelerate knows.
    """

    steps: Count | None = None
    epochs: Positive | None = None
    batch_size: Count = 64
    freeze: str | tuple[Word, ...] = ()
    learning_rate: Positive = 2e-5
    group_learning_rates: dict[str, NotNegative] = field(default_factory=dict)
    min_learning_rate: NotNegative = 0.0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: NotNegative = 0.1
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    weight_decay: NotNegative = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip_norm: Positive | None = 1.0
    max_skipped_steps: Annotated[int, Range(ge=0)] = 10
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    shard: bool | Literal["zero2"] = False
    shard_ranks: Count | None = None
    balance: Balance | None = None
    anchor: AnchorConfig | None = None
    conflict: ConflictConfig | None = None
    mining: LiveNegatives | None = None
    plan: PlanConfig = PlanConfig()
    micro_batch: Count | None = None
    token_budget: Count | None = None
    rank_timeout: Positive = 30.0
    seed: int = 0
    log_every: Count = 10
    checkpoint_every: Count | Literal["epoch"] | None = None
    keep_checkpoints: Count = 2
    final: Literal["last", "best"] = "last"
    log_with: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "freeze", (self.freeze,) if isinstance(self.freeze, str) else self.freeze)
        check_grammar(self.freeze)
        if self.steps is not None and self.epochs is not None:
            raise RecipeError("steps and epochs are both set", fix="take one of them back: train.epochs=null")
        if self.micro_batch is not None and self.token_budget is not None:
            raise RecipeError("micro_batch and token_budget are both set", fix="keep one of them")
        if self.balance is not None and (self.plan.batches == "mixed" or self.plan.schedule != "proportional"):
            raise RecipeError(
                "train.balance has all tasks in every step: a schedule or mixed batches mean nothing beside it",
                fix="remove train.balance, or train.plan.batches and train.plan.schedule",
            )
        if self.shard_ranks is not None and self.shard is not True:
            raise RecipeError("train.shard_ranks without train.shard=true", fix="set train.shard=true, or remove it")
        self._check_by_task()

    def _check_by_task(self) -> None:
        """Errors: `RecipeError` where the gradients of the tasks cannot be told apart as asked."""
        rule, conflict = isinstance(self.balance, TaskRule), self.conflict
        pulled = self.anchor is not None and bool(self.anchor.l2_sp or self.anchor.l2_new)
        if self.shard == "zero2" and (rule or conflict or pulled):
            what = "train.balance" if rule else "train.conflict" if conflict else "train.anchor.l2_sp"
            raise RecipeError(
                f"{what} under train.shard=zero2: DeepSpeed adds up the gradients of a step and keeps none by itself",
                fix=f"set train.shard=true or train.shard=false, or remove {what}",
            )
        if conflict is None:
            return
        if isinstance(self.balance, ConanBalance) and self.balance.mode == "split":
            raise RecipeError(
                "train.conflict with train.balance.mode=split: no rank has the gradients of both tasks",
                fix="set train.balance.mode=balanced, or remove train.conflict",
            )
        if isinstance(self.balance, TaskRule) and conflict.by not in (None, self.balance.by):
            raise RecipeError(
                f"train.conflict.by={conflict.by} and train.balance.by={self.balance.by}",
                fix="remove train.conflict.by: the rule says what one task is",
            )

    @property
    def rows_a_step(self) -> int | None:
        """Rows of a step of a source that does not say; `None` where they follow from the rows' lengths."""
        return None if self.plan.batch_tokens is not None or self.plan.batch_sizes is not None else self.batch_size


@section
@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure while training.

    - `tasks`: names or paths for `embedsmith evaluate`, scored at every evaluation; none by default.
    - `held_out`: where no `tasks` are named, rows of every source of `data` that are scored instead of being trained
      on, at most a tenth of it and so that no text is in both parts (those of `embedsmith split`, the same for every
      seed of the run); `None` trains on all.
    - `data`: the folder in which the tasks are looked up; `None` is that of `embedsmith evaluate`.
    - `every`: steps between evaluations; `None` measures only at the end.
    - `metric`: the task whose main score chooses the best checkpoint; `None` is the mean over tasks.
    - `validation`: sources whose loss is reported without training on them.
    - `patience`: evaluations without a better score after which training stops early; `None` never does.
    - `before`: score the model before the first step too, so that the report can tell what training changed.
    - `probes`: those of `tasks` that tell what is forgotten: how far each lies below its score before the first step is
      logged as `forgetting/TASK`. None of their queries may be trained on.
    - `embedder`: of `task: rerank`, the embedding model whose ranking is put into order anew in retrieval tasks; its
      own scores are logged too, as `score/TASK/embedder`.
    - `depth`: of `task: rerank`, how many documents of that ranking the reranker reads.
    - `geometry`: texts of the first task whose geometry is logged at every evaluation; `None` logs none.
    - `heads`: outputs beside `dense` that are scored too, logged as `score/TASK/HEAD`.
    - `dims`: widths of the vectors that are scored too (Matryoshka), logged as `score/TASK/WIDTH`.
    """

    tasks: tuple[str, ...] = ()
    held_out: Count | None = None
    data: str | None = None
    every: Count | None = None
    metric: str | None = None
    validation: tuple[Source, ...] = ()
    patience: Count | None = None
    before: bool = True
    probes: tuple[str, ...] = ()
    embedder: str | None = None
    depth: Count = 100
    geometry: Count | None = None
    heads: tuple[HeadScored, ...] = ()
    dims: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        if self.geometry is not None and not self.scores:
            raise RecipeError("geometry needs texts to look at", fix="set evaluate.tasks or evaluate.held_out")
        if self.patience is not None and not (self.scores and self.every):
            raise RecipeError("patience needs a score to watch", fix="set evaluate.held_out and evaluate.every")
        if self.metric is not None and self.metric not in self.tasks:
            raise RecipeError(f"metric {self.metric!r} is not one of evaluate.tasks", expected=", ".join(self.tasks))
        if strange := next((name for name in self.probes if name not in self.tasks), None):
            raise RecipeError(
                f"probes: {strange!r} is not one of evaluate.tasks{did_you_mean(strange, self.tasks)}",
                expected=", ".join(self.tasks) or "a task that evaluate.tasks names",
            )
        if self.probes and not self.before:
            raise RecipeError("probes need the scores at the start", fix="set evaluate.before=true")

    def probes_of(self, tasks: Sequence[T]) -> list[T]:
        """Those of the loaded tasks that are probes."""
        return [task for name, task in zip(self.tasks, tasks, strict=True) if name in self.probes]

    @property
    def scores(self) -> bool:
        """Whether anything is scored."""
        return bool(self.tasks) or self.held_out is not None


@section
@dataclass(frozen=True)
class Recipe:
    """Everything a training run depends on.

    >>> import embedsmith as es
    >>> from embedsmith.models import ModelConfig
    >>> from embedsmith.train import TrainConfig
    >>> pairs = es.Source(path="pairs.jsonl", batch_size=8)
    >>> recipe = es.Recipe(ModelConfig("my-model"), data=(pairs,), output="runs/made", train=TrainConfig(steps=2))
    >>> es.train(recipe).folder.as_posix()
    'runs/made/model'

    - `task`: what is trained: `embed`, an embedding model; `rerank`, a reranker, which reads a query and a document
      together (docs/rerankers.md).
    - `model`: the encoder to start from, with its pooling, prompts and heads.
    - `data`: the sources to train on, one or more.
    - `output`: the run's folder.
    - `train`: steps, learning rate, memory, precision, checkpoints.
    - `evaluate`: tasks and validation sources to score while training.
    """

    model: ModelConfig
    data: tuple[Source, ...]
    output: Word
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    task: Literal["embed", "rerank"] = "embed"

    def __post_init__(self) -> None:
        if not self.data:
            raise RecipeError("data: at least one source is needed")
        if self.train.final == "best" and not self.evaluate.scores:
            raise RecipeError("train.final=best needs a score", fix="set evaluate.held_out, or train.final=last")
        if self.train.freeze and self.model.lora is not None:
            raise RecipeError(
                "train.freeze with model.lora: under adapters all weights of the backbone are frozen",
                fix="remove one of the two",
            )
        if self.model.new_tokens and {"backbone", "embeddings"} & set(self.train.freeze):
            raise RecipeError(
                f"train.freeze={self.train.freeze[0]} with model.new_tokens: what new tokens mean would not be learned",
                fix="freeze layers alone, or leave new_tokens out",
            )
        if self.train.anchor is not None and self.train.anchor.l2_sp and self.model.lora is not None:
            raise RecipeError(
                "train.anchor.l2_sp with model.lora: under adapters the weights of the start stay as they are",
                fix="remove train.anchor.l2_sp, or hold the model by train.anchor.texts",
            )
        _check_task(self.task, self.train, self.evaluate)


def _check_task(task: str, train: TrainConfig, evaluate: EvaluateConfig) -> None:
    """Errors: `RecipeError` for what means nothing to a reranker, or to a model that is not one."""
    if task != "rerank":
        if evaluate.embedder is not None:
            raise RecipeError("evaluate.embedder without a reranker", fix="set task=rerank, or leave it out")
        return
    given = {
        "train.mining": train.mining,
        "train.balance": train.balance,
        "train.anchor.texts": train.anchor is not None and train.anchor.texts,
        "evaluate.geometry": evaluate.geometry,
        "evaluate.heads": evaluate.heads,
        "evaluate.dims": evaluate.dims,
    }
    if wrong := next((name for name, value in given.items() if value), None):
        raise RecipeError(f"{wrong} is of embedding models", fix=f"remove {wrong}, or set task=embed")
