"""Reading what a folder says about itself: sentence-transformers' files, legacy and 5.4+ schema, or none of them, and
`embedding_config.json` for what those files have no place for.

What kind of model the modules make is decided by the forms (forms/, one file each): the first that knows the modules
says what the model is made of. A transformer with a pooling and layers behind it, the form `dense`, is read here.

The latter is written only when it holds something. A program that does not read it still gets the right vectors from
the standard files where those can express the model; where they cannot, `modules.json` names the module in
`sentence.py` instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from embedsmith.core import inputs
from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.core.recipe import parse
from embedsmith.core.settings import Count, Finite, Range, Word, section, to_plain
from embedsmith.core.shelf import forms
from embedsmith.models.attention import Attention
from embedsmith.models.expansion import Expansion
from embedsmith.models.heads.base import HeadSpec
from embedsmith.models.layers import LAYERS
from embedsmith.models.pooling import PoolerConfig

EMBEDDING_CONFIG = "embedding_config.json"
POOLER_FILE = "1_Pooling/pooler.safetensors"


@section
@dataclass(frozen=True)
class EmbeddingConfig:
    """What `embedding_config.json` says; the defaults are those of a folder without one.

    `version`: of this file's form.
    `attention`: which tokens see which, and how that is brought about.
    `pooling`: the name of a pooling that sentence-transformers lacks. `pooler`: the shape of one with weights.
    `eos_id`: the token put behind every text. `templates`: by role, for instructions that come with a text.
    `echo`: the text with which a text is put in twice.
    `pool_special_tokens`: whether bos and its like take part in the pooling.
    `base`: what an adapter belongs to.
    `heads_include_prompt`: whether the tokens of a prompt take part in heads of tokens, where that was said.
    `main`: the output that the model is made for. `form`: what it is saved as once its adapter is merged.
    `lengths`: tokens that a text of a role may have. `expansion`: of queries.
    `modules`: the modules, where modules.json names sentence.py's.
    """

    version: int = 1
    attention: Attention = Attention()
    pooling: str | None = None
    pooler: PoolerConfig | None = None
    eos_id: int | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
    echo: str | None = None
    pool_special_tokens: bool = True
    base: Mapping[str, Any] | None = None
    heads_include_prompt: bool | None = None
    main: str = "dense"
    form: str = "dense"
    lengths: Mapping[str, int] = field(default_factory=dict)
    expansion: Expansion | None = None
    modules: tuple[Mapping[str, Any], ...] = ()

    @property
    def standard(self) -> bool:
        """Whether standard files alone give the same vectors in sentence-transformers."""
        plain = self.pooling is None and self.echo is None and self.pool_special_tokens and self.base is None
        late = self.expansion is not None or (self.lengths and self.main == "multivector")
        return plain and self.attention.in_config and not late and self.form == "dense"

    @classmethod
    def read(cls, folder: Path) -> EmbeddingConfig:
        """Errors: `ModelError` for a file that is not JSON, has unknown keys, or is of a newer version."""
        path = folder / EMBEDDING_CONFIG
        if not path.exists():
            return cls()
        tree = read_folder_json(path)
        version = tree.get("version", 1)
        if version != 1:
            raise ModelError(f"version {version}", where=path, expected="1", fix="install a newer embedsmith")
        try:
            if tree.get("base") is not None:
                parse(_Base, tree["base"], where="base")
            return parse(cls, tree, where=str(path))
        except RecipeError as error:
            raise ModelError(f"cannot read this file: {error}", where=path) from error

    def write(self, folder: Path) -> None:
        """No file where everything is as by default. A schedule of training is over: softmask is bidirectional."""
        config = self
        if self.attention.mode == "softmask":
            config = replace(self, attention=replace(self.attention, mode="bidirectional"))
        if config != EmbeddingConfig():
            write_json(folder / EMBEDDING_CONFIG, to_plain(config, exact=True))


@dataclass(frozen=True)
class _Base:
    """What is read of `base`, beside the facts that tell one base from another."""

    path: str | None = None
    revision: str | None = None
    layers: tuple[int, ...] | None = None
    cls_token: Word | None = None
    new_tokens: tuple[Word, ...] = ()
    dtype: str | None = None
    numbers: Mapping[str, tuple[Finite, ...]] = field(default_factory=dict)


POOLING_NAMES: Mapping[str, str] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
"""sentence-transformers' names to ours, in the order in which the legacy schema puts several side by side."""
POOLING_SWITCHES: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The legacy schema: one boolean a mode, in this order in the file."""
KINDS = (
    *("Transformer", "MLMTransformer", "StaticEmbedding", "SparseStaticEmbedding", "Router", "Asym"),
    *("Pooling", *LAYERS, "SpladePooling", "SparseAutoEncoder", "MultiVectorMask"),
)
"""The modules that are read."""
ELSEWHERE = (
    "sentence-transformers itself can run it, to be scored beside others: "
    "embedsmith.evaluate(SentenceTransformersEncoder.load(FOLDER), TASKS), the class from embedsmith's evaluate"
)


# What the files of sentence-transformers say, as far as it is read here.


@dataclass(frozen=True)
class _Module:
    """An entry of modules.json."""

    type: str
    path: str = ""


@dataclass(frozen=True)
class _EncoderFile:
    """sentence_bert_config.json."""

    max_seq_length: Annotated[int, Range(ge=4)] | None = None
    do_lower_case: bool | None = None
    query_length: Annotated[int, Range(ge=4)] | None = None
    document_length: Annotated[int, Range(ge=4)] | None = None

    @property
    def lengths(self) -> dict[str, int]:
        """By role, where it has another than the model."""
        both = {"query": self.query_length, "document": self.document_length}
        return {role: length for role, length in both.items() if length is not None}


@dataclass(frozen=True)
class _GeneralFile:
    """config_sentence_transformers.json."""

    prompts: Mapping[str, str | None] | None = None
    default_prompt_name: str | None = None
    model_type: str | None = None
    similarity_fn_name: Literal["cosine", "dot", "euclidean", "manhattan", "maxsim", "meanmaxsim", "MaxSim"] | None = (
        None
    )
    truncate_dim: Count | None = None
    max_active_dims: Count | None = None


@dataclass(frozen=True)
class PoolingFile:
    """The config.json of a Pooling: the newer schema's mode, or the legacy schema's switches."""

    include_prompt: bool = True
    pooling_mode: str | Sequence[str] | None = None
    pooling_mode_cls_token: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False

    @property
    def modes(self) -> list[str]:
        """By sentence-transformers' names."""
        if self.pooling_mode is not None:
            return [self.pooling_mode] if isinstance(self.pooling_mode, str) else list(self.pooling_mode)
        chosen = {mode for switch, mode in POOLING_SWITCHES.items() if getattr(self, switch)}
        return [mode for mode in POOLING_NAMES if mode in chosen]


@dataclass(frozen=True)
class AdapterFile:
    """peft's adapter_config.json, for adapters of the kind LoRA."""

    peft_type: str = "unknown"
    base_model_name_or_path: str | None = None
    lora_alpha: Finite | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    alpha_pattern: Mapping[str, float] | None = None
    trainable_token_indices: Mapping[str, Sequence[int]] | Sequence[int] | None = None


@dataclass(frozen=True)
class FolderFacts:
    """What a folder says; `None` where it says nothing.

    `form`: the name of its kind on the shelf of forms. `main`: the output that it is made for. `heads`: how heads are
    made that the modules describe. `tokens`: texts that the tokenizer must take as one token each. `query`: what reads
    queries, where that is another model than what reads documents.
    """

    backbone: Path
    pooling: str | None = None
    include_prompt: bool = True
    max_length: int | None = None
    lower_case: bool = False
    normalize: bool | None = None
    projections: tuple[Any, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str | None = None
    truncate_dim: int | None = None
    embedding_config: EmbeddingConfig = EmbeddingConfig()
    form: str = "dense"
    main: str = "dense"
    heads: Mapping[str, HeadSpec] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    lengths: Mapping[str, int] = field(default_factory=dict)
    expansion: Expansion | None = None
    query: FolderFacts | None = None

    @classmethod
    def read(cls, folder: Path) -> FolderFacts:
        """Facts of a sentence-transformers folder (either schema), or of a plain transformers folder.

        Errors: `ModelError` for a file that is not JSON, a module this cannot do, a pooling that is not known.
        """
        return FolderFiles.read(folder).facts()

    def with_late(self, head: HeadSpec, lengths: Mapping[str, int], expansion: Expansion | None) -> FolderFacts:
        """The same with a multi-vector head and its rules of reading."""
        return replace(self, heads={"multivector": head}, lengths=lengths, expansion=expansion)


@dataclass(frozen=True)
class Module:
    """A module of a folder: `kind` is the last part of its class's name."""

    kind: str
    path: Path


@dataclass(frozen=True)
class FolderFiles:
    """The files that say what a folder holds, read and checked one by one, before anything is made of them.

    `place`: where the modules are listed, for messages.
    """

    folder: Path
    place: Path
    modules: tuple[Module, ...]
    general: _GeneralFile
    more: EmbeddingConfig

    @classmethod
    def read(cls, folder: Path) -> FolderFiles:
        """Errors: as of `FolderFacts.read`."""
        more = EmbeddingConfig.read(folder)
        listed = (folder / "modules.json").exists()
        path = folder / "config_sentence_transformers.json"
        general = read_folder_file(_GeneralFile, path) if listed and path.exists() else _GeneralFile()
        if general.default_prompt_name is not None and general.default_prompt_name not in (general.prompts or {}):
            raise ModelError(
                f"default_prompt_name is {general.default_prompt_name!r}, and there is no such prompt",
                where=path,
                expected=f"null, or one of {', '.join(general.prompts or {}) or '(none)'}",
            )
        place = folder / (EMBEDDING_CONFIG if more.modules else "modules.json")
        entries = listed_modules(more, folder) if listed else ()
        modules = tuple(module_of(entry.type, folder / entry.path, folder, place) for entry in entries)
        return cls(folder, place, modules, general, more)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(module.kind for module in self.modules)

    def facts(self) -> FolderFacts:
        """What the first form that knows these modules makes of them.

        Errors: `ModelError` for modules that make no model, naming them.
        """
        for entry in forms.entries():
            found: FolderFacts | None = entry.thing.facts(self)
            if found is not None:
                return found
        if not self.modules:
            return FolderFacts(backbone=self.folder, embedding_config=self.more)
        return self._dense()

    def _dense(self) -> FolderFacts:
        if self.kinds[:2] != ("Transformer", "Pooling") or any(kind not in LAYERS for kind in self.kinds[2:]):
            raise ModelError(
                f"modules in the order {', '.join(self.kinds)}",
                where=self.place,
                expected="the modules of one kind of model: " + "; ".join(entry.summary for entry in forms.entries()),
                fix=f"check that the folder was copied as a whole and not mixed with another; {ELSEWHERE}",
            )
        path = self.modules[1].path / "config.json"
        if self.more.form != "dense" and not read_folder_file(PoolingFile, path).modes:
            pooling, include_prompt = None, True
        else:
            pooling, include_prompt = read_pooling(path, self.more.pooling)
        return FolderFacts(
            form=self.more.form,
            **self.shared(self.modules[0].path),
            pooling=pooling,
            include_prompt=include_prompt,
            **self.layers(2),
        )

    def layers(self, start: int) -> dict[str, Any]:
        """The layers from a place on, as `FolderFacts` takes them: a Normalize at the end is a setting."""
        rest = self.modules[start:]
        last = bool(rest) and rest[-1].kind == "Normalize"
        kept = rest[:-1] if last else rest
        return {"normalize": last, "projections": tuple(LAYERS[module.kind](module.path) for module in kept)}

    def shared(self, backbone: Path) -> dict[str, Any]:
        """What every form takes from the same files, as `FolderFacts` takes it."""
        places = [place / "sentence_bert_config.json" for place in (backbone, self.folder)]
        path = next((place for place in places if place.exists()), None)
        encoder = read_folder_file(_EncoderFile, path) if path is not None else _EncoderFile()
        general = self.general
        return {
            "backbone": backbone,
            "max_length": encoder.max_seq_length,
            "lower_case": bool(encoder.do_lower_case),
            "prompts": {name: text for name, text in (general.prompts or {}).items() if text is not None},
            "default_prompt": general.default_prompt_name,
            "similarity": general.similarity_fn_name,
            "truncate_dim": general.truncate_dim,
            "embedding_config": self.more,
            "main": self.more.main,
            "lengths": self.more.lengths or encoder.lengths,
            "expansion": self.more.expansion,
        }

    def shared_of_sparse(self, backbone: Path) -> dict[str, Any]:
        """The same for a SparseEncoder. Errors: `ModelError` for one that does not compare by inner products."""
        named = self.general.similarity_fn_name
        if named not in (None, "dot"):
            raise ModelError(
                f"similarity_fn_name is {named!r}, and sparse vectors are compared by inner products",
                where=self.folder / "config_sentence_transformers.json",
                expected="dot",
                fix=f"write dot there if that ranks as well; {ELSEWHERE}",
            )
        return {**self.shared(backbone), "similarity": None, "main": "sparse"}


def module_of(name: str, path: Path, folder: Path, where: Path) -> Module:
    """A module by the name of its class. `Pooling` is `sentence_transformers.models.Pooling` or its newer path; other
    packages' modules are not ours to guess at, whatever their last name, but for PyLate's `Dense`.

    Errors: `ModelError` for a module that is not read, and for a path out of the folder.
    """
    kind = name.rpartition(".")[2]
    ours = name.startswith("sentence_transformers.") or name == PYLATE_DENSE
    if not ours or kind not in KINDS:
        raise ModelError(
            f"the module {name!r} is not supported",
            where=where,
            expected=f"sentence-transformers modules of the kinds {', '.join(KINDS)}",
            fix=ELSEWHERE,
        )
    found = inputs.local_path(path, ModelError).resolve()
    if not found.is_relative_to(folder.resolve()):
        inside = Path(os.path.relpath(path, folder))
        raise ModelError(f"the module path {str(inside)!r} leaves the folder", where=where, expected="a relative path")
    return Module(kind, found)


PYLATE_DENSE = "pylate.models.Dense.Dense"


def listed_modules(more: EmbeddingConfig, folder: Path) -> Sequence[_Module]:
    """The modules of a sentence-transformers folder, in order, wherever they are listed."""
    standard = read_folder_file(tuple[_Module, ...], folder / "modules.json")
    if not more.modules:
        return standard
    try:
        return parse(tuple[_Module, ...], more.modules)
    except RecipeError as error:
        raise ModelError(f"modules: {error.what}", where=folder / EMBEDDING_CONFIG) from error


def read_pooling(path: Path, named: str | None) -> tuple[str, bool]:
    """Mode (one that sentence-transformers lacks is `named` elsewhere) and whether prompt tokens take part."""
    config = read_folder_file(PoolingFile, path)
    if named is not None:
        return named, config.include_prompt
    modes = config.modes
    if not modes or any(mode not in POOLING_NAMES for mode in modes):
        raise ModelError(
            f"pooling {' + '.join(modes) or '(none)'} is not supported",
            where=path,
            expected=f"one or several of {', '.join(POOLING_NAMES)}",
            fix="use a model that pools in these ways",
        )
    return "+".join(POOLING_NAMES[mode] for mode in modes), config.include_prompt


S = TypeVar("S")


def read_folder_file(schema: type[S], path: Path) -> S:
    """A JSON file of a model folder as a dataclass (or another type) says it has to be; other keys are left alone.

    Errors: `ModelError` naming the file and the key.
    """
    fix = "copy the folder again, as a whole"
    if not path.exists():
        raise ModelError("this file is missing", where=path, fix=fix)
    return inputs.read_typed(path, schema, ModelError, fix=fix, strict=True)


def read_folder_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object of keys that are not ours. Errors: as `read_folder_file`."""
    return read_folder_file(dict[str, Any], path)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
