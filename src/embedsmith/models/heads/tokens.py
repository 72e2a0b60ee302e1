"""The heads that keep a token axis, as in M3-Embedding: a weight a token (`sparse`), a vector a token (`multivector`).

Their weights lie beside the backbone under BGE-M3's names, so folders go both ways. Either file may be there without
the other. Sources: M3-Embedding (Chen et al., 2024), section 3.2; FlagEmbedding for the biases, the special tokens, the
dropped first position and the files.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedsmith.core.errors import ModelError
from embedsmith.core.reps import MultiVector, Representation, Sparse, in_fp32
from embedsmith.core.tokens import PaddedTokens
from embedsmith.models.config import ModelConfig
from embedsmith.models.heads.splade import SPLADE_FILE, SpladeHead, build_splade
from embedsmith.models.pooling import first_index, last_index
from embedsmith.pretrain.mntp import MNTP, MNTP_FILE, MntpHead, build_mntp
from embedsmith.pretrain.retromae import RETROMAE, RETROMAE_FILE, RetroMaeHead, build_retromae

FILES: Mapping[str, str] = {"sparse": "sparse_linear.pt", "multivector": "colbert_linear.pt"}
"""Token heads and BGE-M3's names of their weights, in the order of parameters."""


class TokenHead(nn.Module):
    """A linear layer over token states. `marks_S`: ids of the tokens that the head leaves out, not saved with it."""

    marks_S: Tensor

    def __init__(self, linear: nn.Linear, marks: Iterable[int]) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("marks_S", torch.tensor(sorted(marks), dtype=torch.int64), persistent=False)


class SparseHead(TokenHead):
    """w_t = relu(a . h_t + b) at coordinate id_t; 0 for special tokens, padding and tokens that do not take part."""

    def forward(self, hidden_NTH: Tensor, padded: PaddedTokens, part_NT: Tensor) -> Sparse:
        weight_NT = torch.relu(self.linear(hidden_NTH))[..., 0]
        counts_NT = part_NT & ~torch.isin(padded.id_NT, self.marks_S)
        return Sparse(padded.id_NT, weight_NT.masked_fill(~counts_NT, 0.0))


class MultiVectorHead(TokenHead):
    """e_t = normalise(W h_t + b) of every token that takes part, without the CLS; 0 and masked elsewhere.

    A text of which nothing would be left keeps its last token.
    """

    def forward(self, hidden_NTH: Tensor, padded: PaddedTokens, part_NT: Tensor) -> MultiVector:
        mask_NT = part_NT & ~self._cls(padded)
        column_T = torch.arange(mask_NT.shape[1], device=mask_NT.device)
        last_NT = padded.mask_NT & (column_T == last_index(padded.mask_NT)[:, None])
        mask_NT = mask_NT | (last_NT & ~mask_NT.any(1, keepdim=True))
        vector_NTD = F.normalize(self.linear(hidden_NTH), dim=-1)
        return MultiVector(vector_NTD.masked_fill(~mask_NT[..., None], 0.0), mask_NT)

    def _cls(self, padded: PaddedTokens) -> Tensor:
        """The first real token, where it is a CLS: a tokenizer that adds none loses no word."""
        column_T = torch.arange(padded.mask_NT.shape[1], device=padded.mask_NT.device)
        is_first_NT = column_T == first_index(padded.mask_NT)[:, None]
        return is_first_NT & torch.isin(padded.id_NT, self.marks_S)


def apply_token_head(head: nn.Module, hidden_NTH: Tensor, padded: PaddedTokens, part_NT: Tensor) -> Representation:
    """In fp32 even under autocast. `part_NT`: the tokens that take part."""
    with torch.autocast(hidden_NTH.device.type, enabled=False):
        made: Representation = head(in_fp32(hidden_NTH), padded, part_NT)
        return made


def build_token_heads(
    config: ModelConfig, folder: Path, base: Path, backbone: Any, tokenizer: Any
) -> dict[str, nn.Module]:
    """The heads asked for, or those that the folder has; weights from the folder where it has them, else new (of the
    language model in `base` where one is needed).

    Errors: `ModelError` for an unknown head, a file that is damaged or of another shape, an impossible width.
    """
    names = _wanted(config, folder)
    hidden_size = backbone.config.get_text_config().hidden_size
    heads: dict[str, nn.Module] = {}
    if "sparse" in names and _is_splade(config, folder):
        splade = build_splade(folder, base, backbone, config.sparse_terms, config.trust_remote_code)
        if config.lora is not None and splade.lm.weight_VH is not None:  # as the backbone's own words are
            splade.lm.weight_VH.requires_grad_(False)
        heads["sparse"] = splade
    elif "sparse" in names:
        sparse = _read(folder / FILES["sparse"], hidden_size, 1) or _new_sparse(hidden_size)
        heads["sparse"] = SparseHead(sparse, special_ids(tokenizer))
    if "multivector" in names:
        width = config.multivector_dim
        multivector = _read(folder / FILES["multivector"], hidden_size, width)
        heads["multivector"] = MultiVectorHead(
            multivector or nn.Linear(hidden_size, width or hidden_size), cls_ids(tokenizer)
        )
    if RETROMAE in names:
        heads[RETROMAE] = build_retromae(folder, base, backbone, tokenizer, config.trust_remote_code)
    if MNTP in names:
        heads[MNTP] = build_mntp(folder, base, backbone, tokenizer, config.trust_remote_code)
        if config.lora is not None:  # as the backbone's own words are
            heads[MNTP].requires_grad_(False)
    return heads


def _new_sparse(hidden_size: int) -> nn.Linear:
    """Small weights and a bias above 0: every word starts with about the same weight, so that scores begin as counts
    of shared words. States lean to one side, and a head of the usual size is then often dead from the start."""
    linear = nn.Linear(hidden_size, 1)
    with torch.no_grad():
        linear.weight.mul_(0.1)
        linear.bias.fill_(0.1)
    return linear


def _is_splade(config: ModelConfig, folder: Path) -> bool:
    """As asked, else as the folder has it, else lexical. Errors: `ModelError` for `sparse_terms` of a lexical head."""
    there = (folder / SPLADE_FILE).exists()
    splade = there if config.sparse is None else config.sparse == "splade"
    if config.sparse_terms is not None and not splade:
        raise ModelError("sparse_terms belongs to sparse=splade", fix="remove it; a lexical head has a text's words")
    return splade


def special_ids(tokenizer: Any) -> set[int]:
    """Tokens that never count as words: cls (or bos), eos (or sep), padding, unknown."""
    said = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    return cls_ids(tokenizer) | {number for number in said if number is not None}


def cls_ids(tokenizer: Any) -> set[int]:
    """Tokens that may stand first for the whole text."""
    return {number for number in (tokenizer.cls_token_id, tokenizer.bos_token_id) if number is not None}


def head_file(name: str, head: nn.Module) -> str:
    """The name of the file a head is saved in."""
    if isinstance(head, RetroMaeHead):
        return RETROMAE_FILE
    if isinstance(head, MntpHead):
        return MNTP_FILE
    return SPLADE_FILE if isinstance(head, SpladeHead) else FILES[name]


def save_token_head(head: nn.Module, path: Path) -> None:
    """BGE-M3's form: torch.save of the linear layer's state, on the CPU. Heads of a language model: safetensors."""
    if isinstance(head, SpladeHead | RetroMaeHead | MntpHead):
        head.save(path.parent)
        return
    assert isinstance(head, TokenHead)
    state = {name: tensor.detach().cpu().clone() for name, tensor in head.linear.state_dict().items()}
    with path.open("wb") as file:  # given a path, torch.save hides the reason when the disk is full
        torch.save(state, file)


def _wanted(config: ModelConfig, folder: Path) -> set[str]:
    """Names of token heads. `dense` may be said and is always there."""
    if config.heads is None:
        files = (*FILES.items(), ("sparse", SPLADE_FILE), (RETROMAE, RETROMAE_FILE), (MNTP, MNTP_FILE))
        names = {name for name, file in files if (folder / file).exists()}
    else:
        names = set(config.heads)
    if unknown := sorted(names - {"dense", *FILES, RETROMAE, MNTP}):
        raise ModelError(f"unknown head {unknown[0]!r}", expected=f"some of dense, {', '.join(FILES)}")
    width = config.multivector_dim
    if width is not None and (width < 1 or "multivector" not in names):
        raise ModelError(
            f"multivector_dim={width}",
            expected="at least 1, of a model with the head multivector",
            fix=None if "multivector" in names else "add multivector to heads",
        )
    return names


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
