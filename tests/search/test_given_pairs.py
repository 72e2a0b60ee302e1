"""Scores of given pairs: those of the plain product, in pieces, by halves where a card has no room, and on a card."""

import numpy as np
import pytest
import torch
from tests.played_card import CARD, PlayedCard

from embedsmith.core.errors import SearchError
from embedsmith.core.reps import Dense, MultiVector, Sparse
from embedsmith.search import given_pairs
from embedsmith.search.given_pairs import one_to_one


def sides(kind):
    torch.manual_seed(0)
    if kind is Dense:
        return Dense(torch.randn(5, 4)), Dense(torch.randn(7, 4))
    masks = torch.rand(5, 3) < 0.8, torch.rand(7, 6) < 0.8
    if kind is MultiVector:
        return tuple(MultiVector(torch.randn(*mask.shape, 4), mask) for mask in masks)
    return tuple(Sparse(torch.randint(0, 9, mask.shape), torch.rand(mask.shape) * mask) for mask in masks)


PAIRS = np.divmod(np.random.default_rng(0).permutation(35), 7)


@pytest.mark.parametrize("kind", [Dense, MultiVector, Sparse])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_equals_the_whole_matrix(kind, size, monkeypatch):
    monkeypatch.setattr(given_pairs, "_PAIRS", size)
    query, document = sides(kind)
    found = one_to_one(query, document, *PAIRS)
    assert len(found) == -(-35 // size)
    expected_QK = query.scores(document)[0]
    torch.testing.assert_close(torch.cat(found), expected_QK[PAIRS])


@pytest.mark.parametrize("room", [1, 3])
def test_a_card_without_room_for_so_many_scores_them_by_halves(room, monkeypatch):
    query, document = sides(Dense)
    expected, paired = torch.cat(one_to_one(query, document, *PAIRS)), Dense.paired

    def small(left, right):
        if len(left) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return paired(left, right)

    monkeypatch.setattr(Dense, "paired", small)
    assert torch.equal(torch.cat(one_to_one(query, document, *PAIRS)), expected)
    room = 0
    with pytest.raises(SearchError, match="no memory left to score one pair"):
        one_to_one(query, document, *PAIRS)


@pytest.mark.parametrize(("kind", "waits"), [(Dense, 0), (MultiVector, 0), (Sparse, 1)])
def test_on_a_card_pairs_are_sent_and_their_scores_not_waited_for(kind, waits):
    """But for the number of words of a sparse head; and as many at once as fit a bound on numbers."""
    query, document = (side.map(lambda tensor: tensor.to(CARD)) for side in sides(kind))
    with PlayedCard() as card:
        assert [len(one) for one in one_to_one(query, document, *PAIRS)] == [35]
    assert (len(card.waits), card.mixes) == (waits, [])
    assert given_pairs._numbers_of_pair(query, document) == {Dense: 8, MultiVector: 63, Sparse: 66}[kind]
