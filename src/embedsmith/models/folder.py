"""Reading what a folder says about itself: sentence-transformers' files, legacy and 5.4+ schema, or none of them, and
`embedding_config.json` for what those files have no place for.

The latter is written only when it holds something. A program that does not read it still gets the right vectors from
the standard files where those can express the model; where they cannot, `modules.json` names the module in
`sentence.py` instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file

from embedsmith.core import inputs
from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.core.recipe import parse
from embedsmith.core.settings import Count, Finite, Range, Width, Word, section, to_plain
from embedsmith.models.attention import Attention
from embedsmith.models.heads.dense import Projection
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
    modules: tuple[Mapping[str, Any], ...] = ()

    @property
    def standard(self) -> bool:
        """Whether standard files alone give the same vectors in sentence-transformers."""
        plain = self.pooling is None and self.echo is None and self.pool_special_tokens and self.base is None
        return plain and self.attention.in_config

    @classmethod
    def read(cls, folder: Path) -> EmbeddingConfig:
        """Errors: `ModelError` for a file that is not JSON, has unknown keys, or is of a newer version."""
        path = folder / EMBEDDING_CONFIG
        if not path.exists():
            return cls()
        tree = read_json(path)
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
    "mean": "mean",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
    "max": "max",
}
"""sentence-transformers' names to ours."""
POOLING_SWITCHES: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The legacy schema: one boolean a mode, in this order in the file."""
_KINDS = ("Transformer", "Pooling", "Dense", "Normalize")


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


@dataclass(frozen=True)
class _GeneralFile:
    """config_sentence_transformers.json."""

    prompts: Mapping[str, str] | None = None
    default_prompt_name: str | None = None
    similarity_fn_name: Literal["cosine", "dot", "euclidean", "manhattan", "maxsim", "meanmaxsim"] | None = None
    truncate_dim: Count | None = None


@dataclass(frozen=True)
class _PoolingFile:
    """The config.json of a Pooling: the newer schema's mode, or the legacy schema's switches."""

    include_prompt: bool = True
    pooling_mode: str | Sequence[str] | None = None
    pooling_mode_cls_token: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False


@dataclass(frozen=True)
class _DenseFile:
    """The config.json of a Dense."""

    in_features: Width
    out_features: Width
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    use_residual: bool = False


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
    """What a folder says; `None` where it says nothing."""

    backbone: Path
    pooling: str | None = None
    include_prompt: bool = True
    max_length: int | None = None
    lower_case: bool = False
    normalize: bool | None = None
    projections: tuple[Projection, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str | None = None
    truncate_dim: int | None = None
    embedding_config: EmbeddingConfig = EmbeddingConfig()

    @classmethod
    def read(cls, folder: Path) -> FolderFacts:
        """Facts of a sentence-transformers folder (either schema), or of a plain transformers folder.

        Errors: `ModelError` for a file that is not JSON, a module this cannot do, a pooling that is not known.
        """
        more = EmbeddingConfig.read(folder)
        if not (folder / "modules.json").exists():
            return cls(backbone=folder, embedding_config=more)
        modules = _modules(more, folder)
        backbone = modules[0][1]
        places = [place / "sentence_bert_config.json" for place in (backbone, folder)]
        encoder = next((read_typed(_EncoderFile, path) for path in places if path.exists()), _EncoderFile())
        path = folder / "config_sentence_transformers.json"
        general = read_typed(_GeneralFile, path) if path.exists() else _GeneralFile()
        if general.default_prompt_name is not None and general.default_prompt_name not in (general.prompts or {}):
            raise ModelError(
                f"default_prompt_name is {general.default_prompt_name!r}, and there is no such prompt",
                where=path,
                expected=f"null, or one of {', '.join(general.prompts or {}) or '(none)'}",
            )
        pooling, include_prompt = _pooling(modules[1][1] / "config.json", more.pooling)
        return cls(
            backbone=backbone,
            pooling=pooling,
            include_prompt=include_prompt,
            max_length=encoder.max_seq_length,
            lower_case=bool(encoder.do_lower_case),
            normalize=modules[-1][0] == "Normalize",
            projections=tuple(_projection(path) for kind, path in modules if kind == "Dense"),
            prompts=dict(general.prompts or {}),
            default_prompt=general.default_prompt_name,
            similarity=general.similarity_fn_name,
            truncate_dim=general.truncate_dim,
            embedding_config=more,
        )


def _modules(more: EmbeddingConfig, folder: Path) -> list[tuple[str, Path]]:
    """Kind and folder of every module. `Pooling` is `sentence_transformers.models.Pooling` or its newer path; other
    packages' modules are not ours to guess at, whatever their last name."""
    where = folder / (EMBEDDING_CONFIG if more.modules else "modules.json")
    modules: list[tuple[str, Path]] = []
    for entry in listed_modules(more, folder):
        name, kind = entry.type, entry.type.rpartition(".")[2]
        if not name.startswith("sentence_transformers.") or kind not in _KINDS:
            raise ModelError(
                f"the module {name!r} is not supported",
                where=where,
                expected=f"sentence-transformers modules of the kinds {', '.join(_KINDS)}",
            )
        path = inputs.local_path(folder / entry.path, ModelError).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise ModelError(
                f"the module path {entry.path!r} leaves the folder", where=where, expected="a relative path"
            )
        modules.append((kind, path))
    kinds = [kind for kind, _ in modules]
    middle = kinds[2:-1] if kinds[-1:] == ["Normalize"] else kinds[2:]
    if kinds[:2] != ["Transformer", "Pooling"] or any(kind != "Dense" for kind in middle):
        raise ModelError(
            f"modules in the order {', '.join(kinds) or '(none)'}",
            where=where,
            expected="Transformer, Pooling, any number of Dense, then at most one Normalize",
        )
    return modules


def listed_modules(more: EmbeddingConfig, folder: Path) -> Sequence[_Module]:
    """The modules of a sentence-transformers folder, in order, wherever they are listed."""
    standard = read_typed(tuple[_Module, ...], folder / "modules.json")
    if not more.modules:
        return standard
    try:
        return parse(tuple[_Module, ...], more.modules)
    except RecipeError as error:
        raise ModelError(f"modules: {error.what}", where=folder / EMBEDDING_CONFIG) from error


def _pooling(path: Path, named: str | None) -> tuple[str, bool]:
    """Mode (one that sentence-transformers lacks is `named` elsewhere) and whether prompt tokens take part."""
    config = read_typed(_PoolingFile, path)
    if named is not None:
        return named, config.include_prompt
    modes = config.pooling_mode
    if modes is None:
        modes = [mode for switch, mode in POOLING_SWITCHES.items() if getattr(config, switch)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLING_NAMES:
        raise ModelError(
            f"pooling {' + '.join(modes) or '(none)'} is not supported",
            where=path,
            expected=f"exactly one of {', '.join(POOLING_NAMES)}",
            fix="use a model that pools in one of these ways",
        )
    return POOLING_NAMES[modes[0]], config.include_prompt


def _projection(path: Path) -> Projection:
    config = read_typed(_DenseFile, path / "config.json")
    widths = config.in_features, config.out_features
    try:
        projection = Projection(*widths, config.bias, config.activation_function, config.use_residual)
    except ModelError as error:
        raise ModelError(error.what, where=path / "config.json", expected=error.expected) from error
    weights = path / "model.safetensors"
    if not weights.exists():
        raise ModelError(
            "the weights of a Dense module are missing",
            where=weights,
            expected="model.safetensors",
            fix="save the model again with a current sentence-transformers, or copy the missing file",
        )
    try:
        projection.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ModelError(f"cannot read the weights of a Dense module: {error}", where=weights) from error
    return projection


S = TypeVar("S")


def read_typed(schema: type[S], path: Path) -> S:
    """A JSON file of a model folder as a dataclass (or another type) says it has to be; other keys are left alone.

    Errors: `ModelError` naming the file and the key.
    """
    fix = "copy the folder again, as a whole"
    if not path.exists():
        raise ModelError("this file is missing", where=path, fix=fix)
    return inputs.read_typed(path, schema, ModelError, fix=fix, strict=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object of keys that are not ours. Errors: as `read_typed`."""
    return read_typed(dict[str, Any], path)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
