"""Vectors in folders: read as they lie, searched as a matrix in memory is, and refused where they are not whole."""

import json

import numpy as np
import pytest
import torch

from embedsmith.core.errors import SearchError
from embedsmith.core.quantize import quantize, value_ranges
from embedsmith.core.reps import Cosine, Dense
from embedsmith.search import StoredVectors, exact_top_k, merged_top_k, stored


def folder(place, vector_ND, kind="float32", **changes):
    """What `encode` leaves."""
    place.mkdir()
    stored_ND = vector_ND.astype(kind)
    if kind == "int8":
        np.save(place / "ranges.npy", value_ranges(vector_ND))
        stored_ND = quantize(vector_ND, "int8", value_ranges(vector_ND))
    np.save(place / "vectors.npy", stored_ND)
    (place / "ids.txt").write_text("".join(f"{place.name}-{row}\n" for row in range(len(vector_ND))))
    meta = {"state": "complete", "count": len(vector_ND), "weights": "w", "dim": 8}
    (place / "meta.json").write_text(json.dumps(meta | changes))
    return place


@pytest.fixture
def vector_ND():
    return np.random.default_rng(0).standard_normal((70, 8), dtype=np.float32)


def test_several_folders_are_one_matrix(tmp_path, vector_ND, monkeypatch):
    monkeypatch.setattr(stored, "_PIECE", 16)
    places = [folder(tmp_path / f"f{n}", vector_ND[a:b]) for n, (a, b) in enumerate([(0, 30), (30, 31), (31, 70)])]
    found = StoredVectors(*places)
    assert (len(found), found.shape, found.ndim) == (70, (70, 8), 2)
    for start, stop in ((0, 70), (28, 33), (30, 31), (5, 5), (60, 99)):
        np.testing.assert_array_equal(found[start:stop], vector_ND[start:stop])
    assert found.ids([69, 0, 30, 29, 31]) == {69: "f2-38", 0: "f0-0", 30: "f1-0", 29: "f0-29", 31: "f2-0"}
    query = torch.from_numpy(vector_ND[:600])
    for mine, theirs in zip(exact_top_k(query, found, 9, block=16), exact_top_k(query, vector_ND, 9), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    whole = found.top(Dense(query), 9)
    for count in (2, 6):
        shares = [found.top(Dense(query), 9, (share, count)) for share in range(count)]
        for mine, theirs in zip(merged_top_k(shares, 9), whole, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert shares[5][0].shape == (70, 0), "there are five pieces"
    np.testing.assert_array_equal(whole[1], exact_top_k(query, vector_ND, 9)[1])
    unit = exact_top_k(Cosine(query), Cosine(torch.from_numpy(vector_ND)), 9)[1]
    np.testing.assert_array_equal(found.top(Cosine(query), 9)[1], unit)
    assert (unit != whole[1]).any()


@pytest.mark.parametrize(("kind", "close"), [("float16", 2e-3), ("int8", 1.3e-2)])
def test_smaller_numbers_are_read_as_what_they_stand_for(tmp_path, vector_ND, kind, close):
    found = StoredVectors(folder(tmp_path / "f", vector_ND, kind))[10:20]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, vector_ND[10:20], atol=close)


def test_what_is_not_whole_or_of_another_model_is_refused(tmp_path, vector_ND):
    good = folder(tmp_path / "good", vector_ND)
    with pytest.raises(SearchError, match="no folder of vectors"):
        StoredVectors()
    with pytest.raises(SearchError, match=r"no vectors here(.|\n)*embedsmith encode"):
        StoredVectors(good, tmp_path)
    with pytest.raises(SearchError, match="these vectors are not whole"):
        StoredVectors(folder(tmp_path / "half", vector_ND, state="encoding"))
    with pytest.raises(SearchError, match=r"made with another weights, dim than those in .*good"):
        StoredVectors(good, folder(tmp_path / "other", vector_ND, weights="v", dim=4))
    with pytest.raises(SearchError, match=r"an array of the shape \(70, 8\)\n  expected: 71 rows"):
        StoredVectors(folder(tmp_path / "short", vector_ND, count=71))
    (good / "vectors.npy").write_bytes(b"no")
    with pytest.raises(SearchError, match="not vectors that can be read"):
        StoredVectors(good)
