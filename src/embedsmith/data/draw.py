"""Records to the texts and ids of one batch. Pure functions: the same records and seeds give the same batch.

The fields are those of `core.batch.RetrievalBatch` and `PairBatch`, still as texts and NumPy arrays.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from embedsmith.core.batch import ABSENT
from embedsmith.core.errors import DataError
from embedsmith.core.seeds import derive_seed
from embedsmith.core.tokens import IntArray
from embedsmith.data.record import Record, Scores, Text, text_id

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RetrievalTexts:
    """Queries, the documents they drew (each distinct text once), and who belongs to whom, by text id.

    Empty slots of `positive_id_QP` and `negative_id_QM` are `ABSENT`. `positive_score_QP` and `negative_score_QM`
    are teacher scores, NaN where unknown, or `None` when no record has any; `label_Q` is `None` unless every record
    has a label.
    """

    queries: list[Text]
    documents: list[Text]
    query_id_Q: IntArray
    positive_id_QP: IntArray
    negative_id_QM: IntArray
    document_id_N: IntArray
    positive_score_QP: FloatArray | None
    negative_score_QM: FloatArray | None
    label_Q: IntArray | None
    instructions: list[str | None]


@dataclass(frozen=True)
class PairTexts:
    """Two aligned sides and how alike they are, in [0, 1]."""

    left: list[Text]
    right: list[Text]
    label_N: FloatArray
    left_id_N: IntArray
    right_id_N: IntArray
    instructions: list[str | None]


def row_seeds(seed: int, visit: int, rows: Sequence[int] | IntArray) -> list[int]:
    """One seed a row, from (seed, visit, row) alone: not from the rank, nor from the other rows of the batch."""
    return [derive_seed(seed, visit, int(row)) for row in rows]


def retrieval_texts(
    records: Sequence[Record[Text]],
    *,
    positives: int,
    negatives: int,
    seeds: Sequence[int],
    share: tuple[int, int] = (0, 1),
    shuffle: float = 0.0,
) -> RetrievalTexts:
    """Draw up to `positives` positives and `negatives` negatives of each record, without replacement.

    A record with fewer leaves slots empty. A text is drawn at most once for a record, and a negative that is also
    one of the record's positives is never drawn. `share=(k, n)` keeps every n-th negative slot from the k-th: n
    calls with the same seeds share the drawn negatives between them. With probability `shuffle` a drawn positive is
    given with its parts in another order (`parts_shuffled`), under the id of the text itself.
    """
    positive_id_QP = np.full((len(records), positives), ABSENT, dtype=np.int64)
    negative_id_QM = np.full((len(records), negatives), ABSENT, dtype=np.int64)
    positive_score_QP = np.full(positive_id_QP.shape, np.nan, dtype=np.float32)
    negative_score_QM = np.full(negative_id_QM.shape, np.nan, dtype=np.float32)
    documents: dict[int, Text] = {}
    for q, (record, seed) in enumerate(zip(records, seeds, strict=True)):
        known = {text_id(text) for text in record.positives} if negatives and record.negatives else set()
        chance = random.Random(seed)
        for p, (slot, id_) in enumerate(_draw(record.positives, positives, chance, set())):
            positive_id_QP[q, p], positive_score_QP[q, p] = id_, _score(record.teacher_positive_scores, slot)
            documents.setdefault(id_, parts_shuffled(record.positives[slot], shuffle, seed))
        drawn = _draw(record.negatives, negatives, chance, known)
        for m, (slot, id_) in islice(enumerate(drawn), share[0], None, share[1]):
            negative_id_QM[q, m], negative_score_QM[q, m] = id_, _score(record.teacher_negative_scores, slot)
            documents.setdefault(id_, record.negatives[slot])
    taught = any(r.teacher_positive_scores or r.teacher_negative_scores for r in records)
    labels = [record.label for record in records if record.label is not None]
    return RetrievalTexts(
        queries=[record.query for record in records],
        documents=list(documents.values()),
        query_id_Q=_ids([record.query for record in records]),
        positive_id_QP=positive_id_QP,
        negative_id_QM=negative_id_QM,
        document_id_N=np.fromiter(documents, np.int64, len(documents)),
        positive_score_QP=positive_score_QP if taught else None,
        negative_score_QM=negative_score_QM if taught else None,
        label_Q=np.asarray(labels, np.int64) if len(labels) == len(records) else None,
        instructions=[record.instruction for record in records],
    )


def pair_texts(records: Sequence[Record[Text]], *, seeds: Sequence[int]) -> PairTexts:
    """The pairs of a batch; a record with several positives gives one of them, drawn with its seed.

    Errors: `DataError` for a record without a scored pair.
    """
    slots = [_pair_slot(record, seed) for record, seed in zip(records, seeds, strict=True)]
    left = [record.query for record in records]
    right = [record.positives[slot] for record, slot in zip(records, slots)]
    labels = [_score(record.positive_scores, slot) for record, slot in zip(records, slots)]
    return PairTexts(
        left=left,
        right=right,
        label_N=np.asarray(labels, np.float32),
        left_id_N=_ids(left),
        right_id_N=_ids(right),
        instructions=[record.instruction for record in records],
    )


def parts_shuffled(text: Text, probability: float, seed: int) -> Text:
    """M3's text shuffling: with this probability a text of more than 100 characters is cut in three equal parts, which
    are put in another order, joined by spaces; tokens stay as they are. A function of its arguments alone.

    Source: M3-Embedding's released code (`shuffle_ratio`); the paper shuffles 0.2 % of the passages.
    """
    if probability == 0 or not isinstance(text, str) or len(text) <= 100:
        return text
    chance = random.Random(derive_seed(seed, "parts"))
    if chance.random() >= probability:
        return text
    size = len(text) // 3 + 1
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    return " ".join(parts[place] for place in _shuffled(len(parts), chance))


def _pair_slot(record: Record[Text], seed: int) -> int:
    scored = [slot for slot in range(len(record.positives)) if not np.isnan(_score(record.positive_scores, slot))]
    if not scored:
        raise DataError(f"no scored pair in the record of {record.query!r:.60}", fix="give every sts row a score")
    return scored[0] if len(scored) == 1 else scored[_shuffled(len(scored), random.Random(seed))[0]]


def _draw(texts: Sequence[Text], count: int, chance: random.Random, banned: set[int]) -> Iterator[tuple[int, int]]:
    """Up to `count` (slot, id) of distinct texts, at random, none of them banned."""
    seen = set(banned)
    order = range(len(texts)) if len(texts) <= count else _shuffled(len(texts), chance)
    left = count
    for slot in order:
        if left == 0:
            return
        id_ = text_id(texts[slot])
        if id_ not in seen:
            seen.add(id_)
            left -= 1
            yield slot, id_


def _shuffled(count: int, chance: random.Random) -> list[int]:
    """Sorted by `random()`, whose stream Python promises to keep; `sample` and `shuffle` make no such promise."""
    keys = [chance.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def _score(scores: Scores | None, slot: int) -> float:
    score = scores[slot] if scores else None
    return float("nan") if score is None else score


def _ids(texts: Sequence[Text]) -> IntArray:
    return np.fromiter((text_id(text) for text in texts), np.int64, len(texts))
