"""Vectors in a byte or a bit a number, against plain loops; what sentence-transformers makes is compared in models."""

import numpy as np

from embedsmith.core.quantize import quantize, value_ranges

VECTORS = np.random.default_rng(0).standard_normal((5, 19)).astype(np.float32)


def test_a_bit_is_a_sign_and_eight_of_a_row_are_a_byte():
    rows = [[int(value > 0) for value in row] + [0] * 5 for row in VECTORS]
    bytes_ = [[sum(bit << (7 - n) for n, bit in enumerate(row[at : at + 8])) for at in (0, 8, 16)] for row in rows]
    assert quantize(VECTORS, "ubinary").tolist() == bytes_
    assert quantize(VECTORS, "binary").tolist() == [[byte - 128 for byte in row] for row in bytes_]


def test_a_byte_is_one_of_equal_steps_between_the_ends_of_its_coordinate():
    low, high = value_ranges(VECTORS)
    assert (low == VECTORS.min(0)).all()
    assert (high == VECTORS.max(0)).all()
    exact = (VECTORS.astype(np.float64) - low) / (high.astype(np.float64) - low) * 255
    unsigned, signed = quantize(VECTORS, "uint8"), quantize(VECTORS, "int8")
    assert np.abs(unsigned - (exact - 0.5)).max() < 0.51  # rounded down
    assert (signed.astype(int) == unsigned.astype(int) - 128).all()
    assert (signed.min(), signed.max()) == (-128, 127)
    assert (quantize(VECTORS * 9, "uint8", value_ranges(VECTORS))[high < VECTORS * 9] == 255).all()
