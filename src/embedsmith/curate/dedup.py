"""Duplicates: the same text, and nearly the same text (MinHash with locality-sensitive hashing, by rensa)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from embedsmith.core.errors import MissingExtraError
from embedsmith.core.settings import Count
from embedsmith.core.shelf import curation_steps
from embedsmith.curate.comparing import ComparingStep
from embedsmith.curate.ledger import Ledger, PerRecord, Tools, short
from embedsmith.curate.rules import token_shingles
from embedsmith.data.record import Record, text_id

By = Literal["query", "positives", "record"]
_BETWEEN = "\u2063"
"""Keeps texts apart that are compared as one; no text has it and no comparison takes it for white space."""


@curation_steps.register("exact_duplicates", formula="each text_id(by) at most `keep` times")
@dataclass(frozen=True)
class ExactDuplicates(ComparingStep):
    """Keep the first records with the same text, drop the later ones.

    Same means equal after Unicode normalisation (NFC) and with runs of white space collapsed. Memory: one number a
    distinct text.

    `by`: what is compared: the query, the positives, or the record (query and positives; for similarity, the pair).
    `keep`: how many may share it; 20 of the same positives removes answers that are given to everything.
    """

    by: By = "record"
    keep: Count = 1

    def sketch(self, record: Record) -> int | None:
        parts = _parts(record, self.by)
        return text_id(_BETWEEN.join(parts)) if any(parts) else None

    def keys(self, sketch: int) -> Sequence[int]:
        return (sketch,)

    def memory(self) -> Callable[[int], str | None]:
        once: set[int] = set()
        more: Counter[int] = Counter()

        def like_earlier(id_: int) -> str | None:
            if id_ not in once:
                once.add(id_)
            elif more[id_] < self.keep - 1:
                more[id_] += 1
            else:
                return ""
            return None

        return like_earlier

    def leave(self, record: Record, like: str, ledger: Ledger) -> None:
        ledger.record_left(f"same {self.by} as an earlier one", record, like)


@curation_steps.register(
    "near_duplicates",
    formula="J(a, b) = |A n B| / |A u B| of shingles < threshold, estimated by MinHash",
    source="Broder 1997; banded locality-sensitive hashing",
)
@dataclass(frozen=True)
class NearDuplicates(ComparingStep):
    """Keep the first of records whose texts share most of their shingles, drop the later ones.

    Candidates come from hash bands, and leave if the similarity estimated from all hashes reaches the threshold
    (standard error at most 0.5 / sqrt(permutations)). A pair exactly at the threshold is found with a probability of at
    least 0.9. Texts that differ in one number are near duplicates too: look at the examples in the report before
    trusting a low threshold on short texts. Memory: about 3 KB a kept record with 128 permutations.

    `by`: what is compared; with `record` one leaves only if both its query and its positives are like those of one
    earlier record, so other questions about the same passage stay.
    `threshold`: the share of shingles in common, of all those of the two texts, from which a record leaves.
    `shingle`: characters of the text's tokens joined by spaces, where each Chinese character is a token: 5 are a word
    or so of English, two to three characters of Chinese.
    `permutations`: hashes of a text; more estimate the similarity better, for more memory.
    `seed`: of the hashes.

    Errors: `MissingExtraError` without the package rensa.
    """

    by: By = "record"
    threshold: Annotated[float, Field(ge=0.05, le=1)] = 0.8
    shingle: Count = 5
    permutations: Annotated[int, Field(ge=16, le=4096)] = 128
    seed: int = 0

    def sketch(self, record: Record) -> Sketch | None:
        parts = [text for text in _parts(record, self.by) if text]
        hashes = [_rensa().RMinHash(self.permutations, self.seed) for _ in parts]
        for one, text in zip(hashes, parts):
            one.update(list(token_shingles(text, self.shingle)))
        return Sketch(hashes, " | ".join(short(text, 60) for text in parts)) if parts else None

    def keys(self, sketch: Sketch) -> Sequence[int]:
        """Of each band of the first part's hashes, with the number of parts: only records of as many are compared."""
        bands = np.array(sketch.hashes[0].digest(), "<u4").reshape(self._bands, -1)
        whole = (f"{len(sketch.hashes)} {band} ".encode() + hashes.tobytes() for band, hashes in enumerate(bands))
        return [int.from_bytes(blake2b(key, digest_size=8).digest(), "little") for key in whole]

    def memory(self) -> Callable[[Sketch], str | None]:
        index = _rensa().RMinHashLSH(self.threshold, self.permutations, self._bands)
        kept: list[Sketch] = []

        def like_earlier(sketch: Sketch) -> str | None:
            mine = sketch.hashes
            candidates = [key for key in index.query(mine[0]) if len(kept[key].hashes) == len(mine)]
            alike = {key: min(a.jaccard(b) for a, b in zip(mine, kept[key].hashes)) for key in candidates}
            most = max(alike, key=lambda key: (alike[key], -key), default=None)
            if most is not None and alike[most] >= self.threshold:
                return f"similarity about {alike[most]:.2f} to: {kept[most].shown}"
            index.insert(len(kept), mine[0])
            kept.append(sketch)
            return None

        return like_earlier

    def leave(self, record: Record, like: str, ledger: Ledger) -> None:
        ledger.record_left(f"nearly the same {self.by} as an earlier one", record, like)

    @property
    def _bands(self) -> int:
        return band_count(self.threshold, self.permutations)


@dataclass(frozen=True, slots=True)
class Sketch:
    """The hashes of each text of a record, and its beginning, to say of a near duplicate what it is like."""

    hashes: list[Any]
    shown: str


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise MissingExtraError("rensa", "curate") from error
    return rensa


@lru_cache
def band_count(threshold: float, permutations: int, recall: float = 0.9) -> int:
    """The fewest bands b that find a pair at the threshold t with probability 1 - (1 - t^r)^b of at least `recall`,
    where r = permutations / b; fewer bands mean less memory and fewer candidates."""
    divisors = [bands for bands in range(1, permutations + 1) if permutations % bands == 0]
    found = (bands for bands in divisors if 1 - (1 - threshold ** (permutations // bands)) ** bands >= recall)
    return next(found, permutations)


def _parts(record: Record, by: By) -> tuple[str, ...]:
    """The texts that are compared; the order of a list of positives does not matter."""
    positives = _BETWEEN.join(sorted(record.positives))
    return {"query": (record.query,), "positives": (positives,), "record": (record.query, positives)}[by]


@dataclass(frozen=True)
class OnePositiveEach(PerRecord):
    """Every positive as a record of its own: what queries are written for."""

    def over(self, records: Iterable[Record], ledger: Ledger, tools: Tools, known: None) -> Iterator[Record]:
        for record in records:
            ledger.taken += 1
            for text in record.positives:
                yield Record(record.query, (text,), task="retrieval", source=record.source)


@dataclass(frozen=True)
class DistinctPositives(ExactDuplicates):
    """Each positive once. `what`: what the report calls one."""

    by: By = "positives"
    what: str = "positive"

    def leave(self, record: Record, like: str, ledger: Ledger) -> None:
        ledger.text_lost(f"{self.what} seen before", record, record.positives[0])
