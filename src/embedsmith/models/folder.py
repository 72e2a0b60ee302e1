"""Reading what a folder says about itself: sentence-transformers' files, legacy and 5.4+ schema, or none of them, and
`embedding_config.json` for what those files have no place for.

The latter is written only when it holds something. A program that does not read it still gets the right vectors from
the standard files where those can express the model; where they cannot, `modules.json` names the module in
`sentence.py` instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.core.recipe import parse
from embedsmith.core.settings import section
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
    modules: tuple[Mapping[str, Any], ...] = ()

    @property
    def standard(self) -> bool:
        """Whether standard files alone give the same vectors in sentence-transformers."""
        plain = self.pooling is None and self.echo is None and self.pool_special_tokens and self.base is None
        return plain and self.attention.in_config


def read_embedding_config(folder: Path) -> EmbeddingConfig:
    """Errors: `ModelError` for a file that is not JSON, has unknown keys, or is of a newer version."""
    path = folder / EMBEDDING_CONFIG
    if not path.exists():
        return EmbeddingConfig()
    tree = read_json(path)
    if isinstance(tree, dict) and tree.get("version", 1) > 1:
        raise ModelError(f"version {tree['version']}", where=path, expected="1", fix="install a newer embedsmith")
    try:
        return parse(EmbeddingConfig, tree, where=str(path))
    except RecipeError as error:
        raise ModelError(f"cannot read this file: {error}", where=path) from error


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
    embedding_config: EmbeddingConfig = EmbeddingConfig()


def read_folder(folder: Path) -> FolderFacts:
    """Facts of a sentence-transformers folder (either schema), or of a plain transformers folder.

    Errors: `ModelError` for a file that is not JSON, a module this cannot do, a pooling that is not known.
    """
    more = read_embedding_config(folder)
    if not (folder / "modules.json").exists():
        return FolderFacts(backbone=folder, embedding_config=more)
    modules = _modules(more.modules or read_json(folder / "modules.json"), folder)
    backbone = modules[0][1]
    encoder = _optional_json(backbone / "sentence_bert_config.json") or _optional_json(
        folder / "sentence_bert_config.json"
    )
    general = _optional_json(folder / "config_sentence_transformers.json")
    pooling, include_prompt = _pooling(modules[1][1] / "config.json", more.pooling)
    return FolderFacts(
        backbone=backbone,
        pooling=pooling,
        include_prompt=include_prompt,
        max_length=encoder.get("max_seq_length"),
        lower_case=bool(encoder.get("do_lower_case", False)),
        normalize=modules[-1][0] == "Normalize",
        projections=tuple(_projection(path) for kind, path in modules if kind == "Dense"),
        prompts=dict(general.get("prompts") or {}),
        default_prompt=general.get("default_prompt_name"),
        embedding_config=more,
    )


def _modules(entries: Sequence[Mapping[str, Any]], folder: Path) -> list[tuple[str, Path]]:
    """Kind and folder of every module. `Pooling` is `sentence_transformers.models.Pooling` or its newer path; other
    packages' modules are not ours to guess at, whatever their last name."""
    where = folder / "modules.json"
    modules: list[tuple[str, Path]] = []
    for entry in entries:
        name = str(entry.get("type", ""))
        kind = name.rpartition(".")[2]
        if not name.startswith("sentence_transformers.") or kind not in _KINDS:
            raise ModelError(
                f"the module {name!r} is not supported",
                where=where,
                expected=f"sentence-transformers modules of the kinds {', '.join(_KINDS)}",
            )
        path = (folder / str(entry.get("path", ""))).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise ModelError(
                f"the module path {entry.get('path')!r} leaves the folder", where=where, expected="a relative path"
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


def _pooling(path: Path, named: str | None) -> tuple[str, bool]:
    """Mode (one that sentence-transformers lacks is `named` elsewhere) and whether prompt tokens take part."""
    config = read_json(path)
    if named is not None:
        return named, bool(config.get("include_prompt", True))
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for switch, mode in POOLING_SWITCHES.items() if config.get(switch)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLING_NAMES:
        raise ModelError(
            f"pooling {' + '.join(modes) or '(none)'} is not supported",
            where=path,
            expected=f"exactly one of {', '.join(POOLING_NAMES)}",
            fix="use a model that pools in one of these ways",
        )
    return POOLING_NAMES[modes[0]], bool(config.get("include_prompt", True))


def _projection(path: Path) -> Projection:
    config = read_json(path / "config.json")
    if not {"in_features", "out_features"} <= config.keys():
        raise ModelError(
            "a Dense module without its widths",
            where=path / "config.json",
            expected="in_features and out_features",
        )
    projection = Projection(
        int(config["in_features"]),
        int(config["out_features"]),
        bias=bool(config.get("bias", True)),
        activation=str(config.get("activation_function", "torch.nn.modules.activation.Tanh")),
        residual=bool(config.get("use_residual", False)),
    )
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
    except (SafetensorError, RuntimeError) as error:
        raise ModelError(f"cannot read the weights of a Dense module: {error}", where=weights) from error
    return projection


def read_json(path: Path) -> Any:
    """Errors: `ModelError` naming the file when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError("this file is missing", where=path, fix="copy the folder again, as a whole") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read this file: {error}", where=path) from error


def _optional_json(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.exists() else {}
