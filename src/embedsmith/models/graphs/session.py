"""A graph that runs: ONNX Runtime and OpenVINO behind one call, on as many threads as torch has (OMP_NUM_THREADS).

A call from a thread that torch gives all cores computes with all of them. Of calls from threads with one core each
(chunks side by side, see `WindowEncoder`) every one computes with one: small products gain little from several cores,
and a busy core then delays its own chunk instead of every product. The runtimes settle this when a graph is opened, so
it is opened once for either way, when there is a call for it.
"""

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
        self._file, self._opening = file, threading.Lock()
        self._session_of: dict[int, Any] = {}
        self._session()

    def _session(self) -> Any:
        """That of as many threads as the calling one has."""
        threads = torch.get_num_threads()
        with self._opening:
            if threads not in self._session_of:
                self._session_of[threads] = self._opened(threads)
            return self._session_of[threads]

    def _opened(self, threads: int) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # what it says of nodes it folds is of no use here
        # A thread that waits busily takes a core from the tokenizer, and from whoever else computes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(str(self._file), options, providers=["CPUExecutionProvider"])

    def run(self, names: Sequence[str], inputs: Mapping[str, Array]) -> list[Array]:
        made: list[Array] = self._session().run(list(names), dict(inputs))
        return made


class OpenVinoSession:
    """A file on OpenVINO's plugin for CPUs."""

    def __init__(self, file: Path, dtype: Numbers) -> None:
        self._file, self._dtype, self._opening = file, dtype, threading.Lock()
        self._threads = torch.get_num_threads()
        self._model_of: dict[bool, Any] = {}
        self._idle: dict[bool, list[Any]] = {False: [], True: []}  # requests: each holds the results of one call
        self._model(False)

    def _model(self, side_by_side: bool) -> Any:
        """With all threads for every call, or a stream of one thread for each of as many calls."""
        with self._opening:
            if side_by_side not in self._model_of:
                self._model_of[side_by_side] = self._opened(self._threads if side_by_side else 1)
            return self._model_of[side_by_side]

    def _opened(self, streams: int) -> Any:
        import openvino

        # Left alone it computes in bfloat16 where the processor can, and vectors would differ from one machine to
        # another; weights kept in 16 bits say that the last digits do not matter.
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": self._threads, "NUM_STREAMS": streams}
        if self._dtype != "fp16":
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        return openvino.compile_model(str(self._file), "CPU", settings)

    def run(self, names: Sequence[str], inputs: Mapping[str, Array]) -> list[Array]:
        side_by_side = torch.get_num_threads() < self._threads
        idle, model = self._idle[side_by_side], self._model(side_by_side)
        try:
            request = idle.pop()
        except IndexError:
            request = model.create_infer_request()
        request.infer(dict(inputs))
        made = [np.array(request.get_tensor(name).data) for name in names]
        idle.append(request)
        return made


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
