"""A graph in 8 bits: the weights of linear layers per output channel, what goes into them with a range that was
measured on texts (QuantizeLinear and DequantizeLinear of ONNX, which every runtime of today computes in whole numbers).

Ranges are measured ahead and not taken from the batch at hand: that is quicker, and a text's vector does not depend on
who shares its batch. A few coordinates of a transformer's states are many times larger than the others and would leave
these a handful of steps, so every coordinate is divided by a share of its largest value, and the weights that it meets
are multiplied by it (SmoothQuant, Xiao et al., 2023, equation 4). Products of two activations (attention's scores) and
the results of layers stay in floating point.
"""

import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsmith.core.tokens import chunk_rows
from embedsmith.models.embedder import Embedder
from embedsmith.models.exports.trace import quiet, save_onnx, wants_prompt
from embedsmith.models.graphs.graph_files import MASK
from embedsmith.models.graphs.session import inputs_of

SAMPLE = files("embedsmith.models.exports").joinpath("sample.txt").read_text(encoding="utf-8").splitlines()
"""Short and long texts in several languages, where no others are given."""
STRENGTH = 0.7
"""Equation 4's alpha: how much of the range of a coordinate goes over to the weights. MiniLM's vectors have a mean
cosine of 0.990 to those of fp32 with the paper's 0.5, and of 0.996 with this."""
_CHUNK = 1024  # tokens
Array = npt.NDArray[Any]


def quantised(model: Embedder, file: Path, texts: Sequence[str], most: int) -> None:
    """Replace the graph in `file` by its form in 8 bits, calibrated on at most `most` of the texts, evenly spaced."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    chosen = [texts[place] for place in np.linspace(0, len(texts) - 1, min(most, len(texts))).astype(int)]
    tokens = model.tokenize(chosen)
    padded = (tokens.pad(model.pad_id, rows=rows) for rows in chunk_rows(tokens.length_N, _CHUNK))  # of similar length
    chunks = [inputs_of(each, wants_prompt(model)) for each in padded]
    with tempfile.TemporaryDirectory() as scratch, quiet("root"):  # which advises on preparing a graph
        prepared, smooth = Path(scratch) / "prepared.onnx", Path(scratch) / "smooth.onnx"
        quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
        proto = onnx.load(str(prepared))
        weights = {one.name for one in proto.graph.initializer}
        products = (node for node in proto.graph.node if node.op_type == "MatMul")
        # products of an activation with weights
        layers = [node for node in products if node.input[1] in weights and node.input[0] not in weights]
        _smooth(proto, layers, _largest(proto, layers, chunks))
        save_onnx(proto, smooth)
        for old in file.parent.glob(f"{file.name}*"):
            old.unlink()
        quantize_static(
            str(smooth),
            str(file),
            _Reader(chunks),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=[node.name for node in layers],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )


def _largest(proto: Any, layers: Sequence[Any], chunks: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The largest absolute value of every coordinate of what goes into the layers, over the texts."""
    import onnx
    import onnxruntime

    names = list(dict.fromkeys(node.input[0] for node in layers))
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    with tempfile.TemporaryDirectory() as scratch:
        save_onnx(watched, file := Path(scratch) / "watched.onnx")
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found: dict[str, Array] = {}
    for chunk in chunks:
        real_S = chunk[MASK].ravel() > 0
        for name, value in zip(names, session.run(names, dict(chunk)), strict=True):
            rows = value.reshape(-1, value.shape[-1])
            rows = rows[real_S] if len(rows) == len(real_S) else rows  # padding's states mean nothing
            found[name] = np.maximum(found.get(name, 0.0), np.abs(rows).max(0))
    return found


def _smooth(proto: Any, layers: Sequence[Any], largest: Mapping[str, Array]) -> None:
    """Divide what goes into the layers, coordinate by coordinate, and multiply their weights by the same."""
    from onnx import helper, numpy_helper

    weights = {one.name: one for one in proto.graph.initializer}
    for number, (name, most_H) in enumerate(largest.items()):
        readers = [node for node in layers if node.input[0] == name]
        matrices = [numpy_helper.to_array(weights[node.input[1]]) for node in readers]
        weight_H = np.max([np.abs(matrix).max(1) for matrix in matrices], axis=0)
        ok_H = (most_H > 0) & (weight_H > 0)
        share_H = np.ones_like(most_H)
        share_H[ok_H] = most_H[ok_H] ** STRENGTH / weight_H[ok_H] ** (1 - STRENGTH)
        divided, factor = f"{name}_divided", f"smoothing_{number}"
        proto.graph.initializer.append(numpy_helper.from_array((1 / share_H).astype(np.float32), factor))
        place = next(place for place, node in enumerate(proto.graph.node) if node in readers)
        proto.graph.node.insert(place, helper.make_node("Mul", [name, factor], [divided], name=divided))
        for reader, matrix in zip(readers, matrices, strict=True):
            smoothed = f"{reader.input[1]}_{reader.name}"  # a matrix of its own, should another layer share it
            scaled = (matrix * share_H[:, None]).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(scaled, smoothed))
            reader.input[0], reader.input[1] = divided, smoothed
    used = {name for node in proto.graph.node for name in node.input}
    kept = [one for one in proto.graph.initializer if one.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


class _Reader:
    """Chunks as onnxruntime asks for them."""

    def __init__(self, chunks: Sequence[Mapping[str, Array]]) -> None:
        self._left = iter(chunks)

    def get_next(self) -> Any:
        return next(self._left, None)
