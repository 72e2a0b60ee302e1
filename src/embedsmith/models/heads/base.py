"""What every head has in common: what a model makes of a text beside its dense vector, found on the shelf by name.

    @heads.register("importance")
    class Importance(Head):
        file = "importance.safetensors"

        @classmethod
        def build(cls, source: HeadSource) -> Importance: ...

        def forward(self, hidden_NTH: Tensor, padded: PaddedTokens, part_NT: Tensor) -> Sparse: ...

The name is then a word of the recipe's `model.heads`, an output of the model, and what losses and search ask for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from embedsmith.core.errors import ModelError
from embedsmith.core.shelf import heads
from embedsmith.core.tokens import PaddedTokens

TRAIN_HEAD = "model.heads=[dense,{}] in a training recipe, or new_heads=True in Python"
"""How a head that a model lacks is made."""


@dataclass(frozen=True)
class HeadSource:
    """What a head is built from. `folder`: the model's, with the head's file if it has one. `base`: the folder of the
    language model, where `folder` holds an adapter alone. `adapted`: adapters are trained in place of the backbone's
    words, so a head that has words of its own keeps them too. `new_heads`: heads that the folder lacks are made anew,
    to be trained. `specs`: how heads are made that the folder's modules describe. `width`: numbers of the pooled and
    projected vector. The rest are the keys of the recipe's `model`."""

    folder: Path
    base: Path
    backbone: Any
    tokenizer: Any
    adapted: bool = False
    trust_remote_code: bool = False
    sparse: Literal["lexical", "splade"] | None = None
    sparse_terms: int | None = None
    multivector: Literal["m3", "colbert"] | None = None
    multivector_dim: int | None = None
    new_heads: bool = False
    specs: Mapping[str, HeadSpec] = field(default_factory=dict)
    width: int = 0

    @property
    def hidden_size(self) -> int:
        return int(self.backbone.config.get_text_config().hidden_size)

    def build(self, names: Collection[str] | None) -> dict[str, Head]:
        """The heads named, or those whose files the folder has (`None`).

        Errors: `RecipeError` for an unknown name; `ModelError` for a file that is missing (unless `new_heads`), damaged
        or of another shape.
        """
        known = known_heads()
        if names is None:
            wanted = {name for name, kind in known.items() if kind.is_in(self.folder)} | self.specs.keys()
        else:
            wanted = {heads.entry(name).name for name in names} & known.keys()
        if self.multivector_dim is not None and "multivector" not in wanted:
            raise ModelError(
                f"multivector_dim={self.multivector_dim}",
                expected="a model with the head multivector",
                fix="add multivector to model.heads",
            )
        taken = set(self.specs) | ({"sparse"} if self.sparse == "splade" else set())  # from the base's language model
        absent = sorted(name for name in wanted - taken if not known[name].is_in(self.folder))
        if absent and not self.new_heads:
            raise ModelError(
                f"this file is missing, so the model has no head {absent[0]!r}: it would be random",
                where=self.folder / known[absent[0]].file,
                fix=f"copy the folder again, as a whole; to make a new head, train it: {TRAIN_HEAD.format(absent[0])}",
            )
        # In one order, whatever the recipe's: new heads draw their weights one after the other from one seed.
        ordered = sorted(sorted(wanted, reverse=True), key=lambda name: known[name].own_pass)
        return {name: self.specs.get(name, known[name]).build(self) for name in ordered}


def cpu_state(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module as a safetensors file takes them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


class HeadSpec(Protocol):
    """A head as the modules of a folder describe it, before there is a backbone. Two of them are equal where the heads
    are the same function of their weights."""

    def build(self, source: HeadSource) -> Head:
        """Errors: `ModelError` for weights that are missing, damaged or of another shape."""
        ...


class ModelForHead(Protocol):
    """A model, as a head sees it that reads a text of its own making."""

    backbone: Any

    def states(self, padded: PaddedTokens) -> Any:
        """The backbone's output for a padded chunk, with `last_hidden_state` [N, T, H]."""

    def pooled_states(self, padded: PaddedTokens) -> Tensor:
        """vector_NH: the last layer's states as the model pools them, before any layer behind the pooling."""


class Head(nn.Module):
    """A head is called with the last layer's states in fp32, the tokens and `part_NT`, the tokens that take part, and
    gives a `Representation`. `file`: holds its weights, beside the backbone's.

    With `own_pass` it is called with the model and the tokens instead, to read the text changed (masked, say) in a
    pass of its own; it is then a head of pre-training, which is neither exported nor named in the model card.
    With `reads_packed` the states of a packed chunk come as they are, [S, H] in the order of `padded.place_S`, and the
    head spreads what it makes of them over the texts itself (`padded.spread`).
    With `with_prompt` the tokens of a prompt take part, unless the model's settings say otherwise.
    With `reads_filling` the tokens that a query is filled up with take part (`ModelConfig.expansion`).
    With `reads_vector` it is called with the text's vector [N, D] in the place of the states: what the layers behind
    the pooling give, before it is normalised.
    `reads_words`: its output layer may be the backbone's word embeddings, so the two cannot be sharded apart.
    """

    file: ClassVar[str]
    own_pass: ClassVar[bool] = False
    reads_packed: ClassVar[bool] = False
    with_prompt: ClassVar[bool] = True
    reads_words: ClassVar[bool] = False
    reads_vector: ClassVar[bool] = False
    reads_filling: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def build(cls, source: HeadSource) -> Head:
        """The head in the folder, else a new one to be trained. Errors: `ModelError` for a file that does not fit."""

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        return (folder / cls.file).exists()

    def reads_prompt(self, include_prompt: bool, said: bool | None) -> bool:
        """Whether the tokens of a prompt take part, in a model whose pooling does so or not; `said` settles it."""
        return (self.with_prompt and include_prompt) if said is None else said

    def read(self, folder: Path) -> None:
        """Take the weights of the head's file. Errors: `ModelError` for a damaged one or one of another shape."""
        path = folder / self.file
        try:
            self.load_state_dict(load_file(path))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"cannot read this head ({error})", where=path, fix="copy the file again") from error

    def save(self, folder: Path) -> None:
        (folder / self.file).write_bytes(save(cpu_state(self)))  # bytes first: a full disk is then named


def known_heads() -> dict[str, type[Head]]:
    """The heads of the shelf that a model may have or not, users' own included; the dense one is always there."""
    return {entry.name: entry.thing for entry in heads.entries() if issubclass(entry.thing, Head)}
