"""The heads that keep a token axis, as in M3-Embedding: a weight a token (`sparse`), a vector a token (`multivector`).

Their weights lie beside the backbone under BGE-M3's names, so folders go both ways. Either file may be there without
the other. The tokens of a prompt, such as `query: `, take no part: they stand in every text of a role and say nothing
of it. Sources: M3-Embedding (Chen et al., 2024), section 3.2, whose model has no prompts; FlagEmbedding for the biases,
the special tokens, the dropped first position and the files.
"""

import pickle
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedsmith.core.errors import ModelError
from embedsmith.core.reps import MultiVector, Sparse
from embedsmith.core.shelf import heads
from embedsmith.core.tokens import PaddedTokens, one_of
from embedsmith.models.heads.base import Head, HeadSource
from embedsmith.models.heads.colbert import ColbertHead
from embedsmith.models.heads.csr import CsrHead
from embedsmith.models.heads.splade import SpladeHead
from embedsmith.models.pooling import first_index, last_index

FILES: Mapping[str, str] = {"sparse": "sparse_linear.pt", "multivector": "colbert_linear.pt"}
"""Heads that are one linear layer, and BGE-M3's names of their weights."""


@heads.register("sparse", formula="w_t = relu(a . h_t + b), or log(1 + relu(max_t z_tv))", source="M3, SPLADE v2")
class SparseHead(Head):
    """w_t = relu(a . h_t + b) at coordinate id_t; 0 for special tokens, padding and tokens that do not take part.

    `marks`: ids of the special tokens, not saved with the head. The name stands for `SpladeHead` too.
    """

    file = FILES["sparse"]
    reads_packed = True
    with_prompt = False
    marks_S: Tensor

    def __init__(self, linear: nn.Linear, marks: Iterable[int]) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("marks_S", torch.tensor(sorted(marks), dtype=torch.int64), persistent=False)

    @classmethod
    def build(cls, source: HeadSource) -> Head:
        """SPLADE's head or the lexical one: as asked, else as the folder has it, else lexical."""
        if source.sparse is None and CsrHead.is_in(source.folder):
            return CsrHead.build(source)
        splade = source.sparse == "splade" or (source.sparse is None and SpladeHead.is_in(source.folder))
        if splade:
            return SpladeHead.build(source)
        if source.sparse_terms is not None:
            raise ModelError(
                "sparse_terms belongs to sparse=splade", fix="remove it; a lexical head has a text's words"
            )
        linear = _read(source.folder / cls.file, source.hidden_size, 1)
        if linear is None:
            # Small weights and a bias above 0: every word starts with about the same weight, so that scores begin as
            # counts of shared words. States lean to one side: a head of the usual size is often dead from the start.
            linear = nn.Linear(source.hidden_size, 1)
            with torch.no_grad():
                linear.weight.mul_(0.1)
                linear.bias.fill_(0.1)
        return cls(linear, special_ids(source.tokenizer))

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        return super().is_in(folder) or SpladeHead.is_in(folder) or CsrHead.is_in(folder)

    def forward(self, hidden: Tensor, padded: PaddedTokens, part_NT: Tensor) -> Sparse:
        weight_NT = torch.relu(self.linear(hidden))[..., 0]
        if hidden.dim() == 2:
            weight_NT = padded.spread(weight_NT)
        counts_NT = part_NT & ~one_of(padded.id_NT, self.marks_S)
        return Sparse(padded.id_NT, weight_NT.masked_fill(~counts_NT, 0.0))

    def save(self, folder: Path) -> None:
        _write(self.linear, folder / self.file)


@heads.register("multivector", formula="e_t = normalise(W h_t + b)", source="M3-Embedding, ColBERT")
class MultiVectorHead(Head):
    """e_t = normalise(W h_t + b) of every token that takes part, without the CLS; 0 and masked elsewhere.

    `marks`: ids of what may be a CLS, not saved with the head. A text of which nothing would be left keeps its last
    token. The name stands for `ColbertHead` too.
    """

    file = FILES["multivector"]
    reads_packed = True
    with_prompt = False
    reads_filling = True
    marks_S: Tensor

    def __init__(self, linear: nn.Linear, marks: Iterable[int]) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("marks_S", torch.tensor(sorted(marks), dtype=torch.int64), persistent=False)

    @classmethod
    def build(cls, source: HeadSource) -> Head:
        """ColBERT's head or M3's: as asked, else as the folder has it, else M3's."""
        if source.multivector == "colbert" or (source.multivector is None and ColbertHead.is_in(source.folder)):
            return ColbertHead.build(source)
        width = source.multivector_dim
        linear = _read(source.folder / cls.file, source.hidden_size, width)
        return cls(linear or nn.Linear(source.hidden_size, width or source.hidden_size), cls_ids(source.tokenizer))

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        return super().is_in(folder) or ColbertHead.is_in(folder)

    def forward(self, hidden: Tensor, padded: PaddedTokens, part_NT: Tensor) -> MultiVector:
        column_T = torch.arange(part_NT.shape[1], device=part_NT.device)
        # The first real token is left out where it is a CLS: a tokenizer that adds none loses no word.
        is_first_NT = column_T == first_index(padded.mask_NT)[:, None]
        mask_NT = part_NT & ~(is_first_NT & one_of(padded.id_NT, self.marks_S))
        last_NT = padded.mask_NT & (column_T == last_index(padded.mask_NT)[:, None])
        mask_NT = mask_NT | (last_NT & ~mask_NT.any(1, keepdim=True))
        vector_NTD = F.normalize(self.linear(hidden), dim=-1)
        if hidden.dim() == 2:
            vector_NTD = padded.spread(vector_NTD)
        return MultiVector(vector_NTD.masked_fill(~mask_NT[..., None], 0.0), mask_NT)

    def save(self, folder: Path) -> None:
        _write(self.linear, folder / self.file)


def special_ids(tokenizer: Any) -> set[int]:
    """Tokens that never count as words: cls (or bos), eos (or sep), padding, unknown."""
    others = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    return cls_ids(tokenizer) | {number for number in others if number is not None}


def cls_ids(tokenizer: Any) -> set[int]:
    """Tokens that may stand first for the whole text."""
    return {number for number in (tokenizer.cls_token_id, tokenizer.bos_token_id) if number is not None}


def _write(linear: nn.Linear, path: Path) -> None:
    """BGE-M3's form: torch.save of the linear layer's state, on the CPU."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in linear.state_dict().items()}
    with path.open("wb") as file:  # given a path, torch.save hides the reason when the disk is full
        torch.save(state, file)


def _read(path: Path, width_in: int, width_out: int | None) -> nn.Linear | None:
    """The linear layer in a file, `None` where there is no such file. `width_out=None` takes the file's."""
    if not path.exists():
        return None
    state = head_state(path)
    width = width_out or max(len(state["bias"]), 1)
    came = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = {"weight": (width, width_in), "bias": (width,)}
    if came != wanted:
        raise ModelError(
            f"weight {came['weight']} and bias {came['bias']}",
            where=path,
            expected=f"weight {wanted['weight']} and bias {wanted['bias']}",
            fix="the file must belong to this backbone and, for multivector, to multivector_dim; move it away to start"
            " a new head",
        )
    linear = nn.Linear(width_in, width)
    linear.load_state_dict(state)
    return linear


def head_state(path: Path) -> dict[str, Tensor]:
    """Weight and bias of the linear layer in a head's file. Errors: `ModelError` for a damaged or foreign file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ModelError(
            f"cannot read the weights of this head ({str(error).splitlines()[0] if str(error) else 'it is empty'})",
            where=path,
            fix="copy or download the file again",
        ) from error
    if (
        not isinstance(state, dict)
        or state.keys() != {"weight", "bias"}
        or not all(isinstance(tensor, Tensor) and tensor.dim() > 0 for tensor in state.values())
    ):
        raise ModelError(
            "this is not a linear layer", where=path, expected="the state of one, with weight and bias, by torch.save"
        )
    return dict(state)


_UNREADABLE = (
    OSError,
    AssertionError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    pickle.UnpicklingError,
    struct.error,
)
"""What torch.load raises for bytes that are not a whole file of its own."""
