"""Records to texts and ids."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from embedsmith.core.batch import ABSENT
from embedsmith.core.errors import DataError
from embedsmith.core.seeds import derive_seed
from embedsmith.data import Record, pair_texts, retrieval_texts, text_id

RECORDS = [
    Record("q1", ("p1", "p2", "p3"), ("n1", "n2", "n3", "n4")),
    Record("q2", ("p2",), ("n1", "p1")),
    Record("q3", ("p4",), (), instruction="find"),
]


def batch(records=RECORDS, positives=2, negatives=3, seed=0, visit=0):
    seeds = [derive_seed(seed, visit, row) for row in range(len(records))]
    return retrieval_texts(records, positives=positives, negatives=negatives, seeds=seeds)


def ids_of(*arguments, **options):
    return batch(*arguments, **options)[2]


def ids(texts):
    return {text_id(text) for text in texts}


def test_slots_hold_the_record_s_own_texts_and_absent_beyond():
    queries, _, found = batch()
    assert found.positive_id_QP.shape == (3, 2)
    assert found.negative_id_QM.shape == (3, 3)
    for q, record in enumerate(RECORDS):
        for slots, texts in ((found.positive_id_QP[q], record.positives), (found.negative_id_QM[q], record.negatives)):
            held = slots[slots != ABSENT].tolist()
            assert len(held) == len(set(held)) == min(len(texts), len(slots))
            assert set(held) <= ids(texts)
            assert (slots[len(held) :] == ABSENT).all()
    assert found.query_id_Q.tolist() == [text_id("q1"), text_id("q2"), text_id("q3")]
    assert queries == ["q1", "q2", "q3"]


def test_documents_are_each_distinct_text_once_and_all_that_was_drawn():
    _, documents, found = batch()
    assert [text_id(text) for text in documents] == found.document_id_N.tolist()
    drawn = {*found.positive_id_QP.flatten().tolist(), *found.negative_id_QM.flatten().tolist()} - {ABSENT}
    assert sorted(found.document_id_N.tolist()) == sorted(drawn)


def test_a_draw_depends_on_its_seed_and_on_nothing_else():
    first = ids_of(seed=1)
    again = ids_of(seed=1)
    assert torch.equal(first.negative_id_QM, again.negative_id_QM)
    alone = ids_of(RECORDS[:1], seed=1)
    assert torch.equal(alone.negative_id_QM[0], first.negative_id_QM[0])
    draws = {tuple(ids_of(seed=1, visit=visit).negative_id_QM[0].tolist()) for visit in range(20)}
    assert len(draws) > 10


def test_every_text_is_drawn_equally_often():
    counts = Counter(int(ids_of(RECORDS[:1], 1, 1, visit=visit).negative_id_QM[0, 0]) for visit in range(4000))
    assert set(counts) == ids(RECORDS[0].negatives)
    assert all(900 < count < 1100 for count in counts.values())


def test_a_negative_that_is_a_positive_and_a_repeated_text_are_not_drawn():
    record = Record("q", ("good", "also good"), ("good ", "bad", "bad", "also  good"))
    found = ids_of([record], positives=1, negatives=4)
    assert found.negative_id_QM[0].tolist() == [text_id("bad"), ABSENT, ABSENT, ABSENT]
    twice = ids_of([Record("q", ("same", "same "))], positives=2, negatives=0)
    assert twice.positive_id_QP[0].tolist() == [text_id("same"), ABSENT]


def test_teacher_scores_follow_their_texts():
    record = Record("q", ("p",), tuple("abcdef"), teacher_negative_scores=(0.0, 1.0, 2.0, 3.0, None, 5.0))
    found = ids_of([record, RECORDS[1]], positives=1, negatives=4)
    known = dict(zip((text_id(letter) for letter in "abcdef"), (0.0, 1.0, 2.0, 3.0, np.nan, 5.0)))
    expected = [known[int(id_)] for id_ in found.negative_id_QM[0]]
    np.testing.assert_array_equal(found.negative_score_QM[0], np.float32(expected))
    assert found.positive_score_QP.isnan().all()
    assert found.negative_score_QM[1].isnan().all()
    assert ids_of().positive_score_QP is None


def test_labels_only_where_every_record_has_one():
    labelled = [Record("a", label=2, task="classification"), Record("b", label=0, task="classification")]
    _, documents, found = batch(labelled)
    assert found.label_Q.tolist() == [2, 0]
    assert (found.positive_id_QP == ABSENT).all()
    assert documents == []
    assert ids_of([*labelled, RECORDS[0]]).label_Q is None


def test_pairs():
    records = [
        Record("a", ("b",), task="sts", positive_scores=(0.25,)),
        Record("c", ("d", "e", "f"), task="sts", positive_scores=(None, 0.5, 1.0)),
    ]
    left, right, found = pair_texts(records, seeds=[1, 2])
    assert left == ["a", "c"]
    assert (right[0], found.label_N[0]) == ("b", 0.25)
    assert found.left_id_N.tolist() == [text_id("a"), text_id("c")]
    assert found.right_id_N.tolist() == [text_id(text) for text in right]
    drawn = [pair_texts(records[1:], seeds=[seed]) for seed in range(40)]
    assert {(right[0], float(pair.label_N[0])) for _, right, pair in drawn} == {("e", 0.5), ("f", 1.0)}
    with pytest.raises(DataError, match="no scored pair"):
        pair_texts(RECORDS, seeds=[1, 2, 3])


def test_one_seed_a_record():
    with pytest.raises(ValueError, match="zip"):
        retrieval_texts(RECORDS, positives=1, negatives=0, seeds=[1])


def test_shares_split_the_drawn_negatives():
    record = Record("q", ("p",), tuple(f"n{i}" for i in range(9)))
    whole = retrieval_texts([record], positives=1, negatives=5, seeds=[3])[2].negative_id_QM
    parts = [retrieval_texts([record], positives=1, negatives=5, seeds=[3], share=(k, 2))[2] for k in range(2)]
    kept = [part.negative_id_QM[part.negative_id_QM != ABSENT].tolist() for part in parts]
    assert [len(each) for each in kept] == [3, 2]
    assert sorted(kept[0] + kept[1]) == sorted(whole.flatten().tolist())
    assert set(parts[0].document_id_N.tolist()) & set(parts[1].document_id_N.tolist()) == {
        parts[0].positive_id_QP.item()
    }


def test_scored_negatives_of_similarity_records_make_pairs_too():
    record = Record("a", ("b",), ("c", "d"), task="sts", positive_scores=(0.9,), negative_scores=(0.2, None))
    drawn = [pair_texts([record], seeds=[seed]) for seed in range(40)]
    found = {(right[0], round(float(ids.label_N), 3)) for _, right, ids in drawn}
    assert found == {("b", 0.9), ("c", 0.2)}
    graded = replace(record, task="retrieval")
    _, _, ids = retrieval_texts([graded], positives=1, negatives=2, seeds=[0])
    assert ids.positive_grade_QP.tolist() == [[pytest.approx(0.9)]]
    grades = dict(zip(ids.negative_id_QM[0].tolist(), ids.negative_grade_QM[0].tolist(), strict=True))
    assert grades[text_id("c")] == pytest.approx(0.2)
    assert math.isnan(grades[text_id("d")])
    plain = Record("a", ("b",), ("c",))
    assert retrieval_texts([plain], positives=1, negatives=1, seeds=[0])[2].positive_grade_QP is None
