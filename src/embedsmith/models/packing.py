"""Unpadded execution: the texts of a chunk one behind another in a single row, so that no padding is computed.

Texts must not see each other. The masks of transformers do not keep them apart (bidirectional ones ignore positions,
causal ones lean on a cache that is not there), so the bounds are handed over: to flash attention and to the attention
of varlen.py as cumulative lengths, to flex attention as a block mask, to sdpa and eager as a block-diagonal mask
[1, 1, S, S], which is exact and saves no time. What mixes tokens elsewhere (recurrence, convolution) would leak: a
self-test on the model itself refuses it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutput

from embedsmith.core.errors import ModelError
from embedsmith.core.progress import log, transformers_silenced
from embedsmith.core.tokens import PaddedTokens
from embedsmith.models.attention import Attention, as_mask
from embedsmith.models.backbone import position_table, takes
from embedsmith.models.flex_rows import text_blocks
from embedsmith.models.row_kernels import NOT_INSTALLED, ROW_KERNELS, dropout_agrees, drops_attention, half_of
from embedsmith.models.self_test import (
    LENGTH,
    SHORTER,
    example_ids,
    first_layer_weight,
    gradients_agree,
    kernel_precision,
    states_agree,
    states_and_gradient,
)
from embedsmith.models.varlen import VARLEN

BUCKET = 64
"""Tokens to a multiple of which a row is filled up for what is compiled: few graphs, and sizes that kernels like."""


def packed(
    padded: PaddedTokens, attention: Attention, backbone: Any, first: int, kernel: str | None = None
) -> dict[str, Any]:
    """The backbone's arguments for the real tokens of a chunk as one row; positions begin anew with every text, at
    `first`. `kernel`: the one of `ROW_KERNELS` that computes its attention.

    The row of what is compiled ends with one more text, of made-up tokens, that fills it up to a bucket.
    """
    implementation, size = backbone.config._attn_implementation, padded.mask_NT.shape[1]
    place_S, longest = padded.place_S, size
    id_S = padded.id_NT.flatten()[place_S]
    column_S = (padded.mask_NT.cumsum(1) - 1).flatten()[place_S]
    text_S, length_N = place_S // size, padded.mask_NT.sum(1)
    if backbone._compiled_call_impl is not None or kernel == "flex":
        more = -len(id_S) % BUCKET
        longest = -(-max(size, BUCKET) // BUCKET) * BUCKET
        id_S, text_S = F.pad(id_S, (0, more)), F.pad(text_S, (0, more), value=len(length_N))
        column_S = torch.cat([column_S, torch.arange(more, device=id_S.device)])
        length_N = F.pad(length_N, (0, 1), value=more)
    arguments: dict[str, Any] = {"input_ids": id_S[None], "position_ids": (column_S + first)[None]}
    if implementation == VARLEN or implementation.startswith("flash"):
        end_P = F.pad(length_N.cumsum(0), (1, 0)).to(torch.int32)
        arguments |= dict(cu_seq_lens_q=end_P, cu_seq_lens_k=end_P, max_length_q=longest, max_length_k=longest)
    if implementation == VARLEN:
        # A mask of four dimensions is handed through as it is, so that none is built; `attend` leaves it aside.
        return arguments | {
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=id_S.device),
            "row_place_S": text_S * longest + column_S,
            "row_kernel": kernel,
            "row_blocks": {},
            "sees_all": attention.how == "mask4d",
        }
    if implementation.startswith("flash"):
        return arguments
    if implementation == "flex_attention":
        return arguments | {"attention_mask": text_blocks(text_S, attention.causal, None)}
    sees_SS = text_S[:, None] == text_S[None, :]
    sees_SS = sees_SS.tril() if attention.causal else sees_SS
    dtype = next(backbone.parameters()).dtype
    return arguments | {"attention_mask": as_mask(sees_SS[None, None], implementation, dtype)}


def first_position(backbone: Any) -> int:
    """0, or what follows the padding index in the position table of RoBERTa and its like."""
    table = position_table(backbone)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def unpacked(states: Any, padded: PaddedTokens) -> BaseModelOutput:
    """States of one row back in the rows of a padded chunk, zeros at the padding."""
    count = len(padded.place_S)
    layers = getattr(states, "hidden_states", None)
    return BaseModelOutput(
        last_hidden_state=padded.spread(states.last_hidden_state[0, :count]),
        hidden_states=None if layers is None else tuple(padded.spread(layer[0, :count]) for layer in layers),
    )


@dataclass(frozen=True)
class Packing:
    """Whether a model packs its chunks (`on`), and `why` or why not, in words. `kernel`: the one of `ROW_KERNELS` that
    computes its attention."""

    on: bool = False
    why: str = "not asked for"
    kernel: str | None = None

    def __str__(self) -> str:
        return f"{'on' if self.on else 'off'} ({self.why})"


def decide_packing(
    backbone: Any, attention: Attention, asked: bool | Literal["auto"], implementation: str | None, max_length: int
) -> Packing:
    """Pack or not, and through which attention; the backbone is brought to it. `implementation`: the user's wish.

    `auto` packs on CUDA where the self-test passes, and says in one line why it does not.
    Errors: `ModelError` where packing was asked for and cannot be, with the reason.
    """
    name, fast = backbone.config._attn_implementation, _is_fast(backbone)
    if asked is False:
        return Packing(why="model.packing=false")
    if asked == "auto" and not fast:
        return Packing(why="it pays on GPUs alone")
    if asked == "auto" and implementation in ("sdpa", "eager"):
        return Packing(
            why=f"model.attn_implementation={implementation} was asked for, and a mask for a row saves nothing"
        )
    try:
        if fast and implementation is None:
            _use_varlen(backbone)
        found = proven_packing(backbone, attention, max_length)
    except ModelError as error:
        changed = backbone.config._attn_implementation != name
        backbone.config._attn_implementation = name
        if asked == "auto":
            log.warning("packing: off, padding is computed: %s", error.what)
            return Packing(why=error.what)
        if not changed:
            raise
        found = proven_packing(backbone, attention, max_length)  # by a mask, as without a GPU
    log.info("packing: on, %s", found.why)
    return found


def _is_fast(backbone: Any) -> bool:
    return bool(backbone.device.type == "cuda")


def _use_varlen(backbone: Any) -> None:
    with transformers_silenced():
        backbone.set_attn_implementation(VARLEN)
    if backbone.config._attn_implementation != VARLEN:
        raise ModelError(f"{type(backbone).__name__} takes no attention but its own", fix="set model.packing=false")


def proven_packing(backbone: Any, attention: Attention, max_length: int) -> Packing:
    """The attention under which two texts in one row have, on the model itself, the states, and pass on the gradient,
    that they have apart: of our own the best kernel that passes. Where a window limits what tokens see, texts of twice
    its length are taken.

    Errors: `ModelError` for softmask training, for windows that a mask would lift, and where the states differ.
    """
    name, implementation = type(backbone).__name__, backbone.config._attn_implementation
    length = _length_of_proof(backbone, attention, max_length)
    failed: dict[str, list[str]] = {}
    for key, kernel in ROW_KERNELS.items() if implementation == VARLEN else ():
        reason = kernel.lacks(backbone)
        if reason is None and not kernel.drops and drops_attention(backbone):
            reason = "it drops no share of attention, as this model does while it trains"
        if (reason := reason or _difference(backbone, attention, length, key)) is None:
            return Packing(True, f"through {kernel.words}, proven on this model{_because(failed)}", key)
        failed.setdefault(reason, []).append(kernel.words)
    if reason := _difference(backbone, attention, length, None):
        raise ModelError(f"{name} cannot be packed: {reason}", fix="set model.packing=false")
    if implementation != VARLEN:
        return Packing(True, f"through {implementation}, proven on this model")
    return Packing(True, f"attention alone is padded, proven on this model{_because(failed)}")


def _because(failed: Mapping[str, list[str]]) -> str:
    """Why not through other kernels. That a package is not there is no reason: torch brings what it does, too."""
    told = (f"; not through {', '.join(words)}: {why}" for why, words in failed.items() if why != NOT_INSTALLED)
    return "".join(told)


def _length_of_proof(backbone: Any, attention: Attention, max_length: int) -> int:
    """Tokens of the texts that a row is tried with. Errors: `ModelError` for what no row can be tried with."""
    name, implementation = type(backbone).__name__, backbone.config._attn_implementation
    if attention.mode == "softmask":
        raise ModelError(
            "packing under attention=softmask: its mask is made of one text", fix="set model.packing=false"
        )
    text = backbone.config.get_text_config()
    names = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    kinds = [kind for kind in getattr(text, "layer_types", None) or names if kind in names]
    bounds = {kind: bound for kind in kinds if (bound := getattr(text, names[kind], None)) is not None}
    if attention.how == "mask4d":
        bounds = {}
    window = min(bounds.values(), default=max_length)
    by_lengths = implementation == VARLEN or implementation.startswith("flash")
    chunked = implementation == VARLEN and bounds.get("chunked_attention", max_length) < max_length
    if window < max_length and (not by_lengths or chunked):
        raise ModelError(
            f"packing: a token of {name} sees {window} tokens, and a mask for packed texts would lift that bound",
            fix=f"set model.packing=false, model.max_length={window}, or on a GPU "
            "model.attn_implementation=flash_attention_2",
        )
    if not takes(backbone, "position_ids"):
        raise ModelError(f"{name} cannot be packed: it takes no positions", fix="set model.packing=false")
    return LENGTH if window >= max_length else max(min(2 * window + 2, max_length), LENGTH)


def _difference(backbone: Any, attention: Attention, length: int, kernel: str | None) -> str | None:
    """What is different in a row, in words: in the numbers of the weights, and in those of autocast where a kernel is
    used; `None` where nothing is."""
    try:
        with kernel_precision(backbone):
            same = _same(backbone, attention, length, kernel, None)
        if same and kernel is not None:
            same = not ROW_KERNELS[kernel].drops or dropout_agrees(backbone, ROW_KERNELS[kernel])
            if same and backbone.dtype == torch.float32:
                half = half_of(backbone.device)
                with torch.autocast(backbone.device.type, half):
                    same = _same(backbone, attention, length, kernel, half)
    except _FAILURES as error:
        # a family whose own code cannot take this mask or these positions, or a kernel that this machine cannot run
        return f"its code fails on a row ({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
    return None if same else "a text's states depend on what else is in its row"


_FAILURES = (
    *(RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError),
    *(ImportError, OSError, AssertionError),
)


def _same(backbone: Any, attention: Attention, length: int, kernel: str | None, dtype: torch.dtype | None) -> bool:
    """Whether states and gradient agree within the rounding of `dtype`, or of what the backbone computes in."""
    id_NT = example_ids(backbone, backbone.device, length=length)
    mask_NT = torch.ones_like(id_NT, dtype=torch.bool)
    mask_NT[0, length - LENGTH + SHORTER :] = False
    padded = PaddedTokens(id_NT, mask_NT, mask_NT, mask_NT[:, 0])
    mask = attention.mask(mask_NT, backbone.config._attn_implementation, backbone.dtype)
    more: dict[str, Any] = {"use_cache": False} if takes(backbone, "use_cache") else {}
    apart: dict[str, Any] = {"input_ids": id_NT, "attention_mask": mask, **more}
    if attention.how == "mask4d":
        apart["position_ids"] = (mask_NT.cumsum(1) - 1).clamp_min(0)
    row = packed(padded, attention, backbone, first_position(backbone), kernel) | more
    weight, was_training = first_layer_weight(backbone), backbone.training
    backbone.eval()
    try:
        expected_SH, pull = states_and_gradient(backbone, apart, padded.place_S, weight)
        found_SH, found_pull = states_and_gradient(backbone, row, slice(len(padded.place_S)), weight)
    finally:
        backbone.train(was_training)
    agree = states_agree(backbone, expected_SH, found_SH, dtype)
    return agree and (pull is None or found_pull is None or gradients_agree(backbone, pull, found_pull, dtype))
