"""Duplicates: the same text, and nearly the same text (MinHash with locality-sensitive hashing, by rensa)."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from embedsmith.core.errors import MissingExtraError
from embedsmith.core.settings import Count
from embedsmith.core.shelf import curation_steps
from embedsmith.curate.ledger import Ledger, Tools, short
from embedsmith.curate.rules import token_shingles
from embedsmith.data.record import Record, text_id

By = Literal["query", "positives", "record"]
_BETWEEN = "\u2063"
"""Keeps texts apart that are compared as one; no text has it and no comparison takes it for white space."""


@curation_steps.register("exact_duplicates", formula="each text_id(by) at most `keep` times")
@dataclass(frozen=True)
class ExactDuplicates:
    """Keep the first records with the same text, drop the later ones.

    Same means equal after Unicode normalisation (NFC) and with runs of white space collapsed. Memory: one number a
    distinct text.

    `by`: what is compared: the query, the positives, or the record (query and positives; for similarity, the pair).
    `keep`: how many may share it; 20 of the same positives removes answers that are given to everything.
    """

    by: By = "record"
    keep: Count = 1

    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        seen: Counter[int] = Counter()
        once: set[int] = set()
        for record in records:
            ledger.taken += 1
            parts = _parts(record, self.by)
            id_ = text_id(_BETWEEN.join(parts))
            if not any(parts):
                yield record
            elif id_ not in once:
                once.add(id_)
                yield record
            elif seen[id_] < self.keep - 1:
                seen[id_] += 1
                yield record
            else:
                ledger.record_left(f"same {self.by} as an earlier one", record)


@curation_steps.register(
    "near_duplicates",
    formula="J(a, b) = |A n B| / |A u B| of shingles < threshold, estimated by MinHash",
    source="Broder 1997; banded locality-sensitive hashing",
)
@dataclass(frozen=True)
class NearDuplicates:
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

    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        try:
            import rensa
        except ImportError as error:
            raise MissingExtraError("rensa", "curate") from error
        index = rensa.RMinHashLSH(self.threshold, self.permutations, band_count(self.threshold, self.permutations))
        kept: list[list[Any]] = []
        shown: list[str] = []  # the beginnings of kept texts, to say of a near duplicate what it is like
        for record in records:
            ledger.taken += 1
            parts = [text for text in _parts(record, self.by) if text]
            sketches = [rensa.RMinHash(self.permutations, self.seed) for _ in parts]
            for sketch, text in zip(sketches, parts):
                sketch.update(list(token_shingles(text, self.shingle)))
            candidates = [key for key in index.query(sketches[0]) if len(kept[key]) == len(parts)] if parts else []
            alike = {key: min(a.jaccard(b) for a, b in zip(sketches, kept[key], strict=True)) for key in candidates}
            most = max(alike, key=lambda key: alike[key], default=None)
            if most is not None and alike[most] >= self.threshold:
                why = f"similarity about {alike[most]:.2f} to: {shown[most]}"
                ledger.record_left(f"nearly the same {self.by} as an earlier one", record, why)
                continue
            if parts:
                index.insert(len(kept), sketches[0])
                kept.append(sketches)
                shown.append(" | ".join(short(text, 60) for text in parts))
            yield record


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
