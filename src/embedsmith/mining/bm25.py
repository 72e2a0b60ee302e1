"""Candidates by BM25, for scripts with and without spaces. In memory are only those words of the corpus that the
queries ask for; of several ranks, each holds those of its own share."""

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embedsmith.core.collectives import objects_of_all_ranks, on_every_rank
from embedsmith.core.errors import DataError
from embedsmith.core.settings import Positive, Share
from embedsmith.core.sharing import Sharing
from embedsmith.core.shelf import searchers
from embedsmith.core.words import folded, letters, runs
from embedsmith.mining import searchers as room
from embedsmith.mining.searchers import Searcher, SearchTexts, SharedSearcher, rank_share
from embedsmith.search.exact import FloatArray, IndexArray

Tokens = Literal["mixed", "characters", "words"]
_BLOCK = 256
"""Scores of which the highest is looked at, where the best of very many are sought."""


@searchers.register("bm25", source="Robertson et al. 1994, with the weights of Lucene")
@dataclass(frozen=True, kw_only=True)
class Bm25Search:
    """Candidates by BM25. The score of a document is the sum over the query's words w of
    log(1 + (N - n + 0.5) / (n + 0.5)) f / (f + k1 (1 - b + b l / L)): w stands f times in it and in n of N documents,
    which have l and on average L words.

    tokens: what a text is cut into: `mixed` takes words, and single characters and pairs of them where a script has no
        spaces (Chinese, Japanese, Thai, ...); `characters` the latter everywhere; `words` only words.
    k1: how soon a word that comes again stops counting more.
    b: how much long documents are held against theirs, from 0 (not at all) to 1.
    """

    tokens: Tokens = "mixed"
    k1: Positive = 1.5
    b: Share = 0.75

    def words(self, text: str) -> list[str]:
        """The words of a text, in lower case. `mixed`: a run of a script without spaces gives its characters and their
        pairs; `characters`: every run does; `words`: none does."""
        found: list[str] = []
        for run, unspaced in runs(folded(text)):
            if self.tokens == "words" or (self.tokens == "mixed" and not unspaced):
                found.append(run)
            else:
                single = letters(run)
                found += single + [left + right for left, right in pairwise(single)]
        return found

    def open(self, texts: SearchTexts) -> Searcher:
        return SharedSearcher.of(Bm25(self, texts.queries, texts.corpus, texts.sharing), texts.sharing)


class Bm25(Searcher):
    """The weights of the queries' words in the documents of a share of the corpus; all other words count only for the
    length of their documents. How often words come is counted over the whole corpus, so that scores do not depend on
    who holds what. Scores of a query are computed for the whole share at a time, [K] numbers."""

    def __init__(
        self, settings: Bm25Search, queries: Sequence[str], corpus: Sequence[str], sharing: Sharing | None = None
    ) -> None:
        self.settings, self.queries, self.corpus, self.sharing = settings, queries, corpus, sharing
        self.share = rank_share(sharing)
        self.starts = range(0, len(corpus), room.PIECE)[self.share[0] :: self.share[1]]

    def prepare(self, folder: Path) -> None:
        """Read the share. On ranks a collective. Errors: `DataError` for a corpus without a single word."""
        known = dict.fromkeys(word for query in self.queries for word in self.settings.words(query))
        self._number = {word: number for number, word in enumerate(known)}
        group = None if self.sharing is None else self.sharing.group
        counted = on_every_rank(self._counted, "count words", group=group)
        everywhere = objects_of_all_ranks(counted, group)
        self._weigh(*(sum(column[1:], start=column[0]) for column in zip(*everywhere, strict=True)))

    def _counted(self) -> tuple[int, IndexArray]:
        """How many words there are in the share, and in how many documents each of the queries' words stands."""
        word_P, times_P, document_P, length_K = array("i"), array("i"), array("i"), array("q")
        for start in self.starts:
            for text in self.corpus[start : start + room.PIECE]:
                words = self.settings.words(text)
                found = Counter(self._number[word] for word in words if word in self._number)
                word_P.extend(found.keys())
                times_P.extend(found.values())
                document_P.extend([len(length_K)] * len(found))
                length_K.append(len(words))
        read: Any = lambda values: np.frombuffer(values, values.typecode) if values else np.zeros(0, np.int64)
        order_P = np.argsort(read(word_P), kind="stable")  # by word, then in the order of the documents
        self._document_P, self._times_P = read(document_P)[order_P], read(times_P)[order_P]
        self._length_K = read(length_K)
        count_V: IndexArray = np.bincount(read(word_P), minlength=len(self._number))
        self._start_V = np.concatenate([[0], np.cumsum(count_V)])
        return int(self._length_K.sum()), count_V

    def _weigh(self, words: int, count_V: IndexArray) -> None:
        if words == 0:
            raise DataError("no text of the corpus has a word in it", expected="tokens that fit its script")
        documents, average = len(self.corpus), words / len(self.corpus)
        rarity_V = [math.log(1 + (documents - n + 0.5) / (n + 0.5)) if n else 0.0 for n in count_V.tolist()]
        k1, b = self.settings.k1, self.settings.b
        length_P = self._length_K[self._document_P]
        times_P = self._times_P / (k1 * ((1 - b) + b * length_P / average) + self._times_P)
        rarity_P = np.repeat(np.asarray(rarity_V, np.float32), np.diff(self._start_V))
        self._weight_P: FloatArray = (rarity_P * times_P).astype(np.float32)

    def top(self, start: int, stop: int, k: int) -> tuple[FloatArray, IndexArray]:
        """score_Qk and index_Qk, ties to the lower index. A document that shares no word with the query is none."""
        queries, k = self.queries[start:stop], min(k, len(self._length_K))
        score_Qk, index_Qk = np.zeros((len(queries), k), np.float32), np.full((len(queries), k), -1, np.int64)
        for row, query in enumerate(queries if k else ()):
            score_K = self.scores(query)
            reached = np.flatnonzero((score_K >= _floor(score_K, k)) & (score_K > 0))
            order = reached[np.argsort(-score_K[reached], kind="stable")][:k]
            score_Qk[row, : len(order)] = score_K[order]
            index_Qk[row, : len(order)] = np.asarray(self.starts)[order // room.PIECE] + order % room.PIECE
        return score_Qk, index_Qk

    def pairs(self, row_E: IndexArray, index_E: IndexArray) -> FloatArray:
        """Only the given documents are looked up, all of its share, and words are added in the same order as for the
        whole."""
        score_E = np.zeros(len(row_E), np.float32)
        held_E = index_E // room.PIECE // self.share[1] * room.PIECE + index_E % room.PIECE
        for row in np.unique(row_E):
            mine = np.flatnonzero(row_E == row)
            for column in self._columns(self.queries[int(row)]):
                document_P = self._document_P[column]
                place_E = np.searchsorted(document_P, held_E[mine])
                found_E = np.append(document_P, -1)[place_E] == held_E[mine]
                score_E[mine[found_E]] += self._weight_P[column][place_E[found_E]]
        return score_E

    def scores(self, query: str) -> FloatArray:
        """score_K of every document of the share; zeros for a query without a known word."""
        score_K = np.zeros(len(self._length_K), np.float32)
        for column in self._columns(query):
            score_K[self._document_P[column]] += self._weight_P[column]
        return score_K

    def _columns(self, query: str) -> list[slice]:
        """Where the weights of a query's words stand, a word that comes twice twice."""
        numbers = [self._number[word] for word in self.settings.words(query) if word in self._number]
        return [slice(int(self._start_V[number]), int(self._start_V[number + 1])) for number in numbers]


def _floor(score_K: FloatArray, k: int) -> float:
    """The k-th highest score, or a little less where that is found faster: the k-th of the highest in k or more blocks,
    which k scores reach."""
    rows = len(score_K) // _BLOCK
    if rows >= k:
        score_K = score_K[: rows * _BLOCK].reshape(rows, _BLOCK).max(1)
    return float(np.partition(score_K, len(score_K) - k)[len(score_K) - k])
