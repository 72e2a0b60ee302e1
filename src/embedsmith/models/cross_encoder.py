"""A reranker: a model that reads a query and a document together and gives one score.

Two kinds: an encoder with a head of one output (a cross-encoder, as BERT's), and a language model that is asked and
answers by the logits of yes and no. Trained, saved and used alike; sentence-transformers' CrossEncoder reads both.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from embedsmith.core.encoder import hash_with_weights, tokenizer_json
from embedsmith.core.errors import ModelError
from embedsmith.core.outputs import atomic_folder, claimed
from embedsmith.core.progress import progress_bar, transformers_silenced
from embedsmith.core.reps import Dense, in_fp32
from embedsmith.core.tokens import PaddedTokens, TokenBatch
from embedsmith.models.backbone import call_backbone, takes
from embedsmith.models.encode import Compute, run_windows, window_rows
from embedsmith.models.folder import EmbeddingConfig, write_json
from embedsmith.models.lora import has_adapter, merged, save_adapter
from embedsmith.models.packing import Packing
from embedsmith.models.pair_text import SIGMOID, PairSettings, PairText
from embedsmith.models.tokenize import Instruction
from embedsmith.models.write import name_tokenizer, refuse_not_finite, saved_model

SCORE = "score"
"""The name of a reranker's only output, a number a pair."""


class CrossEncoder(nn.Module):
    """Pairs of a query and a document to scores.

    `tokenize` makes token ids of pairs, `forward` the outputs of a padded chunk with gradient, `score` does both
    without and applies the activation that the folder names.
    """

    backbone: Any

    def __init__(
        self, backbone: nn.Module, tokenizer: Any, settings: PairSettings, base: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.tokenizer, self.settings, self.base = backbone, tokenizer, settings, base
        self.text = PairText(tokenizer, settings)
        self.pad_id = self.text.pad_id
        # The answer stands behind the last token, which on the left-padded side of a chunk is its last column.
        self.padding_left = settings.asks or tokenizer.padding_side == "left"
        self.packing, self.packs, self.fused, self.progress = False, Packing(why="rerankers pad"), "off", 0.0
        self.fitting: int | None = None  # tokens in a chunk, where the card was too small for more
        inside = {id(module) for module in self.backbone.base_model.modules()}
        for layer in list(self.backbone.modules()):  # the linear layers behind the transformer
            if type(layer) is nn.Linear and id(layer) not in inside:
                layer.__class__ = ExactLinear

    @property
    def max_length(self) -> int:
        return self.settings.max_length

    @property
    def dimension(self) -> int:
        """Of the output: one number a pair."""
        return 1

    @property
    def outputs(self) -> tuple[str, ...]:
        return (SCORE,)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.backbone.parameters()).device
        return device

    def fingerprint(self) -> str:
        """A hash of everything a score depends on: weights, settings, tokenizer, template."""
        said = f"{self.settings!r} {getattr(self.tokenizer, 'chat_template', None)}"
        return hash_with_weights(said + tokenizer_json(self.tokenizer), self)

    def tokenize(self, queries: Sequence[str], documents: Sequence[str], instruction: Instruction = None) -> TokenBatch:
        """Token ids of N pairs, cut to `max_length`: of two segments the longer loses its end, of a question the
        document. An instruction, one for all or one a pair, replaces the folder's prompt."""
        return self.text(queries, documents, instruction)

    def forward(self, padded: PaddedTokens, outputs: Sequence[str] = (SCORE,)) -> dict[str, Dense]:
        """`score`: the output of each pair [N, 1] as it is before the activation, in fp32 even under autocast; whatever
        else is asked for, it is all that there is."""
        arguments: dict[str, Any] = {"input_ids": padded.id_NT, "attention_mask": padded.mask_NT.long()}
        if self.text.has_types and takes(self.backbone, "token_type_ids"):
            arguments["token_type_ids"] = padded.body_NT.long()
        if self.settings.asks and takes(self.backbone, "position_ids"):
            arguments["position_ids"] = (padded.mask_NT.cumsum(1) - 1).clamp_min(0)
        if takes(self.backbone, "use_cache"):
            arguments["use_cache"] = False
        if self.settings.asks and takes(self.backbone, "logits_to_keep"):
            arguments["logits_to_keep"] = 1
        logits = in_fp32(call_backbone(self.backbone, arguments | {"return_dict": True}).logits)
        if not self.settings.asks:  # a head gives [N, 1]
            return {SCORE: Dense(logits)}
        last_NV = logits[:, -1]
        score_N = last_NV[:, self.settings.yes_id]
        score_N = score_N if self.settings.no_id is None else score_N - last_NV[:, self.settings.no_id]
        return {SCORE: Dense(score_N[:, None])}

    def score(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        instruction: Instruction = None,
        token_budget: int | None = None,
        dtype: Compute | None = None,
        show_progress: bool | None = None,
    ) -> Tensor:
        """score_N of the i-th document for the i-th query, fp32 on the CPU, without gradient; more is better.

        `token_budget`, `dtype` and `show_progress` as in `Embedder.represent`. Errors: `ModelError` for other numbers
        of queries and documents; `DataError` for broken Unicode.
        """
        if len(queries) != len(documents):
            raise ModelError(f"{len(queries)} queries for {len(documents)} documents", expected="one a pair")
        size, visible = window_rows(self.device, with_tokens=False), False if len(queries) < 512 else None

        def windows() -> Iterator[TokenBatch]:
            for start in range(0, len(queries), size):
                rows = slice(start, start + size)
                own = instruction if instruction is None or isinstance(instruction, str) else instruction[rows]
                yield self.tokenize(queries[rows], documents[rows], own)

        with progress_bar("rerank", len(queries), visible=visible if show_progress is None else show_progress) as bar:
            logits = [torch.zeros(0, 1)]
            for reps in run_windows(self, self, windows(), token_budget, dtype, bar.advance):
                logits += reps[SCORE].tensors()
        score_N: Tensor = activation_named(self.settings.activation)(torch.cat(logits))[:, 0]
        return score_N

    def rank(self, query: str, documents: Sequence[str], k: int | None = None) -> list[tuple[int, float]]:
        """The places of the `k` best documents for a query (`None`: all) with their scores, best first."""
        scores = self.score([query] * len(documents), documents).tolist()
        order = sorted(range(len(documents)), key=lambda place: -scores[place])
        return [(place, scores[place]) for place in order[:k]]

    def save(self, folder: str | Path, merge: bool = True) -> None:
        """Write a folder that sentence-transformers' CrossEncoder, transformers and servers read; a saved model that is
        there is replaced. An adapter is merged, or with `merge=False` written apart, in a folder that needs its base.

        Errors: those of `Saved.save`.
        """
        with claimed(folder, "model.save"), atomic_folder(folder, saved_model(), overwrite=True) as root:
            refuse_not_finite(self.backbone)
            with transformers_silenced():
                SavedReranker(self.backbone, self.tokenizer, self.settings, self.base).write(root, merge)


class ExactLinear(nn.Linear):
    """The last layer of a reranker in fp32, also under autocast: bf16 has a step of 1/8 at a logit of 20."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else in_fp32(self.bias)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(in_fp32(input), in_fp32(self.weight), bias)


def activation_named(path: str) -> nn.Module:
    """A function of torch by the name under which sentence-transformers writes it. Errors: `ModelError`."""
    kind = getattr(nn, path.rpartition(".")[2], None) if path.startswith("torch.nn.") else None
    if kind is None or not issubclass(kind, nn.Module):
        raise ModelError(
            f"the activation of this reranker is {path!r}",
            expected=f"a module of torch.nn, such as {SIGMOID} or torch.nn.modules.linear.Identity",
            fix="name one of them in the folder's settings: other code is not run",
        )
    made: nn.Module = kind()
    return made


_ST = "sentence_transformers"
_MODULES = (
    {"idx": 0, "name": "0", "path": "", "type": f"{_ST}.base.modules.transformer.Transformer"},
    {"idx": 1, "name": "1", "path": "1_LogitScore", "type": f"{_ST}.cross_encoder.modules.logit_score.LogitScore"},
)
_READ = {"text": {"method": "forward", "method_output_name": "logits"}}


@dataclass(frozen=True)
class SavedReranker:
    """What a saved reranker is made of. A head's folder is one of plain transformers, with the activation in
    config.json, which every version and server reads; a prompt or a language model wants modules.json too."""

    backbone: Any
    tokenizer: Any
    settings: PairSettings
    base: Mapping[str, Any] | None = None

    def write(self, root: Path, merge: bool) -> None:
        """All files, into an empty folder."""
        settings = self.settings
        if has_adapter(self.backbone.base_model) and not merge:
            save_adapter(self.backbone.base_model, root, str((self.base or {}).get("path", "")))
            EmbeddingConfig(base=self.base).write(root)
        else:
            whole = self.backbone
            if has_adapter(whole.base_model):
                whole = copy.copy(self.backbone)
                whole._modules = dict(self.backbone._modules)
                setattr(whole, self.backbone.base_model_prefix, merged(self.backbone.base_model))
                whole.tie_weights()
            names = {"sentence_transformers": {"activation_fn": settings.activation, "version": "5.1.0"}}
            whole.config.update({} if settings.asks else names)
            whole.save_pretrained(root)
        self._save_tokenizer(root)
        if settings.asks or settings.prompt is not None:
            self._save_modules(root)
        (root / "README.md").write_text(self.card(), encoding="utf-8")

    def _save_tokenizer(self, root: Path) -> None:
        tokenizer = copy.deepcopy(self.tokenizer)  # truncation and bounds are the saved one's alone
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.model_max_length = self.settings.max_length
        if not self.settings.asks:
            tokenizer.chat_template = None  # else sentence-transformers takes a pair for a talk
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.save_pretrained(root)
        name_tokenizer(root)

    def _save_modules(self, root: Path) -> None:
        """What sentence-transformers 6 reads of a model with a prompt, and of one that is asked."""
        settings = self.settings
        write_json(root / "modules.json", list(_MODULES if settings.asks else _MODULES[:1]))
        task = "text-generation" if settings.asks else "sequence-classification"
        modalities: dict[str, Any] = dict(_READ)
        if settings.asks:
            form = "structured" if settings.structured else "flat"
            modalities["message"] = {**_READ["text"], "format": form}
        how: dict[str, Any] = {"transformer_task": task, "modality_config": modalities}
        if settings.chat:
            how["processing_kwargs"] = {"chat_template": dict(settings.chat)}
        name = "causal_logits" if settings.asks else "scores"
        write_json(root / "sentence_bert_config.json", {**how, "module_output_name": name})
        versions = {"sentence_transformers": "6.2.0", "transformers": transformers.__version__}
        prompts = {} if settings.prompt is None else {"query": settings.prompt}
        usual = None if settings.prompt is None else "query"
        general: dict[str, Any] = {
            "__version__": versions | {"pytorch": torch.__version__},
            "model_type": "CrossEncoder",
        }
        general |= {"prompts": prompts, "default_prompt_name": usual}
        write_json(root / "config_sentence_transformers.json", general | {"activation_fn": settings.activation})
        if settings.asks:
            ids = {"true_token_id": settings.yes_id, "false_token_id": settings.no_id}
            write_json(root / "1_LogitScore" / "config.json", {**ids, "module_input_name": "causal_logits"})

    def card(self) -> str:
        """The README.md: what it is and how it is loaded anywhere."""
        how = "asked in its chat template, by the logits of yes and no" if self.settings.asks else "by a head"
        return _CARD.format(architecture=type(self.backbone).__name__, how=how, length=self.settings.max_length)


_CARD = """\
---
library_name: sentence-transformers
pipeline_tag: text-ranking
tags:
- sentence-transformers
- cross-encoder
- reranker
- embedsmith
---

# Reranker

A `{architecture}` that reads a query and a document together, up to {length} tokens, and gives one score, {how}; more
is better. Made with embedsmith.

With embedsmith:

```python
import embedsmith as es

model = es.load_reranker("path/to/this/folder")
print(model.rank("what is late interaction?", ["Late interaction compares token vectors.", "Tea is a drink."]))
```

With sentence-transformers:

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("path/to/this/folder")
print(model.predict([("what is late interaction?", "Late interaction compares token vectors.")]))
```
"""
