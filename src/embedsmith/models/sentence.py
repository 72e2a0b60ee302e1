"""The module through which sentence-transformers loads what its own modules cannot express: a pooling of a user's own
or with weights, a text put in twice, tokens left out of the pooling, attention by a mask, an adapter apart from its
base.

`SentenceTransformer(folder, trust_remote_code=True)` finds it by name in an installed embedsmith; no code lies in the
model's folder.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from embedsmith.core.tokens import TokenBatch
from embedsmith.models.embedder import Embedder
from embedsmith.models.load import load


class EmbedsmithModule(InputModule):  # type: ignore[misc]
    """A whole embedder as the only module of a SentenceTransformer."""

    save_in_root = True

    def __init__(self, model: Embedder) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def load(cls, model_name_or_path: str, **_: Any) -> Self:
        return cls(load(str(model_name_or_path), device="cpu"))

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        with TemporaryDirectory() as scratch:  # the folder is sentence-transformers', with files of its own
            self.model.save(Path(scratch) / "model")
            shutil.copytree(Path(scratch) / "model", output_path, dirs_exist_ok=True)

    @property
    def max_seq_length(self) -> int:
        return self.model.max_length

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    def get_embedding_dimension(self) -> int:
        return self.model.dimension

    def preprocess(self, inputs: list[str], prompt: str | None = None, **_: Any) -> dict[str, Tensor]:
        """Token ids, with the prompt as sentence-transformers chose it in front."""
        settings = self.model.settings.with_prompts({"document": prompt or ""})
        tokens = self.model.text(list(inputs), settings, "document")
        padded = tokens.pad(self.model.pad_id, left=self.model.padding_left)
        body_N = torch.as_tensor(tokens.body_N)
        return {"input_ids": padded.id_NT, "attention_mask": padded.mask_NT.long(), "body": body_N}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` [N, D]."""
        dense: Any = self.represented(features, "dense")
        return {**features, "sentence_embedding": dense.vector_ND}

    def represented(self, features: dict[str, Any], head: str) -> Any:
        """One output of the model for the tokens of `preprocess`."""
        id_NT, mask_NT = features["input_ids"], features["attention_mask"].bool()
        rows = [ids[mask].tolist() for ids, mask in zip(id_NT, mask_NT, strict=True)]
        batch = TokenBatch.from_rows(rows, features["body"].tolist(), is_query=False)
        padded = batch.pad(self.model.pad_id, id_NT.device, left=self.model.padding_left)
        return self.model(padded, (head,))[head]


class EmbedsmithSparse(EmbedsmithModule):
    """The sparse head of an embedder as the only module of a SparseEncoder."""

    def get_embedding_dimension(self) -> int:
        return int(self.model.backbone.config.get_text_config().vocab_size)

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` [N, V]."""
        sparse: Any = self.represented(features, "sparse")
        vocabulary_V = torch.arange(self.get_embedding_dimension(), device=sparse.coordinate_NT.device)
        return {**features, "sentence_embedding": sparse.over(vocabulary_V)}
