"""An approximate index: what it is trained on, what it answers, what it refuses."""

import numpy as np
import pytest
import torch

from embedsmith.core.errors import SearchError
from embedsmith.core.reps import Dense, Euclidean, Sparse
from embedsmith.search import approximate, exact, exact_top_k
from embedsmith.search.approximate import ApproximateIndex

faiss = pytest.importorskip("faiss")


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def pieces(vector_ND: torch.Tensor, sizes: list[int]) -> list[Dense]:
    return [Dense(part) for part in vector_ND.split(sizes)]


@pytest.mark.parametrize(
    ("rows", "filled"), [(5, [6, 3, 4]), (6, [6, 3, 4]), (7, [9, 4]), (13, [13]), (99, [13])], ids=str
)
def test_the_first_pieces_train_and_each_later_one_is_added(monkeypatch, rows, filled):
    seen = []
    real = approximate._filled
    monkeypatch.setattr(approximate, "_TRAINING_ROWS", rows)
    monkeypatch.setattr(
        approximate, "_filled", lambda *given: seen.append((given[1] is None, sum(map(len, given[2])))) or real(*given)
    )
    vector_ND = vectors(13)
    index = ApproximateIndex.build(pieces(vector_ND, [3, 3, 3, 4]), "IVF2,Flat", effort=2)
    assert seen == [(place == 0, count) for place, count in enumerate(filled)]
    score, found = index.top(Dense(vector_ND[:4]), 3)
    expected_score, expected = exact_top_k(vector_ND[:4], vector_ND, 3)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(score, expected_score, atol=1e-5)
    assert (score.dtype, found.dtype) == (np.float32, np.int64)
    assert index.top(Dense(vector_ND[:1]), 20)[1][0].tolist().count(-1) == 7


def test_effort_is_how_many_candidates_a_query_looks_at():
    found = pieces(vectors(40), [40])
    assert ApproximateIndex.build(found, "HNSW8,Flat", effort=33)._index.hnsw.efSearch == 33
    assert ApproximateIndex.build(found, "HNSW8,Flat")._index.hnsw.efSearch == 128
    assert ApproximateIndex.build(found, "IVF2,Flat", effort=2)._index.nprobe == 2
    assert ApproximateIndex.build(found, "Flat", effort=2)._index.ntotal == 40


def test_an_index_is_read_only_whole_and_of_as_many_vectors_as_wanted(tmp_path):
    path = tmp_path / "i.faiss"
    vector_ND = vectors(20)
    ApproximateIndex.build(pieces(vector_ND, [20]), "IVF2,Flat").save(path)
    again = ApproximateIndex.load(path, effort=1, count=20)
    assert again._index.nprobe == 1
    assert (
        ApproximateIndex.load(path, effort=2).top(Dense(vector_ND[7:8]), 1)[1].tolist()
        == exact_top_k(vector_ND[7:8], vector_ND, 1)[1].tolist()
    )
    with pytest.raises(SearchError) as caught:
        ApproximateIndex.load(path, count=21)
    assert str(caught.value) == f"{path}: an index of 20 vectors\n  expected: 21\n  to fix: delete it"
    for content in (b"", path.read_bytes()[:-9]):
        path.write_bytes(content)
        with pytest.raises(SearchError) as caught:
            ApproximateIndex.load(path, count=20)
        assert str(caught.value).startswith(f"{path}: not an index that can be read (")
    with pytest.raises(SearchError, match="not an index"):
        ApproximateIndex.load(tmp_path / "gone")


def test_what_is_no_vector_and_what_no_index_can_be_made_of_is_refused():
    with pytest.raises(SearchError, match="no vectors for an index"):
        ApproximateIndex.build([], "Flat")
    sparse = Sparse(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    with pytest.raises(SearchError, match=r"holds dense vectors, not Euclidean(.|\n)*leave index out"):
        ApproximateIndex.build([Euclidean(torch.ones(2, 3))], "Flat")
    with pytest.raises(SearchError, match="holds dense vectors, not Sparse"):
        ApproximateIndex.build([sparse], "Flat")
    with pytest.raises(
        SearchError, match=r"(?s)FAISS cannot make an index 'IVF64,Flat' of 5 vectors.*expected: a factory"
    ):
        ApproximateIndex.build(pieces(vectors(5), [5]), "IVF64,Flat")
    index = ApproximateIndex.build(pieces(vectors(5), [5]), "Flat")
    for query in (sparse, Dense(torch.ones(1, 7))):
        with pytest.raises(SearchError, match=r"(?s)not vectors of the index's dimension.*expected: \[N, 8\]"):
            index.top(query, 1)


def test_rows_in_memory_are_read_in_place_and_all_others_become_fp32(tmp_path):
    plain = np.ones((4, 3), np.float32)
    assert np.shares_memory(exact.rows_between(plain, 1, 3).vector_ND.numpy(), plain)
    np.save(tmp_path / "v.npy", plain)
    fixed = plain.copy()
    fixed.flags.writeable = False
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r+")
    for other in (plain.astype(np.float64), plain.astype(np.int8), fixed, mapped, torch.ones(4, 3).half()):
        part = exact.rows_between(other, 1, 3).vector_ND
        assert part.dtype == torch.float32
        assert part.tolist() == [[1.0] * 3] * 2
        if isinstance(other, np.ndarray):
            assert not np.shares_memory(part.numpy(), other)
