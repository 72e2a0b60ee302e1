"""An embedder as a GGUF file for llama.cpp and what is built on it: BERT and Qwen3, whose tensors and tokenizers both
sides know. What a GGUF file cannot say (projections, other poolings, a prompt left out) is an error.

Names and metadata are llama.cpp's, from the package `gguf`. The file is read back and compared, tensor by tensor,
before it gets its name.
"""

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import CheckpointError, MissingExtraError, ModelError
from embedsmith.core.files import atomic_file
from embedsmith.core.outputs import claimed, refuse_foreign_file
from embedsmith.models.embedder import Embedder
from embedsmith.models.exports.trace import check_traceable
from embedsmith.models.graphs.graph_files import Numbers
from embedsmith.models.tokenize import added_tokens

MARK = "embedsmith.made_from"
"""The key of the fingerprint of the model: what tells a file of ours from any other."""
_POOLINGS = {"mean": "MEAN", "cls": "CLS", "last": "LAST"}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizer cuts texts into words; llama.cpp knows it by the name `qwen2`."""
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ExportedFile:
    """A file that was written, and in words what it holds."""

    path: Path
    text: str

    def __str__(self) -> str:
        return self.text


def write_gguf(model: Embedder, out: Path, dtype: Numbers = "fp32", *, overwrite: bool = False) -> ExportedFile:
    """Write `model` to the file `out`, which appears whole or not at all. `int8` is llama.cpp's Q8_0: blocks of 32
    weights with a scale each.

    Errors: `ModelError` for a family, pooling or tokenizer that cannot be expressed, naming it; `CheckpointError` for
    another file that is there.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "gguf")
    if out.suffix != ".gguf":
        raise ModelError(f"{out}: a GGUF file has the ending .gguf", fix=f"name it {out.with_suffix('.gguf')}")
    family = _family(model)
    with claimed(out, "export"), tempfile.TemporaryDirectory() as scratch:
        refuse_foreign_file(out, MARK)
        made = Path(scratch) / "model.gguf"
        count = _write(model, family, made, dtype)
        if out.exists() and not overwrite:
            if out.read_bytes() != made.read_bytes():
                fix = "choose another output, or replace it with --overwrite"
                raise CheckpointError("another result is here already", where=out, fix=fix)
        else:
            with made.open("rb") as file, atomic_file(out, "wb") as target:
                shutil.copyfileobj(file, target)
    prompts = (
        "; its prompts are not in the file: put them before the texts" if any(model.settings.prompts.values()) else ""
    )
    heads = "; the dense head alone" if model.parts.heads else ""
    return ExportedFile(
        out, f"{out}: GGUF of {family}, {count} tensors in {dtype}, {model.settings.pooling} pooling{heads}{prompts}"
    )


def _family(model: Embedder) -> str:
    """llama.cpp's name of the family. Errors: `ModelError` for what a file cannot say."""
    check_traceable(model)
    kind, settings = model.backbone.config.model_type, model.settings
    if kind not in ("bert", "qwen3"):
        raise ModelError(
            f"the family {kind!r} cannot be written as GGUF",
            expected="bert or qwen3",
            fix="export a graph: --to onnx or --to openvino",
        )
    wrong = {
        f"{settings.pooling} pooling": settings.pooling not in _POOLINGS,
        "layers between pooling and vector": bool(len(model.projections)),
        "prompts that are left out of the pooling": not settings.include_prompt,
        "texts that are put in twice": settings.echo is not None,
        "special tokens left out of the pooling": not settings.pool_special_tokens,
        "attention that was switched": model.attention.mode != "native" and model.attention.causal != (kind == "qwen3"),
        "relative positions": getattr(model.backbone.config, "position_embedding_type", "absolute") != "absolute",
        "scaled rotary positions": _rope(model.backbone.config).get("rope_type", "default") != "default",
        "sliding windows": bool(getattr(model.backbone.config, "use_sliding_window", False)),
    }
    if found := next((what for what, there in wrong.items() if there), None):
        raise ModelError(f"a GGUF file cannot express {found}", fix="export a graph: --to onnx or --to openvino")
    return str(kind)


def _rope(config: Any) -> Mapping[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _write(model: Embedder, family: str, file: Path, dtype: Numbers) -> int:
    """All of the file, read back; how many tensors it has."""
    import gguf

    config: Any = model.backbone.config
    arch = gguf.MODEL_ARCH.BERT if family == "bert" else gguf.MODEL_ARCH.QWEN3
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[arch])
    kind = {"fp32": gguf.LlamaFileType.ALL_F32, "fp16": gguf.LlamaFileType.MOSTLY_F16}
    writer.add_file_type(kind.get(dtype, gguf.LlamaFileType.MOSTLY_Q8_0))
    writer.add_string(MARK, model.fingerprint())
    _add_shape(writer, gguf, model, family)
    (_add_word_pieces if family == "bert" else _add_byte_pairs)(writer, gguf, model)
    tensors: dict[str, tuple[Array, Any]] = {}
    for name, tensor in model.backbone.state_dict().items():
        if name.startswith("pooler.") or name.endswith("position_ids"):
            continue
        value = tensor.detach().float().numpy()
        place = names.get_name(name if family == "bert" else f"model.{name}", try_suffixes=(".weight", ".bias"))
        if place is None:
            raise ModelError(f"llama.cpp has no name for the weights {name}", fix="export a graph: --to onnx")
        tensors[place] = value, _stored_as(gguf, place, value, dtype)
    for place, (value, stored) in tensors.items():
        writer.add_tensor(place, gguf.quants.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _read_back(gguf, file, tensors)
    return len(tensors)


def _stored_as(gguf: Any, name: str, value: Array, dtype: Numbers) -> Any:
    """As llama.cpp's converter: vectors, norms and the small tables stay in 32 bits; rows that do not fill blocks of 8
    bits are kept in 16."""
    kinds = gguf.GGMLQuantizationType
    small = value.ndim < 2 or name.startswith(("position_embd", "token_types"))
    if dtype == "fp32" or small:
        return kinds.F32
    return kinds.Q8_0 if dtype == "int8" and value.shape[-1] % 32 == 0 else kinds.F16


def _read_back(gguf: Any, file: Path, tensors: Mapping[str, tuple[Array, Any]]) -> None:
    """Errors: `ModelError` where the file does not hold the weights."""
    found = {one.name: one for one in gguf.GGUFReader(str(file)).tensors}
    for name, (value, stored) in tensors.items():
        again = gguf.quants.dequantize(found[name].data, found[name].tensor_type).reshape(value.shape)
        room = {"F32": 0.0, "F16": 1e-3, "Q8_0": 1e-2}[stored.name] * float(np.abs(value).max(initial=0))
        if float(np.abs(again - value).max(initial=0)) > room:
            raise ModelError(
                f"{name} cannot be stored as {stored.name}: values are too far apart", fix="use --dtype fp32"
            )


def _add_shape(writer: Any, gguf: Any, model: Embedder, family: str) -> None:
    config: Any = model.backbone.config
    writer.add_vocab_size(len(model.backbone.get_input_embeddings().weight))
    writer.add_context_length(model.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_pooling_type(gguf.PoolingType[_POOLINGS[model.settings.pooling or ""]])
    if family == "bert":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_causal_attention(False)
        writer.add_token_type_count(config.type_vocab_size)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope(config).get("rope_theta", getattr(config, "rope_theta", 10000.0)))


def _native(model: Embedder) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(model.tokenizer.backend_tokenizer.to_str())
    return described


def _tokens(gguf: Any, model: Embedder) -> tuple[list[str], list[Any]]:
    """Every row of the word table with its kind; rows without a token are unused."""
    rows = len(model.backbone.get_input_embeddings().weight)
    added = model.tokenizer.added_tokens_decoder
    by_id = {number: token for token, number in model.tokenizer.get_vocab().items()}
    texts, kinds = [], []
    for number in range(rows):
        texts.append(by_id.get(number, f"[PAD{number}]"))
        if number not in by_id:
            kinds.append(gguf.TokenType.UNUSED)
        elif number in added:
            kinds.append(gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    return texts, kinds


def _add_special(writer: Any, tokenizer: Any, names: Mapping[str, str]) -> None:
    for ours, theirs in names.items():
        if (number := getattr(tokenizer, f"{ours}_token_id")) is not None:
            getattr(writer, f"add_{theirs}_token_id")(int(number))


def _add_word_pieces(writer: Any, gguf: Any, model: Embedder) -> None:
    """llama.cpp marks the start of a word where BERT marks its continuation, makes all texts lower-case, and knows the
    CLS as the token that begins a text."""
    native = _native(model)
    normalizer = native.get("normalizer") or {}
    lower = any(
        step.get("lowercase") or step.get("type") == "Lowercase"
        for step in (normalizer, *normalizer.get("normalizers", ()))
    )
    if native["model"]["type"] != "WordPiece" or not lower:
        raise ModelError(
            "llama.cpp knows BERT's tokenizer in lower case alone", fix="export a graph: --to onnx or --to openvino"
        )
    prefix = native["model"]["continuing_subword_prefix"]
    texts, kinds = _tokens(gguf, model)
    marked = [
        text
        if kind != gguf.TokenType.NORMAL
        else text.removeprefix(prefix)
        if text.startswith(prefix)
        else f"\u2581{text}"
        for text, kind in zip(texts, kinds, strict=True)
    ]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(marked)
    writer.add_token_types(kinds)
    _add_special(writer, model.tokenizer, {"cls": "bos", "unk": "unk", "sep": "sep", "pad": "pad", "mask": "mask"})


def _add_byte_pairs(writer: Any, gguf: Any, model: Embedder) -> None:
    native = _native(model)
    steps = native.get("pre_tokenizer") or {}
    cuts = [step.get("pattern", {}).get("Regex") for step in (steps, *steps.get("pretokenizers", ()))]
    if native["model"]["type"] != "BPE" or _QWEN2 not in cuts:
        raise ModelError(
            "llama.cpp does not know how this tokenizer cuts texts into words",
            expected="Qwen's tokenizer",
            fix="export a graph: --to onnx or --to openvino",
        )
    front, tail = added_tokens(model.tokenizer)
    if front or len(tail) > 1 or (tail and tail[0] != model.tokenizer.eos_token_id):
        raise ModelError("a GGUF file cannot express tokens around a text but its end token", fix="export a graph")
    texts, kinds = _tokens(gguf, model)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    pairs = native["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in pairs])
    _add_special(writer, model.tokenizer, {"eos": "eos", "pad": "pad", "bos": "bos"})
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(bool(tail))
