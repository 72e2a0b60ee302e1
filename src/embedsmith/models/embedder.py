"""The model: a backbone, a pooling, optional heads, normalisation, and the texts' way in."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedsmith.core.encoder import Role, hash_with_weights, tokenizer_json
from embedsmith.core.errors import ModelError
from embedsmith.core.progress import progress_bar
from embedsmith.core.quantize import AnyArray, FloatArray, Precision, quantize
from embedsmith.core.reps import (
    Cosine,
    Dense,
    Euclidean,
    Manhattan,
    MultiVector,
    Representation,
    Reps,
    concatenate,
    each_head,
    in_fp32,
)
from embedsmith.core.tokens import PaddedTokens, TokenBatch, one_of
from embedsmith.core.transfer import to_device
from embedsmith.models import by_role
from embedsmith.models.attention import Attention, SoftMask
from embedsmith.models.backbone import call_backbone, takes, takes_positions
from embedsmith.models.config import Settings
from embedsmith.models.encode import (
    Compute,
    compare,
    run_windows,
    window_rows,
)
from embedsmith.models.heads.base import TRAIN_HEAD, Head, known_heads
from embedsmith.models.packing import Packing, first_position, packed, unpacked
from embedsmith.models.pooling import PoolerConfig, last_index, mean, pool_mask, pooled, pooling_named
from embedsmith.models.self_test import kernel_precision
from embedsmith.models.sentence_keywords import encode_with
from embedsmith.models.static import StaticTable
from embedsmith.models.tokenize import (
    Instruction,
    TextTokenizer,
    added_tokens,
    check_vocabulary,
    room_for,
    with_cls_blocks,
)
from embedsmith.models.write import Saved

_DISTANCES: Mapping[str, type[Dense]] = {"euclidean": Euclidean, "manhattan": Manhattan}


class Embedder(nn.Module):
    """Texts to representations.

    `tokenize` makes token ids, `forward` makes `Reps` of a padded chunk with gradient, `represent` and `encode` do
    both without. `query_side`: what reads queries, where that is another model; all else here is then that of
    documents. `softmask` and `progress` (from 0 to 1) say how far training under attention=softmask is.
    """

    backbone: Any
    side_by_side = True  # chunks on a CPU, one a core (see `WindowEncoder`)

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: Any,
        settings: Settings,
        projections: Sequence[nn.Module] = (),
        token_heads: Mapping[str, Head] | None = None,
        attention: Attention = Attention(),  # noqa: B008  (frozen)
        softmask: SoftMask = SoftMask(),  # noqa: B008  (frozen)
        pooler: nn.Module | None = None,
        pooler_config: PoolerConfig | None = None,
    ) -> None:
        super().__init__()
        pooling: Any = None if settings.pooling is None else pooling_named(settings.pooling)
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
        self.query_side: Embedder | None = None
        if isinstance(backbone, StaticTable):
            self.text.filler_id = backbone.nothing
        self.progress = 0.0
        self.packing, self.packs, self._first_position = False, Packing(), first_position(backbone)
        self.fused = "off (no GPU)"
        self.fitting: int | None = None  # tokens in a chunk, where the card was too small for more
        self._takes_positions, self._takes_cache = takes_positions(backbone), takes(backbone, "use_cache")
        # Of a text with many CLS the vector is the mean of their states; a middle layer has no trained weights.
        self._plain_pooling = mean if settings.mcls is not None or pooler is not None else pooling
        # Poolings over many tokens leave special ones out; last and cls pooling take what stands there.
        averages = not settings.pool_special_tokens and settings.pooling not in ("last", "cls", None)
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
        pooled_ones = () if self.settings.pooling is None else ("dense", "middle")
        return (*pooled_ones, *self.token_heads)

    @property
    def main_head(self) -> str:
        """The output that the model is made for."""
        return self.settings.main

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
            tuple(self.projections),
            cast(Mapping[str, Head], dict(self.token_heads.items())),
            self.pooler,
            self.pooler_config,
            self.attention,
            self.base,
            None if self.query_side is None else self.query_side.parts,
        )

    def fingerprint(self) -> str:
        """A hash of everything a vector or a score depends on: weights, settings, tokenizer."""
        unusual = self.settings.unusual
        about = repr(self.settings) + tokenizer_json(self.tokenizer) + (f"{unusual}" if unusual else "")
        if self.query_side is not None:
            about += f"{self.query_side.settings!r}{self.query_side.settings.unusual}"
        left_out = [name for name, head in self.token_heads.items() if self._leaves_prompt_out(head)]
        if left_out and any(self.settings.prompts.values()):  # models without prompts keep the hashes that they had
            about += f" no prompt in {left_out}"
        return hash_with_weights(about, self)

    def _leaves_prompt_out(self, head: Any) -> bool:
        settings = self.settings
        return settings.include_prompt and not head.reads_prompt(True, settings.heads_include_prompt)

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
        if self.query_side is not None:
            roles: Sequence[Role] = [role] * len(texts) if isinstance(role, str) else role
            own, theirs = partial(self._tokens, task=task), partial(self.query_side._tokens, task=task)
            return by_role.tokenized({"query": theirs, "document": own}, texts, roles, instruction)
        if self.settings.mcls is not None:
            return self._in_blocks(lambda settings: self.text(texts, settings, role, task, instruction))
        return self.text(texts, self.settings, role, task, instruction)

    def tokenize_ids(
        self, rows: Sequence[Sequence[int]], role: Role | Sequence[Role] = "document", task: str | None = None
    ) -> TokenBatch:
        """The same of N texts that are ids of this tokenizer already. Special tokens around a text may be among them or
        left out. Errors: `DataError` for an id that the model does not know, and for more tokens than it reads."""
        if self.settings.mcls is not None:
            return self._in_blocks(lambda settings: self.text.from_ids(rows, settings, role, task))
        return self.text.from_ids(rows, self.settings, role, task)

    def _in_blocks(self, tokenize: Callable[[Settings], TokenBatch]) -> TokenBatch:
        """What `tokenize` makes under settings that leave room for them, with a CLS before every block of tokens."""
        block = self.settings.mcls
        assert block is not None
        ends = len(added_tokens(self.tokenizer)[1])
        shorter = replace(self.settings, max_length=room_for(self.settings.max_length, block, ends))
        return with_cls_blocks(tokenize(shorter), block, ends)

    def _tokens(self, texts: Sequence[str], role: Role, instruction: Instruction, task: str | None) -> TokenBatch:
        return self.text(texts, self.settings, role, task, instruction)

    def forward(self, padded: PaddedTokens, outputs: Sequence[str] = ("dense",)) -> dict[str, Representation]:
        """Representations of a padded chunk, with gradient, pooled and normalised in fp32 even under autocast.

        `dense`: the text's vector [N, D]. `middle`: the same pooling of the middle layer's states [N, H], normalised
        (hidden_states[(L + 1) // 2] of L layers). `tokens`: the last layer's states as they are, [N, T, H], special
        tokens masked: for diagnostics. Every other output is a head's, such as `sparse`, a weight a token, and
        `multivector`, a vector a token.
        Errors: `ModelError` for an output this model does not have.
        """
        if unknown := [name for name in outputs if name not in (*self.outputs, "tokens")]:
            fix = f"train one: {TRAIN_HEAD.format(unknown[0])}" if unknown[0] in known_heads() else None
            if unknown[0] in ("dense", "middle"):
                fix = (
                    f"name what it has, {self.main_head}, as the loss's head of a recipe or --head of a command; a "
                    "dense vector too is had with pooling (model.pooling=mean), and is then to be trained"
                )
            raise ModelError(
                f"this model has no output {unknown[0]!r}", expected=f"one of {', '.join(self.outputs)}", fix=fix
            )
        if self.query_side is None:
            return self._represented(padded, outputs)
        own, theirs = self, self.query_side
        models: dict[Role, tuple[by_role.Represent, int]] = {
            "query": (partial(theirs._represented, outputs=outputs), theirs.pad_id),
            "document": (partial(own._represented, outputs=outputs), own.pad_id),
        }
        return by_role.represented(models, padded)

    def _represented(self, padded: PaddedTokens, outputs: Sequence[str]) -> dict[str, Representation]:
        """What `forward` gives, by this model alone."""
        heads: dict[str, Any] = {name: head for name, head in self.token_heads.items() if name in outputs}
        own = {name: head(self, padded) for name, head in heads.items() if head.own_pass}
        if own and len(own) == len(set(outputs)):
            return own
        states = self._outputs(padded, all_layers="middle" in outputs)

        def given(state_NTH: Tensor) -> Tensor:
            """[N, T, H], or [S, H] of a packed chunk without what fills its row up."""
            return state_NTH[0, : len(padded.place_S)] if self.packing else state_NTH

        last = given(states.last_hidden_state)
        pool_NT = self._pool_mask(padded)
        reps: dict[str, Representation] = {}
        with torch.autocast(last.device.type, enabled=False):
            vector_ND: Tensor | None = None
            if "dense" in outputs or any(head.reads_vector for head in heads.values()):
                pooling: Any = self._plain_pooling if self.pooler is None else self.pooler
                vector_ND = pooled(pooling, in_fp32(last), pool_NT, padded)
                for projection in self.projections:
                    vector_ND = projection(vector_ND)
                if "dense" in outputs:  # in the kind that scores vectors as the model's similarity says
                    settings = self.settings
                    by_product = Dense if settings.normalize or settings.similarity == "dot" else Cosine
                    kind = _DISTANCES.get(settings.similarity, by_product)
                    reps["dense"] = kind(F.normalize(vector_ND, dim=-1) if settings.normalize else vector_ND)
            if "middle" in outputs:
                middle = in_fp32(given(states.hidden_states[len(states.hidden_states) // 2]))
                middle_NH = pooled(self._plain_pooling, middle, pool_NT, padded)
                reps["middle"] = Dense(F.normalize(middle_NH, dim=-1))
            if "tokens" in outputs:
                special_S = to_device(torch.tensor(self.tokenizer.all_special_ids), padded.id_NT.device)
                last_NTH = padded.spread(last) if self.packing else last
                reps["tokens"] = MultiVector(last_NTH, padded.mask_NT & ~one_of(padded.id_NT, special_S))
            for name, head in heads.items():
                if head.reads_vector:
                    reps[name] = head(vector_ND, padded, self._part_of(head, padded))
                elif not head.own_pass:
                    hidden = padded.spread(last) if self.packing and not head.reads_packed else last
                    reps[name] = head(in_fp32(hidden), padded, self._part_of(head, padded))
        return reps | own

    def states(self, padded: PaddedTokens, all_layers: bool = False) -> Any:
        """The backbone's output for a padded chunk, under the model's attention: `last_hidden_state` [N, T, H], and
        `hidden_states` of all layers where they are asked for."""
        states = self._outputs(padded, all_layers)
        return unpacked(states, padded) if self.packing else states

    def pooled_states(self, padded: PaddedTokens) -> Tensor:
        """The last layer's states as the model pools them [N, H], before any layer behind the pooling; in fp32."""
        states = self.states(padded).last_hidden_state
        with torch.autocast(states.device.type, enabled=False):
            pooling: Any = self._plain_pooling if self.pooler is None else self.pooler
            return pooled(pooling, in_fp32(states), self._pool_mask(padded), padded)

    def _pool_mask(self, padded: PaddedTokens) -> Tensor:
        """pool_NT: the tokens that are pooled."""
        settings = self.settings
        if settings.mcls is not None:
            return self._cls_mask(padded)
        pool_NT = pool_mask(padded, settings.include_prompt and settings.echo is None, self._left_out_S)
        return pool_NT if settings.expansion is None else pool_NT & self._unfilled(padded)

    def _part_of(self, head: Any, padded: PaddedTokens) -> Tensor:
        """part_NT: the tokens that a head reads; a CLS between blocks is no word."""
        settings = self.settings
        reads_prompt = head.reads_prompt(settings.include_prompt, settings.heads_include_prompt)
        part_NT = pool_mask(padded, reads_prompt and settings.echo is None, self._left_out_S)
        if settings.expansion is not None and not head.reads_filling:
            part_NT = part_NT & self._unfilled(padded)
        if settings.mcls is None:
            return part_NT
        cls_NT = self._cls_mask(padded)
        return part_NT & ~(cls_NT & (cls_NT.int().cumsum(1) > 1))

    def _cls_mask(self, padded: PaddedTokens) -> Tensor:
        return padded.mask_NT & (padded.id_NT == added_tokens(self.tokenizer)[0][0])

    def _outputs(self, padded: PaddedTokens, all_layers: bool) -> Any:
        """The same as the backbone gives it: of a packed chunk one row, [1, S, H]."""
        dtype, implementation = next(self.backbone.parameters()).dtype, self.backbone.config._attn_implementation
        if self.packing:
            arguments = packed(padded, self.attention, self.backbone, self._first_position, self.packs.kernel)
        else:
            expansion = self.settings.expansion  # others attend to what only fills a query up where it says so
            seen_NT = padded.mask_NT if expansion is None or expansion.attend else self._unfilled(padded)
            if self.attention.mode == "softmask" and self.training:  # as much of the future as the run is along
                mask: Tensor | None = self.softmask.bias(seen_NT, self.softmask.alpha(self.progress), dtype)
            else:
                mask = self.attention.mask(seen_NT, implementation, dtype)
            arguments = {"input_ids": padded.id_NT, "attention_mask": mask}
            if self._takes_positions and (self.padding_left or (mask is not None and mask.dim() == 4)):
                arguments["position_ids"] = (padded.mask_NT.cumsum(1) - 1).clamp_min(0)
        if self._takes_cache:
            arguments["use_cache"] = False
        if all_layers:
            arguments["output_hidden_states"] = True
        with kernel_precision(self.backbone):
            return call_backbone(self.backbone, arguments | {"return_dict": True})

    def _unfilled(self, padded: PaddedTokens) -> Tensor:
        """mask_NT without the tokens that only fill a query up."""
        expansion = self.settings.expansion
        assert expansion is not None
        number = self.tokenizer.convert_tokens_to_ids(expansion.token)
        column_T = torch.arange(padded.mask_NT.shape[1], device=padded.mask_NT.device)
        word_NT = padded.mask_NT & ((padded.id_NT != number) | ~padded.is_query_N[:, None])
        return padded.mask_NT & (column_T <= last_index(word_NT)[:, None])

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
        """Representations of N texts as they are scored, in their order, on the CPU, without gradient; of no text, of
        zero rows. Dense vectors are cut to the folder's `truncate_dim`, and have length 1 where cosines compare them.

        `token_budget`: padded tokens in a chunk, `None` fits the device. `dtype`: computes under autocast; `auto` takes
        16 bits where the hardware multiplies them, and says so.
        `show_progress=None` shows a bar on a terminal, where there are texts enough for it.
        """
        reps = self._read(texts, role, task, outputs, instruction, token_budget, dtype, show_progress)
        dense = reps.get("dense")
        return reps if not isinstance(dense, Dense) else {**reps, "dense": self._as_scored(dense)}

    def _as_scored(self, dense: Dense) -> Dense:
        width, settings = self.encoded_dimension, self.settings
        if width < dense.vector_ND.shape[1]:
            dense = replace(dense, vector_ND=in_fp32(dense.vector_ND)[:, :width])
            if settings.similarity == "cosine":
                dense = Cosine(dense.vector_ND)
        return Dense(F.normalize(in_fp32(dense.vector_ND), dim=-1)) if isinstance(dense, Cosine) else dense

    def _read(
        self,
        texts: Sequence[str],
        role: Role,
        task: str | None,
        outputs: Sequence[str],
        instruction: Instruction,
        token_budget: int | None,
        dtype: Compute | None,
        show_progress: bool | None,
    ) -> Reps:
        """What the model makes of the texts, before anything is done for scoring."""
        if len(texts) == 0:  # the shapes of one text, without its row
            one = self._read([""], role, task, outputs, None, token_budget, dtype, show_progress)
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
        return run_windows(
            self, partial(self, outputs=outputs), windows, token_budget, dtype, advance, self.side_by_side
        )

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
            parts.append(self.vectors(reps, dim))
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
        listed = [texts] if isinstance(texts, str) else texts
        reps = self._read(listed, role, task, ("dense",), instruction, token_budget, dtype, show_progress)
        made = quantize(self.vectors(reps, dim), precision, ranges)
        return made[0] if isinstance(texts, str) else made

    def vectors(self, reps: Reps, dim: int | None) -> FloatArray:
        """vector_ND of the dense head, cut to the leading `dim` coordinates or those of the folder."""
        vector_ND = in_fp32(reps["dense"].tensors()[0])
        if dim is not None and not 1 <= dim <= vector_ND.shape[1]:
            raise ModelError(f"dim={dim}", expected=f"from 1 to {vector_ND.shape[1]}, the model's dimension")
        width = dim or self.encoded_dimension
        if width < vector_ND.shape[1] or dim is not None:
            vector_ND = vector_ND[:, :width]
            cosines = self.settings.normalize and self.settings.similarity == "cosine"
            vector_ND = F.normalize(vector_ND, dim=-1) if dim is not None or cosines else vector_ND
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
