"""How search, mining, evaluation and the server know a model, an encoder or a reranker: a cached matrix, a server or
another library's model fits too."""

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from embedsmith.core.errors import ModelError
from embedsmith.core.reps import Reps
from embedsmith.core.tokens import TokenBatch

Role = Literal["query", "document"]


class Encoder(Protocol):
    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        """Representations of N texts, in their order, on the CPU, without gradient.

        An encoder may also take `instruction`, one or `None` for each text, in the place of the prompt of its role and
        task.
        """
        ...


@runtime_checkable
class MadeFor(Protocol):
    """An encoder that says which of its outputs it is made for."""

    @property
    def main_head(self) -> str: ...


def main_head(encoder: Encoder) -> str:
    """The output that is scored where none is named: what the encoder says, else `dense`."""
    return encoder.main_head if isinstance(encoder, MadeFor) else "dense"


def represent(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    role: Role,
    task: str | None,
    outputs: Sequence[str],
    instruction: Sequence[str | None] | None,
) -> Reps:
    """`encoder.represent`, with instructions only where a text has one. Errors: `ModelError` for an encoder that has no
    such parameter."""
    if instruction is None or all(own is None for own in instruction):
        return encoder.represent(texts, role=role, task=task, outputs=outputs)
    if "instruction" not in inspect.signature(encoder.represent).parameters:
        raise ModelError(
            f"{type(encoder).__name__} cannot put a record's own instruction before its query",
            expected="represent(texts, *, role, task, outputs, instruction)",
            fix="add the parameter, or leave the instructions out",
        )
    reps: Reps = cast(Any, encoder).represent(texts, role=role, task=task, outputs=outputs, instruction=instruction)
    return reps


@runtime_checkable
class TokenEncoder(Protocol):
    """An encoder whose way from a text to a vector can be entered at its tokens: what a server batches by tokens, of
    texts and token ids alike."""

    tokenizer: Any

    @property
    def max_length(self) -> int:
        """Tokens of a text that are read."""
        ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """What `represent` can be asked for."""
        ...

    @property
    def dimension(self) -> int:
        """D of the dense head."""
        ...

    @property
    def encoded_dimension(self) -> int:
        """How many numbers `vectors` gives where nothing else is asked for."""
        ...

    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps: ...

    def tokenize(self, texts: Sequence[str], role: Role | Sequence[Role] = "document") -> TokenBatch:
        """Texts with the prompts of their roles, as the model reads them."""
        ...

    def tokenize_ids(self, rows: Sequence[Sequence[int]], role: Role | Sequence[Role] = "document") -> TokenBatch:
        """The same of texts that are token ids already."""
        ...

    def represent_windows(
        self, windows: Iterator[TokenBatch], outputs: Sequence[str] = ("dense",)
    ) -> Iterator[Reps]: ...

    def vectors(self, reps: Reps, dim: int | None) -> npt.NDArray[np.float32]:
        """The dense vectors as users of the model get them: cut and normalised."""
        ...


class Reranker(Protocol):
    """What reads a query and a document together."""

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> torch.Tensor:
        """score_N, fp32 on the CPU: how well the i-th document answers the i-th query; more is better.

        Scores of one query order its documents; what they are worth across models is the model's own affair.
        """
        ...


@runtime_checkable
class Fingerprinted(Protocol):
    """An encoder that can say which one it is."""

    def fingerprint(self) -> str:
        """A hash of everything its output depends on: weights, settings, prompts."""
        ...


def fingerprint(model: object) -> str:
    """The hash of an encoder or a reranker. Errors: `ModelError` for one that has none."""
    if not isinstance(model, Fingerprinted):
        raise ModelError(
            f"{type(model).__name__} cannot say which model it is",
            expected="a method fingerprint() that returns a hash of its weights and settings",
            fix="add it, or do without what is kept on disk",
        )
    return model.fingerprint()


def tokenizer_json(tokenizer: Any) -> str:
    """Everything in a tokenizer that ids depend on; truncation and padding are set anew for every use. Of one that has
    no fast form, what it says of itself."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return repr(tokenizer)
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({key: words[key] for key in words if key not in ("truncation", "padding")}, sort_keys=True)


def hash_of_model(model: torch.nn.Module, *settings: str) -> str:
    """A hash of a module's weights, and of whatever else its output depends on."""
    return hash_with_weights(repr(settings), model)


def hash_with_weights(text: str, model: torch.nn.Module) -> str:
    """A hash of a text and of a module's weights by name."""
    hasher = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()
