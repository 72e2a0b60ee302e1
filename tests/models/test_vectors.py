"""Quantising and similarities as sentence-transformers has them."""

import numpy as np
import pytest
from sentence_transformers.similarity_functions import SimilarityFunction
from sentence_transformers.util import quantize_embeddings

from embedsmith.core.errors import ModelError
from embedsmith.core.quantize import quantize, value_ranges
from embedsmith.models.encode import compare

VECTORS = np.random.default_rng(0).normal(size=(50, 24)).astype(np.float32)


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_quantised_bits_equal_sentence_transformers(precision):
    ours, theirs = quantize(VECTORS, precision), quantize_embeddings(VECTORS, precision)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


def test_ranges_of_a_sample_are_used_and_values_beyond_them_are_clipped():
    ranges = value_ranges(VECTORS[:20])
    np.testing.assert_array_equal(quantize(VECTORS, "int8", ranges), quantize_embeddings(VECTORS, "int8", ranges))
    far = quantize(VECTORS[:1] * 100, "int8", ranges)
    assert set(far.ravel().tolist()) <= {-128, 127}


def test_one_vector_cannot_be_calibrated_on_itself():
    with pytest.raises(ModelError, match="cannot be calibrated on one vector"):
        quantize(VECTORS[:1], "int8")
    with pytest.raises(ModelError, match="unknown precision 'int4'"):
        quantize(VECTORS, "int4")


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarities_equal_sentence_transformers(similarity):
    theirs = SimilarityFunction.to_similarity_fn(similarity)(VECTORS * 3, VECTORS[:7]).numpy()
    np.testing.assert_allclose(compare(VECTORS * 3, VECTORS[:7], similarity), theirs, atol=1e-5)
    assert compare(VECTORS, VECTORS[0], similarity).shape == (50, 1)
