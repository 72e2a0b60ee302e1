"""Ragged tokens: what is padded, taken, cut into chunks and packed is what stood in the rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedsmith.core.tokens import TokenBatch, chunk_rows, packed_rows

ROWS = [[5, 6, 7], [], [8], [9, 5, 5, 6]]
BODY = [1, 0, 0, 2]
QUERY = [True, False, True, False]
lengths = st.lists(st.integers(0, 12), max_size=12).map(lambda row: np.asarray(row, np.int64))


def batch():
    return TokenBatch.from_rows(ROWS, BODY, QUERY)


def rows_of(tokens):
    return [tokens.id_S[a:b].tolist() for a, b in zip(tokens.offset_P, tokens.offset_P[1:])]


def test_rows_are_taken_in_any_order_and_more_than_once():
    taken = batch().take([3, 0, 1, 3])
    assert rows_of(taken) == [ROWS[3], ROWS[0], [], ROWS[3]]
    assert taken.body_N.tolist() == [2, 1, 0, 2]
    assert taken.is_query_N.tolist() == [False, True, False, False]
    assert len(batch()) == 4
    joined = TokenBatch.concatenate([batch(), taken])
    assert rows_of(joined) == ROWS + rows_of(taken)
    assert joined.body_N.tolist() == [*BODY, 2, 1, 0, 2]
    assert joined.is_query_N.tolist() == [*QUERY, False, True, False, False]


def test_one_answer_for_all_rows():
    assert TokenBatch.from_rows(ROWS, BODY, True).is_query_N.tolist() == [True] * 4


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("rows", [None, [3, 1, 0]])
def test_padding_is_beside_the_tokens_and_in_no_mask(left, rows):
    chosen = range(4) if rows is None else rows
    padded = batch().pad(5, left=left, rows=None if rows is None else np.asarray(rows))
    for n, row in enumerate(chosen):
        ids, gap = ROWS[row], [False] * (4 - len(ROWS[row]))
        body = [place >= BODY[row] for place in range(len(ids))]
        for mask, own in ((padded.mask_NT, [True] * len(ids)), (padded.body_NT, body)):
            assert mask[n].tolist() == (gap + own if left else own + gap)
        assert padded.id_NT[n][padded.mask_NT[n]].tolist() == ids
        assert padded.id_NT[n][~padded.mask_NT[n]].tolist() == [5] * len(gap)
    assert padded.is_query_N.tolist() == [QUERY[row] for row in chosen]


def test_a_batch_without_tokens_has_one_column():
    assert batch().pad(0, rows=np.asarray([1])).id_NT.shape == (1, 1)
    assert torch.equal(batch().pad(3, rows=np.asarray([1])).id_NT, torch.tensor([[3]]))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(lengths, st.integers(1, 20), st.none() | st.integers(1, 4), st.none() | st.integers(1, 9))
def test_chunks_hold_every_row_once_longest_first_and_within_the_budget(length_N, budget, rows, least):
    chunks = chunk_rows(length_N, budget, rows, least)
    assert sorted(np.concatenate([*chunks, []])) == list(range(len(length_N)))
    falling = [length_N[row] for chunk in chunks for row in chunk]
    assert falling == sorted(falling, reverse=True)
    for chunk, following in zip(chunks, [*chunks[1:], None]):
        longest = max(int(length_N[chunk[0]]), 1)
        assert len(chunk) == 1 or len(chunk) * longest <= budget
        assert rows is None or len(chunk) <= rows
        if following is None:
            continue
        full = (len(chunk) + 1) * longest > budget or len(chunk) == rows
        shorter = least is not None and length_N[following[0]] < 0.9 * longest and len(chunk) * longest >= least
        assert full or shorter, "a chunk ends for a reason"


def test_chunks_end_where_texts_get_shorter():
    length_N = np.asarray([10, 10, 9, 8, 4, 4])
    assert [chunk.tolist() for chunk in chunk_rows(length_N, 100, None, 10)] == [[0, 1, 2], [3, 4], [5]]
    assert [chunk.tolist() for chunk in chunk_rows(length_N, 100, None, 40)] == [[0, 1, 2, 3], [4, 5]]
    assert [chunk.tolist() for chunk in chunk_rows(length_N, 20)] == [[0, 1], [2, 3], [4, 5]]
    assert [chunk.tolist() for chunk in chunk_rows(np.zeros(3, np.int64), 2)] == [[0, 1], [2]]


@settings(max_examples=40, derandomize=True, deadline=None)
@given(lengths, st.integers(1, 20), st.none() | st.integers(1, 4))
def test_packed_chunks_are_as_full_as_they_can_be(length_N, budget, rows):
    chunks = packed_rows(length_N, budget, rows)
    assert sorted(np.concatenate([*chunks, []])) == list(range(len(length_N)))
    for chunk, following in zip(chunks, [*chunks[1:], None]):
        held = int(length_N[chunk].sum())
        assert len(chunk) == 1 or held <= budget
        assert rows is None or len(chunk) <= rows
        assert following is None or len(chunk) == rows or held + length_N[following[0]] > budget
