"""An approximate index: what it is trained on, its blocks, what it answers, what it refuses."""

import numpy as np
import pytest
import torch

from embedsmith.core.errors import SearchError
from embedsmith.core.reps import Dense, Euclidean, Sparse
from embedsmith.search import approximate, exact, exact_top_k, merged_top_k
from embedsmith.search.approximate import ApproximateIndex, found_share

faiss = pytest.importorskip("faiss")


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of 20 vectors."""
    monkeypatch.setattr(approximate, "_BLOCK_BYTES", 20 * 8 * 4)
    monkeypatch.setattr(approximate, "_RUN", 10)


def made(folder, vector_ND: torch.Tensor, factory: str, effort: int = 128) -> ApproximateIndex:
    index = ApproximateIndex(folder, factory, len(vector_ND), lambda start, stop: Dense(vector_ND[start:stop]), effort)
    index.train()
    index.build(range(len(index.starts)))
    return index


@pytest.mark.parametrize("factory", ["IVF4,Flat", "HNSW8,Flat", "Flat"])
def test_blocks_give_the_nearest_of_the_whole_corpus_whoever_searches_them(tmp_path, factory):
    vector_ND = vectors(75)
    index = made(tmp_path, vector_ND, factory)
    assert list(index.starts) == [0, 20, 40, 60]
    query = Dense(vector_ND[:9])
    score_Qk, index_Qk = index.top(query, 12)
    expected_score, expected = exact_top_k(query, vector_ND, 12)
    np.testing.assert_array_equal(index_Qk, expected)
    np.testing.assert_allclose(score_Qk, expected_score, atol=1e-5)
    assert (score_Qk.dtype, index_Qk.dtype) == (np.float32, np.int64)
    shares = [index.top(query, 12, range(4)[share::3]) for share in range(3)]
    for mine, theirs in zip(merged_top_k(shares, 12), (score_Qk, index_Qk), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert index.top(query, 12, [])[1].shape == (9, 0)
    assert index.top(Dense(vector_ND[:1]), 90)[1][0].tolist().count(-1) == 15


def test_ties_go_to_the_lower_place(tmp_path):
    index = made(tmp_path, torch.ones(30, 8), "Flat")
    assert index.top(Dense(torch.ones(1, 8)), 30)[1].tolist() == [list(range(30))]
    assert index.top(Dense(torch.ones(1, 8)), 20, [0])[1].tolist() == [list(range(20))]


def test_lists_of_all_blocks_are_those_of_one_index(tmp_path, monkeypatch):
    """Also where a query looks at few of the cells."""
    vector_ND = vectors(75)
    query = Dense(vectors(30, 1))
    several = made(tmp_path / "several", vector_ND, "IVF8,Flat", effort=2)
    assert len(several.starts) == 4
    found = several.top(query, 10)
    monkeypatch.setattr(approximate, "_BLOCK_BYTES", 2**20)
    one = made(tmp_path / "one", vector_ND, "IVF8,Flat", effort=2)
    assert len(one.starts) == 1
    for mine, theirs in zip(found, one.top(query, 10), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    recall = found_share(exact_top_k(query, vector_ND, 10)[1], one.top(query, 10)[1])
    assert 0.2 < recall < 1
    assert found_share(np.array([[1, 2], [3, 4]]), np.array([[2, 9], [-1, 3]])) == 0.5


def test_it_is_trained_once_on_runs_of_the_whole_corpus(tmp_path, monkeypatch):
    asked = []
    vector_ND = vectors(75)
    monkeypatch.setattr(approximate, "_SAMPLE", 30)
    monkeypatch.setattr(approximate, "_PER_CELL", 1)
    rows = lambda start, stop: asked.append((start, stop)) or Dense(vector_ND[start:stop])
    index = ApproximateIndex(tmp_path, "IVF2,Flat", 75, rows)
    index.train()
    assert asked == [(0, 10), (0, 10), (30, 40), (60, 70)]
    index.train()
    assert len(asked) == 4
    monkeypatch.setattr(approximate, "_PER_CELL", 20)
    ApproximateIndex(tmp_path / "more", "IVF2,Flat", 75, rows).train()
    assert asked[5:] == [(0, 10), (20, 30), (40, 50), (60, 70)], "40 for two cells"


def test_effort_is_how_many_candidates_a_query_looks_at(tmp_path):
    def opened(factory, **effort):
        index = made(tmp_path / f"{factory}{effort}", vectors(40), factory, **effort)
        return index._opened((0,))[0][1]

    assert opened("HNSW8,Flat", effort=33).hnsw.efSearch == 33
    assert opened("HNSW8,Flat").hnsw.efSearch == 128
    assert opened("IVF2,Flat", effort=2).nprobe == 2
    assert opened("Flat", effort=2).ntotal == 20


def test_a_block_that_is_not_whole_is_refused_and_made_again(tmp_path):
    vector_ND = vectors(40)
    made(tmp_path, vector_ND, "IVF2,Flat")
    again = lambda: ApproximateIndex(tmp_path, "IVF2,Flat", 40, lambda start, stop: Dense(vector_ND[start:stop]))
    block, note = tmp_path / "block-000001.faiss", tmp_path / "block-000001.json"
    whole = block.read_bytes()
    for spoil in (lambda: block.write_bytes(whole[:-9]), note.unlink, lambda: note.write_text("[20, 1]"), block.unlink):
        spoil()
        index = again()
        index.train()
        with pytest.raises(SearchError) as caught:
            index.top(Dense(vector_ND[:1]), 1)
        expected = f"{block}: a part of an index is not there, or not whole\n  to fix: delete {tmp_path}"
        assert str(caught.value) == expected
        index.build(range(2))
        assert index.top(Dense(vector_ND[30:31]), 1)[1].tolist() == [[30]]
        assert block.read_bytes() == whole
    (tmp_path / "trained.faiss").write_bytes(b"")
    with pytest.raises(SearchError, match=r"trained.faiss: not an index that can be read \((.|\n)*delete"):
        again().train()


def test_what_is_no_vector_and_what_no_index_can_be_made_of_is_refused(tmp_path):
    def training(given, factory="Flat", count=2):
        ApproximateIndex(tmp_path / "new", factory, count, lambda start, stop: given).train()

    with pytest.raises(SearchError, match="no vectors for an index"):
        training(None, count=0)
    sparse = Sparse(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    with pytest.raises(SearchError, match=r"holds dense vectors, not Euclidean(.|\n)*leave index out"):
        training(Euclidean(torch.ones(2, 3)))
    with pytest.raises(SearchError, match="holds dense vectors, not Sparse"):
        training(sparse)
    with pytest.raises(
        SearchError, match=r"(?s)FAISS cannot make an index 'IVF64,Flat' of 5 vectors.*expected: a factory"
    ):
        training(Dense(vectors(5)), "IVF64,Flat", 5)
    with pytest.raises(SearchError, match="FAISS cannot make an index 'what'"):
        training(Dense(vectors(5)), "what", 5)
    index = made(tmp_path / "i", vectors(5), "Flat")
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
