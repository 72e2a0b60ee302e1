"""An exported graph as an embedder: the tokenizer, settings and prompts of its folder, and a session in the place of
the backbone, its pooling and its heads. Everything an `Embedder` does without gradient, it does."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from embedsmith.core.errors import ModelError
from embedsmith.core.reps import Representation, Reps
from embedsmith.core.tokens import PaddedTokens, TokenBatch, one_of
from embedsmith.models.config import Settings
from embedsmith.models.embedder import Embedder
from embedsmith.models.encode import Compute
from embedsmith.models.graphs.graph_files import FILES, KINDS, STATES, GraphBackend, GraphFacts
from embedsmith.models.graphs.session import inputs_of, open_session

_SMALL = 2**30
"""Bytes of a graph whose chunks are computed side by side, one a core."""


class GraphEmbedder(Embedder):
    """A folder's graph on `backend`. `frame`: the backbone without weights, of which the tokenizer's checks read sizes.

    `heads`: those of the graph that are wanted.
    Errors: those of `open_session`.
    """

    def __init__(
        self,
        folder: Path,
        backend: GraphBackend,
        frame: Any,
        tokenizer: Any,
        settings: Settings,
        facts: GraphFacts,
        heads: Sequence[str],
    ) -> None:
        super().__init__(frame, tokenizer, replace(settings, pooling="mean"))  # the real one is in the graph
        self.settings = settings
        self.folder, self.backend, self.facts = folder, backend, facts
        self.heads = tuple(heads)
        self.session = open_session(folder, backend, facts.dtype)
        # A graph is opened a second time for it; large products take all cores well by themselves.
        self.side_by_side = sum(path.stat().st_size for path in self._files) <= _SMALL

    @property
    def dimension(self) -> int:
        return self.facts.dimension

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.heads

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def parts(self) -> NoReturn:
        raise ModelError(
            "an exported graph has no weights to save, train or export again",
            where=self.folder,
            fix="use the model that it was made from",
        )

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """In the place of weights the hash of the graph's files: what tells one model from another, here too."""
        return {"graph": torch.frombuffer(bytearray(self._digest), dtype=torch.uint8)}

    @property
    def _files(self) -> list[Path]:
        """OpenVINO's weights and ONNX's large ones lie beside the graph."""
        file = self.folder / FILES[self.backend]
        return sorted(file.parent.glob(f"{file.stem}*"))

    @cached_property
    def _digest(self) -> bytes:
        digest = hashlib.sha256()
        for path in self._files:
            with path.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return digest.digest()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Nothing moves to a device."""
        return self

    def forward(self, padded: PaddedTokens, outputs: Sequence[str] = ("dense",)) -> dict[str, Representation]:
        """Representations of a padded chunk, `tokens` too. Errors: `ModelError` for an output that the graph does not
        have."""
        if unknown := [name for name in outputs if name not in (*self.heads, "tokens")]:
            raise ModelError(
                f"this graph has no output {unknown[0]!r}",
                where=self.folder / FILES[self.backend],
                expected=f"one of {', '.join(self.heads)}",
                fix="use the model that it was made from, or export that again with the head",
            )
        inputs = inputs_of(padded, self.facts.prompt_length)
        names = {head: (STATES,) if head == "tokens" else self.facts.outputs(head) for head in outputs}
        made = iter(self.session.run([name for each in names.values() for name in each], inputs))
        tensors = {head: [torch.from_numpy(next(made)) for _ in each] for head, each in names.items()}
        if "tokens" in tensors:
            special_S = torch.tensor(self.tokenizer.all_special_ids)
            tensors["tokens"].append(padded.mask_NT & ~one_of(padded.id_NT, special_S))
        return {head: KINDS[self.facts.heads.get(head, "MultiVector")](*each) for head, each in tensors.items()}

    def represent_windows(
        self,
        windows: Iterator[TokenBatch],
        outputs: Sequence[str] = ("dense",),
        token_budget: int | None = None,
        dtype: Compute | None = None,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> Iterator[Reps]:
        if dtype not in (None, "auto", "float32"):
            raise ModelError(
                f"dtype={dtype}: an exported graph computes in {self.facts.dtype}",
                fix="leave dtype out, or export the model with --dtype fp16 or int8",
            )
        return super().represent_windows(windows, outputs, token_budget, None, advance)
