"""Rerankers in an evaluation: they put the candidates of reranking tasks into order, and of retrieval tasks the first
documents of an embedder's ranking."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from embedsmith.core.encoder import Reranker, fingerprint
from embedsmith.core.errors import EvaluationError
from embedsmith.evaluate.metrics import Ranking

Scores = npt.NDArray[np.float32]

DEPTH = 100
"""Documents of an embedder's ranking that a reranker reads, where nothing else is said."""


@dataclass(frozen=True)
class Rerank:
    """A reranker and the number of documents that it reads of every ranking; those behind are left out.

    `found`: the rankings of an embedder by task. Kept by whoever scores one reranker after another on the same ones,
    as training does; empty at first, and of one embedder only.
    """

    model: Reranker
    depth: int = DEPTH
    found: dict[str, Ranking] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise EvaluationError(f"a reranker that reads {self.depth} documents", expected="1 or more")

    def fingerprint(self) -> str:
        """Of everything that a score depends on."""
        return f"{fingerprint(self.model)} {self.depth}"

    def ordered(self, ranking: Ranking, queries: Sequence[str], documents: Sequence[str], label: str) -> Ranking:
        """The first `depth` documents of every query by the reranker's scores; ties by the number of the document.

        Errors: `EvaluationError` for a score that is not finite.
        """
        index_Qk = ranking.index_Qk[:, : self.depth]
        row_E, column_E = np.nonzero(index_Qk >= 0)
        asked = [queries[row] for row in row_E.tolist()]
        read = [documents[index] for index in index_Qk[row_E, column_E].tolist()]
        score_Qk = np.full(index_Qk.shape, -np.inf, np.float32)
        score_Qk[row_E, column_E] = self.scores(asked, read, label)
        order_Qk = np.lexsort((index_Qk, -score_Qk), axis=1)
        return Ranking(np.take_along_axis(score_Qk, order_Qk, 1), np.take_along_axis(index_Qk, order_Qk, 1))

    def scores(self, queries: Sequence[str], documents: Sequence[str], label: str) -> Scores:
        score_E = np.asarray(self.model.score(queries, documents), np.float32)
        if not np.isfinite(score_E).all():
            place = int(np.flatnonzero(~np.isfinite(score_E))[0])
            raise EvaluationError(
                f"the reranker's score of {queries[place][:60]!r} is not finite", where=label, fix="check its weights"
            )
        return score_E
