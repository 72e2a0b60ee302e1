"""The settings of a model, and what is derived where one is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from embedsmith.core.encoder import Role
from embedsmith.core.errors import ModelError
from embedsmith.core.settings import Count, Width, Word, section
from embedsmith.core.shelf import Name, heads, poolings
from embedsmith.models.attention import Mode, SoftMask
from embedsmith.models.expansion import Expansion
from embedsmith.models.heads.dense import HeadConfig
from embedsmith.models.lora import LoraConfig
from embedsmith.models.pooling import PoolerConfig

Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
ComputeType = Literal["float32", "bfloat16", "float16"]
PoolingName = Annotated[str, Name(poolings, joined=True)]
HeadName = Annotated[str, Name(heads)]  # named here: in the class, `heads` is a field


@section
@dataclass(frozen=True)
class ModelConfig:
    """Which model to load and what to change about it; `None` means "as the folder says".

    `path`: a transformers or sentence-transformers folder, or a hub id.
    `revision`: of a hub id, a branch, tag or commit; by default its main branch.
    `backend`: what computes: `torch`, or the graph that `embedsmith export` put into the folder, on `onnx` (ONNX
        Runtime) or `openvino`. By default torch where the folder has weights, else the graph. A graph is not trained.
    `pooling`: how token states become one vector: `cls`, `mean`, `weighted_mean`, `mean_sqrt_len`, `last`, `max`,
        `attention`, `latent`, or one of an installed package; several side by side as `mean+max`; required for a folder
        that does not say.
    `pooler`: the shape of a pooling with weights, such as the last two.
    `max_length`: tokens a text may have, special tokens included (see `derive_max_length`).
    `prompts`: text put before every text, by `task-role`, task or role; replaces the folder's.
    `template`: makes the prompts: a published one (`qwen3`, `e5`, ...), or texts of your own by role (see tokenize.py).
    `instructions`: what the template asks for, by task; `default` is for texts without a task.
    `include_prompt`: whether prompt tokens take part in the pooling; false leaves the instruction out.
    `heads_include_prompt`: the same for heads of tokens; by default M3's `sparse` and `multivector` leave prompts out,
        which would match in all texts of a role, and others do as `include_prompt` says.
    `normalize`: whether vectors get length 1; a plain transformers folder is normalised.
    `similarity`: how two vectors are compared wherever they are scored: `cosine`, `dot`, `euclidean`, `manhattan`.
    `dimension`: adds a linear head from the pooled width to this width, with orthogonal rows.
    `head`: a new dense head, where its width is not all there is to say.
    `heads`: what the model makes of a text besides `dense`, which is always there: `sparse`, `multivector`, each alone
        or both, or heads of an installed package. A head that the folder has not is new where a recipe trains it, else
        an error; one that is not named is left out. `retromae` (docs/m3.md) and `mntp` (docs/decoders.md) are for
        pre-training.
    `sparse`: what a `sparse` head is: `lexical`, M3's weight a token (the default of a new one), or `splade`, a weight
        a word of the vocabulary through the language-model head.
    `sparse_terms`: words that a text keeps of a `splade` head; by default what the folder says, or 256.
    `multivector`: what a new `multivector` head is: `m3`, the mean over query tokens without the CLS (the default), or
        `colbert`, the sum over them, with the CLS, without a bias, and without the punctuation of documents.
    `multivector_dim`: width of a token's vector in a new `multivector` head, by default the backbone's (of `colbert`,
        128).
    `new_tokens`: texts that become tokens, with embeddings that start as the mean of those of their pieces
        (new_tokens.py); one that is a token already is an error.
    `expansion`: fills short queries up with mask tokens whose vectors a `multivector` head scores too, as ColBERT does:
        `{length: 32}`, `attend` (whether words see them, by default not), `cut` (longer queries are cut to that, by
        default), `token`. No other head reads them; `None` is as the folder says.
    `positions`: lengthens the position table of a BERT or XLM-RoBERTa to this many tokens (see `extend_positions`).
    `mcls`: of an encoder with cls pooling, a CLS before every so many tokens; the vector is their mean. An option of
        loading, not saved with the model (tokenize.py).
    `attn_implementation`: as in transformers (`sdpa`, `eager`, `flash_attention_2`); by default its own choice, and
        under packing on CUDA torch's kernels for texts in a row.
    `dtype`: of the weights in memory; keep float32 for training, bf16 there comes from autocast.
    `gradient_checkpointing`: computes layers again in the backward pass: less memory, about a third more time.
    `trust_remote_code`: runs Python code that lies in the model's folder.
    `packing`: no padding is computed: the texts of a chunk stand in one row, kept apart (packing.py). `auto` does so on
        CUDA where it is proven on the model when that is loaded, and says in one line if not; `true` refuses a model
        that cannot; `false` pads.
    `compile`: the backbone through torch.compile with dynamic shapes; pays on GPUs and long runs. Where it fails, a
        line says so and the model runs without.

    For decoders (docs/decoders.md):
    `attention`: `native`, `causal`, `bidirectional` or `softmask`, proven on the model when it is loaded.
    `partial_attention`: accepts a family some of whose layers stay causal.
    `softmask`: the schedule of `attention: softmask`.
    `layers`: keep the first so many layers, or those in a list; by default all.
    `lora`: train adapters instead of the weights.
    `base`: where the base of an adapter folder is now; by default where it was.
    `append_eos`: an end token behind every text; by default for last-token pooling.
    `eos_token`: the text of that token; by default what the tokenizer appends, else its eos token.
    `cls_token`: a token put in front of every text, new or of the vocabulary; for cls pooling.
    `pool_special_tokens`: whether bos and its like take part in averaging poolings; by default not in a folder that
        does not say how to pool.
    `echo`: a text with `{text}` in it twice; the vector is pooled over the second.
    `padding_side`: `right` or `left`; both give the same vectors, right is faster.
    """

    path: str
    revision: str | None = None
    backend: Literal["torch", "onnx", "openvino"] | None = None
    pooling: PoolingName | None = None
    max_length: int | None = None
    prompts: Mapping[str, str] | None = None
    normalize: bool | None = None
    similarity: Similarity | None = None
    dimension: Width | None = None
    heads: tuple[HeadName, ...] | None = None
    multivector: Literal["m3", "colbert"] | None = None
    multivector_dim: Width | None = None
    expansion: Expansion | None = None
    sparse: Literal["lexical", "splade"] | None = None
    sparse_terms: Count | None = None
    new_tokens: tuple[Word, ...] = ()
    positions: Count | None = None
    mcls: int | None = None
    attn_implementation: str | None = None
    dtype: ComputeType = "float32"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    packing: bool | Literal["auto"] = "auto"
    compile: bool = False
    attention: Mode | None = None
    partial_attention: bool = False
    softmask: SoftMask = SoftMask()
    layers: int | tuple[int, ...] | None = None
    lora: LoraConfig | None = None
    base: str | None = None
    pooler: PoolerConfig | None = None
    head: HeadConfig | None = None
    template: str | Mapping[str, str] | None = None
    instructions: Mapping[str, str] | None = None
    include_prompt: bool | None = None
    heads_include_prompt: bool | None = None
    append_eos: bool | None = None
    eos_token: str | None = None
    cls_token: str | None = None
    pool_special_tokens: bool | None = None
    echo: str | None = None
    padding_side: Literal["left", "right"] | None = None

    def continued(self, folder: str) -> ModelConfig:
        """The same model as `folder` holds it: what was changed about the original is in there, how to run it is
        not."""
        kept = (
            *("attn_implementation", "dtype", "gradient_checkpointing", "trust_remote_code", "packing", "compile"),
            *("attention", "partial_attention", "softmask", "lora", "base"),
        )
        return ModelConfig(path=folder, **{name: getattr(self, name) for name in kept})


ROLE_NAMES: Mapping[str, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Names under which folders keep the prompt of a role."""


@dataclass(frozen=True)
class Settings:
    """How an embedder turns texts into vectors, everything decided. What `save` writes and `load` reads back.

    `include_prompt`: prompt tokens take part in pooling. `lower_case`: the tokenizer makes texts lower-case.
    `heads_include_prompt`: prompt tokens take part in heads of tokens; `None` is as each has it by itself.
    `templates`: by role, for instructions that come with a text. `echo`, `pool_special_tokens`: see `ModelConfig`.
    `eos_id`: the token put behind every text, where the tokenizer did not do so by itself. `mcls`: see `ModelConfig`.
    `similarity`: how two vectors are compared. `truncate_dim`: the leading numbers that `encode` keeps by default. Both
    are as a sentence-transformers folder says.
    `main`: the output that the model is made for, which is scored where none is named. `lengths`: tokens that a text of
    a role may have, where that is less than `max_length`. `expansion`: of queries. `form`: of the folder that it is
    saved as, on the shelf of forms.
    What is the same for most models stays out of `repr`, and with it out of the hashes that were made before it was
    there; `unusual` names it.

    `pooling` is `None` for a model that was made for tokens or words alone, and has no dense vector.
    """

    pooling: str | None
    max_length: int
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    include_prompt: bool = True
    normalize: bool = True
    lower_case: bool = False
    templates: Mapping[str, str] = field(default_factory=dict)
    echo: str | None = None
    pool_special_tokens: bool = True
    eos_id: int | None = None
    mcls: int | None = None
    similarity: Similarity = field(default="cosine", repr=False)
    truncate_dim: int | None = field(default=None, repr=False)
    heads_include_prompt: bool | None = field(default=None, repr=False)
    main: str = field(default="dense", repr=False)
    lengths: Mapping[str, int] = field(default_factory=dict, repr=False)
    expansion: Expansion | None = field(default=None, repr=False)
    form: str = field(default="dense", repr=False)

    @property
    def unusual(self) -> dict[str, Any]:
        """What `repr` leaves out and is not as by default, as far as a representation or a score depends on it."""
        plain = Settings(self.pooling, self.max_length)
        shown = {"form", "main", "heads_include_prompt"} | {
            entry.name for entry in dataclasses.fields(self) if entry.repr
        }
        hidden = [entry.name for entry in dataclasses.fields(self) if entry.name not in shown]
        return {name: getattr(self, name) for name in hidden if getattr(self, name) != getattr(plain, name)}

    def length_for(self, role: Role) -> int:
        """Tokens that a text of this role may have."""
        return min(self.lengths.get(role, self.max_length), self.max_length)

    def prompt_for(self, role: Role, task: str | None = None) -> str:
        """The prompt of a text: the first of `task-role`, `task`, role (for documents also `passage` and `corpus`), the
        default prompt; else none. An empty prompt that was set on purpose counts."""
        if role not in ROLE_NAMES:
            raise ModelError(f"unknown role {role!r}", expected="query or document")
        keys = [f"{task}-{name}" for name in ROLE_NAMES[role]] + [task] if task is not None else []
        for key in (*keys, *ROLE_NAMES[role], self.default_prompt):
            if key is not None and key in self.prompts:
                return self.prompts[key]
        return ""

    def with_prompts(self, prompts: Mapping[str, str]) -> Settings:
        """The same settings under other prompts; a default prompt that no longer exists is dropped."""
        default = self.default_prompt if self.default_prompt in prompts else None
        return dataclasses.replace(self, prompts=dict(prompts), default_prompt=default)


def derive_max_length(asked: int | None, folder: int | None, tokenizer: int | None, positions: int | None) -> int:
    """Tokens a text may have: what was asked, else what the folder says, else the tokenizer's bound, else the number
    of positions the backbone has, else 512; never more than those positions.

    Errors: `ModelError` when more is asked for than the backbone has positions, or less than one token fits.
    """
    most = 10_000_000 if positions is None else positions
    if asked is not None and not 4 <= asked <= most:
        raise ModelError(
            f"max_length={asked} is not possible for this model",
            expected=f"from 4 to {most}",
            fix=f"set model.max_length={min(max(asked, 4), most)}",
        )
    # transformers writes 1e30 where there is no maximum
    said = (bound if bound is not None and bound < 1_000_000 else None for bound in (folder, tokenizer))
    bounds = (asked, *said, positions)
    length = next((value for value in bounds if value is not None), 512)
    return length if positions is None else min(length, positions)
