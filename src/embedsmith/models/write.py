"""Saving: the legacy sentence-transformers layout with the backbone in the root, and a model card.

sentence-transformers 2 to 6, transformers' AutoModel, text-embeddings-inference, vLLM and infinity all read it; the
schema that sentence-transformers 5.4+ writes is refused or misread by the servers.
Heads lie beside the backbone as in BGE-M3; a program that does not know them sees the dense model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from embedsmith.core.errors import ModelError
from embedsmith.core.outputs import Kind, atomic_folder, claimed
from embedsmith.core.progress import transformers_silenced
from embedsmith.core.shelf import forms
from embedsmith.models.attention import Attention
from embedsmith.models.backbone import load_backbone, locate
from embedsmith.models.card import CardFacts, model_card
from embedsmith.models.config import ModelConfig, Settings
from embedsmith.models.folder import (
    EMBEDDING_CONFIG,
    POOLER_FILE,
    POOLING_NAMES,
    POOLING_SWITCHES,
    EmbeddingConfig,
    read_folder_json,
    write_json,
)
from embedsmith.models.heads.base import Head, cpu_state, known_heads
from embedsmith.models.layers import module_kind, width_after
from embedsmith.models.lora import has_adapter, merged, save_adapter, transplanted
from embedsmith.models.pooling import PoolerConfig, pooled_width


def saved_model() -> Kind:
    """How a folder that `Saved.save` wrote is known; the files of users' own heads belong to it."""
    tokenizer = (
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.*",
        "vocab.*",
        "merges.txt",
    )
    weights = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "adapter_config.json")
    code = ("modeling_*.py", "configuration_*.py", "tokenization_*.py")
    layout = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", EMBEDDING_CONFIG)
    modules = ("[0-9]*_*/config.json", "[0-9]*_*/*.safetensors")
    graphs = ("onnx/model.onnx", "onnx/model.onnx_data", "openvino/openvino_model.*", "*/graph.json")
    routes = ("router_config.json", "query_[0-9]*_*/*", "document_[0-9]*_*/*")
    heads = {head.file for head in known_heads().values()}
    more = ("README.md", "config.json", "generation_config.json", "*.model", *heads)
    return Kind(
        "model saved by embedsmith",
        tokenizer + weights + code + layout + modules + graphs + routes + more,
        ("README.md", "embedsmith"),
    )


def name_tokenizer(root: Path, as_it_is: bool = False) -> None:
    """Give the class of a saved tokenizer a name that version 4 of transformers knows too, where version 5 has one of
    its own for a tokenizer of no family. `as_it_is`: also where a family's class would change it."""
    path = root / "tokenizer_config.json"
    said = read_folder_json(path)
    if as_it_is or said.get("tokenizer_class") == "TokenizersBackend":
        write_json(path, {**said, "tokenizer_class": "PreTrainedTokenizerFast"})


def refuse_not_finite(module: nn.Module | None) -> None:
    """Errors: `ModelError` for weights among which are NaN or infinite ones."""
    named = [] if module is None else list(module.named_parameters())
    bad = [name for name, weight in named if weight.is_floating_point() and not bool(weight.isfinite().all())]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ModelError(f"the weights are not finite ({bad[0]}{more}), and were not written")


@dataclass(frozen=True)
class Saved:
    """What a saved model is made of. `base`: what an adapter in the backbone belongs to. `query`: what reads queries,
    where that is another model."""

    backbone: Any
    tokenizer: Any
    settings: Settings
    projections: Sequence[Any] = ()
    heads: Mapping[str, Head] = field(default_factory=dict)
    pooler: nn.Module | None = None
    pooler_config: PoolerConfig | None = None
    attention: Attention = Attention()
    base: Mapping[str, Any] | None = None
    query: Saved | None = None

    @property
    def pooled_width(self) -> int:
        """Width of what the pooling gives."""
        hidden_size = int(self.backbone.config.get_text_config().hidden_size)
        return pooled_width(self.settings.pooling, self.pooler, hidden_size)

    @property
    def dimension(self) -> int:
        """D of the dense head."""
        return width_after(self.projections, self.pooled_width)

    def embedding_config(self, apart: bool = False) -> EmbeddingConfig:
        """What the standard files cannot say of this model. `apart`: its adapter stays apart from its base."""
        settings = self.settings
        known = all(part in POOLING_NAMES.values() for part in (settings.pooling or "cls").split("+"))
        return EmbeddingConfig(
            attention=Attention() if self.attention.mode == "native" else self.attention,
            pooling=None if known else settings.pooling,
            pooler=None if self.pooler is None else self.pooler_config,
            eos_id=settings.eos_id,
            templates=settings.templates,
            echo=settings.echo,
            pool_special_tokens=settings.pool_special_tokens,
            base=self.base if apart else None,
            heads_include_prompt=settings.heads_include_prompt,
            main=settings.main,
            form=settings.form if apart else "dense",
            lengths=settings.lengths,
            expansion=settings.expansion,
        )

    def save(self, folder: str | Path, merge: bool = True, *, overwrite: bool = True) -> None:
        """Write the model to `folder`, which appears whole or not at all; a saved model already there is replaced.

        An adapter is merged into the weights, after a check that the vectors stay; `merge=False` writes it apart.
        Without `overwrite` a model that is there may only be equal to this one.
        Errors: `CheckpointError` for a folder with other files, when the disk is full or the place cannot be written;
        `ModelError` when merging an adapter would change the vectors, and for weights that are not finite.
        """
        with claimed(folder, "model.save"), atomic_folder(folder, saved_model(), overwrite=overwrite) as root:
            self.write(root, merge)

    def write(self, root: Path, merge: bool = True, weights: bool = True) -> None:
        """All files of `save`, into an empty folder: the form of the model, made of the dense one. Without `weights`
        those of the backbone, of a pooling and of token heads are left out, for a folder that holds a graph in their
        place.

        Errors: `ModelError` where the model can no longer be said in its form.
        """
        if self.query is not None:
            forms.get("router").write(self, root)
            return
        self.write_dense(root, merge, weights)
        apart = has_adapter(self.backbone) and not merge  # no other form has a place for an adapter
        if self.settings.form != "dense" and not apart:
            forms.get(self.settings.form).write(self, root)

    def write_dense(self, root: Path, merge: bool = True, weights: bool = True) -> None:
        """The legacy layout, with the heads' files beside the backbone."""
        settings = self.settings
        for part in (self.backbone, *self.projections, *self.heads.values(), self.pooler):
            refuse_not_finite(part)
        with transformers_silenced():
            apart = weights and has_adapter(self.backbone) and not merge
            if not weights:
                self.backbone.config.architectures = [type(self.backbone).__name__]
                self.backbone.config.save_pretrained(root)
            elif apart:
                save_adapter(self.backbone, root, str((self.base or {}).get("path", "")))
            else:
                self.whole_backbone().save_pretrained(root)
            self._save_tokenizer(root)
            kinds = ["Transformer", "Pooling", *map(module_kind, self.projections)]
            kinds += ["Normalize"] if settings.normalize else []
            modules = [_module(place, kind) for place, kind in enumerate(kinds)]
            more = self.embedding_config(apart)
            if not more.standard:  # sentence-transformers then loads the model through a module of ours
                more, modules = (
                    replace(more, modules=tuple(modules)),
                    [{**_module(0, ""), "type": "embedsmith.models.sentence.EmbedsmithModule"}],
                )
            write_json(root / "modules.json", modules)
            more.write(root)
            self._save_settings(root)
            if weights and self.pooler is not None:
                save_file(cpu_state(self.pooler), root / POOLER_FILE)
            for place, layer in enumerate(self.projections, start=2):
                layer.save(root / f"{place}_{module_kind(layer)}")
            if settings.normalize:
                (root / f"{len(kinds) - 1}_Normalize").mkdir()
            for head in self.heads.values() if weights else ():
                head.save(root)
            if weights:
                (root / "README.md").write_text(self.model_card(), encoding="utf-8")

    def _save_settings(self, root: Path) -> None:
        """Lengths, prompts and the pooling, as sentence-transformers reads them."""
        settings = self.settings
        rules = {"max_seq_length": settings.max_length, "do_lower_case": settings.lower_case}
        if settings.expansion is None and settings.main != "multivector":  # PyLate has a place of its own for them
            rules |= {f"{role}_length": length for role, length in settings.lengths.items()}
        write_json(root / "sentence_bert_config.json", rules)
        versions = {
            "sentence_transformers": "5.1.0",  # whose layout this is: the last series with the legacy schema
            "transformers": transformers.__version__,
            "pytorch": torch.__version__,
        }
        general: dict[str, Any] = {
            "__version__": versions,
            "prompts": dict(settings.prompts),
            "default_prompt_name": settings.default_prompt,
            "similarity_fn_name": settings.similarity,
        }
        general |= {} if settings.truncate_dim is None else {"truncate_dim": settings.truncate_dim}
        write_json(root / "config_sentence_transformers.json", general)
        write_json(root / "1_Pooling" / "config.json", self._pooling_file())

    def _pooling_file(self) -> dict[str, Any]:
        """In the legacy schema; poolings side by side in another order than that has are said in the newer one."""
        wanted = (self.settings.pooling or "").split("+")
        theirs = [name for name, ours in POOLING_NAMES.items() if ours in wanted]
        width, prompt = self.pooled_width // max(len(wanted), 1), {"include_prompt": self.settings.include_prompt}
        if theirs and [POOLING_NAMES[name] for name in theirs] != wanted and len(wanted) > 1:
            names = {ours: name for name, ours in POOLING_NAMES.items()}
            return {"embedding_dimension": width, "pooling_mode": [names[one] for one in wanted], **prompt}
        switches = {switch: mode in theirs for switch, mode in POOLING_SWITCHES.items()}
        return {"word_embedding_dimension": width, **switches, **prompt}

    def whole_backbone(self) -> Any:
        """The backbone with its adapter merged. The base of a quantised one is loaded at full precision: an adapter is
        merged into that, never into 4 bits."""
        if not has_adapter(self.backbone):
            return self.backbone
        if getattr(self.backbone, "hf_quantizer", None) is None:
            return merged(self.backbone)
        assert self.base is not None
        folder = locate(str(self.base["path"]), self.base["revision"])
        layers = self.base["layers"]
        config = ModelConfig(path=str(folder), layers=None if layers is None else tuple(layers))
        return merged(transplanted(self.backbone, load_backbone(folder, config, self.attention.mode)))

    def _save_tokenizer(self, root: Path) -> None:
        """Without the truncation that tokenising leaves in the tokenizer's state, and with a pad token for programs
        that insist on one: the end token, or the first of the vocabulary. Masks come from lengths, so a pad token that
        is also a real one does no harm."""
        tokenizer = self.tokenizer
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        bound = tokenizer.model_max_length
        tokenizer.model_max_length = self.settings.max_length
        try:
            tokenizer.save_pretrained(root)
        finally:
            tokenizer.model_max_length = bound
        # a family's own class would build its processing anew and forget the end token
        name_tokenizer(root, as_it_is=self.settings.eos_id is not None)

    def model_card(self, backend: str | None = None, graph: str = "") -> str:
        """The README.md written beside a model. `graph`: what is said of the graph for `backend` that is in the place
        of the weights."""
        about = CardFacts(
            self.settings,
            type(self.backbone).__name__,
            self.dimension,
            self.heads,
            self.attention,
            layers=bool(self.projections),
            standard=self.embedding_config().standard,
            queries=None if self.query is None else type(self.query.backbone).__name__,
            backend=backend,
            graph=graph,
        )
        return model_card(about)


def _module(place: int, kind: str) -> dict[str, Any]:
    path = "" if place == 0 else f"{place}_{kind}"
    return {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
