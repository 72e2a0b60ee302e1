"""The model: a backbone, a pooling, optional heads, normalisation, and the texts' way in."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedsmith.core.encoder import Role
from embedsmith.core.errors import ModelError
from embedsmith.core.progress import progress_bar
from embedsmith.core.reps import Dense, MultiVector, Representation, Reps, concatenate, each_head, in_fp32
from embedsmith.core.tokens import IntArray, PaddedTokens, TokenBatch, chunk_rows
from embedsmith.models.attention import Attention, SoftMask
from embedsmith.models.backbone import position_table
from embedsmith.models.config import ComputeType, Settings
from embedsmith.models.heads.dense import apply_heads
from embedsmith.models.heads.tokens import FILES, apply_token_head
from embedsmith.models.mcls import cls_places, room_for, with_cls_blocks, without_inner_cls
from embedsmith.models.packing import packed, unpacked
from embedsmith.models.pooling import POOLERS, POOLINGS, PoolerConfig, pool_mask
from embedsmith.models.self_test import kernel_precision
from embedsmith.models.tokenize import Instruction, TextTokenizer, added_tokens
from embedsmith.models.write import save
from embedsmith.pretrain.mntp import MNTP
from embedsmith.pretrain.retromae import RETROMAE

# Texts to representations without gradient: long lists in blocks, each block in chunks of similar length.

BLOCK = 8192
"""Texts tokenised and sorted together: enough for chunks of near-equal length, little enough memory to stream."""


@dataclass(frozen=True)
class Inference:
    """How to compute; see `Embedder.represent`."""

    token_budget: int | None = None
    dtype: ComputeType | None = None
    show_progress: bool | None = None


def represent(
    model: Embedder,
    texts: Sequence[str],
    how: Inference,
    *,
    role: Role,
    task: str | None,
    outputs: Sequence[str],
    instruction: Instruction,
) -> Reps:
    """See `Embedder.represent`. No text gives representations of zero rows."""
    if len(texts) == 0:  # the shapes of one text, without its row
        one = represent(model, [""], how, role=role, task=task, outputs=outputs, instruction=None)
        return each_head(one, lambda rep: rep.rows(slice(0, 0)))
    parts: list[Reps] = []
    with _evaluating(model), progress_bar("encode", len(texts), visible=_worth_showing(how, len(texts))) as bar:
        for start in range(0, len(texts), BLOCK):
            rows = slice(start, start + BLOCK)
            own = instruction if instruction is None or isinstance(instruction, str) else instruction[rows]
            tokens = model.tokenize(texts[rows], role, task, own)
            parts.append(_block(model, tokens, how, outputs, bar.advance))
    return parts[0] if len(parts) == 1 else concatenate(parts)


def derive_token_budget(device: torch.device) -> int:
    """Padded tokens in a chunk. A CPU is fastest while a chunk's states stay in its cache; a GPU wants to be filled."""
    return 1024 if device.type == "cpu" else 32768


def _block(
    model: Embedder, tokens: TokenBatch, how: Inference, outputs: Sequence[str], advance: Callable[[int], None]
) -> Reps:
    """Representations of one block: computed longest chunk first, returned in row order."""
    device = model.device
    chunks = chunk_rows(tokens.length_N, how.token_budget or derive_token_budget(device))

    def compute(rows: IntArray) -> Reps:
        with torch.inference_mode(), autocast(device, how.dtype):  # both are settings of the thread
            padded = tokens.take(rows).pad(model.pad_id, device, model.padding_left)
            return each_head(model(padded, outputs), lambda rep: rep.map(torch.Tensor.cpu))

    parts: list[Reps] = []
    for rows, part in zip(chunks, _spread(compute, chunks, derive_workers(device, len(chunks))), strict=True):
        parts.append(part)
        advance(len(rows))
    order = torch.from_numpy(np.argsort(np.concatenate(chunks), kind="stable"))
    joined = concatenate(parts)  # outside inference mode: ordinary tensors, which a loss may use
    return each_head(joined, lambda rep: rep.rows(order))


def derive_workers(device: torch.device, chunks: int) -> int:
    """Chunks computed side by side. On a CPU one a core: small products gain little from several cores, and a busy
    core then delays its own chunk instead of every product. A few chunks get all cores each."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return threads if chunks >= 2 * threads else 1


def _spread(compute: Callable[[IntArray], Reps], chunks: Sequence[IntArray], workers: int) -> Iterator[Reps]:
    """`map(compute, chunks)` over threads of one core each."""
    if workers == 1:
        yield from map(compute, chunks)
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(compute, chunks)
    finally:
        torch.set_num_threads(threads)  # a worker's setting is also the default of threads to come


def autocast(device: torch.device, dtype: ComputeType | None) -> AbstractContextManager[Any]:
    """Computation in `dtype` with the weights as they are; nothing for `None` and float32."""
    if dtype is None or dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


@contextmanager
def _evaluating(model: Embedder) -> Iterator[None]:
    """Dropout off; afterwards the model is as it was (training goes on after an evaluation)."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _worth_showing(how: Inference, count: int) -> bool | None:
    """A few texts take no time: no bar for them unless asked for."""
    return False if how.show_progress is None and count < 512 else how.show_progress


# What is done to finished vectors: shorten, quantise, compare.

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
FloatArray = npt.NDArray[np.float32]
AnyArray = npt.NDArray[Any]


def shortened(dense: Representation, dim: int | None) -> Tensor:
    """The leading `dim` coordinates, normalised again; all of them, as they are, for `None`."""
    vector_ND = in_fp32(dense.tensors()[0])
    if dim is None:
        return vector_ND
    if not 1 <= dim <= vector_ND.shape[1]:
        raise ModelError(f"dim={dim}", expected=f"from 1 to {vector_ND.shape[1]}, the model's dimension")
    return F.normalize(vector_ND[:, :dim], dim=-1)


def value_ranges(vector_ND: FloatArray) -> FloatArray:
    """[2, D]: minimum and maximum of every coordinate, for `quantize`."""
    return np.stack([vector_ND.min(0), vector_ND.max(0)]).astype(np.float32)


def quantize(vector_ND: FloatArray, precision: Precision, ranges: FloatArray | None = None) -> AnyArray:
    """Smaller vectors, bit for bit as sentence-transformers makes them.

    int8, uint8: 255 equal steps between the coordinate's minimum and maximum (`ranges`, or those of the given
    vectors; two at least). binary, ubinary: the signs, eight to a byte, [N, ceil(D / 8)], offset by -128 for binary.
    """
    if precision not in get_args(Precision):
        raise ModelError(f"unknown precision {precision!r}", expected=f"one of {', '.join(get_args(Precision))}")
    if precision == "float32":
        return vector_ND.astype(np.float32, copy=False)
    if precision in ("binary", "ubinary"):
        packed = np.packbits(vector_ND > 0, axis=-1)
        return packed if precision == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)
    if ranges is None:
        if len(vector_ND) == 1:
            raise ModelError(
                f"{precision} cannot be calibrated on one vector",
                fix="give ranges, for example value_ranges() of a sample of documents",
            )
        ranges = value_ranges(vector_ND) if len(vector_ND) else np.zeros((2, vector_ND.shape[1]), np.float32)
    start_D = ranges[0].astype(np.float32)
    step_D = (ranges[1].astype(np.float32) - start_D) / 255
    level_ND: FloatArray = np.clip(np.floor((vector_ND - start_D) / np.where(step_D == 0, 1, step_D)), 0, 255)
    return level_ND.astype(np.uint8) if precision == "uint8" else (level_ND - 128).astype(np.int8)


def cosine(left: AnyArray | Tensor, right: AnyArray | Tensor) -> FloatArray:
    """Cosine of every row with every row, [N, M]."""
    left_ND, right_MD = (F.normalize(torch.atleast_2d(torch.as_tensor(side)).float(), dim=-1) for side in (left, right))
    return np.asarray((left_ND @ right_MD.T).numpy(), np.float32)


class Embedder(nn.Module):
    """Texts to representations.

    `tokenize` makes token ids, `forward` makes `Reps` of a padded chunk with gradient, `represent` and `encode` do
    both without.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: Any,
        settings: Settings,
        projections: Sequence[nn.Module] = (),
        token_heads: Mapping[str, nn.Module] | None = None,
        attention: Attention = Attention(),  # noqa: B008  (frozen)
        softmask: SoftMask = SoftMask(),  # noqa: B008  (frozen)
        pooler: nn.Module | None = None,
        pooler_config: PoolerConfig | None = None,
    ) -> None:
        super().__init__()
        if (settings.pooling in POOLERS) != (pooler is not None) or settings.pooling not in (*POOLINGS, *POOLERS):
            raise ModelError(f"unknown pooling {settings.pooling!r}", expected=f"one of {', '.join(POOLINGS)}")
        self.backbone = backbone
        self.projections = nn.ModuleList(projections)
        self.token_heads = nn.ModuleDict(token_heads)
        self.settings = settings
        self.text = TextTokenizer(tokenizer)
        self.padding_left = tokenizer.padding_side == "left"
        self.attention, self.softmask = attention, softmask
        self.pooler, self.pooler_config = pooler, pooler_config
        self.base: Mapping[str, Any] | None = None
        self.progress = 0.0
        self.packing = False
        self._takes_positions = _takes_positions(backbone)
        self._takes_cache = "use_cache" in inspect.signature(backbone.forward).parameters
        self._left_out_S = _averaged_over(tokenizer, settings)

    @property
    def config(self) -> Any:
        """The backbone's transformers configuration."""
        return self.backbone.config

    @property
    def tokenizer(self) -> Any:
        return self.text.tokenizer

    @property
    def pad_id(self) -> int:
        return self.text.pad_id

    @property
    def max_length(self) -> int:
        return self.settings.max_length

    @property
    def dimension(self) -> int:
        """D of the dense head."""
        if len(self.projections) > 0:
            return int(self.projections[-1].linear.out_features)  # type: ignore[union-attr, arg-type]
        return self.pooled_width

    @property
    def pooled_width(self) -> int:
        """Width of what the pooling gives."""
        if self.pooler is not None:
            return int(self.pooler.width)  # type: ignore[arg-type]
        return int(self.config.get_text_config().hidden_size)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What `forward` and `represent` can be asked for, beside `tokens`."""
        return ("dense", "middle", *self.token_heads)

    def fingerprint(self) -> str:
        """A hash of everything a vector depends on: weights, settings, tokenizer."""
        hasher = hashlib.blake2b(repr(self.settings).encode(), digest_size=16)
        words = json.loads(self.tokenizer.backend_tokenizer.to_str())
        kept = {key: value for key, value in words.items() if key not in ("truncation", "padding")}  # left by use
        hasher.update(json.dumps(kept, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return hasher.hexdigest()

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def tokenize(
        self, texts: Sequence[str], role: Role = "document", task: str | None = None, instruction: Instruction = None
    ) -> TokenBatch:
        """Token ids of N texts, prompt (or instruction) in front, truncated with the end tokens kept.

        An instruction, one for all or one a text, replaces the prompt of the role and task.
        """
        block = self.settings.mcls
        if block is None:
            return self.text(texts, self.settings, role, task, instruction)
        ends = len(added_tokens(self.tokenizer)[1])
        shorter = replace(self.settings, max_length=room_for(self.settings.max_length, block, ends))
        return with_cls_blocks(self.text(texts, shorter, role, task, instruction), block, ends)

    def forward(self, padded: PaddedTokens, outputs: Sequence[str] = ("dense",)) -> dict[str, Representation]:
        """Representations of a padded chunk, with gradient, pooled and normalised in fp32.

        `dense`: the text's vector [N, D]. `middle`: the same pooling of the middle layer's states [N, H], normalised
        (hidden_states[(L + 1) // 2] of L layers). `tokens`: the last layer's states as they are, [N, T, H], special
        tokens masked: for diagnostics. `sparse`: a weight a token. `multivector`: a vector a token.
        `retromae`, `mntp`: losses of pre-training (retromae.py, mntp.py).
        Errors: `ModelError` for an output this model does not have.
        """
        self._check(outputs)
        if own := [name for name in outputs if name in (RETROMAE, MNTP)]:  # read the text changed, each in its own pass
            rest = [name for name in outputs if name not in own]
            made = {name: self.token_heads[name](self, padded) for name in own}
            return {**(self.forward(padded, rest) if rest else {}), **made}
        states = self._states(padded, all_layers="middle" in outputs)
        reps: dict[str, Representation] = {}
        if "dense" in outputs:
            vector_ND = apply_heads(self.projections, self._pool(states.last_hidden_state, padded))
            reps["dense"] = Dense(F.normalize(vector_ND, dim=-1) if self.settings.normalize else vector_ND)
        if "middle" in outputs:
            middle_NTH = states.hidden_states[len(states.hidden_states) // 2]
            reps["middle"] = Dense(F.normalize(self._pool(middle_NTH, padded, trained=False), dim=-1))
        if "tokens" in outputs:
            special = torch.tensor(self.tokenizer.all_special_ids, device=padded.id_NT.device)
            word_NT = padded.mask_NT & ~torch.isin(padded.id_NT, special)
            reps["tokens"] = MultiVector(states.last_hidden_state, word_NT)
        for name in (name for name in self.token_heads if name in outputs):
            part_NT = self._pool_mask(padded)
            if self.settings.mcls is not None:
                part_NT = without_inner_cls(part_NT, padded, self._cls_id)
            reps[name] = apply_token_head(self.token_heads[name], states.last_hidden_state, padded, part_NT)
        return reps

    def _check(self, outputs: Sequence[str]) -> None:
        if unknown := [name for name in outputs if name not in (*self.outputs, "tokens")]:
            raise ModelError(
                f"this model has no output {unknown[0]!r}",
                expected=f"one of {', '.join(self.outputs)}",
                fix=f"to train a new one, load the model with {unknown[0]} in heads" if unknown[0] in FILES else None,
            )

    def _states(self, padded: PaddedTokens, all_layers: bool) -> Any:
        arguments = self._packed(padded) if self.packing else self._padded(padded)
        if self._takes_cache:
            arguments["use_cache"] = False
        if all_layers:
            arguments["output_hidden_states"] = True
        with kernel_precision(self.backbone):
            states = self.backbone(**arguments, return_dict=True)
        return unpacked(states, padded.mask_NT) if self.packing else states

    def _packed(self, padded: PaddedTokens) -> dict[str, Any]:
        dtype = next(self.backbone.parameters()).dtype
        return packed(padded, self.attention, self.config._attn_implementation, dtype)

    def _padded(self, padded: PaddedTokens) -> dict[str, Any]:
        mask = self._attention_mask(padded)
        arguments: dict[str, Any] = {"input_ids": padded.id_NT, "attention_mask": mask}
        four = mask is not None and mask.dim() == 4
        if (self.padding_left or four) and self._takes_positions:
            arguments["position_ids"] = (padded.mask_NT.cumsum(1) - 1).clamp_min(0)
        return arguments

    def _attention_mask(self, padded: PaddedTokens) -> Tensor | None:
        """What the attention mode wants; in training under softmask, as much of the future as the run is along."""
        dtype = next(self.backbone.parameters()).dtype
        if self.attention.mode == "softmask" and self.training:
            return self.softmask.bias(padded.mask_NT, self.softmask.alpha(self.progress), dtype)
        return self.attention.mask(padded.mask_NT, self.config._attn_implementation, dtype)

    def _pool(self, hidden_NTH: Tensor, padded: PaddedTokens, trained: bool = True) -> Tensor:
        """`trained`: with the weights of the pooling, where it has any; the mean otherwise."""
        pool_NT = self._pool_mask(padded)
        if self.settings.mcls is not None:
            pool_NT = cls_places(padded, self._cls_id)
        with torch.autocast(hidden_NTH.device.type, enabled=False):
            if self.pooler is None:
                kind = self.settings.pooling if self.settings.mcls is None else "mean"
                return POOLINGS[kind](in_fp32(hidden_NTH), pool_NT, padded.mask_NT)
            if not trained:
                return POOLINGS["mean"](in_fp32(hidden_NTH), pool_NT, padded.mask_NT)
            pooled_ND: Tensor = self.pooler(in_fp32(hidden_NTH), pool_NT)
            return pooled_ND

    @property
    def _cls_id(self) -> int:
        return added_tokens(self.tokenizer)[0][0]

    def _pool_mask(self, padded: PaddedTokens) -> Tensor:
        """pool_NT: the tokens that take part in the pooling."""
        whole = self.settings.include_prompt and self.settings.echo is None
        left_out_S = None if self._left_out_S is None else self._left_out_S.to(padded.id_NT.device)
        return pool_mask(padded, whole, left_out_S)

    def represent(
        self,
        texts: Sequence[str],
        *,
        role: Role,
        task: str | None = None,
        outputs: Sequence[str] = ("dense",),
        instruction: Instruction = None,
        token_budget: int | None = None,
        dtype: ComputeType | None = None,
        show_progress: bool | None = None,
    ) -> Reps:
        """Representations of N texts, in their order, on the CPU, without gradient.

        `token_budget`: padded tokens in a chunk, `None` fits the device. `dtype`: computes under autocast.
        `show_progress=None` shows a bar on a terminal.
        """
        how = Inference(token_budget, dtype, show_progress)
        return represent(self, texts, how, role=role, task=task, outputs=outputs, instruction=instruction)

    def encode(
        self,
        texts: str | Sequence[str],
        role: Role = "document",
        task: str | None = None,
        *,
        dim: int | None = None,
        precision: Precision = "float32",
        ranges: FloatArray | None = None,
        instruction: Instruction = None,
        token_budget: int | None = None,
        dtype: ComputeType | None = None,
        show_progress: bool | None = None,
    ) -> AnyArray:
        """Vectors of the dense head as numpy: [N, D], or [D] for a single text.

        `dim` keeps the leading coordinates and normalises again. `precision`: see `quantize`; `ranges` [2, D] holds
        the minimum and maximum of every coordinate for int8 and uint8, measured on the given vectors without it.
        """
        rows = [texts] if isinstance(texts, str) else texts
        how = Inference(token_budget, dtype, show_progress)
        reps = represent(self, rows, how, role=role, task=task, outputs=("dense",), instruction=instruction)
        vector_ND = quantize(shortened(reps["dense"], dim).numpy(), precision, ranges)
        return vector_ND[0] if isinstance(texts, str) else vector_ND

    def similarity(self, left: AnyArray | Tensor, right: AnyArray | Tensor) -> FloatArray:
        """Cosine of every row of `left` with every row of `right`, [N, M] in fp32; a single vector is one row."""
        return cosine(left, right)

    def save(self, folder: str | Path, *, merge: bool = True) -> None:
        """Write the legacy sentence-transformers layout (see `save.py`); replaces `folder` as a whole.

        An adapter is merged into the weights, after a check that the vectors stay; `merge=False` writes it apart,
        exactly and small, in a folder that needs its base.
        """
        save(self, folder, merge)


def _averaged_over(tokenizer: Any, settings: Settings) -> Tensor | None:
    """Ids of tokens that poolings over many tokens leave out, `None` for none. A single token is never left out: last
    and cls pooling take what stands there."""
    if settings.pool_special_tokens or settings.pooling in ("last", "cls"):
        return None
    return torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.int64)


def _takes_positions(backbone: nn.Module) -> bool:
    """Whether explicit positions, counted from 0, mean the same as the model's own: not where a table starts behind
    its padding index (RoBERTa), which skips padding by itself."""
    table = position_table(backbone)
    offset = table is not None and table.padding_idx is not None
    return not offset and "position_ids" in inspect.signature(backbone.forward).parameters
