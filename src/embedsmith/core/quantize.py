"""Vectors in a byte or a bit a number, bit for bit as sentence-transformers makes them."""

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import ModelError

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
FloatArray = npt.NDArray[np.float32]
AnyArray = npt.NDArray[Any]


def value_ranges(vector_ND: FloatArray) -> FloatArray:
    """[2, D]: minimum and maximum of every coordinate, for `quantize`."""
    return np.stack([vector_ND.min(0), vector_ND.max(0)]).astype(np.float32)


def quantize(vector_ND: FloatArray, precision: Precision, ranges: FloatArray | None = None) -> AnyArray:
    """Smaller vectors, bit for bit as sentence-transformers makes them.

    int8, uint8: 255 equal steps between the coordinate's minimum and maximum (`ranges`, or those of the given
    vectors; two at least). binary, ubinary: the signs, eight to a byte, [N, ceil(D / 8)], offset by -128 for binary.
    """
    if precision not in get_args(Precision):
        raise ModelError(f"unknown precision {precision!r}", expected=f"one of {', '.join(get_args(Precision))}")
    if precision == "float32":
        return vector_ND.astype(np.float32, copy=False)
    if precision in ("binary", "ubinary"):
        packed = np.packbits(vector_ND > 0, axis=-1)
        return packed if precision == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)
    if ranges is None:
        if len(vector_ND) == 1:
            raise ModelError(
                f"{precision} cannot be calibrated on one vector",
                fix="give ranges, for example value_ranges() of a sample of documents",
            )
        ranges = value_ranges(vector_ND) if len(vector_ND) else np.zeros((2, vector_ND.shape[1]), np.float32)
    start_D = ranges[0].astype(np.float32)
    step_D = (ranges[1].astype(np.float32) - start_D) / 255
    level_ND: FloatArray = np.clip(np.floor((vector_ND - start_D) / np.where(step_D == 0, 1, step_D)), 0, 255)
    return level_ND.astype(np.uint8) if precision == "uint8" else (level_ND - 128).astype(np.int8)
