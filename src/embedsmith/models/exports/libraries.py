"""Folders for other programs: one head of a model for sentence-transformers or PyLate, dense, sparse or multi-vector,
with the same scores (`export`); and any model as an embedder's folder, untrained (`convert`).

`dense` is the model without its token heads, in the layout that every version reads. `sparse` is a `SparseEncoder`:
the family's masked-language model and `SpladePooling` where the head is SPLADE's; a lexical head, for which
sentence-transformers has no module, is loaded through embedsmith (`trust_remote_code=True`). `multivector` is a
`MultiVectorEncoder` (sentence-transformers 6): its mean of best matches is M3's score. `pylate` is the same head for
PyLate's `ColBERT`: of PyLate's own modules where the head is ColBERT's; M3's is loaded through embedsmith, since PyLate
cannot leave the CLS of a query out.
"""

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from embedsmith.core.errors import MissingExtraError, ModelError
from embedsmith.core.outputs import atomic_folder, claimed
from embedsmith.core.progress import transformers_silenced
from embedsmith.core.recipe import apply_override, parse
from embedsmith.core.shelf import forms
from embedsmith.models.backbone import locate
from embedsmith.models.config import ModelConfig
from embedsmith.models.embedder import Embedder
from embedsmith.models.folder import EMBEDDING_CONFIG, EmbeddingConfig, FolderFacts, write_json
from embedsmith.models.forms.late import write_multivector
from embedsmith.models.heads.base import TRAIN_HEAD, Head, cpu_state
from embedsmith.models.heads.colbert import ColbertHead, ColbertSpec
from embedsmith.models.heads.csr import CsrHead
from embedsmith.models.heads.dense import Projection
from embedsmith.models.heads.splade import SpladeHead
from embedsmith.models.heads.static import StaticHead
from embedsmith.models.heads.token_states import MultiVectorHead, SparseHead
from embedsmith.models.layout import ST, clear, modules_in, name_model, write_modules
from embedsmith.models.load import load
from embedsmith.models.write import Saved, saved_model

ExportedHead = Literal["dense", "sparse", "multivector", "pylate"]


def export_head(model: Embedder, folder: str | Path, head: ExportedHead, *, overwrite: bool = False) -> str:
    """Write one head of `model` to `folder`, which appears whole or not at all (`pylate`: multivector, for PyLate);
    returns how to open the folder. `overwrite` replaces another saved model. `options` are changes
    that are values already.

    Errors: `CheckpointError` for a folder with something else in it; `ModelError` for a head that the model lacks
    (none is ever made up), and for what the form cannot express: prompts left out of the heads, attention by a mask,
    an adapter apart.
    """
    saved = model.parts
    if saved.query is not None:
        raise ModelError(
            "this model has another one for queries",
            expected="a model for both sides",
            fix="save it as it is: embedsmith convert MODEL OUT writes a Router, which sentence-transformers reads",
        )
    there = [] if saved.settings.pooling is None else ["dense"]
    there += [name for name, one in saved.heads.items() if not one.own_pass]
    name = "multivector" if head == "pylate" else head
    if name not in there:
        raise ModelError(
            f"this model has no head {name!r}",
            expected=f"one of {', '.join(there)}",
            fix=f"train one: {TRAIN_HEAD.format(name)}",
        )
    with claimed(folder, "export"), atomic_folder(folder, saved_model(), overwrite=overwrite) as root:
        kept = replace(saved, heads={name: saved.heads[name]} if head == "sparse" else {})
        kept.write_dense(root)
        if head == "sparse":
            _as_sparse(saved, root)
        elif head == "multivector":
            _as_multivector(saved, root)
        elif head == "pylate":
            _as_pylate(saved, root)
        through = modules_in(root)[0]["type"].startswith("embedsmith.")
    kinds = {"dense": "SentenceTransformer", "sparse": "SparseEncoder", "multivector": "MultiVectorEncoder"}
    opened = "pylate.models.ColBERT" if head == "pylate" else f"sentence_transformers.{kinds[head]}"
    return f'{folder}: {opened}("{folder}"{", trust_remote_code=True" if through else ""})'


def _as_sparse(saved: Saved, root: Path) -> None:
    head, more = saved.heads["sparse"], saved.embedding_config()
    if not isinstance(head, SparseHead) and more.standard:
        form = {CsrHead: "csr", StaticHead: "sparse_static"}.get(type(head), "splade")
        if form != "splade" or (saved.settings.include_prompt and _is_masked(head, saved)):
            forms.get(form).write(saved, root)
            return
    standard = EmbeddingConfig.read(root).modules or modules_in(root)
    (root / EMBEDDING_CONFIG).unlink(missing_ok=True)
    replace(more, modules=standard, main="sparse").write(root)
    write_modules(root, {"": "embedsmith.models.sentence.EmbedsmithSparse"})
    name_model(root, "SparseEncoder", "dot")


def _is_masked(head: Head, saved: Saved) -> bool:
    """Whether sentence-transformers has a module for this head and its language model."""
    return isinstance(head, SpladeHead) and head.lm.masked_model(saved.whole_backbone()) is not None


def _late_head(saved: Saved) -> MultiVectorHead | ColbertHead:
    """The head, where other libraries can do what this model does."""
    head = saved.heads["multivector"]
    assert isinstance(head, MultiVectorHead | ColbertHead)
    settings = saved.settings
    config = replace(saved.embedding_config(), lengths={}, expansion=None)  # which they have too
    if not (settings.include_prompt and config.standard):
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
    """PyLate's layout. M3's head has texts as they are: no marks in front, no expansion, no punctuation left out."""
    head = _late_head(saved)
    if isinstance(head, ColbertHead):
        forms.get("colbert").write(saved, root)
        return
    if saved.settings.expansion is not None:
        raise ModelError(
            "queries filled up for M3's head, which PyLate's module of it does not know",
            fix="export the head multivector, for sentence-transformers 6, or train with model.multivector=colbert",
        )
    clear(root)
    write_modules(root, {"": ST + "models.Transformer", "1_Dense": "embedsmith.models.late.WordVectors"})
    linear, folder = head.linear, root / "1_Dense"
    config = {"in_features": linear.in_features, "out_features": linear.out_features, "left_out": head.marks_S.tolist()}
    write_json(folder / "config.json", config)
    save_file({f"linear.{name}": tensor for name, tensor in cpu_state(linear).items()}, folder / "model.safetensors")
    lengths = dict.fromkeys(("query_length", "document_length"), saved.settings.max_length)
    plain = {"query_prefix": "", "document_prefix": "", "skiplist_words": [], "do_query_expansion": False}
    name_model(root, "ColBERT", "MaxSim", **lengths, **plain, attend_to_expansion_tokens=False)


def _as_multivector(saved: Saved, root: Path) -> None:
    """A MultiVectorEncoder. M3's head leaves the CLS out of both sides, and scores by the mean."""
    head = _late_head(saved)
    if isinstance(head, ColbertHead):
        write_multivector(saved, root, head.projections, head.spec)
        return
    linear = head.linear
    layer = Projection(linear.in_features, linear.out_features)
    layer.linear = linear
    left_out = tuple(saved.tokenizer.convert_ids_to_tokens(head.marks_S.tolist()))
    write_multivector(saved, root, [layer], ColbertSpec(left_out, ("query", "document"), mean=True))


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
        facts = FolderFacts.read(locate(config.path, config.revision))
        if config.pooling is None and facts.pooling is None and facts.form == "dense":
            both_ways = config.attention in ("bidirectional", "softmask")
            tree["pooling"] = "mean" if both_ways else "last"
        embedder = load(parse(ModelConfig, tree, where="convert"), device="cpu")
        embedder.parts.save(out, overwrite=overwrite)
    found, size = embedder.attention, sum(p.numel() for p in embedder.parameters())
    kind = "causal" if found.causal else "bidirectional" if found.mode != "native" else "native"
    kind += " in part" if found.causal_layers else ""
    pooling = embedder.settings.pooling
    made = (
        f"{embedder.dimension} numbers a text, {pooling} pooling" if pooling else f"for its {embedder.main_head} output"
    )
    return (
        f"{out}: {type(embedder.backbone).__name__}, {size:,} parameters, {made}, {kind} attention, up to "
        f"{embedder.max_length} tokens"
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
