"""A model and a reranker that are served: an encoder behind its batching thread, and what clients are told of it."""

import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import torch

from embedsmith.core.encoder import Encoder, Reranker, Role, TokenEncoder, fingerprint
from embedsmith.core.errors import ModelError
from embedsmith.core.reps import Dense, Reps, concatenate, each_head
from embedsmith.core.tokens import TokenBatch
from embedsmith.serve.batching import Batcher

Text = str | Sequence[int]
"""A text, or the ids of its tokens."""

_BYTES_A_TOKEN = 4
"""Of UTF-8, in English; a Chinese character of three bytes is about a token."""


@dataclass(frozen=True)
class Encoded:
    """Representations of N texts, and the tokens that the model read of each."""

    reps: Reps
    token_N: Sequence[int]

    def rows(self, index: list[int]) -> Self:
        place_N = torch.tensor(index)
        return type(self)(each_head(self.reps, lambda rep: rep.rows(place_N)), [self.token_N[row] for row in index])

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        return cls(concatenate([part.reps for part in parts]), [count for part in parts for count in part.token_N])


@dataclass(frozen=True)
class _Kind:
    """What is computed together: the same outputs. `alone`: of a text that shares its batch with none, so that its
    token axis is as long as the text."""

    outputs: tuple[str, ...]
    alone: object = None


class Model:
    """An encoder by its name. As an `Encoder` of its own it can be asked from any thread: so does an index."""

    def __init__(self, name: str, encoder: Encoder, most_waiting: int, **observer: Any) -> None:
        self.name, self.encoder = name, encoder
        self.tokens = encoder if isinstance(encoder, TokenEncoder) else None
        self._tokenizing = threading.Lock()
        self._fingerprint: str | None = None
        self.batcher: Batcher[tuple[Text, Role], Encoded] = Batcher(self._compute, name, most_waiting, **observer)

    @property
    def heads(self) -> tuple[str, ...]:
        """What clients can ask for: `dense`, and those of `sparse` and `multivector` that the model has."""
        outputs = ("dense",) if self.tokens is None else self.tokens.outputs
        return tuple(name for name in outputs if name != "middle")

    @property
    def max_length(self) -> int | None:
        return None if self.tokens is None else self.tokens.max_length

    @property
    def dimension(self) -> int | None:
        """How many numbers a vector has where nothing else is asked for; `None`: the encoder does not say."""
        return None if self.tokens is None else self.tokens.encoded_dimension

    def check_width(self, dim: int | None) -> None:
        """Before anything is computed. Errors: `ModelError` for a width that the model does not have."""
        if self.tokens is not None and dim is not None and not 1 <= dim <= self.tokens.dimension:
            raise ModelError(
                f"dimensions is {dim}", expected=f"from 1 to {self.tokens.dimension}, the model's dimension"
            )

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.encoder)
        return self._fingerprint

    def submit(
        self, texts: Sequence[Text], role: Role, outputs: Sequence[str] = ("dense",), *, alone: bool = False
    ) -> "Future[Encoded]":
        """Representations of texts of one role, batched with those of other callers.

        Errors: `ModelError` for an output that the model does not have, and for token ids where it takes texts alone;
        those of the batcher.
        """
        if unknown := [name for name in outputs if name not in self.heads]:
            raise ModelError(
                f"the model {self.name} has no head {unknown[0]!r}",
                expected=f"one of {', '.join(self.heads)}",
                fix="ask a model that has it: GET /v1/models tells the heads of each",
            )
        if self.tokens is None and not all(isinstance(text, str) for text in texts):
            raise ModelError(f"the model {self.name} takes no token ids", fix="send texts")
        costs = [self._cost(text) for text in texts]
        kind = _Kind(tuple(outputs), object() if alone else None)
        return self.batcher.submit([(text, role) for text in texts], costs, kind)

    def tokens_of(self, text: str, role: Role) -> list[str]:
        """The tokens of a text as the model reads it, prompt and special tokens with them."""
        assert self.tokens is not None
        with self._tokenizing:
            ids = self.tokens.tokenize([text], role).id_S.tolist()
        words: list[str] = self.tokens.tokenizer.convert_ids_to_tokens(ids)
        return words

    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        """Waits for the batch."""
        if task is not None:
            raise ModelError("a served model puts the prompts of roles before texts, and none of tasks")
        return self.submit(texts, role, outputs).result().reps

    def vectors(self, reps: Reps, dim: int | None) -> npt.NDArray[np.float32]:
        """The dense vectors as `encode` of the model gives them. Errors: `ModelError` for a width it does not have."""
        if self.tokens is not None:
            return self.tokens.vectors(reps, dim)
        dense = cast(Dense, reps["dense"])
        if dim is not None and not 1 <= dim <= dense.vector_ND.shape[1]:
            raise ModelError(f"dim={dim}", expected=f"from 1 to {dense.vector_ND.shape[1]}, the model's dimension")
        return np.asarray((dense if dim is None else dense.truncate(dim)).vector_ND.numpy(), np.float32)

    def _cost(self, text: Text) -> int:
        count = len(text.encode("utf-8", "replace")) // _BYTES_A_TOKEN if isinstance(text, str) else len(text)
        return min(count + 2, self.max_length or 512)

    def _compute(self, items: Sequence[tuple[Text, Role]], kind: _Kind) -> Encoded:
        """Texts of any role, and token ids, in one pass over the model. One encoder that knows nothing of tokens is
        asked once a role."""
        if self.tokens is not None:
            with self._tokenizing:
                batch = _tokens(self.tokens, items)
            (reps,) = self.tokens.represent_windows(iter([batch]), kind.outputs)
            return Encoded(reps, batch.length_N.tolist())
        places = {role: [place for place, (_, own) in enumerate(items) if own == role] for _, role in items}
        parts = [
            self.encoder.represent([str(items[place][0]) for place in rows], role=role, outputs=kind.outputs)
            for role, rows in places.items()
        ]
        order = np.argsort([place for rows in places.values() for place in rows]).tolist()
        return Encoded(concatenate(parts), [0] * len(items)).rows(order)


def _tokens(encoder: TokenEncoder, items: Sequence[tuple[Text, Role]]) -> TokenBatch:
    """The tokens of all items, each with the prompt of its role."""
    texts = [(place, text, role) for place, (text, role) in enumerate(items) if isinstance(text, str)]
    rows = [(place, text, role) for place, (text, role) in enumerate(items) if not isinstance(text, str)]
    parts = []
    if texts:
        parts.append(encoder.tokenize([text for _, text, _ in texts], [role for *_, role in texts]))
    if rows:
        parts.append(encoder.tokenize_ids([row for _, row, _ in rows], [role for *_, role in rows]))
    if len(parts) == 1:
        return parts[0]
    order = np.argsort([place for place, *_ in [*texts, *rows]])
    return TokenBatch.concatenate(parts).take(order)


@dataclass(frozen=True)
class Scores:
    """score_N of pairs of a query and a document, as logits."""

    score_N: torch.Tensor

    @property
    def relevance_N(self) -> torch.Tensor:
        """From 0 to 1, as Cohere and TEI have it: sigmoid(score)."""
        return self.score_N.sigmoid()

    def rows(self, index: list[int]) -> Self:
        return type(self)(self.score_N[torch.tensor(index)])

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        return cls(torch.cat([part.score_N for part in parts]))


class ServedReranker:
    """A reranker by its name, behind a batching thread of its own."""

    def __init__(self, name: str, reranker: Reranker, most_waiting: int, **observer: Any) -> None:
        self.name = name
        self._reranker = reranker
        self.batcher: Batcher[tuple[str, str], Scores] = Batcher(self._compute, name, most_waiting, **observer)

    def submit(self, query: str, documents: Sequence[str]) -> "Future[Scores]":
        """Scores of one query with documents. Errors: those of the batcher."""
        pairs = [(query, document) for document in documents]
        costs = [(len(query) + len(document)) // _BYTES_A_TOKEN + 3 for document in documents]
        return self.batcher.submit(pairs, costs)

    def _compute(self, pairs: Sequence[tuple[str, str]], kind: Hashable) -> Scores:
        return Scores(self._reranker.score([query for query, _ in pairs], [document for _, document in pairs]))
