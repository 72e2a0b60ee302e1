"""An embedder as one ONNX graph: token ids and mask in, the pooled, projected and normalised vector out.

The graph is made by torch.onnx's newer exporter (`dynamo=True`). The older one, which records one run of the model, is
quicker, deprecated, and writes sizes of its example into the graph without a word: MPNet's gave wrong vectors and no
error for other lengths. The newer one reasons about sizes as symbols and refuses a model that would fix one of them.
What it made is still run and compared (`write.py`).

Both padding sides are right: the mask is always handed over, and positions are counted from it.
"""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embedsmith.core.errors import ModelError
from embedsmith.core.progress import transformers_silenced
from embedsmith.core.reps import Representation
from embedsmith.core.tokens import PaddedTokens
from embedsmith.models.embedder import Embedder
from embedsmith.models.graphs.graph_files import IDS, MASK, PROMPT, STATES, output_names
from embedsmith.models.lora import has_adapter

OPSET = 20
"""Operators of ONNX as of version 1.15: the first with GELU as one of them, and known to every runtime of today."""
AXES = ("batch", "length")
LARGEST_FILE = 2**31 - 2**24
"""Bytes that fit a file of ONNX; larger weights lie beside it."""


class Graph(nn.Module):
    """What is traced: `heads` of a model, and its states, from ids and mask, and from the number of prompt tokens where
    these take no part in the pooling."""

    def __init__(self, model: Embedder, heads: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.heads = tuple(heads)

    def forward(self, id_NT: Tensor, mask_NT: Tensor, prompt_N: Tensor | None = None) -> tuple[Tensor, ...]:
        real_NT = mask_NT > 0
        body_NT = real_NT if prompt_N is None else real_NT & (mask_NT.cumsum(1) > prompt_N[:, None])
        padded = PaddedTokens(id_NT, real_NT, body_NT, real_NT[:, 0])
        made: Mapping[str, Any] = self.model(padded, (*self.heads, "tokens"))
        states = made["tokens"].vector_NTD.float()
        return (states, *(tensor.clone() for head in self.heads for tensor in made[head].tensors()))


def check_traceable(model: Embedder) -> None:
    """Errors: `ModelError` for what one graph cannot hold."""
    backbone: Any = model.backbone
    reasons = {
        "mcls puts tokens between those of a text": model.settings.mcls is not None,
        "it has an adapter beside its weights": has_adapter(backbone),
        "its weights are not float32": backbone.dtype != torch.float32,
        "it is not on the CPU": model.device.type != "cpu",
        "it is compiled": backbone._compiled_call_impl is not None,
    }
    if reason := next((why for why, found in reasons.items() if found), None):
        raise ModelError(
            f"this model cannot be exported as it was loaded: {reason}",
            fix='load it plainly, embedsmith.load(FOLDER, device="cpu"), an adapter merged and saved first',
        )


def heads_of(model: Embedder) -> tuple[str, ...]:
    """What a graph of the model gives."""
    return ("dense", *(name for name, head in model.parts.heads.items() if not head.own_pass))


def wants_prompt(model: Embedder) -> bool:
    """Whether the vector depends on which tokens are the prompt."""
    return not model.settings.include_prompt or model.settings.echo is not None


@contextmanager
def _as_traced(model: Embedder, half: bool) -> Iterator[None]:
    """The model as it is while it is traced: a mask is always handed over and positions are counted from it, whatever
    the example looks like; one row a text; `half`: the backbone in 16 bits, what follows it in 32.

    Attention is written out and adds its mask to the scores. That of torch takes booleans, and looks every score over
    for a row that sees nothing: in a graph two more steps over all scores, a seventh of MiniLM's time in 8 bits.
    """
    kept = (model.attention, model.padding_left, model.packing, model.backbone, model.training)
    attention = getattr(model.backbone.config, "_attn_implementation", None)
    model.attention, model.padding_left, model.packing = replace(model.attention, causal=False), True, False
    if attention == "sdpa":
        model.backbone.set_attn_implementation("eager")
    if half:
        model.backbone = deepcopy(model.backbone).half()
    try:
        with torch.no_grad(), transformers_silenced():
            yield model.eval()  # type: ignore[misc]
    finally:
        model.attention, model.padding_left, model.packing, model.backbone, was_training = kept
        if attention == "sdpa":
            model.backbone.set_attn_implementation(attention)
        model.train(was_training)


def write_onnx(model: Embedder, file: Path, *, half: bool = False) -> Mapping[str, type[Representation]]:
    """Write the graph of a model; the kinds of its heads by name.

    Errors: `ModelError` naming an operator that ONNX lacks, and for a model whose code fixes a size.
    """
    heads = heads_of(model)
    rows, length = 3, min(12, model.max_length)
    id_NT = torch.full((rows, length), model.pad_id)
    mask_NT = torch.ones_like(id_NT)
    mask_NT[1, : length // 2] = 0
    names, example = [IDS, MASK], [id_NT, mask_NT]
    if wants_prompt(model):
        names, example = [*names, PROMPT], [*example, torch.zeros(rows, dtype=torch.int64)]
    with _as_traced(model, half):
        mask = mask_NT > 0
        kinds = {head: type(rep) for head, rep in model(PaddedTokens(id_NT, mask, mask, mask[:, 0]), heads).items()}
        kinds = {head: kinds[head] for head in heads}
        outputs = [STATES, *(name for head, kind in kinds.items() for name in output_names(head, kind))]
        program = _traced(Graph(model, heads), names, example, outputs)
    _save(program.model_proto, file)
    return kinds


def _traced(graph: Graph, names: Sequence[str], example: Sequence[Tensor], outputs: Sequence[str]) -> Any:
    free = torch.export.Dim.DYNAMIC
    arguments = [*example, None][:3]  # without the prompt's length where no vector depends on it
    sizes = tuple(None if one is None else {axis: free for axis in range(one.dim())} for one in arguments)
    try:
        with warnings.catch_warnings(), quiet("torch.onnx", "onnxscript", "onnx_ir"):
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                graph,
                tuple(arguments),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(names),
                output_names=list(outputs),
                dynamic_shapes=sizes,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise _refusal(error, type(graph.model.backbone).__name__) from error


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Without what libraries report of their work, but for errors. `names`: of their loggers."""
    loggers = [logging.getLogger(None if name == "root" else name) for name in names]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def _refusal(error: BaseException, name: str) -> ModelError:
    """The exporter's pages of advice in one line."""
    said: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        said.append(str(cause))
        cause = cause.__cause__
    whole = "\n".join(said)
    if (found := re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", whole)) is not None:
        return ModelError(
            f"ONNX has no operator for {found[1]}, which {name}, its pooling or one of its heads computes",
            fix="write that part with other operations of torch, or serve the model with torch: embedsmith serve MODEL",
        )
    reason = next((line.strip(" -") for line in reversed(whole.splitlines()) if "inferred a static shape" in line), "")
    reason = reason or next((line.strip() for line in said[-1].splitlines() if line.strip()), type(error).__name__)
    return ModelError(
        f"{name} cannot be exported: {reason[:500]}",
        fix="serve the model with torch: embedsmith serve MODEL",
    )


def _save(proto: Any, file: Path) -> None:
    """Without what the exporter notes beside every node: paths of this machine and lines of code. The sizes that are
    free are called by what they are."""
    free = {one.dim_param: name for one, name in zip(proto.graph.input[0].type.tensor_type.shape.dim, AXES)}
    for value in (*proto.graph.input, *proto.graph.output):
        for one in value.type.tensor_type.shape.dim:
            if one.dim_param in free:
                one.dim_param = free[one.dim_param]
    del proto.graph.value_info[:]  # of what is between, which every runtime works out by itself
    for one in (*proto.graph.node, *proto.graph.input, *proto.graph.output, proto.graph):
        del one.metadata_props[:]
        one.doc_string = ""
    for function in proto.functions:
        for node in function.node:
            del node.metadata_props[:]
            node.doc_string = ""
    save_onnx(proto, file)


def save_onnx(proto: Any, file: Path) -> None:
    """One file, or weights beside it under the name that other programs look for, where they are too large for one."""
    import onnx

    file.parent.mkdir(parents=True, exist_ok=True)
    large = sum(len(one.raw_data) for one in proto.graph.initializer) > LARGEST_FILE
    apart = {"save_as_external_data": True, "all_tensors_to_one_file": True, "location": f"{file.name}_data"}
    onnx.save_model(proto, str(file), **(apart if large else {}))
