"""`load_reranker`: a folder or hub id, and what to change about it, to a `CrossEncoder`.

Read are transformers' classifiers with one output, folders of sentence-transformers' CrossEncoder (any version), and
language models with a template for pairs; a plain encoder or language model becomes a new reranker that wants training.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from embedsmith.core.device import device_named
from embedsmith.core.errors import ModelError, foreign_errors
from embedsmith.core.progress import log, transformers_silenced
from embedsmith.core.recipe import parse
from embedsmith.models.backbone import (
    UNUSED,
    check_memory,
    check_weight_files,
    keep_layers,
    load_tokenizer,
    locate,
    positions_of,
    read_config,
)
from embedsmith.models.config import ModelConfig, derive_max_length
from embedsmith.models.cross_encoder import CrossEncoder, activation_named
from embedsmith.models.folder import AdapterFile, EmbeddingConfig, read_folder_file, read_folder_json
from embedsmith.models.load import best_device
from embedsmith.models.lora import ADAPTER, add_adapter, base_facts, check_installed, load_adapter, merged
from embedsmith.models.pair_text import SIGMOID, PairSettings, answer_token, pair_template

_KEPT = {
    *("path", "revision", "max_length", "template", "instructions", "attn_implementation", "dtype", "compile"),
    *("gradient_checkpointing", "trust_remote_code", "layers", "lora", "base"),
}
_HEAD, _ASKED = "ForSequenceClassification", "ForCausalLM"


def load_reranker(
    path: str | ModelConfig,
    /,
    *,
    device: str | torch.device | None = None,
    new_heads: bool = False,
    **overrides: Any,
) -> CrossEncoder:
    """A reranker in eval mode from a folder or hub id.

    >>> import embedsmith as es
    >>> reranker = es.load_reranker("my-model", new_heads=True)
    >>> reranker.score(["how do I reset my password?"], ["Open Settings, choose Security, then Reset."]).shape
    torch.Size([1])

    `overrides` are those fields of `ModelConfig` that mean something to a reranker: `max_length`, `template` and
    `instructions` of a language model (the instruction called `default`), `lora`, `dtype` and how to run it.
    `new_heads`: a model that gives no scores yet gets a new head, random, for you to train it.
    Errors: `ModelError` naming the file and the fix; `RecipeError` for an unknown override.
    """
    if isinstance(path, ModelConfig):
        config = dataclasses.replace(path, **overrides)
    else:
        config = parse(ModelConfig, {"path": str(path), **overrides}, where="load_reranker")
    _refuse_foreign(config)
    facts = RerankerFacts.read(config)
    target = device_named(best_device() if device is None else device)
    backbone: Any = _backbone(facts, config, new_heads)
    tokenizer = load_tokenizer(facts.folder, config.trust_remote_code)
    positions = positions_of(backbone)
    length = derive_max_length(config.max_length, facts.max_length, tokenizer.model_max_length, positions)
    settings = facts.settings(config, tokenizer, length)
    if backbone.config.pad_token_id is None:
        backbone.config.pad_token_id = tokenizer.pad_token_id
    base = _adapt(backbone, facts, config)
    model = CrossEncoder(backbone, tokenizer, settings, base)
    if config.compile:
        model.backbone.compile(dynamic=True)
    return model.to(target).eval()


def is_reranker(path: str) -> bool:
    """Whether a folder (or hub id) holds a reranker: a classifier, or what sentence-transformers calls a
    CrossEncoder."""
    folder = locate(path)
    if _modules_kind(folder) is not None:
        return True
    config = folder / "config.json"
    names = read_folder_json(config).get("architectures") if config.exists() else None
    return isinstance(names, list) and any(str(name).endswith(_HEAD) for name in names)


def _refuse_foreign(config: ModelConfig) -> None:
    usual = ModelConfig(path=config.path)
    names = (f.name for f in dataclasses.fields(ModelConfig) if f.name not in _KEPT)
    if given := next((name for name in names if getattr(config, name) not in (getattr(usual, name), False)), None):
        raise ModelError(
            f"model.{given} of a reranker, which has no vectors",
            expected=f"one of {', '.join(sorted(_KEPT))}",
            fix=f"leave {given} of the model out, or train an embedder: task=embed",
        )


# What a folder says.


@dataclass(frozen=True)
class _Module:
    """An entry of modules.json."""

    type: str
    path: str = ""


@dataclass(frozen=True)
class _TransformerFile:
    """sentence_bert_config.json."""

    max_seq_length: int | None = None
    transformer_task: str | None = None
    modality_config: Mapping[str, Any] | None = None
    processing_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class _GeneralFile:
    """config_sentence_transformers.json."""

    model_type: str = "SentenceTransformer"
    prompts: Mapping[str, str] | None = None
    default_prompt_name: str | None = None
    activation_fn: str | None = None


@dataclass(frozen=True)
class _LogitScoreFile:
    """The config.json of a LogitScore."""

    true_token_id: int
    false_token_id: int | None = None


@dataclass(frozen=True)
class _Named:
    """Of config.json, what sentence-transformers left there."""

    activation_fn: str | None = None


@dataclass(frozen=True)
class _ConfigFile:
    sentence_transformers: _Named | None = None
    sbert_ce_default_activation_function: str | None = None


def _modules_kind(folder: Path) -> tuple[_Module, ...] | None:
    """The modules of a CrossEncoder folder; `None` where there is none."""
    path = folder / "config_sentence_transformers.json"
    if not (folder / "modules.json").exists() or not path.exists():
        return None
    if read_folder_file(_GeneralFile, path).model_type != "CrossEncoder":
        return None
    return read_folder_file(tuple[_Module, ...], folder / "modules.json")


@dataclass(frozen=True)
class RerankerFacts:
    """What a folder says of the reranker in it. `base`: the folder of the weights, another one where the folder holds
    an adapter alone. `kind`: how the class of its weights ends, `None` for a model that gives no scores. `answers`: the
    tokens of yes and no. The others as in `PairSettings`."""

    folder: Path
    base: Path
    kind: str | None
    labels: int
    model_config: Any
    activation: str = SIGMOID
    prompt: str | None = None
    max_length: int | None = None
    answers: tuple[int, int | None] | None = None
    structured: bool = False
    chat: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(config: ModelConfig) -> "RerankerFacts":
        """Errors: `ModelError` for a folder that cannot be read, several scores a pair and unknown modules."""
        folder = locate(config.path, config.revision)
        base = folder
        if (folder / ADAPTER).exists():
            said = EmbeddingConfig.read(folder).base or {}
            name = (
                config.base
                or said.get("path")
                or read_folder_file(AdapterFile, folder / ADAPTER).base_model_name_or_path
            )
            base = locate(str(name), said.get("revision"))
        model_config = read_config(base, config.trust_remote_code)
        names = [str(name) for name in model_config.architectures or []]
        kind = next((end for end in (_HEAD, _ASKED) for name in names if name.endswith(end)), None)
        facts = RerankerFacts(folder, base, kind, int(model_config.num_labels), model_config)
        modules = _modules_kind(folder)
        facts = facts._of_config() if modules is None else facts._of_modules(modules)
        if facts.kind == _HEAD and facts.labels != 1:
            raise ModelError(
                f"this model gives {facts.labels} scores a pair",
                where=base / "config.json",
                expected="a reranker, which gives one (num_labels 1)",
                fix="use a model with one output; to train one from its encoder, remove `architectures` and the labels "
                "from a copy of this file and train it with task=rerank",
            )
        activation_named(facts.activation)
        return facts

    def _of_config(self) -> "RerankerFacts":
        said = read_folder_file(_ConfigFile, self.base / "config.json")
        newer = said.sentence_transformers and said.sentence_transformers.activation_fn
        return dataclasses.replace(self, activation=newer or said.sbert_ce_default_activation_function or SIGMOID)

    def _of_modules(self, modules: tuple[_Module, ...]) -> "RerankerFacts":
        kinds = [module.type.rpartition(".")[2] for module in modules]
        if kinds not in (["Transformer"], ["Transformer", "LogitScore"]) or modules[0].path:
            raise ModelError(
                f"a CrossEncoder of the modules {', '.join(kinds)}",
                where=self.folder / "modules.json",
                expected="a Transformer in the folder itself, alone or with a LogitScore",
            )
        general = read_folder_file(_GeneralFile, self.folder / "config_sentence_transformers.json")
        path = self.folder / "sentence_bert_config.json"
        how = read_folder_file(_TransformerFile, path) if path.exists() else _TransformerFile()
        answers = None
        if len(modules) == 2:
            path = (self.folder / modules[1].path / "config.json").resolve()
            if not path.is_relative_to(self.folder.resolve()):
                raise ModelError(f"the module path {modules[1].path!r} leaves the folder", where=self.folder)
            score = read_folder_file(_LogitScoreFile, path)
            answers = (score.true_token_id, score.false_token_id)
        message = (how.modality_config or {}).get("message") or {}
        prompts, usual = general.prompts or {}, general.default_prompt_name
        return dataclasses.replace(
            self,
            kind=_HEAD if answers is None else _ASKED,
            activation=general.activation_fn or self._of_config().activation,
            prompt=None if usual is None else prompts.get(usual),
            max_length=how.max_seq_length,
            answers=answers,
            structured=message.get("format") == "structured",
            chat=dict((how.processing_kwargs or {}).get("chat_template") or {}),
        )

    @property
    def asks(self) -> bool:
        return self.kind == _ASKED

    def settings(self, config: ModelConfig, tokenizer: Any, length: int) -> PairSettings:
        """As asked, else as the folder says. A template is put into the tokenizer, where every program finds it."""
        given = config.instructions or {}
        if unknown := sorted(given.keys() - {"default", "retrieval"}):
            raise ModelError(f"an instruction for {unknown[0]!r}", expected="model.instructions.default, of every pair")
        prompt = given.get("default", given.get("retrieval", self.prompt))
        if not self.asks:
            if config.template is not None:
                raise ModelError("model.template of a reranker with a head", fix="leave it out")
            return PairSettings(length, prompt, self.activation)
        answers, template = self.answers, config.template
        if template is None and answers is None and not _carries_pairs(tokenizer):
            log.warning("%s says nowhere how a pair is put: the template `plain` is used", config.path)
            template = "plain"
        if template is not None:
            chosen = pair_template(template)
            tokenizer.chat_template = chosen.jinja()
            no = None if chosen.no is None else answer_token(tokenizer, chosen.no)
            answers = (answer_token(tokenizer, chosen.yes), no)
        yes, no = answers or (answer_token(tokenizer, "yes"), answer_token(tokenizer, "no"))
        structured = self.structured and template is None
        return PairSettings(length, prompt, self.activation, yes, no, structured, {} if template else self.chat)


def _carries_pairs(tokenizer: Any) -> bool:
    """Whether the tokenizer's own chat template puts a query and a document, as that of a reranker does."""
    if getattr(tokenizer, "chat_template", None) is None:
        return False
    try:
        said = [{"role": "query", "content": "alpha"}, {"role": "document", "content": "bravo"}]
        text = tokenizer.apply_chat_template(said, tokenize=False)
    except Exception:  # noqa: BLE001  (a template's own refusal of roles may be of any kind)
        return False
    return "alpha" in text and "bravo" in text


# From files to a model.


def _backbone(facts: RerankerFacts, config: ModelConfig, new_heads: bool) -> Any:
    """The model with its head, every weight from the folder but those of a head that is new.

    Errors: `ModelError` for a model that gives no scores unless `new_heads`, and for missing weights.
    """
    head = facts.kind is None
    if head and not new_heads:
        name = next(iter(facts.model_config.architectures or ["this model"]))
        raise ModelError(
            f"{name} has no head that scores pairs",
            where=config.path,
            expected=f"a cross-encoder (its config.json names a ...{_HEAD} or ...{_ASKED})",
            fix="train it as one first: task=rerank; for an embedding model as teacher set type: embedding",
        )
    auto: Any = AutoModelForCausalLM if facts.asks else AutoModelForSequenceClassification
    if not facts.asks:
        facts.model_config.num_labels = 1
    dtype = getattr(torch, config.dtype)
    check_weight_files(facts.base)
    check_memory(auto, facts.model_config, config.trust_remote_code, dtype, facts.base)
    with foreign_errors("cannot load the model", facts.base), transformers_silenced():
        backbone, report = auto.from_pretrained(
            facts.base,
            config=facts.model_config,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    inside = f"{backbone.base_model_prefix}."
    missing = sorted(report["missing_keys"])
    if head:  # a new one; a pooler belongs to it
        missing = [key for key in missing if key.startswith(inside) and not UNUSED.search(key)]
    if missing:
        raise ModelError(
            f"{len(missing)} weights are missing and would be random: {', '.join(missing[:3])}",
            where=facts.base,
            fix="use a folder that was saved with this architecture",
        )
    keep_layers(backbone.base_model, config.layers)
    if config.gradient_checkpointing:
        enable = getattr(backbone, "activation_checkpointing_enable", backbone.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return backbone.eval()


def _adapt(backbone: Any, facts: RerankerFacts, config: ModelConfig) -> Mapping[str, Any] | None:
    """The folder's adapter, or a new one where the config asks for it; what it belongs to. One that nobody asks to
    train is merged."""
    adapter = facts.folder != facts.base
    if not adapter and config.lora is None:
        return None
    check_installed(config.lora)
    if not facts.asks or (config.lora is not None and config.lora.four_bit):
        raise ModelError(
            "model.lora of a reranker with a head, or in 4 bits",
            expected="adapters of a language model that answers yes or no",
            fix="leave model.lora out",
        )
    inner = backbone.base_model
    if config.lora is not None:
        backbone.requires_grad_(False)  # the adapter's own weights are trained, old ones and new ones
    if adapter:
        said = EmbeddingConfig.read(facts.folder).base
        load_adapter(inner, facts.folder, said)
        if config.lora is None:
            setattr(backbone, backbone.base_model_prefix, merged(inner))
            return None
    elif config.lora is not None:
        said = {**base_facts(inner), "path": str(facts.base.resolve()), "revision": config.revision}
        add_adapter(inner, config.lora)
    return {**(said or {}), "path": str(facts.base.resolve())}
