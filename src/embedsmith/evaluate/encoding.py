"""Texts to representations for evaluation: in pieces of bounded size, shared among ranks, with a progress bar, checked
for NaN; and other libraries' models as an `Encoder`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from embedsmith.core.collectives import ALONE, FailedElsewhereError, Group, objects_of_all_ranks, rank, world_size
from embedsmith.core.encoder import Encoder, Role, hash_of_model, tokenizer_json
from embedsmith.core.errors import EmbedsmithError, EvaluationError, MissingExtraError, ModelError
from embedsmith.core.progress import progress_bar
from embedsmith.core.reps import Dense, Representation, Reps
from embedsmith.evaluate.rerank import Rerank
from embedsmith.search.hybrid import join

PIECE = 2048
"""Texts an encoder is given at once, at most: enough to sort by length, few enough to hold and to show progress."""
_LEAST = 256
"""Of fewer texts than 16 pieces have a piece is a sixteenth, so that as many ranks share them, but not less."""

_ROLES = {"query": ("query",), "document": ("document", "passage", "corpus")}
_NORMALIZE = {"cosine": True, "dot": False}

T = TypeVar("T")


@dataclass(frozen=True)
class Reader:
    """An encoder as the tasks use it: one head of it, on the ranks of `group`; or a reranker (`rerank`), with the
    encoder whose rankings it puts into order, or without any where a task gives the candidates.

    Every rank encodes a share of the texts. `progress=None` shows a bar where the terminal is watched.
    """

    encoder: Encoder | None
    head: str = "dense"
    progress: bool | None = None
    group: Group = ALONE
    rerank: Rerank | None = None

    def pieces(
        self, texts: Sequence[str], *, role: Role, task: str, label: str, share: slice | None = None
    ) -> Iterator[Representation]:
        """Representations of successive pieces of `texts`, or of a `share` of them, on this rank alone. Which texts
        stand in a piece does not depend on the share, so that a text's numbers do not.

        Errors: `EvaluationError` for a missing head, a wrong number of rows and values that are not finite.
        """
        if self.encoder is None:
            raise EvaluationError(
                "a reranker alone finds nothing and has no vectors",
                where=label,
                expected="reranking tasks, or an embedding model whose ranking it puts into order",
                fix="embedsmith evaluate EMBEDDER --rerank RERANKER; in a recipe evaluate.embedder=EMBEDDER",
            )
        share, rows = share or slice(0, len(texts)), piece_rows(len(texts))
        with progress_bar(label, share.stop - share.start, visible=self.progress) as bar:
            for start in range(share.start, share.stop, rows):
                piece = texts[start : start + rows]
                reps = self.encoder.represent(piece, role=role, task=task, outputs=(self.head,))
                if self.head not in reps:
                    have = ", ".join(reps)
                    raise EvaluationError(f"the model gave no {self.head!r} output", where=label, expected=have)
                _check(reps[self.head], piece, label)
                yield reps[self.head]
                bar.advance(len(piece))

    def all(self, texts: Sequence[str], *, role: Role, task: str, label: str) -> Representation:
        """Representations of all texts, in their order, on every rank. A collective."""
        share = self.share(len(texts), piece_rows(len(texts)))

        def act() -> Representation | None:
            made = list(self.pieces(texts, role=role, task=task, label=label, share=share))
            return join(made) if made else None  # more ranks than pieces

        return join([part for part in self.together(act) if part is not None])

    def sides(
        self, left: Sequence[str], right: Sequence[str], *, task: str, label: str
    ) -> tuple[Representation, Representation]:
        """Both sides of pairs, as queries of `task`; a text that occurs more than once is encoded once."""
        texts = list(dict.fromkeys([*left, *right]))
        place = {text: number for number, text in enumerate(texts)}
        rep = self.all(texts, role="query", task=task, label=label)
        first, second = (rep.rows(torch.tensor([place[text] for text in side])) for side in (left, right))
        return first, second

    def dense(self, texts: Sequence[str], *, task: str, label: str) -> npt.NDArray[np.float32]:
        """vector_ND of texts that are queries of `task`. Errors: `EvaluationError` for a head without vectors."""
        rep = self.all(texts, role="query", task=task, label=label)
        if not isinstance(rep, Dense):
            raise EvaluationError(f"{task} needs one vector a text; the head {self.head!r} has none", where=label)
        vector_ND: npt.NDArray[np.float32] = rep.vector_ND.float().numpy()
        return vector_ND

    def share(self, count: int, rows: int) -> slice:
        """This rank's part of `count` texts, whole pieces of so many rows; nothing where there are fewer of these than
        ranks and it gets none."""
        world, mine, pieces = world_size(self.group), rank(self.group), -(-count // rows)
        start, stop = (min(pieces * which // world * rows, count) for which in (mine, mine + 1))
        return slice(start, stop)

    def together(self, act: Callable[[], T]) -> list[T]:
        """What `act` returns on every rank, in rank order. Errors: see `as_one`."""
        outcomes: list[tuple[T, str | None]] = objects_of_all_ranks((act(), None), self.group)
        for number, (_, message) in enumerate(outcomes):
            if message is not None:
                raise FailedElsewhereError(message, where=f"rank {number}")
        return [value for value, _ in outcomes]

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """An error of any kind on one rank ends all of them here: none waits for a rank that is gone.

        All exchange between the ranks inside goes through `together`, so each of the others receives the error of a
        failed rank at its next exchange, at the latest at the end. Errors: the rank's own; on the others
        `FailedElsewhereError` with its message.
        """
        try:
            yield
            self.together(lambda: None)
        except FailedElsewhereError:
            raise
        except BaseException as error:
            name = "" if isinstance(error, EmbedsmithError) else f"{type(error).__name__}: "
            objects_of_all_ranks((None, f"{name}{error}"), self.group)
            raise


def piece_rows(count: int) -> int:
    """How many of `count` texts an encoder is given at once, on any number of ranks."""
    return min(PIECE, max(-(-count // 16), _LEAST))


def _check(representation: Representation, texts: Sequence[str], label: str) -> None:
    if len(representation) != len(texts):
        raise EvaluationError(f"the model gave {len(representation)} rows for {len(texts)} texts", where=label)
    for tensor in representation.floating():
        if bool(tensor.sum().isfinite()):  # one pass finds that nothing is wrong; a sum that overflowed is looked into
            continue
        if not bool(tensor.isfinite().all()):
            row = int((~tensor.isfinite()).flatten(1).any(1).nonzero()[0])
            raise EvaluationError(
                f"the model's output for {texts[row][:80]!r} is not finite",
                where=label,
                fix="check the weights; a run that diverged leaves NaN in them",
            )


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
        """A hash of the weights, the modules, the tokenizer, the prompts, the similarity and the maximum length."""
        prompts = repr((sorted(self.model.prompts.items()), self.model.default_prompt_name))
        tokens = tokenizer_json(getattr(self.model, "tokenizer", None))
        used = (prompts, str(self.model.max_seq_length), str(self.model.similarity_fn_name), tokens)
        return hash_of_model(self.model, repr(self.model), *used)

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
