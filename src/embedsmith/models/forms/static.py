"""Tables in the place of a transformer: StaticEmbedding, model2vec, SparseStaticEmbedding."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer

from embedsmith.core.settings import Count
from embedsmith.core.shelf import forms
from embedsmith.models.folder import FolderFacts, FolderFiles, read_folder_file, write_json
from embedsmith.models.heads.static import StaticHead, StaticWeights
from embedsmith.models.layers import LAYERS
from embedsmith.models.layout import ST, clear, modules_in, name_model, write_modules
from embedsmith.models.static import WEIGHTS
from embedsmith.models.write import Saved

_NO_LIMIT = 999_999  # tokens: nothing is cut


@dataclass(frozen=True)
class _Truncation:
    max_length: Count


@dataclass(frozen=True)
class _TokenizerFile:
    """Of tokenizer.json, how long texts may be: the module has no place of its own to say it."""

    truncation: _Truncation | None = None


@forms.register("static")
class Static:
    """StaticEmbedding, any number of layers."""

    @staticmethod
    def facts(files: FolderFiles) -> FolderFacts | None:
        if files.kinds[:1] != ("StaticEmbedding",) or any(kind not in LAYERS for kind in files.kinds[1:]):
            return None
        shared = files.shared(files.modules[0].path)
        path = shared["backbone"] / "tokenizer.json"
        cut = read_folder_file(_TokenizerFile, path).truncation if path.exists() else None
        shared["max_length"] = shared["max_length"] or (_NO_LIMIT if cut is None else cut.max_length)
        return FolderFacts(**shared, pooling="mean", **files.layers(1), form="static")

    @staticmethod
    def write(saved: Saved, root: Path) -> None:
        (root / "1_Pooling" / "config.json").unlink()
        (root / "1_Pooling").rmdir()
        first, _, *rest = modules_in(root)
        types = {first["path"]: ST + "models.StaticEmbedding"}
        write_modules(root, types | {entry["path"]: entry["type"] for entry in rest})
        if saved.settings.max_length < _NO_LIMIT:  # its tokenizer alone says so
            path = root / "tokenizer.json"
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.enable_truncation(saved.settings.max_length)
            tokenizer.save(str(path))


@forms.register("sparse_static")
class SparseStatic:
    """SparseEncoder: SparseStaticEmbedding, as a rule the queries' part of a Router."""

    @staticmethod
    def facts(files: FolderFiles) -> FolderFacts | None:
        if files.kinds != ("SparseStaticEmbedding",):
            return None
        shared = files.shared_of_sparse(files.modules[0].path)
        return FolderFacts(
            **shared, form="sparse_static", heads={"sparse": StaticWeights(files.general.max_active_dims)}
        )

    @staticmethod
    def write(saved: Saved, root: Path) -> None:
        clear(root)
        weight_V = saved.backbone.embedding.weight[:, 0].detach().cpu().float().contiguous()
        save_file({"weight": weight_V}, root / WEIGHTS)
        write_json(root / "config.json", {"frozen": False})
        write_modules(root, {"": ST + "sparse_encoder.models.SparseStaticEmbedding"})
        head = saved.heads["sparse"]
        assert isinstance(head, StaticHead)
        name_model(root, "SparseEncoder", "dot", max_active_dims=head.terms)
