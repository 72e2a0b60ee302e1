"""Representations: scores equal naive loops, tree operations lose nothing."""

import math

import pytest
import torch
import torch.nn.functional as F

from embedsmith.core.reps import TIE, Dense, Euclidean, Manhattan, MultiVector, Sparse, concatenate, exceeds


def dense(n, d=8, seed=0):
    return Dense(
        F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)
    )


def sparse(n, t=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Sparse(
        torch.randint(1, 12, (n, t), generator=generator), torch.rand(n, t, generator=generator, dtype=torch.float64)
    )


def multi(n, t=5, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vector = F.normalize(torch.randn(n, t, d, generator=generator, dtype=torch.float64), dim=-1)
    mask = torch.arange(t)[None, :] < torch.randint(1, t + 1, (n, 1), generator=generator)
    return MultiVector(vector * mask[..., None], mask)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def euclidean(*shape, **options):
    return Euclidean(dense(*shape, **options).vector_ND)


def manhattan(*shape, **options):
    return Manhattan(dense(*shape, **options).vector_ND)


def naive(left, right, i, j):
    if isinstance(left, Euclidean):
        apart = [abs(x - y) for x, y in zip(left.vector_ND[i].tolist(), right.vector_ND[j].tolist())]
        return -sum(apart) if isinstance(left, Manhattan) else -math.sqrt(sum(x * x for x in apart))
    if isinstance(left, Dense):
        return sum(x * y for x, y in zip(left.vector_ND[i].tolist(), right.vector_ND[j].tolist()))
    if isinstance(left, Sparse):
        rows = []
        for rep, n in ((left, i), (right, j)):
            weights: dict[int, float] = {}
            for c, w in zip(rep.coordinate_NT[n].tolist(), rep.weight_NT[n].tolist()):
                weights[c] = max(weights.get(c, -math.inf), w)
            rows.append(weights)
        return sum(w * rows[1].get(c, 0.0) for c, w in rows[0].items())
    best = []
    for q in left.vector_NTD[i][left.mask_NT[i]].tolist():
        best.append(max(sum(x * y for x, y in zip(q, d)) for d in right.vector_NTD[j][right.mask_NT[j]].tolist()))
    return sum(best) / len(best)


def signed(n, **options):
    """A table of weights that was trained has some below 0."""
    made = sparse(n, **options)
    return Sparse(made.coordinate_NT, made.weight_NT - 0.5)


@pytest.mark.parametrize("make", [dense, euclidean, manhattan, sparse, signed, multi])
def test_scores_equal_a_naive_loop(make):
    left, right = make(4, seed=1), make(4, seed=2)
    score_WQK, paired_WN = left.scores(right), left.paired(right)
    assert score_WQK.shape == (1, 4, 4)
    for i in range(4):
        assert paired_WN[0, i].item() == pytest.approx(naive(left, right, i, i), abs=1e-12)
        for j in range(4):
            assert score_WQK[0, i, j].item() == pytest.approx(naive(left, right, i, j), abs=1e-12)


def test_widths_are_cosines_of_leading_coordinates():
    left, right = dense(3, seed=1), dense(4, seed=2)
    score_WQK = left.scores(right, (8, 2, 5))
    for w, width in enumerate((8, 2, 5)):
        for i in range(3):
            for j in range(4):
                expected = cosine(left.vector_ND[i, :width].tolist(), right.vector_ND[j, :width].tolist())
                assert score_WQK[w, i, j].item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(
        left.paired(left.map(lambda t: t.flip(0)), (2,))[0], left.scores(left, (2,))[0].flip(1).diag()
    )


def test_a_zero_vector_scores_zero_with_a_finite_gradient():
    zero = Dense(torch.zeros(1, 4, requires_grad=True))
    score = zero.scores(dense(2, 4).map(torch.Tensor.float), (4, 2))
    score.sum().backward()
    assert score.abs().max() == 0
    assert torch.isfinite(zero.vector_ND.grad).all()


def test_padding_of_documents_puts_no_floor_under_multivector_scores():
    """The published code keeps padded tokens as zero vectors in the maximum and scores 0 here; ours scores -1."""
    query = MultiVector(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[True]]))
    passage = MultiVector(torch.tensor([[[-1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[True, False]]))
    assert query.scores(passage).item() == -1.0


@pytest.mark.parametrize("make", [dense, sparse, signed, multi])
def test_scores_ignore_token_and_row_padding(make):
    left, right = make(3, seed=1), make(4, seed=2)
    padded = right.pad_tokens(right.token_count + 3).pad_rows(6)
    torch.testing.assert_close(left.scores(padded)[..., :4], left.scores(right))
    torch.testing.assert_close(left.pad_tokens(9).scores(right), left.scores(right))


@pytest.mark.parametrize("make", [dense, sparse, multi])
def test_concatenate_undoes_split(make):
    whole = make(5)
    joined = concatenate([{"h": whole.rows(slice(0, 2))}, {"h": whole.rows(slice(2, 5))}])["h"]
    for a, b in zip(joined.tensors(), whole.tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("make", "length"), [(sparse, (3, 6)), (multi, (2, 6))])
def test_concatenate_pads_ragged_tokens(make, length):
    short, long = make(2, length[0], seed=3), make(3, length[1], seed=4)
    joined = concatenate([{"h": short}, {"h": long}])["h"]
    query = make(4, seed=5)
    expected = torch.cat([query.scores(short), query.scores(long)], dim=-1)
    torch.testing.assert_close(query.scores(joined), expected)


def test_the_maximum_over_repeats_has_the_gradient_of_the_dense_tensor():
    """`scatter_reduce(amax)` over the query's own vocabulary equals the maximum over a [N, T, V] tensor."""
    left, right = sparse(3, seed=1), sparse(4, seed=2)
    weight_NT = right.weight_NT.clone().requires_grad_()
    left.scores(Sparse(right.coordinate_NT, weight_NT)).square().sum().backward()
    ours = weight_NT.grad
    weight_NT = right.weight_NT.clone().requires_grad_()
    full = torch.zeros(4, 5, 12, dtype=torch.float64).scatter(2, right.coordinate_NT[..., None], weight_NT[..., None])
    left_full = torch.zeros(3, 5, 12, dtype=torch.float64)
    left_full = left_full.scatter(2, left.coordinate_NT[..., None], left.weight_NT[..., None]).amax(1)
    (left_full @ full.amax(1).T).square().sum().backward()
    torch.testing.assert_close(ours, weight_NT.grad)


@pytest.mark.parametrize("make", [dense, sparse, multi])
def test_a_leaf_is_cut_from_its_graph(make):
    start = torch.ones((), dtype=torch.float64, requires_grad=True)
    made = make(3).map(lambda tensor: tensor * start if tensor.is_floating_point() else tensor)
    leaf = made.leaf()
    for tensor in leaf.tensors():
        assert tensor.is_leaf
        assert tensor.requires_grad == tensor.is_floating_point()
    leaf.scores(make(2, seed=1)).sum().backward()
    assert start.grad is None
    assert all(tensor.grad is not None for tensor in leaf.floating())
    assert len(leaf) == 3


@pytest.mark.parametrize("make", [dense, sparse, multi])
def test_blocks_and_chosen_rows_are_the_rows(make):
    whole = make(5)
    blocks = list(whole.split(2))
    assert [len(block) for block in blocks] == [2, 2, 1]
    for a, b in zip(type(whole).of_pieces(blocks).tensors(), whole.tensors(), strict=True):
        assert torch.equal(a, b)
    order = torch.tensor([4, 0, 2])
    for a, b in zip(type(whole).of_pieces(blocks, order).tensors(), whole.rows(order).tensors(), strict=True):
        assert torch.equal(a, b)


def test_padding_is_zero_and_counts_nowhere():
    whole = sparse(2, t=3).pad_tokens(5).pad_rows(3)
    assert whole.coordinate_NT.shape == (3, 5)
    assert not whole.weight_NT[:, 3:].any()
    assert not whole.weight_NT[2].any()
    assert whole.pad_tokens(2).token_count == whole.token_count == 5
    assert whole.pad_rows(3) is whole
    assert (dense(2).token_count, multi(2, t=7).token_count) == (0, 7)
    assert len(dense(2).pad_rows(4)) == 4


def test_texts_without_tokens_score_nothing_and_are_finite():
    nothing = MultiVector(
        torch.zeros(2, 3, 4, dtype=torch.float64, requires_grad=True), torch.zeros(2, 3, dtype=torch.bool)
    )
    for score in (nothing.scores(multi(2, d=4)), multi(2, d=4).scores(nothing), nothing.paired(multi(2, d=4))):
        assert score.abs().max() == 0
    nothing.scores(nothing).sum().backward()
    assert torch.isfinite(nothing.vector_NTD.grad).all()
    none = Sparse(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.float64))
    assert sparse(2).scores(none).shape == (1, 2, 0)
    assert none.scores(sparse(2)).shape == (1, 0, 2)


def test_scores_are_of_fp32_at_least():
    left, right = dense(2, seed=1), dense(3, seed=2)
    half = left.map(lambda tensor: tensor.half())
    assert half.scores(right.map(torch.Tensor.half)).dtype == torch.float32
    assert half.paired(half, (2, 4)).dtype == torch.float32
    assert left.scores(right).dtype == torch.float64
    short = left.truncate(3).vector_ND
    torch.testing.assert_close(short, F.normalize(left.vector_ND[:, :3], dim=-1))


def test_a_score_exceeds_its_limit_by_more_than_rounding():
    for limit in (0.0, 0.5, -0.5, 100.0):
        room = TIE * (1 + abs(limit))
        for score, expected in ((limit, False), (limit + 0.9 * room, False), (limit + 1.1 * room, True)):
            assert exceeds(score, limit) is expected
            assert bool(exceeds(torch.tensor(score, dtype=torch.float64), limit)) is expected
    assert not exceeds(math.nan, 0.0)
    assert not exceeds(1.0, math.nan)
    assert TIE == 2**-18
