"""ColBERT's multi-vector head, as PyLate, sentence-transformers 6 and Stanford's code have it.

    e_t = normalise(f(h_t)),   f: one layer or several;   score = sum over query tokens of the best document token

Every token takes part, the CLS and the tokens that a query is filled up with too, but for a list of words (as a rule
punctuation) that documents leave out. Sources: ColBERT (Khattab and Zaharia, 2020), ColBERTv2 (2022).
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from embedsmith.core.errors import ModelError
from embedsmith.core.reps import MaxSim, MultiVector
from embedsmith.core.tokens import PaddedTokens
from embedsmith.models.heads.base import Head, HeadSource, cpu_state
from embedsmith.models.heads.dense import Projection

COLBERT_FILE = "colbert_head.safetensors"
WIDTH = 128
"""Of a token's vector in a new head."""
PUNCTUATION = tuple(string.punctuation)


@dataclass(frozen=True)
class ColbertSpec:
    """What a head is beside its weights. `skiplist`: words that take no part, in the texts of `skipped_in`.
    `normalize`: vectors of length 1. `mean`: a score is the mean over query tokens in the place of their sum.
    `layers`: f, of a folder that has one."""

    skiplist: tuple[str, ...] = PUNCTUATION
    skipped_in: tuple[Literal["query", "document"], ...] = ("document",)
    normalize: bool = True
    mean: bool = False
    layers: tuple[Projection, ...] = field(default=(), compare=False)

    def build(self, source: HeadSource) -> ColbertHead:
        """The head of the folder's own layers, or of a new one. Errors: `ModelError` for layers of another width."""
        layers = list(self.layers)
        if not layers:
            layers = [Projection(source.hidden_size, source.multivector_dim or WIDTH, bias=False)]
        width, made = source.hidden_size, layers[-1].width_out
        for place, layer in enumerate(layers):
            if layer.linear.in_features != width:
                raise ModelError(
                    f"layer {place + 1} of the multivector head takes {layer.linear.in_features} numbers, and gets "
                    f"{width}",
                    where=source.folder,
                    expected="a head that belongs to this backbone",
                    fix="copy the folder again, as a whole; to start a new head, name the base model's folder with "
                    "model.heads=[multivector] and model.multivector=colbert in a training recipe",
                )
            width = layer.width_out
        if source.multivector_dim not in (None, made):
            raise ModelError(
                f"multivector_dim={source.multivector_dim}, and the folder's head gives {made}",
                fix="leave multivector_dim out",
            )
        return ColbertHead(layers, self, word_ids(source.tokenizer, self.skiplist))


class ColbertHead(Head):
    """The head of its layers, `spec` and the ids of the words that it skips."""

    file = COLBERT_FILE
    reads_packed = True
    reads_filling = True
    skipped_S: Tensor

    def __init__(self, layers: Sequence[Projection], spec: ColbertSpec, skipped: Iterable[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.spec = spec
        self.register_buffer("skipped_S", torch.tensor(sorted(skipped), dtype=torch.int64), persistent=False)

    @classmethod
    def build(cls, source: HeadSource) -> ColbertHead:
        """The head in the folder's file, or a new one. Errors: `ModelError` for a file that does not fit."""
        path = source.folder / cls.file
        if not path.exists():
            return ColbertSpec().build(source)
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["spec"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            layers = tuple(Projection(*shape) for shape in about.pop("layers"))
            said: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in about.items()}
            spec = ColbertSpec(**said, layers=layers)
            head = spec.build(source)
            head.load_state_dict(tensors)
        except (OSError, LookupError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            raise ModelError(f"cannot read this head ({error})", where=path, fix="copy the file again") from error
        return head

    def forward(self, hidden: Tensor, padded: PaddedTokens, part_NT: Tensor) -> MultiVector:
        skips = {"query": padded.is_query_N, "document": ~padded.is_query_N}
        rows_N = torch.stack([skips[role] for role in self.spec.skipped_in] or [torch.zeros_like(padded.is_query_N)])
        mask_NT = part_NT & ~(rows_N.any(0)[:, None] & torch.isin(padded.id_NT, self.skipped_S))
        vector = hidden
        for layer in self.layers:
            vector = layer(vector)
        vector = F.normalize(vector, dim=-1) if self.spec.normalize else vector
        vector_NTD = padded.spread(vector) if hidden.dim() == 2 else vector
        kind = MultiVector if self.spec.mean else MaxSim
        return kind(vector_NTD.masked_fill(~mask_NT[..., None], 0.0), mask_NT)

    def save(self, folder: Any) -> None:
        spec = {key: value for key, value in asdict(self.spec_alone).items() if key != "layers"}
        shapes = [
            (one.linear.in_features, one.width_out, one.linear.bias is not None, one.activation, one.use_residual)
            for one in self.projections
        ]
        about = {"spec": json.dumps({**spec, "layers": shapes}, ensure_ascii=False)}
        (folder / self.file).write_bytes(save(cpu_state(self), metadata=about))

    @property
    def projections(self) -> list[Projection]:
        return [layer for layer in self.layers if isinstance(layer, Projection)]

    @property
    def spec_alone(self) -> ColbertSpec:
        spec = self.spec
        return ColbertSpec(spec.skiplist, spec.skipped_in, spec.normalize, spec.mean)


def word_ids(tokenizer: Any, words: Iterable[str]) -> set[int]:
    """The tokens of words; one that the vocabulary lacks is left out, or every unknown word would go with it."""
    found = {word: tokenizer.convert_tokens_to_ids(word) for word in words}
    return {
        number
        for word, number in found.items()
        if number is not None and (number != tokenizer.unk_token_id or word == tokenizer.unk_token)
    }
