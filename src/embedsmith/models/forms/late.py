"""Late interaction: PyLate's ColBERT, sentence-transformers' MultiVectorEncoder, and Stanford's checkpoints.

All three are a transformer, one layer or several over its token states, and rules: texts put in front (`[Q] `),
queries filled up with `[MASK]` to a fixed length, punctuation that documents leave out. Stanford's is written as
PyLate's, which PyLate and sentence-transformers 6 read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from embedsmith.core.errors import ModelError
from embedsmith.core.settings import Count, Width
from embedsmith.core.shelf import forms
from embedsmith.models.expansion import Expansion
from embedsmith.models.folder import (
    PYLATE_DENSE,
    FolderFacts,
    FolderFiles,
    read_folder_file,
    read_folder_json,
    write_json,
)
from embedsmith.models.heads.colbert import PUNCTUATION, ColbertHead, ColbertSpec
from embedsmith.models.heads.dense import Projection
from embedsmith.models.layers import LAYERS
from embedsmith.models.layout import ST, clear, name_model, write_modules
from embedsmith.models.write import Saved

_ARCHITECTURE = "HF_ColBERT"
_LENGTHS = {"query": 32, "document": 180}
"""PyLate's, where a folder does not say."""


@dataclass(frozen=True)
class _PylateFile:
    """PyLate's part of config_sentence_transformers.json."""

    query_prefix: str | None = None
    document_prefix: str | None = None
    query_length: Count | None = None
    document_length: Count | None = None
    do_query_expansion: bool | None = None
    attend_to_expansion_tokens: bool | None = None
    skiplist_words: Sequence[str] | None = None


@dataclass(frozen=True)
class _ExpansionFile:
    """How sentence-transformers' Transformer fills queries up."""

    length: Count
    strategy: Literal["fixed", "min"] = "fixed"
    attend: bool = False
    token: str | None = None


@dataclass(frozen=True)
class _EncoderFile:
    """The part of sentence_bert_config.json that is about late interaction."""

    query_length: Count | None = None
    document_length: Count | None = None
    query_expansion: _ExpansionFile | None = None


@dataclass(frozen=True)
class _MaskFile:
    """The config.json of a MultiVectorMask."""

    skiplist_words: Sequence[str] | None = None
    skiplist_tasks: str | Sequence[str] | None = None
    keep_only_token_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class _StanfordFile:
    """artifact.metadata."""

    query_token_id: str | None = None
    doc_token_id: str | None = None
    query_maxlen: Count | None = None
    doc_maxlen: Count | None = None
    mask_punctuation: bool = True
    attend_to_mask_tokens: bool = False
    similarity: str | None = None
    dim: Width | None = None


@forms.register("colbert")
class Colbert:
    """ColBERT of PyLate: Transformer, any number of Dense; or a checkpoint of Stanford's."""

    @staticmethod
    def facts(files: FolderFiles) -> FolderFacts | None:
        if not files.modules:
            return _stanford(files)
        if files.kinds[0] != "Transformer" or set(files.kinds[1:]) != {"Dense"}:
            return None
        path = files.folder / "config_sentence_transformers.json"
        said = read_folder_file(_PylateFile, path) if path.exists() else _PylateFile()
        if files.general.model_type != "ColBERT" and said == _PylateFile():  # PyLate itself names no type
            return None
        prefixes = {
            "query": "[Q] " if said.query_prefix is None else said.query_prefix,
            "document": "[D] " if said.document_prefix is None else said.document_prefix,
        }
        shared = files.shared(files.modules[0].path)
        prompts = {**shared["prompts"]}
        for role, prefix in prefixes.items():
            prompts[role] = prefix + prompts.get(role, "").removeprefix(prefix)
        lengths = {
            "query": said.query_length or _LENGTHS["query"],
            "document": said.document_length or _LENGTHS["document"],
        }
        expansion = Expansion(lengths["query"], attend=bool(said.attend_to_expansion_tokens))
        spec = ColbertSpec(
            PUNCTUATION if said.skiplist_words is None else tuple(said.skiplist_words), layers=_layers(files)
        )
        return FolderFacts(
            **{**shared, "prompts": prompts, "similarity": None, "main": "multivector"},
            form="colbert",
            tokens=tuple(prefix for prefix in prefixes.values() if prefix),
        ).with_late(spec, lengths, None if said.do_query_expansion is False else expansion)

    @staticmethod
    def write(saved: Saved, root: Path) -> None:
        head, settings = _head(saved), saved.settings
        expansion = settings.expansion
        if head.spec.skipped_in != ("document",) or (expansion is not None and not expansion.cut):
            raise ModelError(
                "PyLate cannot leave words of queries out, nor fill queries up without cutting them",
                fix="export the head multivector, for sentence-transformers 6: embedsmith export MODEL OUT --head "
                "multivector",
            )
        clear(root)
        types = {"": ST + "models.Transformer"}
        for place, layer in enumerate(head.projections, start=1):
            layer.save(root / f"{place}_Dense", use_residual=layer.use_residual)
            types[f"{place}_Dense"] = PYLATE_DENSE
        write_modules(root, types)
        lengths = {f"{role}_length": settings.length_for(role) for role in ("query", "document")}
        prompts = {role: settings.prompt_for(role) for role in ("query", "document")}
        prefixes = {f"{role}_prefix": prefix_of(saved.tokenizer, prompt) for role, prompt in prompts.items()}
        rest = {role: prompt.removeprefix(prefixes[f"{role}_prefix"]) for role, prompt in prompts.items()}
        name_model(
            root,
            "ColBERT",
            "MaxSim",
            **lengths,
            **prefixes,
            prompts={role: text for role, text in rest.items() if text},
            default_prompt_name=None,
            skiplist_words=list(head.spec.skiplist),
            do_query_expansion=expansion is not None,
            attend_to_expansion_tokens=expansion is not None and expansion.attend,
        )


@forms.register("multivector")
class MultiVectors:
    """MultiVectorEncoder: Transformer, any number of Dense over tokens, MultiVectorMask, Normalize."""

    @staticmethod
    def facts(files: FolderFiles) -> FolderFacts | None:
        kinds = files.kinds
        allowed = {"Transformer", "Dense", "MultiVectorMask", "Normalize"}
        if "MultiVectorMask" not in kinds or kinds[0] != "Transformer" or not set(kinds) <= allowed:
            return None
        layers = [place for place, kind in enumerate(kinds) if kind == "Dense"]
        others = [kind for kind in kinds if kind in ("MultiVectorMask", "Normalize")]
        after = max(layers, default=0)
        if len(set(others)) != len(others) or ("Normalize" in kinds and kinds.index("Normalize") < after):
            return None
        mask_path = next(module.path for module in files.modules if module.kind == "MultiVectorMask") / "config.json"
        mask = read_folder_file(_MaskFile, mask_path)
        if mask.keep_only_token_ids:
            raise ModelError(
                f"keep_only_token_ids keeps {len(mask.keep_only_token_ids)} tokens alone",
                where=mask_path,
                expected="null: that is for models of pictures",
                fix="use a text model; sentence-transformers loads models of pictures and texts",
            )
        tasks = mask.skiplist_tasks
        tasks = ("document",) if tasks is None else (tasks,) if isinstance(tasks, str) else tuple(tasks)
        backbone = files.modules[0].path
        path = next((p for p in (backbone, files.folder) if (p / "sentence_bert_config.json").exists()), None)
        said = _EncoderFile() if path is None else read_folder_file(_EncoderFile, path / "sentence_bert_config.json")
        wanted = {"query": said.query_length, "document": said.document_length}
        lengths = {role: length for role, length in wanted.items() if length is not None}
        expansion, found = None, said.query_expansion
        if found is not None:
            expansion = Expansion(found.length, found.token, found.attend, cut=found.strategy == "fixed")
            if expansion.cut:
                lengths["query"] = found.length
            elif "query" in lengths:
                lengths["query"] = max(lengths["query"], found.length)
        spec = ColbertSpec(
            tuple(mask.skiplist_words or ()),
            tuple(role for role in ("query", "document") if role in tasks),
            normalize="Normalize" in kinds,
            mean=files.general.similarity_fn_name == "meanmaxsim",
            layers=_layers(files),
        )
        shared = {**files.shared(backbone), "similarity": None, "main": "multivector"}
        return FolderFacts(**shared, form="multivector").with_late(spec, lengths, expansion)

    @staticmethod
    def write(saved: Saved, root: Path) -> None:
        head = _head(saved)
        write_multivector(saved, root, head.projections, head.spec)


def write_multivector(saved: Saved, root: Path, layers: Sequence[Projection], spec: ColbertSpec) -> None:
    """A folder in the dense form becomes a MultiVectorEncoder."""
    clear(root)
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    types = {"": "base.modules.transformer.Transformer"}
    for place, layer in enumerate(layers, start=1):
        layer.save(root / f"{place}_Dense", **names)
        types[f"{place}_Dense"] = "base.modules.dense.Dense"
    mask, last = f"{len(types)}_MultiVectorMask", f"{len(types) + 1}_Normalize"
    types[mask] = "multi_vector_encoder.modules.MultiVectorMask"
    said = {"skiplist_words": list(spec.skiplist), "skiplist_tasks": list(spec.skipped_in), "keep_only_token_ids": None}
    write_json(root / mask / "config.json", said)
    if spec.normalize:
        types[last] = "base.modules.normalize.Normalize"
        write_json(root / last / "config.json", names)
    write_modules(root, {path: ST + kind for path, kind in types.items()})
    settings = saved.settings
    path = root / "sentence_bert_config.json"
    more: dict[str, Any] = {f"{role}_length": length for role, length in settings.lengths.items()}
    if (expansion := settings.expansion) is not None:
        filled = {"strategy": "fixed" if expansion.cut else "min", "attend": expansion.attend}
        more["query_expansion"] = {**filled, "token": expansion.token, "length": expansion.length}
        if expansion.cut:
            more.pop("query_length", None)
    write_json(path, {**read_folder_json(path), **more})
    name_model(root, "MultiVectorEncoder", "meanmaxsim" if spec.mean else "maxsim")


def prefix_of(tokenizer: Any, prompt: str) -> str:
    """The token at the start of a prompt that is one of its own, as PyLate puts one in front; empty for none."""
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    known = next((token for token in added if prompt.startswith(token)), "")
    return known


def _head(saved: Saved) -> ColbertHead:
    head = saved.heads["multivector"]
    assert isinstance(head, ColbertHead)
    return head


def _layers(files: FolderFiles) -> tuple[Projection, ...]:
    return tuple(LAYERS["Dense"](module.path) for module in files.modules if module.kind == "Dense")


def _stanford(files: FolderFiles) -> FolderFacts | None:
    config = files.folder / "config.json"
    if not config.exists() or _ARCHITECTURE not in (read_folder_json(config).get("architectures") or ()):
        return None
    path = files.folder / "artifact.metadata"
    said = read_folder_file(_StanfordFile, path) if path.exists() else _StanfordFile()
    if said.similarity not in (None, "cosine"):
        raise ModelError(
            f"similarity {said.similarity!r}", where=path, expected="cosine", fix="use a checkpoint that compares so"
        )
    lengths = {"query": said.query_maxlen or _LENGTHS["query"]}
    lengths |= {} if said.doc_maxlen is None else {"document": said.doc_maxlen}
    prefixes = {"query": said.query_token_id or "[unused0]", "document": said.doc_token_id or "[unused1]"}
    weight_DH = _inline_weight(files.folder)
    projection = Projection(weight_DH.shape[1], weight_DH.shape[0], bias=False)
    with torch.no_grad():
        projection.linear.weight.copy_(weight_DH)
    spec = ColbertSpec(PUNCTUATION if said.mask_punctuation else (), layers=(projection,))
    return FolderFacts(
        backbone=files.folder,
        prompts={role: f"{token} " for role, token in prefixes.items()},
        embedding_config=files.more,
        form="colbert",
        main="multivector",
        tokens=tuple(prefixes.values()),
    ).with_late(spec, lengths, Expansion(lengths["query"], attend=said.attend_to_mask_tokens))


def _inline_weight(folder: Path) -> Tensor:
    """`linear.weight` among the weights of the backbone. Errors: `ModelError` where it is not there."""
    path = folder / "model.safetensors"
    try:
        if path.exists():
            with safe_open(path, framework="pt") as file:
                found: Tensor = file.get_tensor("linear.weight")
        else:
            path = folder / "pytorch_model.bin"
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["linear.weight"]
    except (OSError, SafetensorError, LookupError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"cannot read the weights of ColBERT's head, linear.weight ({error})",
            where=path,
            expected="a checkpoint of Stanford's ColBERT: its weights lie beside the encoder's",
            fix="copy the folder again, as a whole",
        ) from error
    return found.float()
