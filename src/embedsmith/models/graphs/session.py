"""A graph that runs: ONNX Runtime and OpenVINO behind one call, on as many threads as torch has (OMP_NUM_THREADS)."""

import importlib.util
import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from embedsmith.core.errors import MissingExtraError, ModelError
from embedsmith.core.tokens import PaddedTokens
from embedsmith.models.graphs.graph_files import FILES, IDS, MASK, PROMPT, GraphBackend, Numbers

Array = npt.NDArray[Any]


class Session(Protocol):
    """A graph that runs. Calls may come from several threads."""

    @abstractmethod
    def run(self, names: Sequence[str], inputs: Mapping[str, Array]) -> list[Array]:
        """The outputs of these names."""


def inputs_of(padded: PaddedTokens, prompt_length: bool) -> dict[str, Array]:
    """A chunk as a graph takes it. `prompt_length`: the graph wants to be told it."""
    inputs: dict[str, Array] = {IDS: padded.id_NT.numpy(), MASK: padded.mask_NT.numpy().astype(np.int64)}
    if prompt_length:
        inputs[PROMPT] = (padded.mask_NT & ~padded.body_NT).sum(1).numpy()
    return inputs


class OnnxSession:
    """A file on ONNX Runtime's processor for CPUs."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # what it says of nodes it folds is of no use here
        # A thread that waits busily takes a core from the tokenizer, and from whoever else computes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(self, names: Sequence[str], inputs: Mapping[str, Array]) -> list[Array]:
        made: list[Array] = self._session.run(list(names), dict(inputs))
        return made


class OpenVinoSession:
    """A file on OpenVINO's plugin for CPUs."""

    def __init__(self, file: Path, dtype: Numbers) -> None:
        import openvino

        # Left alone it computes in bfloat16 where the processor can, and vectors would differ from one machine to
        # another; weights kept in 16 bits say that the last digits do not matter.
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        if dtype != "fp16":
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        self._model = openvino.compile_model(str(file), "CPU", settings)
        self._request = self._model.create_infer_request()
        self._lock = threading.Lock()  # a request holds the results of one call

    def run(self, names: Sequence[str], inputs: Mapping[str, Array]) -> list[Array]:
        with self._lock:
            self._request.infer(dict(inputs))
            return [np.array(self._request.get_tensor(name).data) for name in names]


def open_session(folder: Path, backend: GraphBackend, dtype: Numbers) -> Session:
    """Errors: `MissingExtraError`; `ModelError` for a file that cannot be opened, naming it."""
    package = {"onnx": "onnxruntime", "openvino": "openvino"}[backend]
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, "export")
    file = folder / FILES[backend]
    try:
        return OnnxSession(file) if backend == "onnx" else OpenVinoSession(file, dtype)
    except Exception as error:
        said = " ".join(str(error).split())
        raise ModelError(
            f"{package} cannot open this graph: {said[:500]}", where=file, fix="export or copy the folder again"
        ) from error
