"""Every pooling against a loop over rows and tokens, on both padding sides."""

import numpy as np
import pytest
import torch

from embedsmith.core.shelf import poolings
from embedsmith.core.tokens import TokenBatch
from embedsmith.models.pooling import pool_mask
from tests.models import tiny

LENGTHS, BODY = [5, 1, 3], [2, 0, 3]


def one_by_one(name, states_TH, pooled_T):
    """Loop form: `pooled_T` lists the places (from 0) that take part in a row of real tokens."""
    if name == "cls":
        return states_TH[pooled_T[0]]
    if name == "last":
        return states_TH[pooled_T[-1]]
    if name == "max":
        return states_TH[pooled_T].amax(0)
    weights = [1.0 if name == "mean" else place + 1.0 for place in pooled_T]
    return sum(w * states_TH[place] for w, place in zip(weights, pooled_T, strict=True)) / sum(weights)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("name", tiny.POOLINGS)
def test_pooling_equals_a_loop(name, include_prompt, left):
    tokens = TokenBatch.from_rows([list(range(1, n + 1)) for n in LENGTHS], BODY, is_query=True)
    padded = tokens.pad(0, left=left)
    generator = torch.Generator().manual_seed(0)
    hidden_NTH = torch.randn(*padded.id_NT.shape, 4, generator=generator, dtype=torch.float64)
    pooled_NH = poolings.get(name)(hidden_NTH, pool_mask(padded, include_prompt), padded.mask_NT)
    for row, (length, body) in enumerate(zip(LENGTHS, BODY, strict=True)):
        start = hidden_NTH.shape[1] - length if left else 0
        places = list(range(length)) if include_prompt else list(range(body, length)) or [length - 1]
        expected_H = one_by_one(name, hidden_NTH[row, start : start + length], places)
        np.testing.assert_allclose(pooled_NH[row], expected_H, rtol=1e-12)


@pytest.mark.parametrize("name", ["mean", "weighted_mean", "max"])
def test_a_row_without_tokens_is_zero_and_not_nan(name):
    none_NT = torch.zeros(2, 3, dtype=torch.bool)
    assert poolings.get(name)(torch.ones(2, 3, 4), none_NT, none_NT).abs().sum() == 0
