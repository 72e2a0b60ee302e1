"""`load`: a folder or hub id, and what to change about it, to an `Embedder`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import normalizers
from torch import nn

from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.core.recipe import parse
from embedsmith.core.shelf import poolings
from embedsmith.models.attention import Attention, switch_attention
from embedsmith.models.backbone import (
    extend_positions,
    has_tokenizer,
    load_backbone,
    load_tokenizer,
    locate,
    positions_of,
    skeleton,
)
from embedsmith.models.config import ModelConfig, Settings, derive_max_length
from embedsmith.models.embedder import Embedder
from embedsmith.models.folder import POOLER_FILE, FolderFacts, read_folder, read_json
from embedsmith.models.heads.base import HeadSource, build_heads
from embedsmith.models.heads.dense import Projection, orthogonal_projection
from embedsmith.models.lora import ADAPTER, add_adapter, check_installed, fingerprint, load_adapter, merged
from embedsmith.models.packing import check_packing
from embedsmith.models.pooling import PoolerConfig
from embedsmith.models.self_test import is_flash
from embedsmith.models.tokenize import added_tokens, compiled, put_end_token, put_first_token, template_named, unescaped


def load(path: str | ModelConfig, /, *, device: str | torch.device | None = None, **overrides: Any) -> Embedder:
    """An embedder in eval mode from a transformers folder, a sentence-transformers folder or a hub id.

    `overrides` are the fields of `ModelConfig`. `device=None` is the current GPU where there is one, else the CPU.
    Errors: `ModelError` naming the file and the fix; `RecipeError` for an unknown override.
    """
    if isinstance(path, ModelConfig):
        config = dataclasses.replace(path, **overrides)
    else:
        config = parse(ModelConfig, {"path": str(path), **overrides}, where="load")
    folder = locate(config.path, config.revision)
    facts = read_folder(folder)
    adapter = (folder / ADAPTER).exists()
    if adapter or config.lora is not None:
        check_installed(config.lora)
    base, config = _base(folder, facts, config) if adapter else (facts.backbone, config)
    mode = config.attention or facts.embedding_config.attention.mode
    tokenizer = load_tokenizer(facts.backbone if has_tokenizer(facts.backbone) else base, config.trust_remote_code)
    backbone: Any = load_backbone(base, config, mode, config.lora is not None and config.lora.four_bit)
    if config.positions is not None:
        if adapter or config.lora is not None:
            raise ModelError("positions of a model with an adapter", fix="extend the base first: embedsmith convert")
        extend_positions(backbone, config.positions)
    prepare_tokenizer(tokenizer, backbone, config, facts)
    target = torch.device(best_device() if device is None else device)
    if is_flash(backbone):  # the self-test runs the kernel, which is only there
        backbone.to(target)
    allowed = config.partial_attention or bool(facts.embedding_config.attention.causal_layers)
    attention = switch_attention(backbone, mode, allowed)
    settings = decide(config, facts, tokenizer, positions_of(backbone), attention)
    embedder = _assemble(config, facts, base, backbone, tokenizer, settings, attention)
    _adapt(embedder, config, facts, folder if adapter else None, base)
    embedder.to(target).eval()
    if config.packing:
        check_packing(embedder.backbone, attention, settings.max_length)
        embedder.packing = True
    if config.compile:
        embedder.backbone.compile(dynamic=True)
    return embedder


def without_weights(config: ModelConfig) -> Embedder:
    """An embedder that can only `tokenize`: no weight of the backbone is read, so a large one needs no memory.

    Errors: `ModelError` as of `load`; for a model that says nowhere whether texts get an end token.
    """
    folder = locate(config.path, config.revision)
    facts = read_folder(folder)
    base, config = _base(folder, facts, config) if (folder / ADAPTER).exists() else (facts.backbone, config)
    tokenizer = load_tokenizer(facts.backbone if has_tokenizer(facts.backbone) else base, config.trust_remote_code)
    frame: Any = skeleton(base, config.trust_remote_code)
    if config.positions is not None:
        extend_positions(frame, config.positions)
    if (config.pooling or facts.pooling) is None:
        if not added_tokens(tokenizer)[1]:
            raise ModelError(
                "this folder does not say how to pool, and last-token pooling puts an end token behind every text",
                where=config.path,
                fix="say it, for example pooling=last or pooling=mean",
            )
        config = dataclasses.replace(config, pooling="mean")  # of no matter to tokens
    prepare_tokenizer(tokenizer, frame, config, facts)
    settings = decide(config, facts, tokenizer, positions_of(frame), Attention())
    return Embedder(frame, tokenizer, dataclasses.replace(settings, pooling="mean")).eval()


def _assemble(
    config: ModelConfig,
    facts: FolderFacts,
    base: Path,
    backbone: Any,
    tokenizer: Any,
    settings: Settings,
    attention: Attention,
) -> Embedder:
    """The embedder with the folder's heads, and new ones where they are asked for."""
    hidden_size = backbone.config.get_text_config().hidden_size
    pooler, shape = _pooler(config, facts, settings.pooling, hidden_size)
    width = hidden_size if pooler is None else int(pooler.width)  # type: ignore[arg-type]
    source = HeadSource(
        folder=facts.backbone,
        base=base,
        backbone=backbone,
        tokenizer=tokenizer,
        adapted=config.lora is not None,
        trust_remote_code=config.trust_remote_code,
        sparse=config.sparse,
        sparse_terms=config.sparse_terms,
        multivector_dim=config.multivector_dim,
    )
    return Embedder(
        backbone,
        tokenizer,
        settings,
        projections(config, facts, width),
        build_heads(config.heads, source),
        attention=attention,
        softmask=config.softmask,
        pooler=pooler,
        pooler_config=shape,
    )


def _pooler(
    config: ModelConfig, facts: FolderFacts, name: str, hidden_size: int
) -> tuple[nn.Module | None, PoolerConfig | None]:
    """The module of a pooling with weights and its shape, the folder's where it pools so; `None` for one without.

    Errors: `ModelError` naming the file of the weights when it is missing, damaged or of another shape.
    """
    kind = poolings.get(name)
    if not isinstance(kind, type):
        return None, None
    from_folder = facts.embedding_config.pooling == name
    shape = config.pooler or (facts.embedding_config.pooler if from_folder else None) or PoolerConfig()
    pooler: nn.Module = kind(hidden_size, shape)
    if from_folder:
        path = facts.backbone / POOLER_FILE
        try:
            pooler.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError, OSError) as error:
            raise ModelError(f"cannot read the weights of the pooling: {error}", where=path) from error
    return pooler, shape


def _base(folder: Path, facts: FolderFacts, config: ModelConfig) -> tuple[Path, ModelConfig]:
    """Where the base of an adapter folder is, and how it was changed before the adapter was put in."""
    found = facts.embedding_config.base or {}
    path = config.base or found.get("path") or read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not path:
        raise ModelError("this adapter does not say what it belongs to", where=folder, fix="say it with base=...")
    layers, first = found.get("layers"), found.get("cls_token")
    changed = dataclasses.replace(
        config, layers=None if layers is None else tuple(layers), cls_token=first or config.cls_token
    )
    return locate(str(path), found.get("revision")), changed


def _adapt(model: Embedder, config: ModelConfig, facts: FolderFacts, adapter: Path | None, base: Path) -> None:
    """The folder's adapter, or a new one where the config asks for it. One that nobody asks to train is merged."""
    if adapter is None and config.lora is None:
        return
    if adapter is not None:
        load_adapter(model.backbone, adapter, facts.embedding_config.base)
        if config.lora is None:
            model.backbone = merged(model.backbone)
            return
    else:
        assert config.lora is not None
        layers = config.layers
        model.base = {
            **fingerprint(model.backbone),
            "path": str(base.resolve()),
            "revision": config.revision,
            "layers": list(range(layers)) if isinstance(layers, int) else layers and list(layers),
            "cls_token": config.cls_token,
        }
        add_adapter(model.backbone, config.lora)
        return
    model.base = facts.embedding_config.base and {**facts.embedding_config.base, "path": str(base.resolve())}


def prepare_tokenizer(tokenizer: Any, backbone: Any, config: ModelConfig, facts: FolderFacts) -> None:
    """Padding side, first and end tokens: as asked, else as the folder was saved."""
    if config.padding_side is not None:
        tokenizer.padding_side = config.padding_side
    if facts.lower_case:  # before whatever else the tokenizer normalises, as in sentence-transformers
        normalizer = tokenizer.backend_tokenizer.normalizer
        steps = [normalizer] if normalizer is not None else []
        if isinstance(normalizer, normalizers.Sequence):
            steps = [normalizer[place] for place in range(len(normalizer))]
        if not any(isinstance(step, normalizers.Lowercase) for step in steps):
            tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])
    if config.cls_token is not None:
        put_first_token(tokenizer, backbone, config.cls_token)
    if derive_append_eos(config, facts):
        put_end_token(tokenizer, config.eos_token)
    elif facts.embedding_config.eos_id is not None:
        put_end_token(tokenizer, tokenizer.convert_ids_to_tokens(facts.embedding_config.eos_id))


def derive_append_eos(config: ModelConfig, facts: FolderFacts) -> bool:
    """As asked; else for last-token pooling of a folder that does not say how it pools."""
    if config.append_eos is not None or config.eos_token is not None:
        return config.append_eos is not False
    return config.pooling == "last" and facts.pooling is None


def decide_pooling(config: ModelConfig, facts: FolderFacts, tokenizer: Any, attention: Attention) -> str:
    """As the user asks, else as the folder says. Errors: `ModelError` when neither says it, for a pooling that no
    installed package has, for cls pooling of causal attention."""
    pooling = config.pooling or facts.pooling
    if pooling is None:
        raise ModelError(
            "this folder does not say how to pool",
            where=config.path,
            expected=f"pooling, one of {', '.join(poolings.names())}",
            fix="say it, for example pooling=mean: it must be the one the model was trained with; where there is "
            "no place to say it, make an embedder of the folder first: embedsmith convert",
        )
    try:
        poolings.entry(pooling)
    except RecipeError as error:
        if config.pooling is not None:
            raise
        raise ModelError(
            f"this model pools by {pooling!r}, which no installed package has",
            where=config.path,
            expected=error.expected,
            fix="install the package that the README.md in the folder names",
        ) from error
    if pooling == "cls" and attention.causal:
        raise ModelError(
            "cls pooling of causal attention: the first token sees nothing but itself",
            where=config.path,
            fix="use pooling=last or mean, or attention=bidirectional",
        )
    one_cls = pooling == "cls" and len(added_tokens(tokenizer)[0]) == 1
    if config.mcls is not None and (config.mcls < 1 or not one_cls):
        raise ModelError(
            f"mcls={config.mcls} with {pooling} pooling",
            expected="1 or more, for an encoder with cls pooling whose tokenizer puts one CLS before a text",
            fix="leave mcls out",
        )
    return pooling


def decide(
    config: ModelConfig, facts: FolderFacts, tokenizer: Any, positions: int | None, attention: Attention
) -> Settings:
    """What the user asks for, else what the folder says. Errors: as `decide_pooling`, and `ModelError` for prompts that
    leave no room for a text."""
    pooling = decide_pooling(config, facts, tokenizer, attention)
    saved = facts.embedding_config
    special = config.pool_special_tokens
    if special is None:
        # A decoder's first token is a sink of attention whose large state says nothing about the text.
        sink = (attention.causal or attention.mode != "native") and bool(added_tokens(tokenizer)[0])
        takes_part = saved.pool_special_tokens if facts.pooling is not None else not sink
        special = takes_part or pooling in ("last", "cls")  # which take a single token as it is
    settings = Settings(
        pooling=pooling,
        max_length=derive_max_length(
            config.max_length or config.positions, facts.max_length, tokenizer.model_max_length, positions
        ),
        prompts=facts.prompts,
        default_prompt=facts.default_prompt,
        include_prompt=facts.include_prompt if config.include_prompt is None else config.include_prompt,
        normalize=facts.normalize is not False if config.normalize is None else config.normalize,
        lower_case=facts.lower_case,
        templates=saved.templates,
        echo=config.echo or saved.echo,
        pool_special_tokens=special,
        eos_id=added_tokens(tokenizer)[1][-1] if derive_append_eos(config, facts) else saved.eos_id,
        mcls=config.mcls,
    )
    settings = with_prompts(settings, config)
    for name, text in settings.prompts.items():  # behind a longer prompt all texts would be one vector
        count = len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids) if text else 0
        if count + sum(map(len, added_tokens(tokenizer))) >= settings.max_length:
            raise ModelError(
                f"the prompt {name!r} takes {count} tokens of {settings.max_length}: no text would fit behind it",
                fix="shorten the prompt or raise max_length",
            )
    return settings


def with_prompts(settings: Settings, config: ModelConfig) -> Settings:
    """Prompts as the user gave them, or made from a template and the tasks' instructions."""
    if config.prompts is not None:
        if config.template is not None:
            raise ModelError("prompts and template are both set", fix="keep one of them")
        plain = {name: unescaped(text) for name, text in config.prompts.items()}
        return dataclasses.replace(settings.with_prompts(plain), templates={})
    if config.template is None and config.instructions is None:
        return settings
    templates = settings.templates if config.template is None else template_named(config.template)
    if not templates:
        raise ModelError("instructions without a template", fix="set template, for example qwen3")
    made = compiled(templates, config.instructions or {})
    return dataclasses.replace(settings.with_prompts(made), templates=dict(templates))


def projections(config: ModelConfig, facts: FolderFacts, hidden_size: int) -> list[Projection]:
    """The folder's dense layers, then a new one where another dimension is asked for."""
    layers = list(facts.projections)
    width = facts.projections[-1].linear.out_features if facts.projections else hidden_size
    if config.head is not None:
        if config.dimension not in (None, config.head.out):
            raise ModelError(f"dimension={config.dimension} and head.out={config.head.out}", fix="keep one of them")
        return [*layers, *config.head.build(width)]
    if config.dimension is not None and config.dimension != width:
        layers.append(orthogonal_projection(width, config.dimension))
    return layers


def best_device() -> str:
    """The current CUDA device, Apple's GPU, or the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
