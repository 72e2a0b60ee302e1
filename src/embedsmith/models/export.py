"""Folders for other programs: one head of a model for sentence-transformers or PyLate, dense, sparse or multi-vector,
with the same scores (`export`); and any model as an embedder's folder, untrained (`convert`).

`dense` is the model without its token heads, in the layout that every version reads. `sparse` is a `SparseEncoder`:
the family's masked-language model and `SpladePooling` where the head is SPLADE's; a lexical head, for which
sentence-transformers has no module, is loaded through embedsmith (`trust_remote_code=True`). `multivector` is a
`MultiVectorEncoder` (sentence-transformers 6): its mean of best matches is M3's score. `pylate` is the same head for
PyLate's `ColBERT`, loaded through embedsmith, since PyLate's own modules cannot leave the CLS of a query out.
"""

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer

from embedsmith.core.errors import MissingExtraError, ModelError
from embedsmith.core.outputs import atomic_folder, claimed
from embedsmith.core.progress import transformers_silenced
from embedsmith.core.recipe import apply_override, parse
from embedsmith.models.backbone import locate
from embedsmith.models.config import ModelConfig
from embedsmith.models.embedder import Embedder
from embedsmith.models.folder import EMBEDDING_CONFIG, EmbeddingConfig, FolderFacts, read_json, read_typed, write_json
from embedsmith.models.heads.base import TRAIN_HEAD, cpu_state
from embedsmith.models.heads.splade import SPLADE_FILE, SpladeHead
from embedsmith.models.heads.tokens import MultiVectorHead
from embedsmith.models.load import load
from embedsmith.models.write import Saved, saved_model

ExportedHead = Literal["dense", "sparse", "multivector", "pylate"]
_MODULES = "sentence_transformers."


def export_head(model: Embedder, folder: str | Path, head: ExportedHead, *, overwrite: bool = False) -> str:
    """Write one head of `model` to `folder`, which appears whole or not at all (`pylate`: multivector, for PyLate);
    returns how to open the folder. `overwrite` replaces another saved model. `options` are changes
    that are values already.

    Errors: `CheckpointError` for a folder with something else in it; `ModelError` for a head that the model has not
    (none is ever made up), and for what the form cannot express: prompts left out of the heads, attention by a mask,
    an adapter apart.
    """
    saved = model.parts
    there = ["dense", *(name for name, one in saved.heads.items() if not one.own_pass)]
    name = "multivector" if head == "pylate" else head
    if name not in there:
        raise ModelError(
            f"this model has no head {name!r}",
            expected=f"one of {', '.join(there)}",
            fix=f"train one: {TRAIN_HEAD.format(name)}",
        )
    with claimed(folder, "export"), atomic_folder(folder, saved_model(), overwrite=overwrite) as root:
        replace(saved, heads={name: saved.heads[name]} if head == "sparse" else {}).write(root)
        if head == "sparse":
            _as_sparse(saved, root)
        elif head == "multivector":
            _as_multivector(saved, root)
        elif head == "pylate":
            _as_pylate(saved, root)
        through = _modules(root)[0]["type"].startswith("embedsmith.")
    kinds = {"dense": "SentenceTransformer", "sparse": "SparseEncoder", "multivector": "MultiVectorEncoder"}
    opened = "pylate.models.ColBERT" if head == "pylate" else f"sentence_transformers.{kinds[head]}"
    return f'{folder}: {opened}("{folder}"{", trust_remote_code=True" if through else ""})'


def _as_sparse(saved: Saved, root: Path) -> None:
    head = saved.heads["sparse"]
    more = saved.embedding_config()
    whole = None
    if isinstance(head, SpladeHead) and saved.settings.include_prompt and more.standard:
        whole = head.lm.masked_model(saved.backbone)
    if whole is None:
        standard = EmbeddingConfig.read(root).modules or _modules(root)
        (root / EMBEDDING_CONFIG).unlink(missing_ok=True)
        replace(more, modules=standard).write(root)
        _write_modules(root, {"": "embedsmith.models.sentence.EmbedsmithSparse"})
        _name_model(root, "SparseEncoder", "dot")
        return
    assert isinstance(head, SpladeHead)
    _clear(root)
    with transformers_silenced():
        whole.save_pretrained(root)
    pooling_path = _MODULES + "sparse_encoder.models.SpladePooling"
    _write_modules(root, {"": _MODULES + "sparse_encoder.models.MLMTransformer", "1_SpladePooling": pooling_path})
    pooling = {"pooling_strategy": "max", "activation_function": "relu", "word_embedding_dimension": None}
    write_json(root / "1_SpladePooling" / "config.json", pooling)
    _name_model(root, "SparseEncoder", "dot", max_active_dims=head.terms)


def _multivector(saved: Saved) -> MultiVectorHead:
    """The head, where other libraries can do what this model does."""
    head = saved.heads["multivector"]
    assert isinstance(head, MultiVectorHead)
    settings = saved.settings
    if not (settings.include_prompt and saved.embedding_config().standard):
        raise ModelError(
            "the multi-vector models of other libraries cannot do what this model does",
            expected="prompts that take part, all tokens pooled, attention as its config says",
        )
    if any(settings.prompts.values()) and not head.reads_prompt(True, settings.heads_include_prompt):
        raise ModelError(
            "the tokens of its prompts take no part in this head, which other libraries cannot do",
            expected="a model without prompts, or a head that reads them",
            fix="train it with model.heads_include_prompt=true, or without prompts",
        )
    return head


def _as_pylate(saved: Saved, root: Path) -> None:
    """PyLate's layout: texts as they are (no marks in front, no expansion, no punctuation left out)."""
    head = _multivector(saved)
    _clear(root)
    _write_modules(root, {"": _MODULES + "models.Transformer", "1_Dense": "embedsmith.models.late.WordVectors"})
    _write_dense(head.linear, root / "1_Dense", left_out=head.marks_S.tolist())
    lengths = dict.fromkeys(("query_length", "document_length"), saved.settings.max_length)
    plain = {"query_prefix": "", "document_prefix": "", "skiplist_words": [], "do_query_expansion": False}
    _name_model(root, "ColBERT", "MaxSim", **lengths, **plain, attend_to_expansion_tokens=False)


def _as_multivector(saved: Saved, root: Path) -> None:
    head = _multivector(saved)
    _clear(root)
    kinds = {
        "": "base.modules.transformer.Transformer",
        "1_Dense": "base.modules.dense.Dense",
        "2_MultiVectorMask": "multi_vector_encoder.modules.MultiVectorMask",
        "3_Normalize": "base.modules.normalize.Normalize",
    }
    _write_modules(root, {path: _MODULES + kind for path, kind in kinds.items()})
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    identity = "torch.nn.modules.linear.Identity"
    _write_dense(head.linear, root / "1_Dense", bias=True, activation_function=identity, **names)
    left_out = saved.tokenizer.convert_ids_to_tokens(head.marks_S.tolist())
    mask = {"skiplist_words": left_out, "skiplist_tasks": ["query", "document"], "keep_only_token_ids": None}
    write_json(root / "2_MultiVectorMask" / "config.json", mask)
    write_json(root / "3_Normalize" / "config.json", names)
    _name_model(root, "MultiVectorEncoder", "meanmaxsim")


def _clear(root: Path) -> None:
    """Take away what belongs to the dense form and to other heads."""
    for path in sorted(root.rglob("*"), reverse=True):
        if path.parent != root or path.suffix == ".pt" or path.name in (EMBEDDING_CONFIG, SPLADE_FILE):
            path.unlink() if path.is_file() else path.rmdir()
        elif path.is_dir():
            path.rmdir()


def _modules(root: Path) -> tuple[dict[str, Any], ...]:
    return read_typed(tuple[dict[str, Any], ...], root / "modules.json")


def _write_modules(root: Path, types: Mapping[str, str]) -> None:
    """`types`: the class of each module by its folder, in their order."""
    entries = [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(types.items())]
    write_json(root / "modules.json", entries)


def _write_dense(linear: nn.Linear, folder: Path, **more: Any) -> None:
    widths = {"in_features": linear.in_features, "out_features": linear.out_features}
    write_json(folder / "config.json", widths | more)
    save_file({f"linear.{name}": tensor for name, tensor in cpu_state(linear).items()}, folder / "model.safetensors")


def _name_model(root: Path, kind: str, similarity: str, **more: Any) -> None:
    """What sentence-transformers is to make of the folder."""
    path = root / "config_sentence_transformers.json"
    write_json(path, {**read_json(path), "model_type": kind, "similarity_fn_name": similarity, **more})


def convert(
    model: str,
    out: Path,
    changes: Sequence[str] = (),
    *,
    overwrite: bool = False,
    options: Mapping[str, Any] | None = None,
) -> str:
    """What `embedsmith convert` does: load `model` as `ModelConfig` and the changes (`key=value`) say, and save it to
    `out`; returns what was made. `overwrite` replaces another saved model.

    A folder that does not say how to pool gets the last token, or the mean where attention is bidirectional. A `.gguf`
    file is turned into plain weights first (extra `gguf`).
    Errors: `CheckpointError` for a folder with something else in it; `ModelError` and `RecipeError` as for `load`;
    `ModelError` for a GGUF file that transformers cannot read.
    """
    with claimed(out, "convert"), tempfile.TemporaryDirectory() as scratch:
        saved_model().refuse_other(out)
        path = str(_from_gguf(Path(model), Path(scratch))) if model.endswith(".gguf") else model
        tree: dict[str, Any] = {"path": path, **(options or {})}
        for change in changes:
            apply_override(tree, change.removeprefix("model."))  # as a recipe and the messages call it
        config = parse(ModelConfig, tree, where="convert")
        if config.pooling is None and FolderFacts.read(locate(config.path, config.revision)).pooling is None:
            both_ways = config.attention in ("bidirectional", "softmask")
            tree["pooling"] = "mean" if both_ways else "last"
        embedder = load(parse(ModelConfig, tree, where="convert"), device="cpu")
        embedder.parts.save(out, overwrite=overwrite)
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
        with transformers_silenced():
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
