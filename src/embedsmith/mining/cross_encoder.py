"""A model that reads query and document together, as a teacher: sentence-transformers' CrossEncoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedsmith.core.encoder import hash_of_model
from embedsmith.core.errors import MissingExtraError, ModelError
from embedsmith.mining.config import CrossEncoder
from embedsmith.search.exact import FloatArray, IndexArray

_SCORERS = ("ForSequenceClassification", "ForCausalLM")
"""How the classes end whose weights hold what a score is made of; any other would be given a random classifier."""


@dataclass(frozen=True)
class CrossEncoderModel:
    """A cross-encoder with one output. Its scores are the library's: a sigmoid of the output unless the model's own
    settings name another function."""

    library: Any
    batch_size: int = 32

    @staticmethod
    def load(config: CrossEncoder) -> CrossEncoderModel:
        """Errors: `MissingExtraError`; `ModelError` for a model that cannot be loaded, has no head that was trained to
        score, or gives more than one number a pair."""
        try:
            from sentence_transformers import CrossEncoder as Library
        except ImportError as error:
            raise MissingExtraError("sentence-transformers", "eval") from error
        _refuse_without_scores(config.model)
        try:
            model = Library(config.model)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"sentence-transformers cannot load it: {error}", where=config.model) from error
        if model.num_labels != 1:
            raise ModelError(
                f"the cross-encoder gives {model.num_labels} scores a pair",
                where=config.model,
                expected="one score a pair",
            )
        return CrossEncoderModel(model, config.batch_size)

    def scores(self, pairs: Sequence[tuple[str, str]]) -> FloatArray:
        """score_E of pairs (query, document), in batches of similar length."""
        if not pairs:
            return np.zeros(0, np.float32)
        return np.asarray(self.library.predict(pairs, batch_size=self.batch_size, show_progress_bar=False), np.float32)

    def fingerprint(self) -> str:
        """A hash of the weights, the modules and what is done to their output."""
        return hash_of_model(self.library, repr(self.library), repr(self.library.activation_fn))


def _refuse_without_scores(path: str) -> None:
    """sentence-transformers gives a model without a classifier a random one, whose scores mean nothing."""
    from transformers import AutoConfig

    folder = Path(path).expanduser()
    if folder.is_dir() and (folder / "modules.json").exists() and not (folder / "config.json").exists():
        return  # its first module lies in a folder of its own, as only sentence-transformers writes it
    try:
        classes = AutoConfig.from_pretrained(str(folder) if folder.is_dir() else path).architectures or []
    except (OSError, ValueError) as error:
        raise ModelError(f"its settings cannot be read: {str(error).splitlines()[0]}", where=path) from error
    if classes and not any(name.endswith(_SCORERS) for name in classes):
        raise ModelError(
            f"{classes[0]} has no head that scores pairs",
            where=path,
            expected="a cross-encoder (its config.json names a ...ForSequenceClassification or ...ForCausalLM)",
            fix="for an embedding model as teacher set type: embedding",
        )


@dataclass(frozen=True)
class CrossEncoderScorer:
    """Scores of pairs of given texts; all pairs of a part go through the model together."""

    model: CrossEncoderModel
    queries: Sequence[str]
    corpus: Sequence[str]

    def pairs(self, row_E: IndexArray, index_E: IndexArray) -> FloatArray:
        """score_E of query `row_E[e]` with document `index_E[e]`."""
        return self.model.scores(
            [(self.queries[int(row)], self.corpus[int(index)]) for row, index in zip(row_E, index_E, strict=True)]
        )
