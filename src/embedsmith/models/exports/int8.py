"""A graph in 8 bits: the weights of linear layers per output channel, what goes into them with a range that was
measured on texts (QuantizeLinear and DequantizeLinear of ONNX, which every runtime of today computes in whole numbers).

Ranges are measured ahead and not taken from the batch at hand: that is quicker, and a text's vector does not depend on
who shares its batch. Products of two activations (attention's scores) stay in floating point.
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from embedsmith.core.tokens import chunk_rows
from embedsmith.models.embedder import Embedder
from embedsmith.models.graphs.layout import IDS, MASK

SAMPLE = files("embedsmith.models.exports").joinpath("sample.txt").read_text(encoding="utf-8").splitlines()
"""Short and long texts in several languages, where no others are given."""
_CHUNK = 1024  # tokens


def quantised(model: Embedder, file: Path, texts: Sequence[str], most: int) -> None:
    """Replace the graph in `file` by its form in 8 bits, calibrated on at most `most` of the texts, evenly spaced."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    chosen = [texts[place] for place in np.linspace(0, len(texts) - 1, min(most, len(texts))).astype(int)]
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        prepared = Path(scratch) / "prepared.onnx"
        quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(file),
            _Reader(model, chosen),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=_linear_layers(prepared),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )


def _linear_layers(file: Path) -> list[str]:
    """Products with weights."""
    import onnx

    graph = onnx.load(str(file)).graph
    weights = {one.name for one in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]


class _Reader:
    """The texts as the graph takes them, in chunks of similar length. (onnxruntime calls `get_next`.)"""

    def __init__(self, model: Embedder, texts: Sequence[str]) -> None:
        self._chunks = self._read(model, texts)

    def get_next(self) -> Any:
        return next(self._chunks, None)

    @staticmethod
    def _read(model: Embedder, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
        tokens = model.tokenize(texts)
        for rows in chunk_rows(tokens.length_N, _CHUNK):
            padded = tokens.pad(model.pad_id, left=model.padding_left, rows=rows)
            yield {IDS: padded.id_NT.numpy(), MASK: padded.mask_NT.numpy().astype(np.int64)}


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime advises on preparing a graph, which has just been done."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
