"""Training texts that an evaluation set holds too: found by equality and by shared runs of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Literal

import numpy as np
import numpy.typing as npt

from embedsmith.core.encoder import Role
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.settings import Count, Share
from embedsmith.core.shelf import curation_steps
from embedsmith.core.words import UNSPACED, words
from embedsmith.curate.ledger import EvaluationText, Ledger, PerRecord, Tools
from embedsmith.data.record import Record

Hashes = npt.NDArray[np.uint64]
_UNSPACED_START = re.compile(f"[{UNSPACED}]")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@curation_steps.register(
    "decontaminate",
    formula="drop t iff tokens(t) equals those of an evaluation text, or shares >= overlap of its runs of n tokens",
    source="n-gram overlap as in GPT-3 (arXiv 2005.14165, appendix C), with our own thresholds",
)
@dataclass(frozen=True)
class Decontaminate(PerRecord):
    """Drop texts that are in an evaluation set.

    Two texts are compared by their tokens: words, and each Chinese character, without differences of case, marks and
    spaces. A text leaves if its tokens equal those of an evaluation text, or if the two share enough runs of tokens; a
    query takes its record along. Texts with fewer tokens than a run are compared for equality only. Memory: 12 bytes a
    run of the evaluation texts.

    `tasks`: names or paths of evaluation tasks, as for `embedsmith evaluate`.
    `against`: compare with their queries (and both texts of similarity pairs), their documents, or both.
    `ngram`: tokens of a run.
    `ngram_unspaced`: tokens of a run in a script without spaces, such as Chinese.
    `overlap`: the share of the shorter text's runs that two texts must have in common.
    `shortest`: texts of fewer tokens are not compared at all.

    Errors: `DataError` if the evaluation sets hold no text.
    """

    tasks: tuple[str, ...]
    against: tuple[Literal["query", "document"], ...] = ("query", "document")
    ngram: Count = 10
    ngram_unspaced: Count = 16
    overlap: Share = 0.5
    shortest: Count = 3

    def __post_init__(self) -> None:
        if not self.tasks or not self.against:
            raise RecipeError("decontaminate needs tasks", expected="for example tasks: [stsb-en, cranfield]")

    def prepare(self, ledger: Ledger, tools: Tools, surveys: Sequence[None]) -> Index:
        if tools.evaluation is None:
            raise DataError("decontaminate has no evaluation texts", fix="pass Tools(evaluation=...)")
        index = Index(self)
        count = index.read(text for text in tools.evaluation(self.tasks) if text.role in self.against)
        if not count:
            raise DataError(f"no texts in {', '.join(self.tasks)}", fix="check the tasks and `against`")
        ledger.notes["evaluation texts"] = count
        return index

    def over(self, records: Iterable[Record], ledger: Ledger, tools: Tools, known: Index) -> Iterator[Record]:
        return ledger.sift(records, known.fault)


@dataclass
class Index:
    """Evaluation texts as hashes: of whole texts, and of their runs, sorted, so that a lookup is a binary search."""

    step: Decontaminate
    whole: dict[int, int] = field(default_factory=dict)  # hash of a text: its owner
    owners: list[str] = field(default_factory=list)  # what to say of each text
    sizes: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))  # how many runs each has
    runs: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))
    owner_of_run: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))

    def read(self, texts: Iterable[EvaluationText]) -> int:
        parts: list[Hashes] = []
        names: dict[str, str] = {}
        for owner, text in enumerate(texts):
            name = f"{text.task}, a {text.role}"
            self.owners.append(names.setdefault(name, name))
            found = words(text.text)
            if len(found) >= self.step.shortest:
                self.whole.setdefault(_hash(" ".join(found)), owner)
            parts.append(self._runs(found))
        if parts:
            self.sizes = np.array([len(part) for part in parts], np.uint64)
            self.runs, first = np.unique(np.concatenate(parts), return_index=True)
            self.owner_of_run = np.repeat(np.arange(len(parts), dtype=np.int32), self.sizes.astype(np.int64))[first]
        return len(parts)

    def fault(self, text: str, role: Role) -> str | None:
        found = words(text)
        if len(found) >= self.step.shortest and (owner := self.whole.get(_hash(" ".join(found)))) is not None:
            return f"the same as in {self.owners[owner]}"
        mine = self._runs(found)
        if not len(mine) or not len(self.runs):
            return None
        place = np.minimum(np.searchsorted(self.runs, mine), len(self.runs) - 1)
        owners, counts = np.unique(self.owner_of_run[place[self.runs[place] == mine]], return_counts=True)
        shares = counts / np.minimum(self.sizes[owners].astype(np.int64), len(mine))
        if not len(shares) or shares.max() < self.step.overlap:
            return None
        return f"overlaps with a text of {self.owners[owners[shares.argmax()]]}"

    def _runs(self, found: Sequence[str]) -> Hashes:
        """The distinct runs of the tokens, as hashes; none if the text is shorter than a run."""
        unspaced = sum(bool(_UNSPACED_START.match(token)) for token in found) > len(found) / 2
        length = self.step.ngram_unspaced if unspaced else self.step.ngram
        if len(found) < length:
            return np.zeros(0, np.uint64)
        hash_T = np.fromiter((_hash(token) for token in found), np.uint64, len(found))
        run_W = np.zeros(len(found) - length + 1, np.uint64)
        for place in range(length):  # a polynomial of the run's tokens, modulo 2**64
            run_W = run_W * _FACTOR + hash_T[place : place + len(run_W)]
        return np.unique(run_W)


@lru_cache(maxsize=1 << 16)
def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
