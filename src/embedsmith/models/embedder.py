"""The model: a backbone, a pooling, optional heads, normalisation, and the texts' way in."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedsmith.core.encoder import Role, hash_with_weights, tokenizer_json
from embedsmith.core.errors import ModelError
from embedsmith.core.progress import progress_bar
from embedsmith.core.reps import Dense, MultiVector, Representation, Reps, concatenate, each_head, in_fp32
from embedsmith.core.shelf import poolings
from embedsmith.core.tokens import IntArray, PaddedTokens, TokenBatch, one_of
from embedsmith.models.attention import Attention, SoftMask
from embedsmith.models.backbone import call_backbone, takes, takes_positions
from embedsmith.models.config import Settings
from embedsmith.models.encode import (
    AnyArray,
    Compute,
    FloatArray,
    Precision,
    WindowEncoder,
    compare,
    fitting_tokens,
    quantize,
    settled_dtype,
    window_rows,
)
from embedsmith.models.heads.base import TRAIN_HEAD, Head, known_heads
from embedsmith.models.heads.dense import Projection
from embedsmith.models.packing import Packing, first_position, packed, unpacked
from embedsmith.models.pooling import PoolerConfig, mean, pool_mask, pooled
from embedsmith.models.self_test import kernel_precision
from embedsmith.models.sentence_keywords import encode_with
from embedsmith.models.tokenize import (
    Instruction,
    TextTokenizer,
    added_tokens,
    check_vocabulary,
    room_for,
    with_cls_blocks,
)
from embedsmith.models.write import Saved


class Embedder(nn.Module):
    """Texts to representations.

    `tokenize` makes token ids, `forward` makes `Reps` of a padded chunk with gradient, `represent` and `encode` do
    both without. `softmask` and `progress` (from 0 to 1) say how far training under attention=softmask is.
    """

    backbone: Any
    side_by_side = True  # chunks on a CPU, one a core (see `WindowEncoder`)

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: Any,
        settings: Settings,
        projections: Sequence[Projection] = (),
        token_heads: Mapping[str, Head] | None = None,
        attention: Attention = Attention(),  # noqa: B008  (frozen)
        softmask: SoftMask = SoftMask(),  # noqa: B008  (frozen)
        pooler: nn.Module | None = None,
        pooler_config: PoolerConfig | None = None,
    ) -> None:
        super().__init__()
        pooling: Callable[[Tensor, Tensor, Tensor], Tensor] = poolings.get(settings.pooling)
        if isinstance(pooling, type) != (pooler is not None):
            raise ModelError(f"pooling {settings.pooling!r} needs its weights, and no other pooling has any")
        self.backbone = backbone
        self.projections = nn.ModuleList(projections)
        self.token_heads = nn.ModuleDict(token_heads)
        self.settings = settings
        self.tokenizer = tokenizer
        self.text = TextTokenizer(tokenizer)
        self.text.rows = check_vocabulary(tokenizer, backbone)
        self.pad_id = self.text.pad_id
        self.padding_left = tokenizer.padding_side == "left"
        self.attention, self.softmask = attention, softmask
        self.pooler, self.pooler_config = pooler, pooler_config
        self.base: Mapping[str, Any] | None = None
        self.progress = 0.0
        self.packing, self.packs, self._first_position = False, Packing(), first_position(backbone)
        self.fused = "off (no GPU)"
        self._fitting: int | None = None  # tokens in a chunk, where the card was too small for more
        self._takes_positions, self._takes_cache = takes_positions(backbone), takes(backbone, "use_cache")
        # Of a text with many CLS the vector is the mean of their states; a middle layer has no trained weights.
        self._plain_pooling = mean if settings.mcls is not None or pooler is not None else pooling
        # Poolings over many tokens leave special ones out; last and cls pooling take what stands there.
        averages = not settings.pool_special_tokens and settings.pooling not in ("last", "cls")
        self._left_out_S = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.int64) if averages else None

    @property
    def max_length(self) -> int:
        return self.settings.max_length

    @property
    def dimension(self) -> int:
        """D of the dense head."""
        return self.parts.dimension

    @property
    def encoded_dimension(self) -> int:
        """How many leading numbers of them `encode` gives where nothing else is asked for."""
        return min(self.settings.truncate_dim or self.dimension, self.dimension)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What `forward` and `represent` can be asked for, beside `tokens`."""
        return ("dense", "middle", *self.token_heads)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.backbone.parameters()).device
        return device

    @property
    def parts(self) -> Saved:
        """What a saved model is made of, with the weights shared."""
        return Saved(
            self.backbone,
            self.tokenizer,
            self.settings,
            cast(Sequence[Projection], tuple(self.projections)),
            cast(Mapping[str, Head], dict(self.token_heads.items())),
            self.pooler,
            self.pooler_config,
            self.attention,
            self.base,
        )

    def fingerprint(self) -> str:
        """A hash of everything a vector depends on: weights, settings, tokenizer."""
        return hash_with_weights(repr(self.settings) + tokenizer_json(self.tokenizer), self)

    def tokenize(
        self,
        texts: Sequence[str],
        role: Role | Sequence[Role] = "document",
        task: str | None = None,
        instruction: Instruction = None,
    ) -> TokenBatch:
        """Token ids of N texts, prompt (or instruction) in front, truncated with the end tokens kept.

        A role may be given for all texts or for each. An instruction, one for all or one a text, replaces the prompt of
        the role and task.
        """
        block = self.settings.mcls
        if block is None:
            return self.text(texts, self.settings, role, task, instruction)
        ends = len(added_tokens(self.tokenizer)[1])
        shorter = replace(self.settings, max_length=room_for(self.settings.max_length, block, ends))
        return with_cls_blocks(self.text(texts, shorter, role, task, instruction), block, ends)

    def forward(self, padded: PaddedTokens, outputs: Sequence[str] = ("dense",)) -> dict[str, Representation]:
        """Representations of a padded chunk, with gradient, pooled and normalised in fp32 even under autocast.

        `dense`: the text's vector [N, D]. `middle`: the same pooling of the middle layer's states [N, H], normalised
        (hidden_states[(L + 1) // 2] of L layers). `tokens`: the last layer's states as they are, [N, T, H], special
        tokens masked: for diagnostics. Every other output is a head's, such as `sparse`, a weight a token, and
        `multivector`, a vector a token.
        Errors: `ModelError` for an output this model does not have.
        """
        settings = self.settings
        if unknown := [name for name in outputs if name not in (*self.token_heads, "dense", "middle", "tokens")]:
            raise ModelError(
                f"this model has no output {unknown[0]!r}",
                expected=f"one of {', '.join(self.outputs)}",
                fix=f"train one: {TRAIN_HEAD.format(unknown[0])}" if unknown[0] in known_heads() else None,
            )
        heads: dict[str, Any] = {name: head for name, head in self.token_heads.items() if name in outputs}
        own = {name: head(self, padded) for name, head in heads.items() if head.own_pass}
        if own and len(own) == len(set(outputs)):
            return own
        states = self._outputs(padded, all_layers="middle" in outputs)

        def given(state_NTH: Tensor) -> Tensor:
            """[N, T, H], or [S, H] of a packed chunk without what fills its row up."""
            return state_NTH[0, : len(padded.place_S)] if self.packing else state_NTH

        last = given(states.last_hidden_state)
        left_out_S = None if self._left_out_S is None else self._left_out_S.to(padded.id_NT.device)
        part_NT = pool_NT = pool_mask(padded, settings.include_prompt and settings.echo is None, left_out_S)
        if settings.mcls is not None:
            pool_NT = padded.mask_NT & (padded.id_NT == added_tokens(self.tokenizer)[0][0])
            part_NT = part_NT & ~(pool_NT & (pool_NT.int().cumsum(1) > 1))  # a CLS between blocks is no word
        reps: dict[str, Representation] = {}
        with torch.autocast(last.device.type, enabled=False):
            if "dense" in outputs:
                pooling: Any = self._plain_pooling if self.pooler is None else self.pooler
                vector_ND = pooled(pooling, in_fp32(last), pool_NT, padded)
                for projection in self.projections:
                    vector_ND = projection(vector_ND)
                reps["dense"] = Dense(F.normalize(vector_ND, dim=-1) if settings.normalize else vector_ND)
            if "middle" in outputs:
                middle = in_fp32(given(states.hidden_states[len(states.hidden_states) // 2]))
                middle_NH = pooled(self._plain_pooling, middle, pool_NT, padded)
                reps["middle"] = Dense(F.normalize(middle_NH, dim=-1))
            if "tokens" in outputs:
                special_S = torch.tensor(self.tokenizer.all_special_ids, device=padded.id_NT.device)
                last_NTH = padded.spread(last) if self.packing else last
                reps["tokens"] = MultiVector(last_NTH, padded.mask_NT & ~one_of(padded.id_NT, special_S))
            for name, head in heads.items():
                if not head.own_pass:
                    hidden = padded.spread(last) if self.packing and not head.reads_packed else last
                    reps[name] = head(in_fp32(hidden), padded, part_NT)
        return reps | own

    def states(self, padded: PaddedTokens, all_layers: bool = False) -> Any:
        """The backbone's output for a padded chunk, under the model's attention: `last_hidden_state` [N, T, H], and
        `hidden_states` of all layers where they are asked for."""
        states = self._outputs(padded, all_layers)
        return unpacked(states, padded) if self.packing else states

    def _outputs(self, padded: PaddedTokens, all_layers: bool) -> Any:
        """The same as the backbone gives it: of a packed chunk one row, [1, S, H]."""
        dtype, implementation = next(self.backbone.parameters()).dtype, self.backbone.config._attn_implementation
        if self.packing:
            arguments = packed(padded, self.attention, self.backbone, self._first_position)
        else:
            if self.attention.mode == "softmask" and self.training:  # as much of the future as the run is along
                mask: Tensor | None = self.softmask.bias(padded.mask_NT, self.softmask.alpha(self.progress), dtype)
            else:
                mask = self.attention.mask(padded.mask_NT, implementation, dtype)
            arguments = {"input_ids": padded.id_NT, "attention_mask": mask}
            if self._takes_positions and (self.padding_left or (mask is not None and mask.dim() == 4)):
                arguments["position_ids"] = (padded.mask_NT.cumsum(1) - 1).clamp_min(0)
        if self._takes_cache:
            arguments["use_cache"] = False
        if all_layers:
            arguments["output_hidden_states"] = True
        with kernel_precision(self.backbone):
            return call_backbone(self.backbone, arguments | {"return_dict": True})

    def represent(
        self,
        texts: Sequence[str],
        *,
        role: Role,
        task: str | None = None,
        outputs: Sequence[str] = ("dense",),
        instruction: Instruction = None,
        token_budget: int | None = None,
        dtype: Compute | None = None,
        show_progress: bool | None = None,
    ) -> Reps:
        """Representations of N texts, in their order, on the CPU, without gradient; of no text, of zero rows.

        `token_budget`: padded tokens in a chunk, `None` fits the device. `dtype`: computes under autocast; `auto` takes
        16 bits where the hardware multiplies them, and says so.
        `show_progress=None` shows a bar on a terminal, where there are texts enough for it.
        """
        if len(texts) == 0:  # the shapes of one text, without its row
            one = self.represent([""], role=role, task=task, outputs=outputs, token_budget=token_budget, dtype=dtype)
            return each_head(one, lambda rep: rep.rows(slice(0, 0)))

        def windows(size: int) -> Iterator[TokenBatch]:
            for start in range(0, len(texts), size):
                rows = slice(start, start + size)
                own = instruction if instruction is None or isinstance(instruction, str) else instruction[rows]
                yield self.tokenize(texts[rows], role, task, own)

        visible = False if show_progress is None and len(texts) < 512 else show_progress
        size = window_rows(self.device, with_tokens=any(name not in ("dense", "middle") for name in outputs))
        with progress_bar("encode", len(texts), visible=visible) as bar:
            parts = list(self.represent_windows(windows(size), outputs, token_budget, dtype, bar.advance))
        return parts[0] if len(parts) == 1 else concatenate(parts)

    def represent_windows(
        self,
        windows: Iterator[TokenBatch],
        outputs: Sequence[str] = ("dense",),
        token_budget: int | None = None,
        dtype: Compute | None = None,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> Iterator[Reps]:
        """Representations of windows of tokenised texts, as `represent` gives them; a window is made, in a thread,
        while a GPU computes the one before. `advance` is told how many rows are done."""

        def compute(tokens: TokenBatch, rows: IntArray) -> Reps:
            made: Reps = self(tokens.pad(self.pad_id, self.device, self.padding_left, rows), outputs)
            return made

        device, chosen = self.device, settled_dtype(dtype, self.device)
        known = self._fitting if token_budget is None else token_budget
        size = known or fitting_tokens(device, self.backbone.config)
        engine = WindowEncoder(compute, device, size, chosen, self.packing, advance, self.side_by_side)
        was_training = self.training  # training goes on after an evaluation
        self.eval()
        try:
            yield from engine.run(windows)
        finally:
            self.train(was_training)
            if engine.chunk_tokens < size:
                self._fitting = engine.chunk_tokens

    def encode_windows(
        self,
        windows: Iterator[Sequence[str]],
        role: Role = "document",
        task: str | None = None,
        *,
        dim: int | None = None,
        dtype: Compute | None = None,
    ) -> Iterator[FloatArray]:
        """What `encode` gives for each window of texts; the next one is read and tokenised while a GPU computes
        one. For files: a window is to hold no more texts than may lie in memory together."""
        size = window_rows(self.device, with_tokens=False)
        lengths: deque[int] = deque()

        def tokens() -> Iterator[TokenBatch]:
            for texts in windows:
                lengths.append(len(texts))
                for start in range(0, len(texts), size):
                    yield self.tokenize(texts[start : start + size], role, task)

        parts: list[FloatArray] = []
        for reps in self.represent_windows(tokens(), dtype=dtype):
            parts.append(self._vectors(reps, dim))
            if sum(map(len, parts)) == lengths[0]:
                lengths.popleft()
                yield np.concatenate(parts)
                parts = []

    @overload
    def encode(
        self,
        texts: str | Sequence[str],
        role: Role = "document",
        task: str | None = None,
        *,
        convert_to_tensor: Literal[True],
        **options: Any,
    ) -> Tensor: ...

    @overload
    def encode(
        self, texts: str | Sequence[str], role: Role = "document", task: str | None = None, **options: Any
    ) -> AnyArray: ...

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
        dtype: Compute | None = None,
        show_progress: bool | None = None,
        **keywords: Any,
    ) -> Any:
        """Vectors of the dense head as numpy: [N, D], or [D] for a single text.

        `dim` keeps the leading coordinates and normalises again; by default what the folder says (`truncate_dim` of
        sentence-transformers), else all of them. `precision`: see `quantize`; `ranges` [2, D] holds
        the minimum and maximum of every coordinate for int8 and uint8, measured on the given vectors without it.

        `keywords` are those of sentence-transformers, which mean what they mean there: `batch_size`, `prompt`,
        `prompt_name`, `normalize_embeddings`, `convert_to_tensor`, `convert_to_numpy`, `device`, `show_progress_bar`,
        `truncate_dim`. Errors: `ModelError` naming what to use here instead of another.
        """
        if keywords:
            options: dict[str, Any] = {"role": role, "task": task, "dim": dim, "precision": precision, "ranges": ranges}
            options |= {"instruction": instruction, "token_budget": token_budget, "dtype": dtype}
            return encode_with(self, texts, options | {"show_progress": show_progress}, keywords)
        reps = self.represent(
            [texts] if isinstance(texts, str) else texts,
            role=role,
            task=task,
            instruction=instruction,
            token_budget=token_budget,
            dtype=dtype,
            show_progress=show_progress,
        )
        made = quantize(self._vectors(reps, dim), precision, ranges)
        return made[0] if isinstance(texts, str) else made

    def _vectors(self, reps: Reps, dim: int | None) -> FloatArray:
        """vector_ND of the dense head, cut to the leading `dim` coordinates or those of the folder."""
        vector_ND = in_fp32(reps["dense"].tensors()[0])
        if dim is not None and not 1 <= dim <= vector_ND.shape[1]:
            raise ModelError(f"dim={dim}", expected=f"from 1 to {vector_ND.shape[1]}, the model's dimension")
        width = dim or self.encoded_dimension
        if width < vector_ND.shape[1] or dim is not None:
            vector_ND = vector_ND[:, :width]
            vector_ND = F.normalize(vector_ND, dim=-1) if dim is not None or self.settings.normalize else vector_ND
        vectors: FloatArray = vector_ND.numpy()
        return vectors

    def encode_query(self, texts: str | Sequence[str], **options: Any) -> Any:
        """`encode` with the prompt of queries."""
        return self.encode(texts, "query", **options)

    def encode_document(self, texts: str | Sequence[str], **options: Any) -> Any:
        """`encode` with the prompt of documents."""
        return self.encode(texts, "document", **options)

    def similarity(self, left: AnyArray | Tensor, right: AnyArray | Tensor) -> FloatArray:
        """Every row of `left` with every row of `right`, [N, M] in fp32; a single vector is one row. Cosine, or what
        the folder names: the dot product, or a negative distance (`euclidean`, `manhattan`)."""
        return compare(left, right, self.settings.similarity)

    def save(self, folder: str | Path, *, merge: bool = True) -> None:
        """Write the legacy sentence-transformers layout (see `write.py`); a saved model in `folder` is replaced.

        An adapter is merged into the weights, after a check that the vectors stay; `merge=False` writes it apart,
        exactly and small, in a folder that needs its base.
        """
        self.parts.save(folder, merge)
