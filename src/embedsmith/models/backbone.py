"""The transformer and its tokenizer from a folder or the hub, with nothing random and nothing guessed."""

import inspect
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer, PreTrainedTokenizerFast

from embedsmith.core.device import check_fits, memory
from embedsmith.core.errors import ModelError, foreign_errors
from embedsmith.core.inputs import local_path
from embedsmith.core.progress import log, transformers_silenced
from embedsmith.core.settings import Range, Word
from embedsmith.models.attention import Mode, prepare_config
from embedsmith.models.config import ModelConfig
from embedsmith.models.folder import read_folder_file, read_folder_json
from embedsmith.models.heads.base import known_heads
from embedsmith.models.lora import four_bit_loading, keep_trainable
from embedsmith.models.self_test import layers_of
from embedsmith.models.static import is_static, load_static

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_FILES = (
    *("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*/config.json", "*/model.safetensors"),
    *("1_Pooling/*.safetensors", "artifact.metadata"),
)
_SETTING_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
UNUSED = re.compile(r"(^|\.)(pooler\.|position_ids$|token_type_ids$|rotary_emb\.inv_freq$)")
"""Weights no vector depends on: absent or extra, they change nothing."""


def locate(path: str, revision: str | None = None, backend: str | None = None) -> Path:
    """The local folder of a folder name or a hub id; a hub id is downloaded (or found in the cache), with the graph of
    a `backend` where one is asked for.

    Errors: `ModelError` when there is no such folder, when a pipe, a device or a link to nothing stands in it, and when
    the hub has no such model or cannot be reached.
    """
    folder = local_path(path, ModelError)
    if folder.is_dir():
        for file in (*folder.iterdir(), *folder.glob("[0-9]*_*/*")):  # a pipe in a file's place would never end
            local_path(file, ModelError)
            if file.is_symlink() and not file.exists():
                raise ModelError(
                    f"a link to {file.readlink()}, which is not there", where=file, fix="copy the folder again"
                )
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(path):
        raise ModelError("there is no such model folder", where=path, fix="check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_HUB_FILES, *(kind.file for kind in known_heads().values())]
    patterns += [f"{backend}/{name}*" for name in ("model.onnx", "openvino_model.", "graph.json") if backend]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            "no folder has this name, and as a hub id it could not be fetched",
            where=path,
            fix="check the name; without a network, give a local folder",
        ) from error


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in _TOKENIZER_FILES)


@dataclass(frozen=True)
class _TokenizerFile:
    """tokenizer_config.json and its like, where tokens stand by themselves or with how they are found."""

    model_max_length: Annotated[float, Range(ge=4)] | None = None
    unk_token: Word | Mapping[str, Any] | None = None
    pad_token: Word | Mapping[str, Any] | None = None
    cls_token: Word | Mapping[str, Any] | None = None
    sep_token: Word | Mapping[str, Any] | None = None
    bos_token: Word | Mapping[str, Any] | None = None
    eos_token: Word | Mapping[str, Any] | None = None
    mask_token: Word | Mapping[str, Any] | None = None


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """Errors: `ModelError` when the folder has no tokenizer (transformers would make up one of five tokens)."""
    if not has_tokenizer(folder):
        raise ModelError(
            "this folder has no tokenizer",
            where=folder,
            expected=f"one of {', '.join(_TOKENIZER_FILES)}",
            fix="save the tokenizer of the base model into the folder",
        )
    if (folder / "config.json").exists() and not is_static(folder):  # transformers reads it for the tokenizer too
        read_config(folder, trust_remote_code)
    for path in (folder / name for name in _SETTING_FILES):
        if path.exists():
            read_folder_file(_TokenizerFile, path)
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
    with foreign_errors("cannot load the tokenizer", files[0]), transformers_silenced():
        if is_static(folder) and not (folder / "tokenizer_config.json").exists():
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if tokenizer.is_fast:  # lengths are ours to say: a file may pad and cut every text to one length
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.encode("a \u0378")  # a word that no vocabulary has
    return tokenizer


def load_backbone(folder: Path, config: ModelConfig, mode: Mode = "native", four_bit: bool = False) -> nn.Module:
    """The encoder in eval mode, every weight from the folder, built for an attention `mode` (which `switch_attention`
    then proves). `four_bit`: quantised, for QLoRA.

    Errors: `ModelError` for a missing or damaged file, an unknown architecture or one that is no encoder of texts,
    sizes beyond this machine, weights that do not fit, or an attention kernel that this machine lacks.
    """
    if is_static(folder):
        table: nn.Module = load_static(folder, getattr(torch, config.dtype)).eval()
        return table
    kind, model_config = read_architecture(folder, config.trust_remote_code)
    check_weight_files(folder)
    if (config.attn_implementation or "").startswith("flash") and not torch.cuda.is_available():  # no silent fallback
        raise ModelError(
            f"the attention {config.attn_implementation!r} needs a GPU, and there is none",
            fix="leave attn_implementation out, or say sdpa",
        )
    more = {"quantization_config": four_bit_loading(torch.bfloat16)} if four_bit else {}
    dtype = getattr(torch, config.dtype)
    if not four_bit:
        check_memory(kind, model_config, config.trust_remote_code, dtype, folder)
    with foreign_errors("cannot load the model", folder), transformers_silenced():
        backbone, report = kind.from_pretrained(
            folder,
            config=prepare_config(model_config, mode),
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **more,
        )
    _check_weights(backbone, report, folder)
    _check_reads_texts(backbone, folder)
    if four_bit:
        keep_trainable(backbone)
    keep_layers(backbone, config.layers)
    if config.gradient_checkpointing:
        # transformers 5 renamed it on the way, and takes the old name away with version 6
        enable = getattr(backbone, "activation_checkpointing_enable", backbone.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    model: nn.Module = backbone.eval()
    return model


def keep_layers(backbone: Any, wanted: int | Sequence[int] | None) -> None:
    """Drop all layers but the first `wanted`, or but those listed, in place. Errors: `ModelError` if there are not."""
    if wanted is None:
        return
    layers = layers_of(backbone)
    places = list(range(min(wanted, len(layers) + 1))) if isinstance(wanted, int) else list(wanted)
    if not places or sorted(set(places)) != places or places[0] < 0 or places[-1] >= len(layers):
        raise ModelError(
            f"layers={wanted} of a model with {len(layers)} layers", expected="a number, or a rising list from 0"
        )
    config = backbone.config.get_text_config()
    holder = next(m for m in backbone.modules() if isinstance(m, nn.ModuleList) and list(m) == layers)
    types = getattr(config, "layer_types", None)
    for place in reversed(range(len(layers))):
        if place not in places:
            del holder[place]
    config.num_hidden_layers = len(places)
    if types is not None:
        config.layer_types = [types[place] for place in places]


def skeleton(folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """The encoder that `load_backbone` would load, without its weights: names, shapes, ties and buffers only.

    Errors: `ModelError` for a missing config.json or an unknown architecture.
    """
    if is_static(folder):
        frame: nn.Module = load_static(folder, device="meta")
        return frame
    kind, model_config = read_architecture(folder, trust_remote_code)
    with foreign_errors("cannot read the architecture", folder), transformers_silenced(), torch.device("meta"):
        model: nn.Module = kind.from_config(model_config, trust_remote_code=trust_remote_code)
    return model


def read_architecture(folder: Path, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The class of transformers that builds the encoder, and its config.

    Errors: `ModelError` for a config.json that is missing, damaged or absurd, an unknown architecture, and one that
    gives something else than states of tokens.
    """
    path = folder / "config.json"
    model_config = read_config(folder, trust_remote_code)
    with foreign_errors("cannot load the model", path), transformers_silenced():
        saved_as = [str(name) for name in model_config.architectures or []]
        # An encoder-decoder, or the encoder saved of one (which then says it is not): only its encoder is wanted.
        has_decoder = bool(model_config.is_encoder_decoder) or any(name.endswith("EncoderModel") for name in saved_as)
    if classifier := next((name for name in saved_as if _CLASSIFIER.search(name)), None):
        raise ModelError(
            f"a {classifier} is no embedder: it gives scores or labels (a cross-encoder, for example), no vectors",
            where=path,
            fix="name it where a reranker is wanted (--rerank, task: rerank, a teacher, "
            "embedsmith.load_reranker(FOLDER)); to train an embedder from its encoder, remove `architectures` from a "
            "copy of this file",
        )
    return AutoModelForTextEncoding if has_decoder else AutoModel, model_config


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """What transformers makes of a config.json. Errors: `ModelError` for one that is missing, damaged or absurd."""
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(
            "this folder holds no model", where=folder, expected="a config.json", fix="give the folder of a saved model"
        )
    _check_counts(read_folder_json(path), path)
    with foreign_errors("cannot load the model", path), transformers_silenced():
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


_CLASSIFIER = re.compile(
    r"For(Sequence|Token|Image|Audio\w*|Video)Classification$|ForQuestionAnswering$|ForMultipleChoice$"
)
_COUNTS = re.compile(r"(^|_)(layers?|experts?|blocks?|stages?|depth)$|^(n|num)_.*(layer|expert|block|stage)s?(_|$)")
_SIZES = re.compile(r"(size|heads?|dim|d_model|d_ff|embd|embeddings|positions|ctx|inner)$")
_MOST = 10_000


def _check_counts(tree: Mapping[str, Any], path: Path) -> None:
    """A model is built part by part, without memory too: a number of parts must be one that can be counted to. And no
    number is NaN, and no size negative."""
    for key, value in tree.items():
        if isinstance(value, dict):
            _check_counts(value, path)
        elif isinstance(value, int | float) and not _plausible(key, value):
            raise ModelError(f"{key} is {value}", where=path, fix="restore this file: it is damaged")


def _plausible(key: str, value: float) -> bool:
    if _COUNTS.search(key):
        return 0 <= value <= _MOST
    if key == "max_relative_positions" and value == -1:  # of DeBERTa: as many as the model has positions
        return True
    return 0 <= value <= 2**31 if _SIZES.search(key) else not math.isnan(value)


def check_memory(kind: Any, model_config: Any, trust_remote_code: bool, dtype: torch.dtype, folder: Path) -> None:
    """The size of the weights that a config describes, which are many times those of the files where it is damaged.
    Building the model without memory to count them takes a tenth of the time in which a small one is loaded, so that
    is done only where they might be too many."""
    limit = memory()
    if limit is not None and _at_most(model_config.to_dict()) * dtype.itemsize <= limit:
        return
    numbers = 0  # what else is wrong with the config is said when the model is loaded
    with suppress(ModelError), foreign_errors("", folder), transformers_silenced(), torch.device("meta"):
        frame = kind.from_config(model_config, trust_remote_code=trust_remote_code)
        numbers = sum(math.prod(one.shape) for one in [*frame.parameters(), *frame.buffers()])
    check_fits(numbers * dtype.itemsize, "the model that this file describes", folder / "config.json")


def _at_most(tree: Mapping[str, Any]) -> int:
    """A bound on the weights of a model: tables of its vocabulary and positions, and 16 matrices in every part, all as
    wide as the largest other number of its config."""
    widest, tables, parts = 1, 0, 1
    for key, value in _whole_numbers(tree):
        if key.startswith("vocab") or "position" in key:
            tables += value
        elif _COUNTS.search(key):
            parts *= max(value, 1)
        elif not key.endswith("_id"):
            widest = max(widest, value)
    return (tables + 16 * parts * widest) * widest


def _whole_numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """All of a tree, each with the key under which it stands."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield key, value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _whole_numbers(each, str(name))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _whole_numbers(each, key)


def _check_reads_texts(backbone: Any, folder: Path) -> None:
    """Errors: `ModelError` for models of pictures or sound, and for pairs of towers such as CLIP: their forward pass
    wants both sides and gives no states of tokens."""
    if hasattr(backbone, "get_text_features") or not takes(backbone, "input_ids"):
        raise ModelError(
            f"{type(backbone).__name__} is no encoder of texts",
            where=folder / "config.json",
            expected="a model that turns token ids into states, such as BERT or Qwen3",
            fix="use a text model; sentence-transformers loads models of pictures and texts",
        )


def positions_of(backbone: nn.Module) -> int | None:
    """How many tokens the backbone can place; `None` where there is no bound."""
    table = position_table(backbone)
    if table is not None:
        return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    count = getattr(backbone.config, "max_position_embeddings", None)
    return count if isinstance(count, int) and count > 0 else None


@dataclass(frozen=True)
class _ShardIndex:
    """model.safetensors.index.json."""

    weight_map: Mapping[str, str]


def shard_names(index: Path) -> list[str]:
    """The files that an index of weights names, beside itself.

    Errors: `ModelError` for a damaged index, one that names a place elsewhere, and missing files.
    """
    names = sorted(set(read_folder_file(_ShardIndex, index).weight_map.values()))
    if away := [name for name in names if not name or Path(name).name != name or "\\" in name]:
        raise ModelError(
            f"the file {away[0]!r} does not lie beside this index", where=index, expected="names of files in the folder"
        )
    if missing := [name for name in names if not os.path.exists(index.parent / name)]:
        raise ModelError(
            f"{len(missing)} of {len(names)} weight files are missing: {', '.join(missing)}",
            where=index.parent,
            fix="copy or download the folder again, as a whole",
        )
    return names


def check_weight_files(folder: Path) -> None:
    """Before loading: every safetensors file is whole, every shard is there, and no tensor is in two of them.

    Errors: `ModelError` naming the file. Pickled weights are left to torch.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not single.exists() and not index.exists():
        return
    seen: dict[str, str] = {}
    for name in [single.name] if single.exists() else shard_names(index):
        path = folder / name
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
        except (OSError, SafetensorError, ValueError) as error:
            raise ModelError(
                f"a weights file is damaged ({error})",
                where=path,
                expected="whole *.safetensors files",
                fix="copy or download the folder again",
            ) from error
        if twice := [key for key in keys if key in seen]:
            raise ModelError(
                f"{twice[0]} is in this file and in {seen[twice[0]]}", where=path, fix="save the model again"
            )
        seen |= dict.fromkeys(keys, name)


def _check_weights(backbone: Any, report: dict[str, Any], folder: Path) -> None:
    """No vector may depend on a random weight, and no weight of a used part may be thrown away."""
    missing, unexpected = (
        sorted(key for key in report[kind] if not UNUSED.search(key)) for kind in ("missing_keys", "unexpected_keys")
    )
    if missing:
        raise ModelError(
            f"{len(missing)} weights are missing and would be random: {_some(missing)}",
            where=folder,
            fix="use a folder that was saved with this architecture",
        )
    if any(key.startswith("pooler.") for key in report["missing_keys"]):
        backbone.pooler = None  # unused, and otherwise saved with random weights
    parts = {name for name, _ in backbone.named_children()}
    prefix = f"{backbone.base_model_prefix}."
    own = [key for key in unexpected if key.removeprefix(prefix).split(".")[0] in parts]
    if own:
        raise ModelError(
            f"{len(own)} weights have no place in the model that config.json describes: {_some(own)}",
            where=folder,
            fix="check that config.json belongs to these weights",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def extend_positions(backbone: Any, positions: int) -> None:
    """Give a learned position table, as BERT and XLM-RoBERTa have, room for `positions` tokens, in place.

    New rows repeat the old ones (position n of the longer table is position n mod L of the old), as Longformer's were
    made: a text that fits the old table keeps its vector, and a longer one starts from positions the model knows. How
    M3-Embedding's new rows were made is not published; this is reconstructed. Texts longer than before need training.
    Errors: `ModelError` for a model without such a table, and for fewer positions than it has.
    """
    table = position_table(backbone)
    holder = next((module for module in backbone.modules() if table in module.children()), None)
    # As in BERT, the table has to belong to a module that adds it to word embeddings.
    plain = holder is not None and "word_embeddings" in dict(holder.named_children())
    if table is None or type(table) is not nn.Embedding or not plain:
        raise ModelError(
            f"positions={positions}: {type(backbone).__name__} has no position table that can be extended",
            expected="a model like BERT or XLM-RoBERTa",
            fix="leave positions out; a model with rotary positions takes max_length alone",
        )
    offset = 0 if table.padding_idx is None else table.padding_idx + 1
    old = table.num_embeddings - offset
    if positions < old:
        raise ModelError(f"positions={positions}", expected=f"{old} or more, as many as the model has")
    if positions == old:
        return
    assert holder is not None
    check_fits((positions + offset) * table.embedding_dim * table.weight.element_size(), f"positions={positions}")
    longer = nn.Embedding(positions + offset, table.embedding_dim, table.padding_idx)
    rows = table.weight.detach()
    again = rows[offset:].repeat(-(-positions // old), 1)[:positions]
    longer.weight = nn.Parameter(torch.cat([rows[:offset], again]))
    name = next(name for name, child in holder.named_children() if child is table)
    setattr(holder, name, longer)
    for name, buffer in list(holder.named_buffers(recurse=False)):  # what goes with the table
        if name == "position_ids":
            numbers = torch.arange(positions + offset, device=buffer.device)
            holder.register_buffer(name, numbers[None], persistent=False)
        elif name == "token_type_ids":
            holder.register_buffer(name, buffer.new_zeros(1, positions + offset), persistent=False)
    backbone.config.max_position_embeddings = positions + offset


def position_table(backbone: nn.Module) -> nn.Embedding | None:
    """The learned absolute positions, or `None` for rotary and relative ones."""
    names = ("position_embeddings", "wpe", "embed_positions")
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in names:
            return module
    return None


def takes_positions(backbone: nn.Module) -> bool:
    """Whether explicit positions, counted from 0, mean the same as the model's own: not where a table starts behind
    its padding index (RoBERTa), which skips padding by itself."""
    table = position_table(backbone)
    offset = table is not None and table.padding_idx is not None
    return not offset and takes(backbone, "position_ids")


def takes(backbone: nn.Module, argument: str) -> bool:
    """Whether the forward pass names this argument."""
    return argument in inspect.signature(backbone.forward).parameters


def call_backbone(backbone: Any, arguments: Mapping[str, Any]) -> Any:
    """Its output. A backbone that torch.compile cannot compile is run without, from here on, and a line says so."""
    try:
        return backbone(**arguments)
    except Exception as error:  # a compiler has errors of many kinds
        if not stops_compiling(backbone, error):
            raise
    return backbone(**arguments)


def stops_compiling(backbone: Any, error: Exception) -> bool:
    """Whether an error is one of torch.compile: then the backbone runs without from here on, and a line says so. A
    backward pass may be compiled only when it is first needed, so its error comes there."""
    if backbone._compiled_call_impl is None:
        return False
    from torch._dynamo.exc import TorchDynamoException

    code = type(error).__module__.split(".")
    if not (isinstance(error, TorchDynamoException) or code[0] == "triton" or code[:2] == ["torch", "_inductor"]):
        return False
    reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
    log.warning("compile: off, %s cannot be compiled: %s", type(backbone).__name__, reason)
    backbone._compiled_call_impl = None
    return True
