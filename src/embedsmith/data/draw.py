"""Records to the texts and ids of one batch. Pure functions: the same records and seeds give the same batch."""

import math
import random
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch

from embedsmith.core.batch import ABSENT, GroupIds, PairIds, RetrievalIds
from embedsmith.core.errors import DataError
from embedsmith.core.seeds import derive_seed
from embedsmith.data.record import Record, Text, draw_texts, shuffled, text_id


def retrieval_texts(
    records: Sequence[Record[Text]],
    *,
    positives: int,
    negatives: int,
    seeds: Sequence[int],
    share: tuple[int, int] = (0, 1),
    shuffle: float = 0.0,
) -> tuple[list[Text], list[Text], RetrievalIds]:
    """(queries, documents, ids): up to `positives` positives and `negatives` negatives of each record, drawn without
    replacement. Each distinct text stands once among the documents.

    A record with fewer leaves slots empty. A text is drawn at most once for a record, and a negative that is also
    one of the record's positives is never drawn. `share=(k, n)` keeps every n-th negative slot from the k-th: n
    calls with the same seeds share the drawn negatives between them. With probability `shuffle` a drawn positive is
    given with its parts in another order (`parts_shuffled`), under the id of the text itself.
    """
    queries = [record.query for record in records]
    documents: dict[int, Text] = {}
    positive_id_QP = np.full((len(records), positives), ABSENT)
    negative_id_QM = np.full((len(records), negatives), ABSENT)
    positive_score_QP = np.full(positive_id_QP.shape, np.nan, np.float32)
    negative_score_QM = np.full(negative_id_QM.shape, np.nan, np.float32)
    for q, (record, seed) in enumerate(zip(records, seeds, strict=True)):
        known = {text_id(text) for text in record.positives} if negatives and record.negatives else set()
        chance = random.Random(seed)
        scores = record.teacher_positive_scores or (None,) * len(record.positives)
        for p, (slot, id_) in enumerate(draw_texts(record.positives, positives, chance)):
            positive_id_QP[q, p] = id_
            positive_score_QP[q, p] = math.nan if (score := scores[slot]) is None else score
            text = record.positives[slot]
            documents.setdefault(id_, parts_shuffled(text, shuffle, seed) if shuffle > 0 else text)
        scores = record.teacher_negative_scores or (None,) * len(record.negatives)
        drawn = enumerate(draw_texts(record.negatives, negatives, chance, banned=known))
        for m, (slot, id_) in islice(drawn, share[0], None, share[1]):
            negative_id_QM[q, m] = id_
            negative_score_QM[q, m] = math.nan if (score := scores[slot]) is None else score
            documents.setdefault(id_, record.negatives[slot])
    taught = any(record.teacher_positive_scores or record.teacher_negative_scores for record in records)
    labels = [record.label for record in records if record.label is not None]
    ids = RetrievalIds(
        query_id_Q=torch.tensor([text_id(query) for query in queries], dtype=torch.int64),
        positive_id_QP=torch.from_numpy(positive_id_QP),
        negative_id_QM=torch.from_numpy(negative_id_QM),
        document_id_N=torch.tensor(list(documents), dtype=torch.int64),
        label_Q=torch.tensor(labels) if len(labels) == len(records) else None,
        positive_score_QP=torch.from_numpy(positive_score_QP) if taught else None,
        negative_score_QM=torch.from_numpy(negative_score_QM) if taught else None,
    )
    return queries, list(documents.values()), ids


def group_texts(
    records: Sequence[Record[Text]], *, positives: int, negatives: int, seeds: Sequence[int]
) -> tuple[list[Text], list[Text], list[int], GroupIds]:
    """(queries, documents, rows, ids): every record's query beside each of its own documents, drawn as in
    `retrieval_texts`; pair n is `queries[n]` with `documents[n]`, of the record `rows[n]`.

    A document's grade is its own score, where the data have one; else 1 for a positive and 0 for a negative.
    """
    shape = (len(records), positives + negatives)
    pair_QX = np.full(shape, ABSENT)
    grade_QX, teacher_QX = np.zeros(shape, np.float32), np.full(shape, np.nan, np.float32)
    queries: list[Text] = []
    documents: list[Text] = []
    rows: list[int] = []
    for q, (record, seed) in enumerate(zip(records, seeds, strict=True)):
        known = {text_id(text) for text in record.positives} if negatives and record.negatives else set()
        chance = random.Random(seed)
        answers = (record.positives, record.positive_scores, record.teacher_positive_scores)
        others = (record.negatives, record.negative_scores, record.teacher_negative_scores)
        sides = ((0, positives, set[int](), 1.0, answers), (positives, negatives, known, 0.0, others))
        for first, count, banned, usual, (texts, scores, taught) in sides:
            for x, (slot, _) in enumerate(draw_texts(texts, count, chance, banned=banned), start=first):
                pair_QX[q, x] = len(queries)
                own, teacher = scores and scores[slot], taught and taught[slot]
                grade_QX[q, x] = usual if own is None else own
                teacher_QX[q, x] = math.nan if teacher is None else teacher
                queries.append(record.query)
                documents.append(texts[slot])
                rows.append(q)
    tensors = (torch.from_numpy(each) for each in (pair_QX, grade_QX, teacher_QX))
    names = ("pair_QX", "grade_QX", "teacher_QX")
    ids = GroupIds(**dict(zip(names, tensors, strict=True)), positives=positives, pairs=len(queries))
    return queries, documents, rows, ids


def pair_texts(records: Sequence[Record[Text]], *, seeds: Sequence[int]) -> tuple[list[Text], list[Text], PairIds]:
    """(left, right, ids) of the pairs of a batch, with labels in [0, 1]; a record with several scored positives gives
    one of them, drawn with its seed.

    Errors: `DataError` for a record without a scored pair.
    """
    right: list[Text] = []
    labels: list[float] = []
    for record, seed in zip(records, seeds, strict=True):
        scored = {slot: s for slot, s in enumerate(record.positive_scores or ()) if s is not None and not math.isnan(s)}
        if not scored:
            raise DataError(f"no scored pair in the record of {record.query!r:.60}", fix="give every sts row a score")
        slot = list(scored)[shuffled(len(scored), random.Random(seed))[0] if len(scored) > 1 else 0]
        right.append(record.positives[slot])
        labels.append(scored[slot])
    left = [record.query for record in records]
    ids = PairIds(
        left_id_N=torch.tensor([text_id(text) for text in left], dtype=torch.int64),
        right_id_N=torch.tensor([text_id(text) for text in right], dtype=torch.int64),
        label_N=torch.tensor(labels, dtype=torch.float32),
    )
    return left, right, ids


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
    return " ".join(parts[place] for place in shuffled(len(parts), chance))
