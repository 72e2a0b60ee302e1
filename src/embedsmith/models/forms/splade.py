"""SPLADE, a SparseEncoder of sentence-transformers: a masked-language model whose scores of words become weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from embedsmith.core.errors import ModelError
from embedsmith.core.progress import transformers_silenced
from embedsmith.core.shelf import forms
from embedsmith.models.folder import FolderFacts, FolderFiles, read_folder_file, write_json
from embedsmith.models.heads.splade import SpladeHead, SpladeSpec
from embedsmith.models.layout import ST, clear, name_model, write_modules
from embedsmith.models.write import Saved

_LOGS = {"relu": 1, "log1p_relu": 2}


@dataclass(frozen=True)
class _SpladeFile:
    """The config.json of a SpladePooling."""

    pooling_strategy: Literal["max", "sum"] = "max"
    activation_function: Literal["relu", "log1p_relu"] = "relu"


@forms.register("splade")
class Splade:
    """SparseEncoder: Transformer (or MLMTransformer), SpladePooling."""

    @staticmethod
    def facts(files: FolderFiles) -> FolderFacts | None:
        if files.kinds not in (("Transformer", "SpladePooling"), ("MLMTransformer", "SpladePooling")):
            return None
        said = read_folder_file(_SpladeFile, files.modules[1].path / "config.json")
        spec = SpladeSpec(files.general.max_active_dims, said.pooling_strategy, _LOGS[said.activation_function])
        shared = files.shared_of_sparse(files.modules[0].path)
        return FolderFacts(**shared, form="splade", heads={"sparse": spec})

    @staticmethod
    def write(saved: Saved, root: Path) -> None:
        """Errors: `ModelError` for a head that is not of a masked-language model's form."""
        head = saved.heads["sparse"]
        whole = head.lm.masked_model(saved.whole_backbone()) if isinstance(head, SpladeHead) else None
        if whole is None or not isinstance(head, SpladeHead):
            raise ModelError(
                "this sparse head is not that of a masked-language model", fix="say how to pool: model.pooling=mean"
            )
        clear(root)
        with transformers_silenced():
            whole.save_pretrained(root)
        types = {"": ST + "sparse_encoder.models.MLMTransformer"}
        write_modules(root, types | {"1_SpladePooling": ST + "sparse_encoder.models.SpladePooling"})
        activation = next(name for name, logs in _LOGS.items() if logs == head.spec.logs)
        pooling = {"pooling_strategy": head.spec.pooling, "activation_function": activation}
        write_json(root / "1_SpladePooling" / "config.json", {**pooling, "word_embedding_dimension": None})
        name_model(root, "SparseEncoder", "dot", max_active_dims=head.spec.terms)
