"""Search by codes of a byte or a bit a number equals plain loops, and the exact search where all is rescored."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from embedsmith.core.errors import SearchError
from embedsmith.core.quantize import quantize, value_ranges
from embedsmith.core.reps import Dense, Sparse
from embedsmith.search import Quantised, exact_top_k
from embedsmith.search import quantised as room

WIDTHS = (1, 7, 16, 64)


def vectors(rows: int, width: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    drawn += np.random.default_rng(width).standard_normal(width).astype(np.float32)  # as of a model: not around 0
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def by_score(score: list[float], among: list[int], count: int) -> list[int]:
    return sorted(among, key=lambda n: (-score[n], n))[:count]


def naive_int8(query: list[float], documents: list[list[float]]) -> list[float]:
    """Score of every document as the middle of the step that each of its numbers falls into."""
    columns = [list(map(np.float32, column)) for column in zip(*documents, strict=True)]
    low = [min(column) for column in columns]  # in fp32, as a level is decided there
    step = [(max(column) - least) / np.float32(255) for column, least in zip(columns, low, strict=True)]
    found = []
    for document in documents:
        total = 0.0
        for q, x, least, size in zip(query, document, low, step, strict=True):
            level = min(max(int((np.float32(x) - least) / size), 0), 255) if size else 0
            total += q * (least + (level + 0.5) * size)
        found.append(total)
    return found


def naive_binary(query: list[float], documents: list[list[float]]) -> tuple[list[float], list[float]]:
    """How many signs agree less how many differ; and the query's numbers added with the signs of the document's."""
    agree = [sum(1 if (q > 0) == (x > 0) else -1 for q, x in zip(query, d, strict=True)) for d in documents]
    signed = [sum(q if x > 0 else -q for q, x in zip(query, d, strict=True)) for d in documents]
    return [float(each) for each in agree], [each / len(query) ** 0.5 for each in signed]


def naive(query: np.ndarray, document: np.ndarray, k: int, precision: str, rescore: int) -> list[list[int]]:
    found, full = [], query.astype(np.float64) @ document.T.astype(np.float64)
    for row, asked in enumerate(query.tolist()):
        everything, count = list(range(len(document))), k * max(rescore, 1)
        if precision == "int8":
            chosen = by_score(naive_int8(asked, document.tolist()), everything, count)
        else:
            agree, signed = naive_binary(asked, document.tolist())
            chosen = by_score(signed, by_score(agree, everything, 8 * count), count)
        found.append(by_score(full[row].tolist(), chosen, k) if rescore else chosen)
    return found


@pytest.fixture(params=["bits counted", "signs multiplied"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways of a CPU and of a GPU to compare signs, both here on a CPU."""
    if request.param == "signs multiplied":
        monkeypatch.setattr(room, "counts_bits", lambda device: False)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rescore", [0, 1, 3])
@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_equals_plain_loops(precision: str, rescore: int, width: int) -> None:
    query, document = vectors(3, width, 0), vectors(60, width, 1)
    found = Quantised.of(document, precision, block=11).top_k(query, 2, rescore)
    assert found[1].tolist() == naive(query, document, 2, precision, rescore)
    assert (found[0].dtype, found[1].dtype) == (np.float32, np.int64)
    whole = exact_top_k(query, document, 2, precision=precision, rescore=rescore)
    for got, same in zip(found, whole, strict=True):
        np.testing.assert_array_equal(got, same)


def test_scores_without_rescoring_are_those_of_the_codes() -> None:
    query, document = vectors(3, 20, 0), vectors(40, 20, 1)
    for precision, score in (("int8", naive_int8), ("binary", lambda q, d: naive_binary(q, d)[1])):
        found, index = exact_top_k(query, document, 5, precision=precision, rescore=0)
        for row, asked in enumerate(query.tolist()):
            np.testing.assert_allclose(found[row], np.array(score(asked, document.tolist()))[index[row]], atol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "binary"])
@pytest.mark.parametrize("seed", range(4))
def test_with_all_rescored_it_is_the_exact_search(precision: str, seed: int) -> None:
    query = np.random.default_rng(seed).integers(-1, 2, (9, 6)).astype(np.float32)  # few values: ties are everywhere
    document = np.random.default_rng(seed + 50).integers(-1, 2, (40, 6)).astype(np.float32)
    for k, rescore in ((10, 4), (40, 1), (60, 1), (7, 6)):
        expected = exact_top_k(query, document, k)
        found = exact_top_k(query, document, k, precision=precision, rescore=rescore)
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_more_rescoring_finds_no_less(precision: str) -> None:
    """What is found is the best of growing sets of candidates: no place of a ranking gets a lower score."""
    query, document = vectors(20, 16, 0), vectors(300, 16, 1)
    scores = [exact_top_k(query, document, 5, precision=precision, rescore=r)[0] for r in (1, 2, 4, 8, 60)]
    for less, more in pairwise(scores):
        assert (more >= less - 1e-6).all()
    np.testing.assert_allclose(scores[-1], exact_top_k(query, document, 5)[0], atol=1e-6)
    assert (scores[0] < scores[-1] - 1e-4).any()  # and the codes alone do lose something


def test_codes_are_those_of_encode_and_of_their_size() -> None:
    document = vectors(50, 20, 3)
    int8, binary = Quantised.of(document, "int8", block=7), Quantised.of(document, "binary", block=7)
    np.testing.assert_array_equal(int8.code, quantize(document, "int8", value_ranges(document)))
    np.testing.assert_array_equal(binary.code, quantize(document, "ubinary"))
    assert (int8.bytes_per_vector, binary.bytes_per_vector) == (20, 3)
    assert (int8.code.nbytes, binary.code.nbytes) == (1000, 150)


def test_codes_without_vectors_are_searched_but_not_rescored() -> None:
    document = vectors(30, 16, 0)
    whole = Quantised.of(document, "int8")
    kept = Quantised("int8", whole.code, 16, whole.ranges)
    np.testing.assert_array_equal(kept.top_k(document[:3], 4, 0)[1], whole.top_k(document[:3], 4, 0)[1])
    with pytest.raises(SearchError, match="rescore 0"):
        kept.top_k(document[:3], 4)


def test_inputs_of_every_kind_agree(tmp_path: Path) -> None:
    query, document = vectors(4, 16, 0), vectors(60, 16, 1)
    mapped = np.memmap(tmp_path / "v.f32", dtype=np.float32, mode="w+", shape=document.shape)
    mapped[:] = document
    mapped.flush()
    read_only = np.memmap(tmp_path / "v.f32", dtype=np.float32, mode="r", shape=document.shape)
    for precision in ("int8", "binary"):
        expected = exact_top_k(query, document, 3, precision=precision)[1]
        for documents in (read_only, torch.from_numpy(document), Dense(torch.from_numpy(document))):
            found = exact_top_k(Dense(torch.from_numpy(query)), documents, 3, precision=precision)[1]
            np.testing.assert_array_equal(found, expected)


def test_few_and_equal_documents() -> None:
    query = vectors(3, 8, 0)
    for precision in ("int8", "binary"):
        assert exact_top_k(query, np.zeros((0, 8), np.float32), 3, precision=precision)[1].shape == (3, 0)
        one = exact_top_k(query, query[:1], 3, precision=precision)
        np.testing.assert_array_equal(one[1], [[0]] * 3)
        np.testing.assert_allclose(one[0], query @ query[:1].T, atol=1e-6)
        alike = exact_top_k(query, np.tile(query[:1], (40, 1)), 4, precision=precision)[1]
        np.testing.assert_array_equal(alike, np.tile(np.arange(4), (3, 1)))


def test_wrong_input_is_told() -> None:
    document = vectors(9, 8, 0)
    broken = document.copy()
    broken[5, 2] = np.nan
    for precision in ("int8", "binary"):
        for query, documents, message in (
            (document, broken, "the vector of document 5 is not finite"),
            (broken, document, "the vector of query 5 is not finite"),
            (document[:, :4], document, "vectors of 4 and 8 numbers"),
            (document[0], document, "have the shape"),
            (document, Sparse(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)), "the documents are Sparse"),
        ):
            with pytest.raises(SearchError, match=message):
                exact_top_k(query, documents, 2, precision=precision)
        with pytest.raises(SearchError, match="rescore is -1"):
            exact_top_k(document, document, 2, precision=precision, rescore=-1)
    with pytest.raises(SearchError, match="the precision is 'int4'"):
        exact_top_k(document, document, 2, precision="int4")  # type: ignore[arg-type]


def test_signs_choose_eight_times_as_many_as_the_querys_numbers() -> None:
    query, document = vectors(60, 16, 4), vectors(60, 16, 5)
    assert exact_top_k(query, document, 1, precision="binary", rescore=0)[1].tolist() == naive(
        query, document, 1, "binary", 0
    )
