"""`load`: a folder or hub id, and what to change about it, to an `Embedder`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import normalizers
from torch import nn

from embedsmith.core.device import device_named, has_mps
from embedsmith.core.errors import ModelError, RecipeError, foreign_errors
from embedsmith.core.progress import log
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
from embedsmith.models.config import ModelConfig, Settings, Similarity, derive_max_length
from embedsmith.models.embedder import Embedder
from embedsmith.models.expansion import with_token
from embedsmith.models.folder import EMBEDDING_CONFIG, POOLER_FILE, AdapterFile, FolderFacts, read_folder_file
from embedsmith.models.fused import fuse_kernels
from embedsmith.models.graphs.graph_embedder import GraphEmbedder
from embedsmith.models.graphs.graph_files import FILES, GraphBackend, GraphFacts, backend_of
from embedsmith.models.heads.base import HeadSource
from embedsmith.models.heads.dense import HeadConfig
from embedsmith.models.layers import check_widths, width_after
from embedsmith.models.lora import (
    ADAPTER,
    UnmergedError,
    add_adapter,
    base_facts,
    check_installed,
    load_adapter,
    merged,
)
from embedsmith.models.new_tokens import add_new_tokens, grow_table
from embedsmith.models.packing import Packing, decide_packing
from embedsmith.models.pooling import PoolerConfig, pooled_width, pooling_named
from embedsmith.models.self_test import is_flash
from embedsmith.models.static import StaticTable
from embedsmith.models.tokenize import (
    TextTokenizer,
    added_tokens,
    compiled,
    put_end_token,
    put_first_token,
    put_single_tokens,
    template_named,
    unescaped,
)


def load(
    path: str | ModelConfig,
    /,
    *,
    device: str | torch.device | None = None,
    new_heads: bool = False,
    **overrides: Any,
) -> Embedder:
    """An embedder in eval mode from a transformers folder, a sentence-transformers folder or a hub id; of a folder that
    `embedsmith export` made, the graph in it (`backend`).

    >>> import embedsmith as es
    >>> model = es.load("my-model", max_length=16)
    >>> model.encode(["how do I reset my password?"], role="query").shape
    (1, 16)

    `overrides` are the fields of `ModelConfig`. `device=None` is the current GPU where there is one, else the CPU.
    `new_heads`: heads that are asked for and not in the folder are made, random, for you to train them.
    Errors: `ModelError` naming the file and the fix; `RecipeError` for an unknown override.
    """
    if isinstance(path, ModelConfig):
        config = dataclasses.replace(path, **overrides)
    else:
        config = parse(ModelConfig, {"path": str(path), **overrides}, where="load")
    target = device_named(best_device() if device is None else device)
    source = ModelSource.find(config)
    if source.graph is not None:
        return _running(source, source.graph, device, new_heads)
    return _loaded(source, target, new_heads)


def _loaded(source: ModelSource, target: torch.device, new_heads: bool) -> Embedder:
    config, saved = source.config, source.facts.embedding_config.attention
    mode = config.attention or saved.mode
    tokenizer = source.tokenizer()
    backbone: Any = load_backbone(source.base, config, mode, config.lora is not None and config.lora.four_bit)
    if config.positions is not None:
        if source.adapter or config.lora is not None:
            raise ModelError(
                "positions of a model with an adapter",
                fix="extend the base first: embedsmith convert BASE NEW_FOLDER model.positions=COUNT",
            )
        extend_positions(backbone, config.positions)
    new_ids = source.prepare_tokenizer(tokenizer, backbone)
    if is_flash(backbone):  # the self-test runs the kernel, which is only there
        backbone.to(target)
    attention = switch_attention(backbone, mode, config.partial_attention or bool(saved.causal_layers))
    settings = source.settings(tokenizer, positions_of(backbone), attention)
    embedder = source.assemble(backbone, tokenizer, settings, attention, new_heads)
    source.adapt(embedder, new_ids)
    if (queries := source.of_queries()) is not None:
        embedder.query_side = _loaded(queries, target, new_heads=False)
    embedder.to(target).eval()
    if target.type == "cuda":
        embedder.fused = fuse_kernels(embedder.backbone)
    if settings.expansion is not None and not settings.expansion.attend:
        why = "queries are filled up with tokens that nothing attends to, and a row has no mask for that"
        if config.packing is True:
            raise ModelError(f"packing=true: {why}", where=config.path, fix="leave model.packing out")
        embedder.packs = Packing(why=why)
    else:
        embedder.packs = decide_packing(
            embedder.backbone, attention, config.packing, config.attn_implementation, settings.max_length
        )
    embedder.packing = embedder.packs.on
    if config.compile:
        embedder.backbone.compile(dynamic=True)
    return embedder


_OF_A_GRAPH = ("path", "revision", "backend", "heads", "max_length", "prompts", "template", "instructions")
"""Keys of `ModelConfig` that mean something where the model is a graph; the others are settled when it is exported."""


def _running(
    source: ModelSource, backend: GraphBackend, device: str | torch.device | None, new_heads: bool
) -> GraphEmbedder:
    """The graph of a folder. Errors: `ModelError` for what would change it, and for training."""
    config, folder = source.config, source.facts.backbone
    facts = GraphFacts.read(folder, backend)
    plain = ModelConfig(path=config.path)
    more = ("padding_side", "trust_remote_code", *_OF_A_GRAPH)
    changed = [one.name for one in dataclasses.fields(config) if one.name not in more]
    changed = [f"model.{name}" for name in changed if getattr(config, name) != getattr(plain, name)]
    if device is not None and device_named(device).type != "cpu":
        changed.append(f"device={device}")
    if changed or new_heads:
        raise ModelError(
            "an exported graph cannot be trained" if new_heads else f"{changed[0]} of an exported graph",
            where=folder / FILES[backend],
            expected=None
            if new_heads
            else f"of the keys of model at most {', '.join(_OF_A_GRAPH)}; it runs on the CPU",
            fix="use the model that it was made from" + ("" if new_heads else f", and export that with {changed[0]}"),
        )
    wanted = facts.heads if config.heads is None else dict.fromkeys(("dense", *config.heads))
    if absent := [name for name in wanted if name not in facts.heads]:
        raise ModelError(
            f"this graph has no head {absent[0]!r}", where=folder, expected=f"some of {', '.join(facts.heads)}"
        )
    tokenizer = source.tokenizer()
    frame = skeleton(source.base, config.trust_remote_code)
    source.prepare_tokenizer(tokenizer, frame)
    settings = source.settings(tokenizer, facts.max_length, Attention())
    return GraphEmbedder(folder, backend, frame, tokenizer, settings, facts, tuple(wanted)).eval()


def without_weights(config: ModelConfig) -> Embedder:
    """An embedder that can only `tokenize`: no weight of the backbone is read, so a large one needs no memory.

    Errors: `ModelError` as of `load`; for a model that says nowhere whether texts get an end token.
    """
    source = ModelSource.find(config, with_weights=False)
    config, tokenizer = source.config, source.tokenizer()
    frame: Any = skeleton(source.base, config.trust_remote_code)
    if config.positions is not None:
        extend_positions(frame, config.positions)
    if (config.pooling or source.facts.pooling) is None and source.facts.main == "dense":
        if not added_tokens(tokenizer)[1]:
            raise ModelError(
                "this folder does not say how to pool, and last-token pooling puts an end token behind every text",
                where=config.path,
                fix="say it, for example --pooling mean, or model.pooling=mean in a recipe",
            )
        config = dataclasses.replace(config, pooling="mean")  # of no matter to tokens
        source = dataclasses.replace(source, config=config)
    source.prepare_tokenizer(tokenizer, frame)
    settings = source.settings(tokenizer, positions_of(frame), Attention())
    embedder = Embedder(frame, tokenizer, dataclasses.replace(settings, pooling="mean")).eval()
    if (queries := source.of_queries()) is not None:
        embedder.query_side = without_weights(queries.config)
    return embedder


@dataclass(frozen=True)
class ModelSource:
    """What an embedder is built from: as the user asks (`config`), else as the folder says (`facts`).

    `base`: the folder of the backbone, which is another one where the folder holds an adapter alone (`adapter`).
    `graph`: the exported graph that runs in the place of the weights.
    """

    config: ModelConfig
    facts: FolderFacts
    base: Path
    adapter: Path | None = None
    graph: GraphBackend | None = None

    @classmethod
    def find(cls, config: ModelConfig, with_weights: bool = True) -> ModelSource:
        """Read what the folder says, and how the base of an adapter was changed before the adapter was put in.

        Errors: `ModelError` naming the file; `MissingExtraError` where adapters need a package (`with_weights`).
        """
        folder = locate(config.path, config.revision, config.backend)
        facts = FolderFacts.read(folder)
        if (graph := backend_of(facts.backbone, config.backend)) is not None:
            return cls(config, facts, facts.backbone, graph=graph)
        adapter = (folder / ADAPTER).exists()
        if with_weights and (adapter or config.lora is not None):
            check_installed(config.lora)
        if not adapter:
            return cls(config, facts, facts.backbone)
        found = facts.embedding_config.base or {}
        path = (
            config.base or found.get("path") or read_folder_file(AdapterFile, folder / ADAPTER).base_model_name_or_path
        )
        if not path:
            raise ModelError(
                "this adapter does not say what it belongs to", where=folder, fix="say it with model.base=FOLDER"
            )
        layers, first = found.get("layers"), found.get("cls_token")
        changed = dataclasses.replace(
            config, layers=None if layers is None else tuple(layers), cls_token=first or config.cls_token
        )
        return cls(changed, facts, locate(str(path), found.get("revision")), folder)

    def of_queries(self) -> ModelSource | None:
        """What reads queries, where a Router names another model for them. What the user changes about the model is
        about that of the documents, but for what is said of texts and of how to compute."""
        facts = self.facts.query
        if facts is None:
            return None
        if self.config.lora is not None:
            raise ModelError(
                "an adapter for a model that has another one for queries",
                where=self.config.path,
                fix="leave model.lora out, and train the weights",
            )
        kept = (
            *("prompts", "template", "instructions", "max_length", "normalize", "similarity", "trust_remote_code"),
            *("dtype", "attn_implementation", "gradient_checkpointing", "packing", "compile"),
        )
        config = ModelConfig(str(facts.backbone), **{name: getattr(self.config, name) for name in kept})
        return ModelSource(config, facts, facts.backbone)

    def tokenizer(self) -> Any:
        """The folder's, else that of the base. Errors: `ModelError` for one that has no fast form."""
        folder = self.facts.backbone if has_tokenizer(self.facts.backbone) else self.base
        return TextTokenizer(load_tokenizer(folder, self.config.trust_remote_code), str(folder)).tokenizer

    def prepare_tokenizer(self, tokenizer: Any, backbone: Any) -> list[int]:
        """Padding side, new tokens (whose ids are returned), first and end tokens: as asked, else as the folder was
        saved."""
        config, facts = self.config, self.facts
        if config.padding_side is not None:
            tokenizer.padding_side = config.padding_side
        if facts.lower_case:  # before whatever else the tokenizer normalises, as in sentence-transformers
            normalizer = tokenizer.backend_tokenizer.normalizer
            steps = [normalizer] if normalizer is not None else []
            if isinstance(normalizer, normalizers.Sequence):
                steps = [normalizer[place] for place in range(len(normalizer))]
            if not any(isinstance(step, normalizers.Lowercase) for step in steps):
                tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])
        put_single_tokens(tokenizer, facts.tokens)
        if isinstance(backbone, StaticTable):  # no token stands around a text
            tokenizer.backend_tokenizer.post_processor = None
        new_ids: list[int] = []
        if self.adapter is not None:
            self._as_adapted(tokenizer, backbone)
        elif config.new_tokens:
            new_ids = add_new_tokens(tokenizer, backbone, config.new_tokens)
        if config.cls_token is not None:
            put_first_token(tokenizer, backbone, config.cls_token)
        if self.append_eos:
            put_end_token(tokenizer, config.eos_token)
        elif facts.embedding_config.eos_id is not None:
            number = facts.embedding_config.eos_id
            if not 0 <= number < len(tokenizer):
                raise ModelError(
                    f"eos_id is {number}, and the tokenizer has {len(tokenizer)} tokens",
                    where=facts.backbone / EMBEDDING_CONFIG,
                    fix="copy the folder again, as a whole",
                )
            put_end_token(tokenizer, tokenizer.convert_ids_to_tokens(number))
        return new_ids

    def _as_adapted(self, tokenizer: Any, backbone: Any) -> None:
        """Room in the base for the new tokens of its adapter, which has their embeddings.

        Errors: `ModelError` where further ones are asked for.
        """
        if self.config.new_tokens:
            raise ModelError(
                "new_tokens of a model with an adapter",
                where=self.adapter,
                fix="merge it first: embedsmith convert FOLDER NEW_FOLDER, and start from there",
            )
        if added := (self.facts.embedding_config.base or {}).get("new_tokens"):
            grow_table(backbone, max(tokenizer.convert_tokens_to_ids(added)) + 1)

    @property
    def append_eos(self) -> bool:
        """As asked; else for last-token pooling of a folder that does not say how it pools."""
        if self.config.append_eos is not None or self.config.eos_token is not None:
            return self.config.append_eos is not False
        return self.config.pooling == "last" and self.facts.pooling is None

    @property
    def form(self) -> str:
        """That of the folder, unless the user asks for more than it can hold."""
        config, facts = self.config, self.facts
        asked = config.pooling not in (None, facts.pooling) or config.head is not None or config.dimension is not None
        there = set(facts.heads) | ({facts.main} - {"dense"})
        more = config.heads is not None and set(config.heads) - {"dense"} != there
        return "dense" if asked or more else facts.form

    def pooling(self, tokenizer: Any, attention: Attention) -> str | None:
        """As the user asks, else as the folder says; `None` for a folder that is made for words or tokens alone.

        Errors: `ModelError` when neither says it, for a pooling that no installed package has, for cls pooling of
        causal attention."""
        config = self.config
        pooling = config.pooling or self.facts.pooling
        if pooling is None and self.form != "dense":
            return None
        if pooling is None:
            raise ModelError(
                "this folder does not say how to pool",
                where=config.path,
                expected=f"pooling, one of {', '.join(poolings.names())}",
                fix="say the one it was trained with, for example --pooling mean, in a recipe model.pooling=mean; or "
                "make an embedder of the folder once: embedsmith convert MODEL NEW_FOLDER --pooling=mean",
            )
        try:
            pooling_named(pooling)
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
                fix="use model.pooling=last or mean, or model.attention=bidirectional",
            )
        one_cls = pooling == "cls" and len(added_tokens(tokenizer)[0]) == 1
        if config.mcls is not None and (config.mcls < 1 or not one_cls):
            raise ModelError(
                f"mcls={config.mcls} with {pooling} pooling",
                expected="1 or more, for an encoder with cls pooling whose tokenizer puts one CLS before a text",
                fix="leave model.mcls out",
            )
        return pooling

    def settings(self, tokenizer: Any, positions: int | None, attention: Attention) -> Settings:
        """What the user asks for, else what the folder says. Errors: as `pooling`, and `ModelError` for prompts that
        leave no room for a text."""
        config, facts, saved = self.config, self.facts, self.facts.embedding_config
        pooling = self.pooling(tokenizer, attention)
        special = config.pool_special_tokens
        if special is None:
            # A decoder's first token is a sink of attention whose large state says nothing about the text.
            sink = (attention.causal or attention.mode != "native") and bool(added_tokens(tokenizer)[0])
            said = facts.pooling is not None or facts.form != "dense"
            takes_part = saved.pool_special_tokens if said else not sink
            special = takes_part or pooling in ("last", "cls")  # which take a single token as it is
        expansion = config.expansion
        filled = {} if expansion is None or not expansion.cut else {"query": expansion.length}
        settings = Settings(
            pooling=pooling,
            max_length=derive_max_length(
                config.max_length or config.positions, facts.max_length, tokenizer.model_max_length, positions
            ),
            prompts=facts.prompts,
            default_prompt=facts.default_prompt,
            include_prompt=facts.include_prompt if config.include_prompt is None else config.include_prompt,
            heads_include_prompt=(
                saved.heads_include_prompt if config.heads_include_prompt is None else config.heads_include_prompt
            ),
            normalize=facts.normalize is not False if config.normalize is None else config.normalize,
            lower_case=facts.lower_case,
            templates=saved.templates,
            echo=config.echo or saved.echo,
            pool_special_tokens=special,
            eos_id=added_tokens(tokenizer)[1][-1] if self.append_eos else saved.eos_id,
            mcls=config.mcls,
            similarity=config.similarity or _similarity(facts.similarity),
            truncate_dim=facts.truncate_dim,
            main=facts.main if self.form == facts.form else "dense",
            lengths={**facts.lengths, **filled},
            expansion=with_token(config.expansion or facts.expansion, tokenizer, config.path),
            form=self.form,
        )
        if settings.echo is not None and settings.echo.count("{text}") != 2:
            raise ModelError(f"echo is {settings.echo!r}", where=config.path, expected="a text with {text} in it twice")
        settings = self.prompted(settings)
        for name, text in settings.prompts.items():  # behind a longer prompt all texts would be one vector
            count = len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids) if text else 0
            if count + sum(map(len, added_tokens(tokenizer))) >= settings.max_length:
                raise ModelError(
                    f"the prompt {name!r} takes {count} tokens of {settings.max_length}: no text would fit behind it",
                    fix="shorten the prompt or raise model.max_length",
                )
        return settings

    def prompted(self, settings: Settings) -> Settings:
        """Prompts as the user gave them, or made from a template and the tasks' instructions."""
        config = self.config
        if config.prompts is not None:
            if config.template is not None:
                raise ModelError("prompts and template are both set", fix="keep one of them")
            plain = {name: unescaped(text) for name, text in config.prompts.items()}
            return dataclasses.replace(settings.with_prompts(plain), templates={})
        if config.template is None and config.instructions is None:
            return settings
        templates = settings.templates if config.template is None else template_named(config.template)
        if not templates:
            raise ModelError("instructions without a template", fix="set model.template=qwen3 or another")
        made = compiled(templates, config.instructions or {})
        return dataclasses.replace(settings.with_prompts(made), templates=dict(templates))

    def projections(self, width: int) -> list[Any]:
        """The folder's layers, then a new one where another dimension is asked for.

        `width`: of what the pooling gives. Errors: `ModelError` for a layer of another width.
        """
        config, layers = self.config, list(self.facts.projections)
        check_widths(layers, width, self.facts.backbone)
        width = width_after(layers, width)
        if config.head is not None:
            if config.dimension not in (None, config.head.out):
                raise ModelError(f"dimension={config.dimension} and head.out={config.head.out}", fix="keep one of them")
            return [*layers, *config.head.build(width)]
        if config.dimension is not None and config.dimension != width:
            layers += HeadConfig(out=config.dimension).build(width)
        return layers

    def pooler(self, name: str | None, hidden_size: int) -> tuple[nn.Module | None, PoolerConfig | None]:
        """The module of a pooling with weights and its shape, the folder's where it pools so; `None` for one without.

        Errors: `ModelError` naming the file of the weights when it is missing, damaged or of another shape.
        """
        kind = None if name is None else pooling_named(name)
        if not isinstance(kind, type):
            return None, None
        saved = self.facts.embedding_config
        from_folder = saved.pooling == name
        shape = self.config.pooler or (saved.pooler if from_folder else None) or PoolerConfig()
        pooler: nn.Module = kind(hidden_size, shape)
        if from_folder:
            path = self.facts.backbone / POOLER_FILE
            try:
                pooler.load_state_dict(load_file(path))
            except (SafetensorError, RuntimeError, OSError) as error:
                raise ModelError(f"cannot read the weights of the pooling: {error}", where=path) from error
        return pooler, shape

    def assemble(
        self, backbone: Any, tokenizer: Any, settings: Settings, attention: Attention, new_heads: bool
    ) -> Embedder:
        """The embedder with the folder's heads, and new ones where they are asked for to be trained (`new_heads`)."""
        config = self.config
        hidden_size = backbone.config.get_text_config().hidden_size
        pooler, shape = self.pooler(settings.pooling, hidden_size)
        width = pooled_width(settings.pooling, pooler, hidden_size)
        layers = self.projections(width)
        source = HeadSource(
            folder=self.facts.backbone,
            base=self.base,
            backbone=backbone,
            tokenizer=tokenizer,
            adapted=config.lora is not None,
            trust_remote_code=config.trust_remote_code,
            sparse=config.sparse,
            sparse_terms=config.sparse_terms,
            multivector=config.multivector,
            multivector_dim=config.multivector_dim,
            new_heads=new_heads,
            specs=self.facts.heads,
            width=width_after(layers, width),
        )
        return Embedder(
            backbone,
            tokenizer,
            settings,
            layers,
            source.build(config.heads),
            attention=attention,
            softmask=config.softmask,
            pooler=pooler,
            pooler_config=shape,
        )

    def adapt(self, model: Embedder, new_ids: Sequence[int]) -> None:
        """The folder's adapter, or a new one where the config asks for it. One that nobody asks to train is merged.
        Beside a new one the embeddings of new tokens are trained.

        Errors: `ModelError` for new tokens beside a head that scores words.
        """
        config, saved = self.config, self.facts.embedding_config.base
        if self.adapter is not None:
            load_adapter(model.backbone, self.adapter, saved)
            if config.lora is None:
                try:
                    with foreign_errors("cannot merge the adapter", self.adapter):
                        model.backbone = merged(model.backbone)
                    return
                except UnmergedError as error:
                    log.warning("%s: %s; it stays beside the weights", self.adapter, error.what)
            model.base = saved and {**saved, "path": str(self.base.resolve())}
        elif config.lora is not None:
            layers = config.layers
            model.base = {
                **base_facts(model.backbone),
                "path": str(self.base.resolve()),
                "revision": config.revision,
                "layers": list(range(layers)) if isinstance(layers, int) else layers and list(layers),
                "cls_token": config.cls_token,
            }
            if new_ids:
                model.base |= {"new_tokens": list(config.new_tokens)}
                if words := [name for name, head in model.token_heads.items() if head.reads_words]:
                    raise ModelError(
                        f"new_tokens with model.lora and the head {words[0]}, which reads frozen embeddings",
                        fix="train the weights (no model.lora), or leave the head out (model.heads)",
                    )
            add_adapter(model.backbone, config.lora, new_ids)


def _similarity(named: str | None) -> Similarity:
    """What a folder names, where that compares two vectors: a sparse or multi-vector model (maxsim) has a cosine for
    its dense vectors."""
    return next((known for known in get_args(Similarity) if known == named), "cosine")


def best_device() -> str:
    """The current CUDA device, Apple's GPU, or the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if has_mps() else "cpu"
