"""BM25 through the library bm25s, for scripts with and without spaces."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import DataError, MissingExtraError
from embedsmith.mining.config import Bm25Search, Tokens
from embedsmith.search.exact import FloatArray, IndexArray

# Scripts written without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_RUN = re.compile(rf"[{_UNSPACED}]+|[^\W{_UNSPACED}]+")


def tokenize(text: str, tokens: Tokens = "mixed") -> list[str]:
    """Words in lower case. `mixed`: a run of a script without spaces gives its characters and their pairs;
    `characters`: every run does; `words`: none does."""
    found: list[str] = []
    for match in _RUN.finditer(unicodedata.normalize("NFKC", text).casefold()):
        run = match[0]
        if tokens == "words" or (tokens == "mixed" and not _unspaced(run)):
            found.append(run)
        else:
            found.extend(run)
            found.extend(run[place : place + 2] for place in range(len(run) - 1))
    return found


def _unspaced(run: str) -> bool:
    return re.match(f"[{_UNSPACED}]", run) is not None


class Bm25:
    """An index over a corpus. Scores of a query are computed for the whole corpus at a time, [K] numbers.

    Errors: `MissingExtraError`; `DataError` for a corpus without a single token.
    """

    def __init__(self, config: Bm25Search, corpus: Sequence[str]) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise MissingExtraError("bm25s", "search") from error
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # the library sets it to talk about every step
        self._tokens, self._size = config.tokens, len(corpus)
        rows = [tokenize(text, config.tokens) for text in corpus]
        if not any(rows):
            raise DataError("no text of the corpus has a word in it", expected="tokens that fit its script")
        self._index: Any = bm25s.BM25(k1=config.k1, b=config.b)
        self._index.index(rows, show_progress=False)
        self._vocabulary: dict[str, int] = self._index.vocab_dict

    def top(self, queries: Sequence[str], k: int) -> tuple[FloatArray, IndexArray]:
        """score_Qk and index_Qk, ties to the lower index."""
        k = min(k, self._size)
        score_Qk, index_Qk = np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)
        for row, query in enumerate(queries):
            score_K = self.scores(query)
            floor = np.partition(score_K, len(score_K) - k)[len(score_K) - k]
            kept = np.flatnonzero(score_K >= floor)
            order = kept[np.argsort(-score_K[kept], kind="stable")][:k]
            score_Qk[row], index_Qk[row] = score_K[order], order
        return score_Qk, index_Qk

    def scores(self, query: str) -> npt.NDArray[np.float32]:
        """score_K of every document; zeros for a query without a known word."""
        known = [token for token in tokenize(query, self._tokens) if token in self._vocabulary]
        if not known:
            return np.zeros(self._size, np.float32)
        return np.asarray(self._index.get_scores(known), np.float32)
