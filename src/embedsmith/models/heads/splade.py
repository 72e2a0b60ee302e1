"""SPLADE-style sparse vectors: the weight of every word of the vocabulary, through the language-model head.

    w_v = log(1 + relu( max_t z_tv )),   z = W f(h) + b,   max over the tokens that take part

Sources: SPLADE v2 (Formal et al., 2021), max pooling; SPLADE (2021) for the sum of log(1 + relu(z)) over tokens, and
OpenSearch's models for a logarithm taken twice. Of the V weights the `terms` largest are kept, or all that are above 0.
[N, T, V] never exists: words are scored block by block beside a running best, and the backward pass goes only to the
words and tokens that were chosen.

z comes from the language-model head of the backbone's family, taken off its model (`LmHead`), on which pre-training
builds too: f is the family's transform before the output layer, W [V, H] the output layer, as a rule the input
embeddings. W is never copied where it is the backbone's own input embeddings: both are trained as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from embedsmith.core.errors import ModelError, foreign_errors
from embedsmith.core.progress import log, transformers_silenced
from embedsmith.core.reps import Sparse, in_fp32
from embedsmith.core.tokens import PaddedTokens
from embedsmith.models.heads.base import Head, HeadSource, cpu_state

SPLADE_FILE = "splade_head.safetensors"
TERMS = 256
"""Words a text may have, unless a recipe says otherwise."""
_NUMBERS = 2**23  # scores alive at once: 32 MB
_TERMS_AT_ONCE = 2048  # rows of W that the backward pass copies together
_WORDS_OF_A_GRAPH = 16384  # a block of the vocabulary in an exported graph


class LmHead(nn.Module):
    """`transform`: f, or none. `weight_VH`: an output layer of its own, or `None` for the backbone's input embeddings,
    `embeddings`, which stay the backbone's: they are neither saved nor counted here."""

    def __init__(
        self, embeddings: nn.Module, transform: nn.Module | None, weight_VH: Tensor | None, bias_V: Tensor | None
    ) -> None:
        super().__init__()
        self.transform = transform
        self.weight_VH = None if weight_VH is None else nn.Parameter(weight_VH)
        self.bias_V = None if bias_V is None else nn.Parameter(bias_V)
        self._embeddings = (embeddings,)  # a tuple: no submodule

    @classmethod
    def new(cls, source: HeadSource) -> LmHead:
        """The head of the language model in the base; where that has none, the input embeddings without a transform.

        Errors: `ModelError` for a family whose head computes more than W f(h) + b (a cap or scale on its scores).
        """
        kind = _family(source.backbone.config)
        with foreign_errors("cannot load the language-model head", source.base), transformers_silenced():
            model, report = kind.from_pretrained(
                source.base, dtype=torch.float32, trust_remote_code=source.trust_remote_code, output_loading_info=True
            )
        prefix = f"{model.base_model_prefix}."
        if [key for key in report["missing_keys"] if not key.startswith(prefix)]:
            log.warning(
                "%s has no language-model head: the input embeddings take its place, to be trained", source.base
            )
            words = source.backbone.get_input_embeddings()
            return cls(words, None, None, torch.zeros(len(words.weight)))
        return _split(model.eval(), source.backbone).requires_grad_(True)

    @classmethod
    def read(cls, path: Path, backbone: Any) -> tuple[LmHead, dict[str, Tensor], dict[str, str]]:
        """The head in a file, the other tensors there, and what the file says of itself.

        Errors: `ModelError` for a damaged file, or one of another family or size.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read this head ({error})", where=path, fix="copy the file again") from error
        own = {name.removeprefix("lm."): tensor for name, tensor in tensors.items() if name.startswith("lm.")}
        transform = None
        if about.get("transform") == "family":
            with transformers_silenced(), torch.device("meta"):
                transform = _parts(_family(backbone.config).from_config(backbone.config))[1]
        head = cls(backbone.get_input_embeddings(), transform, own.get("weight_VH"), own.get("bias_V"))
        try:
            head.load_state_dict(own, assign=True)
        except RuntimeError as error:
            raise ModelError(f"this head belongs to another model: {error}", where=path) from error
        others = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm.")}
        return head.requires_grad_(True), others, about

    @property
    def output_VH(self) -> Tensor:
        """W."""
        if self.weight_VH is not None:
            return self.weight_VH
        tied_VH: Tensor = self._embeddings[0].weight  # type: ignore[assignment]
        return tied_VH

    def states(self, hidden_NTH: Tensor) -> Tensor:
        """f(h), in fp32."""
        state_NTH: Tensor = in_fp32(hidden_NTH) if self.transform is None else self.transform(in_fp32(hidden_NTH))
        return state_NTH

    def cross_entropies(self, hidden_SH: Tensor, id_S: Tensor) -> Tensor:
        """-log softmax(z)_id of S tokens, a few at a time, computed again in the backward pass: [S, V] never exists."""

        def of(some_SH: Tensor, some_S: Tensor) -> Tensor:
            logit_SV = F.linear(self.states(some_SH), in_fp32(self.output_VH), self.bias_V)
            return F.cross_entropy(logit_SV, some_S, reduction="none")

        size = max(_NUMBERS // len(self.output_VH), 1)
        parts = zip(hidden_SH.split(size), id_S.split(size), strict=True)
        return torch.cat([checkpoint(of, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])

    def save(self, path: Path, about: Mapping[str, str], **others: nn.Module) -> None:
        """The head under `lm` and other modules under their names, in one safetensors file. Bytes first: a full disk is
        then named."""
        tensors = {
            f"{name}.{key}": tensor
            for name, part in {"lm": self, **others}.items()
            for key, tensor in cpu_state(part).items()
        }
        path.write_bytes(save(tensors, metadata={"transform": "none" if self.transform is None else "family", **about}))

    def masked_model(self, backbone: Any) -> Any | None:
        """The whole masked-language model of this head and its backbone, on the CPU, as its family saves it; `None`
        where the family has none, or the head is not of its form."""
        kind = _family(backbone.config)
        if kind is not AutoModelForMaskedLM or self.transform is None:
            return None
        with transformers_silenced():
            model = kind.from_config(backbone.config, dtype=torch.float32)
        own = {name: tensor.detach().cpu().float() for name, tensor in backbone.state_dict().items()}
        known = model.base_model.state_dict().keys()
        model.base_model.load_state_dict({name: tensor for name, tensor in own.items() if name in known})
        with torch.no_grad():
            output: Any = model.get_output_embeddings()
            if self.bias_V is not None:
                output.bias.copy_(self.bias_V.cpu())
            if self.weight_VH is not None:
                output.weight.copy_(self.weight_VH.cpu())
        _, holder = _output(model)
        into: Any = model.get_submodule(holder) if holder else _parts(model)[1]  # with the output layer in it
        into.load_state_dict({name: tensor.cpu() for name, tensor in self.transform.state_dict().items()}, strict=False)
        return model.eval()


def _family(config: Any) -> Any:
    """The class of transformers that builds the language models of a family."""
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return AutoModelForMaskedLM
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    raise ModelError(f"the family {config.model_type!r} has no language model", expected="an encoder or a decoder")


def _parts(model: Any) -> tuple[nn.Module, nn.Module | None]:
    """The output layer, and the transform before it (cut loose from it; `None` where there is none)."""
    output, holder = _output(model)
    if holder:  # BERT's cls.predictions, RoBERTa's lm_head: the transform with the output layer at its end
        transform = model.get_submodule(holder)
        setattr(transform, next(name for name, child in transform.named_children() if child is output), nn.Identity())
        transform._parameters.pop("bias", None)  # the output layer's, under a second name
        return output, transform
    children = dict(model.named_children())
    if "vocab_transform" in children:  # DistilBERT
        steps = (children[name] for name in ("vocab_transform", "activation", "vocab_layer_norm"))
        return output, nn.Sequential(*steps)
    return output, children.get(
        "head", children.get("generator_predictions")
    )  # ModernBERT, ELECTRA; decoders have none


def _output(model: Any) -> tuple[nn.Module, str]:
    """The output layer, and the path of the module that holds it, empty for the model itself."""
    output = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is output), None)
    if path is None:
        raise _unknown_form(model)
    return output, path.rpartition(".")[0]


def _split(model: Any, backbone: Any) -> LmHead:
    """The head of a whole language model, proven on it."""
    id_NT = torch.arange(min(8, model.config.get_text_config().vocab_size))[None]
    with torch.no_grad():
        expected_NTV = model(input_ids=id_NT).logits
        hidden_NTH = model.base_model(input_ids=id_NT).last_hidden_state
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    found, transform = _parts(model)
    output: Any = found
    table, weight_VH, bias = backbone.get_input_embeddings(), output.weight.detach(), output.bias
    head = LmHead(table, transform, None if tied else weight_VH, None if bias is None else bias.detach())
    try:
        with torch.no_grad():
            logit_NTV = F.linear(head.states(hidden_NTH), weight_VH, bias)
    except (AttributeError, RuntimeError, TypeError) as error:  # parts that do not fit together
        raise _unknown_form(model) from error
    if not torch.allclose(logit_NTV, expected_NTV, atol=1e-3, rtol=1e-3):
        raise _unknown_form(model)
    if head.weight_VH is not None and (more := len(table.weight) - len(weight_VH)) > 0:  # words were added
        mean_H = weight_VH.float().mean(0).to(weight_VH.dtype)
        head.weight_VH = nn.Parameter(torch.cat([weight_VH, mean_H.expand(more, -1)]))
    if head.bias_V is not None and len(head.bias_V) < len(head.output_VH):
        more = len(head.output_VH) - len(head.bias_V)
        head.bias_V = nn.Parameter(F.pad(head.bias_V.detach(), (0, more)))
    return head


def _unknown_form(model: Any) -> ModelError:
    return ModelError(
        f"{type(model).__name__} does more with its scores than a linear layer behind one transform",
        fix="use the lexical sparse head: model.sparse=lexical",
    )


@dataclass(frozen=True)
class SpladeSpec:
    """How words' scores become weights. `terms`: how many words a text may have, `None` for all above 0. `pooling`: the
    largest of a word's scores over the tokens, or the sum of what they are worth. `logs`: how often the logarithm of
    1 + w is taken."""

    terms: int | None = TERMS
    pooling: Literal["max", "sum"] = "max"
    logs: int = 1

    def build(self, source: HeadSource) -> SpladeHead:
        """The head of the language model in the base."""
        spec = self if source.sparse_terms is None else replace(self, terms=source.sparse_terms)
        return SpladeHead(LmHead.new(source), spec).frozen_as(source)

    def said(self) -> dict[str, str]:
        """What the head's file says of itself."""
        plain = {"terms": "all" if self.terms is None else str(self.terms)}
        more = {"pooling": self.pooling, "logs": str(self.logs)}
        return plain if (self.pooling, self.logs) == ("max", 1) else plain | more

    @staticmethod
    def read(about: Mapping[str, str]) -> SpladeSpec:
        terms = about.get("terms", str(TERMS))
        pooling: Literal["max", "sum"] = "sum" if about.get("pooling") == "sum" else "max"
        return SpladeSpec(None if terms == "all" else int(terms), pooling, int(about.get("logs", 1)))


class SpladeHead(Head):
    """The sparse head through the language model."""

    file = SPLADE_FILE
    reads_packed = True
    reads_words = True

    def __init__(self, lm: LmHead, spec: SpladeSpec = SpladeSpec()) -> None:
        super().__init__()
        self.lm = lm
        self.spec = spec

    @property
    def terms(self) -> int:
        """How many words a text may have."""
        return self.spec.terms or len(self.lm.output_VH)

    @classmethod
    def build(cls, source: HeadSource) -> SpladeHead:
        """The head in the folder, or a new one of the language model in the base."""
        if not cls.is_in(source.folder):
            return SpladeSpec().build(source)
        lm, _, about = LmHead.read(source.folder / cls.file, source.backbone)
        spec = SpladeSpec.read(about)
        return cls(lm, replace(spec, terms=source.sparse_terms or spec.terms)).frozen_as(source)

    def frozen_as(self, source: HeadSource) -> SpladeHead:
        """Its own words stay as they are where the backbone's do."""
        if source.adapted and self.lm.weight_VH is not None:
            self.lm.weight_VH.requires_grad_(False)
        return self

    def forward(self, hidden: Tensor, padded: PaddedTokens, part_NT: Tensor) -> Sparse:
        state_NTH = self.lm.states(hidden)
        if hidden.dim() == 2:  # the search for the best words wants its rows
            state_NTH = padded.spread(state_NTH)
        if self.spec.pooling == "sum":
            weight_NV = self._summed(state_NTH, part_NT)
            weight_NK, word_NK = weight_NV.topk(min(self.terms, weight_NV.shape[1]), dim=1)
        else:
            score_NK, word_NK = top_words(state_NTH, self.lm.output_VH, self.lm.bias_V, part_NT, self.terms)
            weight_NK = self._weights(score_NK)
        if self.spec.terms is None:  # they stand in falling order: behind the last one above 0 there is nothing
            used = max(int((weight_NK > 0).sum(1).max()), 1)
            word_NK, weight_NK = word_NK[:, :used].contiguous(), weight_NK[:, :used].contiguous()
        return Sparse(word_NK, weight_NK)

    def _weights(self, score: Tensor) -> Tensor:
        weight = torch.relu(score)
        for _ in range(self.spec.logs):
            weight = torch.log1p(weight)
        return weight

    def _summed(self, state_NTH: Tensor, part_NT: Tensor) -> Tensor:
        """weight_NV: sums over the tokens, a block of words at a time, computed again in the backward pass."""
        weight_VH, bias_V = self.lm.output_VH, self.lm.bias_V

        def of(states_NTH: Tensor, some_BH: Tensor, bias_B: Tensor | None) -> Tensor:
            weight_NTB = self._weights(F.linear(states_NTH, in_fp32(some_BH), bias_B))
            return weight_NTB.masked_fill(~part_NT[..., None], 0.0).sum(1)

        size = max(_NUMBERS // max(part_NT.numel(), 1), 64)
        parts = []
        for start in range(0, len(weight_VH), size):
            bias_B = None if bias_V is None else bias_V[start : start + size]
            words_BH = weight_VH[start : start + size]
            parts.append(
                checkpoint(of, state_NTH, words_BH, bias_B, use_reentrant=False, preserve_rng_state=False)
                if torch.is_grad_enabled()
                else of(state_NTH, words_BH, bias_B)
            )
        return torch.cat(parts, 1)

    def save(self, folder: Path) -> None:
        self.lm.save(folder / self.file, self.spec.said())


def top_words(
    state_NTH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, part_NT: Tensor, terms: int
) -> tuple[Tensor, Tensor]:
    """score_NK and word_NK of the K = min(terms, V) words with the largest max_t (W state_t + b)_v; -inf where a row
    has no tokens. The gradient goes to the token that had the maximum (the first of equal ones)."""
    bias_V = state_NTH.new_zeros(len(weight_VH)) if bias_V is None else bias_V
    if torch.compiler.is_exporting():  # blocks whose number does not depend on the batch, and no backward pass
        score_NK, word_NK, _ = _search(state_NTH, weight_VH, bias_V, part_NT, terms, _WORDS_OF_A_GRAPH)
        return score_NK, word_NK
    score_NK, word_NK = _TopWords.apply(state_NTH, weight_VH, bias_V, part_NT, terms)  # type: ignore[no-untyped-call]
    return score_NK, word_NK


class _TopWords(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, state_NTH: Tensor, weight_VH: Tensor, bias_V: Tensor, part_NT: Tensor, terms: int
    ) -> tuple[Tensor, Tensor]:
        score_NK, word_NK, token_NK = _search(state_NTH, weight_VH, bias_V, part_NT, terms)
        ctx.save_for_backward(state_NTH, weight_VH, bias_V, word_NK, token_NK)
        ctx.mark_non_differentiable(word_NK)
        return score_NK, word_NK

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        state_NTH, weight_VH, bias_V, word_NK, token_NK = ctx.saved_tensors
        pull_NK = gradients[0]
        to_state = torch.zeros_like(state_NTH) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        to_bias = None
        if ctx.needs_input_grad[2]:
            to_bias = torch.zeros_like(bias_V).index_add_(0, word_NK.flatten(), pull_NK.flatten())
        for row in range(len(state_NTH)):
            chosen_K = pull_NK[row].nonzero()[:, 0]
            for some_K in chosen_K.split(_TERMS_AT_ONCE):
                word_K, token_K, pull_K1 = word_NK[row, some_K], token_NK[row, some_K], pull_NK[row, some_K, None]
                if to_state is not None:
                    to_state[row].index_add_(0, token_K, pull_K1 * in_fp32(weight_VH[word_K]))
                if to_weight is not None:
                    to_weight.index_add_(0, word_K, (pull_K1 * state_NTH[row, token_K]).to(weight_VH.dtype))
        return to_state, to_weight, to_bias, None, None


def _search(
    state_NTH: Tensor, weight_VH: Tensor, bias_V: Tensor, part_NT: Tensor, terms: int, block: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """score_NK, word_NK, token_NK of the best words, a `block` of the vocabulary at a time."""
    rows, tokens = part_NT.shape
    size = block or max(_NUMBERS // max(rows * tokens, 1), 64)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for start in range(0, len(weight_VH), size):
        score_NTB = state_NTH @ in_fp32(weight_VH[start : start + size]).T
        score_NTB.masked_fill_(~part_NT[..., None], float("-inf"))
        score_NB, token_NB = score_NTB.max(1)
        score_NB += bias_V[start : start + size]
        word_NB = torch.arange(start, start + score_NB.shape[1], device=token_NB.device).expand_as(token_NB)
        found = (score_NB, word_NB, token_NB)
        joined = found if best is None else tuple(torch.cat(pair, 1) for pair in zip(best, found, strict=True))
        score_NK, place_NK = joined[0].topk(min(terms, joined[0].shape[1]), dim=1)
        best = score_NK, joined[1].gather(1, place_NK), joined[2].gather(1, place_NK)
    assert best is not None
    return best
