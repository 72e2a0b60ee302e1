"""Residual codes: bits that come back, centroids that settle, scores near to the exact ones, files that are whole."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from embedsmith.core.errors import SearchError
from embedsmith.core.reps import Dense, MultiVector
from embedsmith.search import exact_top_k
from embedsmith.search.residual import (
    BITS,
    Codebook,
    ResidualEncoder,
    ResidualStore,
    _packed,
    _unpacked,
    share_of_exact,
)


def documents(count, seed=0, width=16, longest=9):
    """Tokens around a few directions, as those of texts are."""
    generator = torch.Generator().manual_seed(seed)
    topics = F.normalize(torch.randn(12, width, generator=torch.Generator().manual_seed(7)), dim=-1)
    length = torch.randint(1, longest, (count,), generator=generator)
    mask = torch.arange(longest)[None, :] < length[:, None]
    noise = 0.25 * torch.randn(count, longest, width, generator=generator)
    near = topics[torch.randint(12, (count, longest), generator=generator)]
    return MultiVector(F.normalize(near + noise, dim=-1) * mask[..., None], mask)


@pytest.mark.parametrize("bits", BITS)
def test_bits_come_back(bits):
    bucket = torch.randint(2**bits, (7, 13), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = _packed(bucket, bits)
    assert packed.shape == (7, -(-13 * bits // 8))
    assert torch.equal(_unpacked(packed, bits)[:, :13], bucket.int())
    first = sum(int(bucket[0, place]) << (place * bits) for place in range(8 // bits))
    assert int(packed[0, 0]) == first


def test_a_code_is_its_definition():
    rep = documents(60)
    vectors = rep.vector_NTD[rep.mask_NT]
    book = Codebook.learned(vectors, 2, count=8)
    code, packed = book.encode(vectors)
    back = book.decode(code, packed)
    residual = []
    for row, vector in enumerate(vectors):
        nearest = max(range(8), key=lambda c: float(vector @ book.centroid_CD[c]))
        assert int(code[row]) == nearest
        rest = vector - book.centroid_CD[nearest]
        residual.append(rest)
        values = [float(book.value_Y[sum(float(x) > float(b) for b in book.border_Y)]) for x in rest]
        torch.testing.assert_close(back[row], F.normalize(book.centroid_CD[nearest] + torch.tensor(values), dim=0))
    flat = torch.stack(residual).flatten().double().numpy()
    np.testing.assert_allclose(book.border_Y.numpy(), np.quantile(flat, [0.25, 0.5, 0.75]), atol=1e-6)
    np.testing.assert_allclose(book.value_Y.numpy(), np.quantile(flat, [0.125, 0.375, 0.625, 0.875]), atol=1e-6)


def test_more_bits_come_nearer_and_take_more_room():
    rep, query = documents(400), documents(30, seed=1)
    _, exact = exact_top_k(query, rep, 10)
    found, sizes, errors = [], [], []
    for bits in BITS:
        store = ResidualStore.build([rep], bits)
        back = store.rows(0, len(store)).pad_tokens(rep.token_count)
        errors.append(float((back.vector_NTD - rep.vector_NTD)[rep.mask_NT].norm(dim=-1).mean()))
        _, best = store.top(query, 10)
        found.append(share_of_exact(best, exact))
        sizes.append(store.bytes)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02
    assert sizes == sorted(sizes)
    assert found[-1] > 0.97
    assert 0.65 < found[1] < found[-1]
    assert share_of_exact(exact, exact) == 1
    assert share_of_exact(np.array([[0, 1]]), np.array([[1, 2]])) == 0.5


def test_pieces_are_as_one_and_scores_are_those_of_what_comes_back(monkeypatch):
    rep, query = documents(50), documents(6, seed=1)
    book = Codebook.learned(rep.vector_NTD[rep.mask_NT], 4)
    whole = ResidualStore.build([rep], book=book)
    pieces = ResidualStore.build(list(rep.split(7)), book=book)
    assert torch.equal(whole.packed_SB, pieces.packed_SB)
    assert torch.equal(whole.offset_P, pieces.offset_P)
    back = whole.rows(0, 50)
    expected = exact_top_k(query, back, 5)
    monkeypatch.setattr("embedsmith.search.residual._BLOCK", 16)
    assert sum(len(block) for block in whole.blocks()) == 50
    assert max(int(block.mask_NT.sum()) for block in whole.blocks()) <= 16
    score, index = whole.top(query, 5)
    np.testing.assert_allclose(score, expected[0], atol=1e-6)
    np.testing.assert_array_equal(index, expected[1])


def test_every_centroid_is_used_and_the_code_is_repeatable():
    vectors = torch.cat([torch.eye(4), torch.eye(4), -torch.eye(4)]).repeat(3, 1)
    book = Codebook.learned(vectors, 1, count=8)
    code, _ = book.encode(vectors)
    assert len(set(code.tolist())) == 8
    again = Codebook.learned(vectors, 1, count=8)
    assert torch.equal(again.centroid_CD, book.centroid_CD)


def test_saved_and_refused(tmp_path):
    store = ResidualStore.build([documents(20)])
    store.save(tmp_path / "store.safetensors")
    again = ResidualStore.load(tmp_path / "store.safetensors")
    assert torch.equal(again.rows(3, 9).vector_NTD, store.rows(3, 9).vector_NTD)
    (tmp_path / "store.safetensors").write_bytes((tmp_path / "store.safetensors").read_bytes()[:-40])
    with pytest.raises(SearchError, match="make it again"):
        ResidualStore.load(tmp_path / "store.safetensors")
    with pytest.raises(SearchError, match="bits is 3"):
        Codebook.learned(torch.eye(3), 3)
    with pytest.raises(SearchError, match="no documents"):
        ResidualStore.build([])
    with pytest.raises(SearchError, match="not Dense"):
        ResidualStore.build([Dense(torch.eye(3))])
    with pytest.raises(SearchError, match="token vectors of 8 numbers"):
        ResidualStore.build([documents(5), documents(5, width=8)])


def test_an_encoder_gives_documents_from_their_codes_and_queries_as_they_are():
    rep = documents(40)

    class Fixed:
        def represent(self, texts, *, role, task=None, outputs=("dense",)):
            return {"multivector": rep.rows(slice(0, len(texts)))}

        def fingerprint(self):
            return "fixed"

    encoder = ResidualEncoder(Fixed(), 8)
    texts = ["a"] * 40
    given = encoder.represent(texts, role="query")["multivector"]
    back = encoder.represent(texts, role="document")["multivector"].pad_tokens(rep.token_count)
    assert torch.equal(given.vector_NTD, rep.vector_NTD)
    assert not torch.equal(back.vector_NTD, rep.vector_NTD)
    assert float((back.vector_NTD - rep.vector_NTD)[rep.mask_NT].norm(dim=-1).mean()) < 0.02
    book = encoder.book
    encoder.represent(texts[:3], role="document")
    assert encoder.book is book, "one code for all documents"
    assert encoder.fingerprint() == "fixed-residual8"
