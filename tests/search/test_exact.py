"""Exact search equals a full sort, whatever the blocks, and breaks ties by index."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from embedsmith.core.errors import SearchError
from embedsmith.core.reps import Dense, MultiVector, Representation, Sparse
from embedsmith.search import TopK, exact, exact_top_k


@pytest.fixture(params=["cpu", "gpu"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for both ways of keeping the best: that of CPUs and that of GPUs, here run by a CPU."""
    if request.param == "gpu":
        monkeypatch.setattr(exact, "_best_for", lambda device: exact._BestOnGpu)


def naive(score_QK: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """By score, then by index, in plain Python."""
    order = [sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[:k] for row in score_QK]
    index = np.array(order, dtype=np.int64)
    return np.take_along_axis(score_QK, index, axis=1), index


def whole_numbers(rows: int, width: int, seed: int) -> np.ndarray:
    """Few distinct values, so that inner products are exact and ties are everywhere."""
    return np.random.default_rng(seed).integers(-1, 2, (rows, width)).astype(np.float32)


@pytest.mark.parametrize("block", [1, 7, 16, 50, None])
@pytest.mark.parametrize("k", [1, 5, 16, 50, 80])
def test_equals_a_full_sort_with_ties(block: int | None, k: int) -> None:
    query, document = whole_numbers(9, 4, 0), whole_numbers(50, 4, 1)
    score, index = exact_top_k(query, document, k, block=block)
    expected_score, expected_index = naive(query @ document.T, k)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_array_equal(score, expected_score)
    assert score.dtype == np.float32
    assert index.dtype == np.int64


@pytest.mark.parametrize("spare", [1, 3, 256])
def test_candidates_above_the_floor_overflow_into_a_new_choice(spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that get better and better fill the spare places again and again."""
    monkeypatch.setattr(exact, "_SPARE", spare)
    for seed in range(5):
        query, document = whole_numbers(9, 4, seed), whole_numbers(90, 4, seed + 1)
        document[45:] *= 2
        score, index = exact_top_k(query, document, 6, block=7)
        expected_score, expected_index = naive(query @ document.T, 6)
        np.testing.assert_array_equal(index, expected_index)
        np.testing.assert_array_equal(score, expected_score)


def test_every_document_tied_gives_the_first_ones() -> None:
    _, index = exact_top_k(np.ones((3, 2)), np.ones((40, 2)), 4, block=6)
    np.testing.assert_array_equal(index, np.tile(np.arange(4), (3, 1)))


def test_minus_zero_and_zero_are_a_tie() -> None:
    score = np.array([[-0.0], [0.0], [-0.0], [0.0]], dtype=np.float32)
    _, index = exact_top_k(np.ones((1, 1), np.float32), score, 3, block=2)
    np.testing.assert_array_equal(index, [[0, 1, 2]])


def test_inputs_of_every_kind_agree(tmp_path: Path) -> None:
    query, document = whole_numbers(5, 8, 2), whole_numbers(30, 8, 3)
    mapped = np.memmap(tmp_path / "v.f32", dtype=np.float32, mode="w+", shape=document.shape)
    mapped[:] = document
    mapped.flush()
    read_only = np.memmap(tmp_path / "v.f32", dtype=np.float32, mode="r", shape=document.shape)
    expected = naive(query @ document.T, 6)[1]
    for documents in (read_only, torch.from_numpy(document), document.astype(np.int8), document.astype(np.float64)):
        np.testing.assert_array_equal(exact_top_k(query, documents, 6, block=11)[1], expected)
    np.testing.assert_array_equal(
        exact_top_k(torch.from_numpy(query).bfloat16(), Dense(torch.from_numpy(document)), 6)[1], expected
    )


def representations(kind: str, rows: int, seed: int) -> Representation:
    generator = torch.Generator().manual_seed(seed)
    if kind == "sparse":
        coordinate = torch.randint(0, 12, (rows, 5), generator=generator)
        return Sparse(coordinate, torch.rand(rows, 5, generator=generator))
    mask = torch.arange(4)[None] < torch.randint(1, 5, (rows, 1), generator=generator)
    return MultiVector(torch.randn(rows, 4, 3, generator=generator), mask)


@pytest.mark.parametrize("kind", ["sparse", "multivector"])
def test_other_heads_rank_by_their_own_scores(kind: str) -> None:
    query, document = representations(kind, 40, 0), representations(kind, 33, 1)
    score, index = exact_top_k(query, document, 7, block=10)
    expected_score, expected_index = naive(query.scores(document)[0].numpy(), 7)
    np.testing.assert_allclose(score, expected_score, atol=1e-6)
    np.testing.assert_array_equal(index, expected_index)


def test_pieces_of_a_stream_are_numbered_on() -> None:
    query, document = whole_numbers(6, 4, 4), whole_numbers(25, 4, 5)
    best = TopK(query, 8)
    for piece in (document[:3], document[3:3], document[3:20], document[20:]):
        best.add(piece)
    np.testing.assert_array_equal(best.result()[1], naive(query @ document.T, 8)[1])


def test_any_sequence_of_blocks_of_any_size_with_many_ties() -> None:
    chance = np.random.default_rng(0)
    for _ in range(60):
        query, document = (chance.integers(0, 2, (rows, 2)).astype(np.float32) for rows in chance.integers(1, 40, 2))
        k, place = int(chance.integers(1, 12)), 0
        best = TopK(query, k, device="cpu")
        while place < len(document):
            size = int(chance.integers(1, 15))
            best.add(document[place : place + size])
            place += size
        score, index = best.result()
        expected_score, expected_index = naive(query @ document.T, k)
        np.testing.assert_array_equal(index, expected_index)
        np.testing.assert_array_equal(score, expected_score)


@pytest.mark.parametrize("room", [1, 3])
def test_a_card_without_room_for_a_block_scores_it_by_halves(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, query, document = TopK._scores, whole_numbers(9, 4, 0), whole_numbers(50, 4, 1)

    def small(best: TopK, part: Representation, block: Representation) -> torch.Tensor:
        if len(block) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return scores(best, part, block)

    monkeypatch.setattr(TopK, "_scores", small)
    np.testing.assert_array_equal(exact_top_k(query, document, 6, block=20)[1], naive(query @ document.T, 6)[1])
    document[41] = np.nan
    with pytest.raises(SearchError, match="query 0 with document 41"):
        exact_top_k(query, document, 6, block=20)
    room = 0
    with pytest.raises(SearchError, match="cpu has no memory left to score one document"):
        exact_top_k(query, document, 6, block=20)


def test_where_scores_are_computed() -> None:
    assert exact.search_device(np.ones((1, 2))).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert exact.search_device(np.ones((1, 2)), "cpu").type == "cpu"
    assert exact.search_device(torch.ones(1, 2, device="meta")).type == "meta", "where the queries lie"
    assert TopK(np.ones((1, 2)), 1, device="cpu").device.type == "cpu"


def test_no_documents_and_no_queries_give_empty_answers() -> None:
    assert exact_top_k(np.ones((2, 3)), np.ones((0, 3)), 5)[1].shape == (2, 0)
    assert exact_top_k(np.ones((0, 3)), np.ones((4, 3)), 5)[1].shape[0] == 0


def test_one_document() -> None:
    assert exact_top_k(np.ones((2, 3)), np.ones((1, 3)), 5)[1].tolist() == [[0], [0]]


def test_a_nan_names_the_query_and_the_document() -> None:
    document = np.ones((10, 2), np.float32)
    document[7, 1] = np.nan
    with pytest.raises(SearchError, match="query 0 with document 7"):
        exact_top_k(np.ones((3, 2), np.float32), document, 2, block=4)


def test_many_queries_are_searched_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents in memory and on disk give the same; a message counts queries from the first part."""
    monkeypatch.setitem(exact._QUERIES, Dense, 4)
    query, document = whole_numbers(11, 4, 0), whole_numbers(50, 4, 1)
    np.save(tmp_path / "documents.npy", document)
    expected_score, expected_index = naive(query @ document.T, 6)
    for held in (document, torch.from_numpy(document), np.load(tmp_path / "documents.npy", mmap_mode="r")):
        score, index = exact_top_k(query, held, 6, block=7)
        np.testing.assert_array_equal(index, expected_index)
        np.testing.assert_array_equal(score, expected_score)
    query[9] = np.nan
    with pytest.raises(SearchError, match="query 9 with document 0"):
        exact_top_k(query, document, 6)


def test_finite_vectors_whose_product_overflows_are_refused() -> None:
    """Infinite minus infinite: only the scores tell."""
    document = np.array([[1.0, 1.0], [3e30, -3e30]], np.float32)
    with pytest.raises(SearchError, match="query 0 with document 1 is not a number"):
        exact_top_k(np.full((1, 2), 3e30, np.float32), document, 1)


@pytest.mark.parametrize(
    ("query", "document", "k"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), 1),
        (np.ones(3), np.ones((2, 3)), 1),
        (np.ones((2, 3)), np.ones(3), 1),
        (np.ones((2, 3)), np.ones((2, 3)), 0),
        (np.ones((2, 3)), MultiVector(torch.ones(1, 1, 3), torch.ones(1, 1, dtype=torch.bool)), 1),
    ],
)
def test_inputs_that_do_not_fit_are_errors(query: np.ndarray, document: np.ndarray, k: int) -> None:
    with pytest.raises(SearchError):
        exact_top_k(query, document, k)


def test_a_block_stays_within_its_budget() -> None:
    query = MultiVector(torch.ones(64, 32, 4), torch.ones(64, 32, dtype=torch.bool))
    document = MultiVector(torch.ones(2, 512, 4), torch.ones(2, 512, dtype=torch.bool))
    assert 1 <= TopK(query, 3).block_rows(document) * 32 * 32 * 512 <= 2**24
    assert TopK(np.ones((5000, 4)), 3).block_rows(np.ones((2, 4))) * 1024 <= 2**24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads_and_any_precision(threads, dtype):
    generator = torch.Generator().manual_seed(0)
    query_ND, document_ND = (torch.randn(count, 8, generator=generator, dtype=dtype) for count in (5, 300))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        score_Qk, index_Qk = exact_top_k(Dense(query_ND), Dense(document_ND), 10)
    finally:
        torch.set_num_threads(before)
    best = (query_ND @ document_ND.T).topk(10)
    assert index_Qk.tolist() == best.indices.tolist()
    np.testing.assert_allclose(score_Qk, best.values.numpy(), rtol=1e-5)


def test_a_piece_that_is_no_matrix_is_refused() -> None:
    best = TopK(np.ones((2, 3), np.float32), 1)
    for add in (best.add, best.add_in_blocks):
        with pytest.raises(SearchError, match=r"the documents have the shape \(3,\)"):
            add(np.ones(3, np.float32))


@pytest.mark.filterwarnings("error")
def test_vectors_that_are_not_finite_give_the_error_alone() -> None:
    with pytest.raises(SearchError, match="not a number"):
        exact_top_k(np.full((1, 2), np.inf, np.float32), np.array([[1.0, -1.0]], np.float32), 1)


def test_products_beyond_fp32_are_scores_and_no_warnings():
    huge = torch.full((3, 2), 1e30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isinf(exact_top_k(huge, huge, 2)[0]).all()
