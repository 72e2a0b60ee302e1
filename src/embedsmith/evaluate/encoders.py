"""Other libraries' models as an `Encoder`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from embedsmith.core.encoder import Role, hash_of_model
from embedsmith.core.errors import EvaluationError, MissingExtraError, ModelError
from embedsmith.core.reps import Dense, Reps

_ROLES = {"query": ("query",), "document": ("document", "passage", "corpus")}
_NORMALIZE = {"cosine": True, "dot": False}


@dataclass(frozen=True)
class SentenceTransformersEncoder:
    """Any model of sentence-transformers, encoded by sentence-transformers itself.

    Vectors are normalised where the model's own similarity is the cosine (the default there), and left as they are
    where it is the inner product. The prompt of a text is the model's prompt called `task-role`, `task` or `role`
    (for documents also `passage` and `corpus`), else its default prompt.
    """

    model: Any
    batch_size: int = 32

    @classmethod
    def load(
        cls,
        path_or_id: str | Path,
        *,
        max_length: int | None = None,
        batch_size: int = 32,
        prompts: Mapping[str, str] | None = None,
        device: str | None = None,
    ) -> Self:
        """From a folder or a hub id; `prompts` are added to the model's own.

        Errors: `MissingExtraError` without sentence-transformers; `ModelError` for a model it cannot load.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingExtraError("sentence-transformers", "eval") from error
        if looks_like_a_path(path_or_id) and not Path(path_or_id).is_dir():
            raise ModelError("there is no such folder", where=path_or_id)
        try:
            model = SentenceTransformer(str(path_or_id), device=device)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"sentence-transformers cannot load it: {error}", where=path_or_id) from error
        model.prompts = {**model.prompts, **(prompts or {})}
        if max_length is not None:
            model.max_seq_length = max_length
        return cls(model, batch_size)

    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        """Dense vectors only. Errors: `EvaluationError` for another output, or a similarity that is a distance."""
        if tuple(outputs) != ("dense",):
            raise EvaluationError(f"a sentence-transformers model gives dense vectors, not {', '.join(outputs)}")
        similarity = str(getattr(self.model.similarity_fn_name, "value", self.model.similarity_fn_name))
        if similarity not in _NORMALIZE:
            raise EvaluationError(f"the model compares by {similarity!r}", expected="cosine or dot")
        vectors = self.model.encode(
            list(texts),
            prompt=self.prompt(role, task),
            batch_size=self.batch_size,
            normalize_embeddings=_NORMALIZE[similarity],
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return {"dense": Dense(torch.from_numpy(vectors).float())}

    def fingerprint(self) -> str:
        """A hash of the weights, the modules, the prompts and the maximum length."""
        prompts = repr(sorted(self.model.prompts.items()))
        return hash_of_model(self.model, repr(self.model), prompts, str(self.model.max_seq_length))

    def prompt(self, role: Role, task: str | None) -> str | None:
        """The text put before a text of this role, `None` where the model has none for it."""
        names = [f"{task}-{name}" for name in _ROLES[role]] + [task] if task is not None else []
        prompts: Mapping[str, str] = self.model.prompts
        for name in (*names, *_ROLES[role], self.model.default_prompt_name):
            if name is not None and prompts.get(name) is not None:
                return prompts[name]
        return None


def looks_like_a_path(path_or_id: str | Path) -> bool:
    """Hub ids are `name` or `owner/name`; anything that starts like a path, or is deeper, is meant as a folder."""
    text = str(path_or_id)
    return isinstance(path_or_id, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
