"""One head of a model as a folder for sentence-transformers: dense, sparse or multi-vector, with the same scores.

`dense` is the model without its token heads, in the layout that every version reads. `sparse` is a `SparseEncoder`:
the family's masked-language model and `SpladePooling` where the head is SPLADE's; a lexical head, for which
sentence-transformers has no module, is loaded through embedsmith (`trust_remote_code=True`). `multivector` is a
`MultiVectorEncoder` (sentence-transformers 6): its mean of best matches is M3's score. `pylate` is the same head for
PyLate's `ColBERT`, loaded through embedsmith, since PyLate's own modules cannot leave the CLS of a query out.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer

from embedsmith.core.errors import MissingExtraError, ModelError
from embedsmith.core.files import atomic_folder
from embedsmith.core.progress import quiet
from embedsmith.core.recipe import apply_override, parse
from embedsmith.models.backbone import locate
from embedsmith.models.config import ModelConfig
from embedsmith.models.folder import FILE, read_folder, read_json
from embedsmith.models.heads.splade import SpladeHead, masked_model
from embedsmith.models.heads.tokens import MultiVectorHead
from embedsmith.models.load import load
from embedsmith.models.write import contract_of, save, write_contract, write_json
from embedsmith.pretrain.mntp import MNTP
from embedsmith.pretrain.retromae import RETROMAE

if TYPE_CHECKING:
    from embedsmith.models.embedder import Embedder


Head = Literal["dense", "sparse", "multivector", "pylate"]
_MODULES = "sentence_transformers."
LATE_MODULE = "embedsmith.models.late.WordVectors"
SPARSE_MODULE = "embedsmith.models.sentence.EmbedsmithSparse"


def export_head(model: Embedder, folder: str | Path, head: Head) -> None:
    """Write one head of `model` to `folder`, which appears whole or not at all (`pylate`: multivector, for PyLate).

    Errors: `ModelError` for a head that the model has not (none is ever made up), and for what the form cannot
    express: prompts left out of the heads, attention by a mask, an adapter apart.
    """
    there = ["dense", *(name for name in model.token_heads if name not in (RETROMAE, MNTP))]
    name = "multivector" if head == "pylate" else head
    if name not in there:
        raise ModelError(
            f"this model has no head {name!r}",
            expected=f"one of {', '.join(there)}",
            fix="train one: load the model with it in heads",
        )
    with atomic_folder(folder) as root:
        save(_with_heads(model, [] if name == "multivector" else [name]), root)
        if head == "sparse":
            _as_sparse(model, root)
        elif head == "multivector":
            _as_multivector(model, root)
        elif head == "pylate":
            _as_pylate(model, root)


def _with_heads(model: Embedder, names: list[str]) -> Embedder:
    """The same model, weights shared, with some of its token heads."""
    other = copy.copy(model)
    other.__dict__["_modules"] = dict(model._modules)
    other.token_heads = nn.ModuleDict({name: head for name, head in model.token_heads.items() if name in names})
    return other


def _as_sparse(model: Embedder, root: Path) -> None:
    head = model.token_heads["sparse"]
    whole = None
    if isinstance(head, SpladeHead) and model.settings.include_prompt and contract_of(model).standard:
        whole = masked_model(head.lm, model.backbone)
    if whole is None:
        contract = contract_of(model)
        standard = tuple(contract.modules or read_json(root / "modules.json"))
        (root / FILE).unlink(missing_ok=True)
        write_contract(replace(contract, modules=standard), root)
        write_json(root / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": SPARSE_MODULE}])
        _say(root, "SparseEncoder", "dot")
        return
    assert isinstance(head, SpladeHead)
    _clear(root)
    with quiet():
        whole.save_pretrained(root)
    _write_modules(root, [("", "sparse_encoder.models.MLMTransformer"), ("SpladePooling", _SPLADE)])
    pooling = {"pooling_strategy": "max", "activation_function": "relu", "word_embedding_dimension": None}
    write_json(root / "1_SpladePooling" / "config.json", pooling)
    _say(root, "SparseEncoder", "dot", max_active_dims=head.terms)


_SPLADE = "sparse_encoder.models.SpladePooling"


def _multivector(model: Embedder) -> MultiVectorHead:
    """The head, where other libraries can do what this model does."""
    head = model.token_heads["multivector"]
    assert isinstance(head, MultiVectorHead)
    if not (model.settings.include_prompt and contract_of(model).standard):
        raise ModelError(
            "the multi-vector models of other libraries cannot do what this model does",
            expected="prompts that take part, all tokens pooled, attention as its config says",
        )
    return head


def _as_pylate(model: Embedder, root: Path) -> None:
    """PyLate's layout: texts as they are (no marks in front, no expansion, no punctuation left out)."""
    head = _multivector(model)
    _clear(root)
    types = {"": _MODULES + "models.Transformer", "1_Dense": LATE_MODULE}
    entries = [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(types.items())]
    write_json(root / "modules.json", entries)
    linear = head.linear
    widths = {"in_features": linear.in_features, "out_features": linear.out_features}
    write_json(root / "1_Dense" / "config.json", widths | {"left_out": head.marks_S.tolist()})
    _save_linear(linear, root / "1_Dense")
    lengths = dict.fromkeys(("query_length", "document_length"), model.max_length)
    plain = {"query_prefix": "", "document_prefix": "", "skiplist_words": [], "do_query_expansion": False}
    _say(root, "ColBERT", "MaxSim", **lengths, **plain, attend_to_expansion_tokens=False)


def _save_linear(linear: nn.Linear, folder: Path) -> None:
    state = {f"linear.{name}": tensor.detach().cpu().contiguous() for name, tensor in linear.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def _as_multivector(model: Embedder, root: Path) -> None:
    head = _multivector(model)
    _clear(root)
    linear, left_out = head.linear, model.tokenizer.convert_ids_to_tokens(head.marks_S.tolist())
    _write_modules(
        root,
        [
            ("", "base.modules.transformer.Transformer"),
            ("Dense", "base.modules.dense.Dense"),
            ("MultiVectorMask", "multi_vector_encoder.modules.MultiVectorMask"),
            ("Normalize", "base.modules.normalize.Normalize"),
        ],
    )
    dense = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
        "module_input_name": "token_embeddings",
        "module_output_name": "token_embeddings",
    }
    write_json(root / "1_Dense" / "config.json", dense)
    _save_linear(linear, root / "1_Dense")
    mask = {"skiplist_words": left_out, "skiplist_tasks": ["query", "document"]}
    write_json(root / "2_MultiVectorMask" / "config.json", mask | {"keep_only_token_ids": None})
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    write_json(root / "3_Normalize" / "config.json", names)
    _say(root, "MultiVectorEncoder", "meanmaxsim")


def _clear(root: Path) -> None:
    """Take away what belongs to the dense form and to other heads."""
    for path in sorted(root.rglob("*"), reverse=True):
        if path.parent != root or path.suffix == ".pt" or path.name in (FILE, "splade_head.safetensors"):
            path.unlink() if path.is_file() else path.rmdir()
        elif path.is_dir():
            path.rmdir()


def _write_modules(root: Path, modules: list[tuple[str, str]]) -> None:
    entries = [
        {"idx": place, "name": str(place), "path": f"{place}_{name}" if name else "", "type": _MODULES + kind}
        for place, (name, kind) in enumerate(modules)
    ]
    write_json(root / "modules.json", entries)


def _say(root: Path, kind: str, similarity: str, **more: Any) -> None:
    path = root / "config_sentence_transformers.json"
    write_json(path, {**read_json(path), "model_type": kind, "similarity_fn_name": similarity, **more})


def run_export(model: str, out: Path, head: Head) -> str:
    """What `embedsmith export` does; returns how to open the folder."""
    from embedsmith.models.load import load

    export_head(load(model, device="cpu"), out, head)
    if head == "pylate":
        return f'{out}: pylate.models.ColBERT("{out}")'
    through = read_json(out / "modules.json")[0]["type"].startswith("embedsmith.")
    kind = {"dense": "SentenceTransformer", "sparse": "SparseEncoder", "multivector": "MultiVectorEncoder"}[head]
    return f'{out}: sentence_transformers.{kind}("{out}"{", trust_remote_code=True" if through else ""})'


# Any model to an embedder's folder, untrained: what `embedsmith convert` does.


def convert(model: str, out: Path, changes: Sequence[str] = ()) -> str:
    """Load `model` as `ModelConfig` and the changes (`key=value`) say, and save it to `out`; returns what was made.

    A folder that does not say how to pool gets the last token, or the mean where attention is bidirectional. A `.gguf`
    file is turned into plain weights first (extra `gguf`).
    Errors: `ModelError` and `RecipeError` as for `load`; `ModelError` for a GGUF file that transformers cannot read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = str(_from_gguf(Path(model), Path(scratch))) if model.endswith(".gguf") else model
        tree: dict[str, Any] = {"path": path}
        for change in changes:
            apply_override(tree, change)
        config = parse(ModelConfig, tree, where="convert")
        if config.pooling is None and read_folder(locate(config.path, config.revision)).pooling is None:
            both_ways = config.attention in ("bidirectional", "softmask")
            tree["pooling"] = "mean" if both_ways else "last"
        embedder = load(parse(ModelConfig, tree, where="convert"), device="cpu")
        embedder.save(out)
    found, size = embedder.attention, sum(p.numel() for p in embedder.parameters())
    kind = "causal" if found.causal else "bidirectional" if found.mode != "native" else "native"
    kind += " in part" if found.causal_layers else ""
    return (
        f"{out}: {type(embedder.backbone).__name__}, {size:,} parameters, {embedder.dimension} numbers a text, "
        f"{embedder.settings.pooling} pooling, {kind} attention, up to {embedder.max_length} tokens"
    )


def _from_gguf(file: Path, scratch: Path) -> Path:
    """A plain transformers folder of a GGUF file. Quantised weights come back in float32, as exact as they were."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "gguf")
    if not file.is_file():
        raise ModelError("there is no such file", where=file, fix="check the path")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            loaded = AutoModel.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"transformers cannot read this GGUF file: {error}", where=file) from error
    config = loaded.config
    if "quantization_config" in config.__dict__:  # saving refuses a model that was once quantised
        del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), strict=False)
    plain.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    return scratch
