"""An embedder to a folder with a graph: all that a saved model has but its weights, and the graph in their place.

In this order: the graph in fp32, its quantised or half form, OpenVINO's form of that; then the folder is opened as a
user will open it and compared with the model, over lengths, batches and both padding sides. Only what is close enough
gets the folder's name.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from embedsmith.core.errors import MissingExtraError, ModelError
from embedsmith.core.outputs import atomic_folder, claimed
from embedsmith.core.progress import log
from embedsmith.core.reps import in_fp32
from embedsmith.core.settings import Count, Share, section
from embedsmith.core.tokens import TokenBatch
from embedsmith.models.embedder import Embedder
from embedsmith.models.exports.int8 import SAMPLE, quantised
from embedsmith.models.exports.trace import check_traceable, heads_of, wants_prompt, write_onnx
from embedsmith.models.graphs.graph_files import FILES, GraphBackend, GraphFacts, Numbers
from embedsmith.models.load import load
from embedsmith.models.write import saved_model

Scores = Mapping[str, Mapping[str, float]]
"""By task, what the model and what the graph scored: `{"stsb": {"model": 0.82, "graph": 0.819}}`."""
SAME = 1e-4
"""How far a number of a graph in fp32 may be from the model's, in units of the largest: sums in another order."""


@section
@dataclass(frozen=True)
class GraphConfig:
    """How a graph is made. `to`: for ONNX Runtime and whatever reads ONNX, or OpenVINO. `dtype`: the numbers it
    computes with. `floor`: the least mean cosine between its vectors and the model's, where these are not fp32.
    `sample`: so many of the given texts at most calibrate 8 bits.
    """

    to: GraphBackend
    dtype: Numbers = "fp32"
    floor: Share = 0.98
    sample: Count = 256


@dataclass(frozen=True)
class Exported:
    """What was made: its folder, what the graph says of itself, and all of it in words."""

    path: Path
    facts: GraphFacts
    text: str

    def __str__(self) -> str:
        return self.text


def export_graph(
    model: Embedder,
    out: str | Path,
    config: GraphConfig,
    texts: Sequence[str] = (),
    *,
    overwrite: bool = False,
    score: Callable[[Embedder], Mapping[str, float]] | None = None,
) -> Exported:
    """Write the graph of `model` to the folder `out`, which appears whole or not at all.

    `texts` calibrate 8 bits and measure what they cost; by default a small sample in several languages. `score`: the
    main scores of an encoder by task, for the card. `overwrite` replaces another saved model.
    Errors: `ModelError` naming an operator that cannot be expressed, for vectors further from the model's than
    `config` allows, and for a model that is not loaded plainly; `CheckpointError` for a folder with something else.
    """
    needed = ["onnx", "onnxscript", "onnxruntime", *(["openvino"] if config.to == "openvino" else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise MissingExtraError(missing[0], "export")
    check_traceable(model)
    given = list(texts) or SAMPLE
    with claimed(out, "export"), atomic_folder(out, saved_model(), overwrite=overwrite) as root:
        model.parts.write(root, weights=False)
        facts = _write_graph(model, root, config, given)
        graph = load(str(root), backend=config.to)
        _check_shapes(model, graph, config)
        facts = replace(facts, cosine=_agreement(model, graph, given, config))
        if score is not None:
            before, after = score(model), score(graph)
            facts = replace(facts, scores={task: {"model": before[task], "graph": after[task]} for task in before})
        facts.write(root, config.to)
        card = model.parts.model_card(config.to, _card(facts, config))
        (root / "README.md").write_text(card, encoding="utf-8")
    return Exported(Path(out), facts, _told(Path(out), facts, config))


def _write_graph(model: Embedder, root: Path, config: GraphConfig, texts: Sequence[str]) -> GraphFacts:
    """The graph and what it says of itself."""
    half = config.dtype == "fp16" and config.to == "onnx"
    with tempfile.TemporaryDirectory() as scratch:
        plain = (root if config.to == "onnx" else Path(scratch)) / FILES["onnx"]
        kinds = write_onnx(model, plain, half=half)
        if config.dtype == "int8":
            quantised(model, plain, texts, config.sample)
        if config.to == "openvino":
            to_openvino(plain, root / FILES["openvino"], config.dtype == "fp16")
    facts = GraphFacts(
        dtype=config.dtype,
        heads={head: kind.__name__ for head, kind in kinds.items()},
        dimension=model.dimension,
        max_length=model.max_length,
        prompt_length=wants_prompt(model),
        made_from=model.fingerprint(),
    )
    facts.write(root, config.to)
    return facts


def to_openvino(onnx_file: Path, file: Path, half: bool) -> None:
    """OpenVINO's own form. `half`: weights in 16 bits, as its tools keep them. Errors: `ModelError` naming an operator
    that it lacks."""
    import openvino

    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        converted = openvino.convert_model(str(onnx_file))
    except Exception as error:
        said = " ".join(str(error).split())
        raise ModelError(f"OpenVINO cannot take this graph: {said[-500:]}", fix="export it with --to onnx") from error
    openvino.save_model(converted, str(file), compress_to_fp16=half)


FloatArray = npt.NDArray[np.float64]


def _check_shapes(model: Embedder, graph: Embedder, config: GraphConfig) -> None:
    """The graph against the model on made-up tokens: a few lengths up to the longest, one text and several, padded on
    either side. Errors: `ModelError` naming where they differ; fp16 and int8 must only be finite here."""
    longest = min(model.max_length, 512)
    chance = np.random.default_rng(0)
    vocabulary = np.array(sorted(set(model.tokenizer.get_vocab().values()) - set(model.tokenizer.all_special_ids)))
    if model.text.rows is not None:
        vocabulary = vocabulary[vocabulary < model.text.rows]
    for lengths in ([1], [2, 1, 3], [longest], [longest // 2, 5, longest, 1]):
        rows = [chance.choice(vocabulary, min(max(length, 1), longest)).tolist() for length in lengths]
        tokens = TokenBatch.from_rows(rows, [len(row) // 3 for row in rows], is_query=False)
        for left in (False, True):
            padded = tokens.pad(model.pad_id, left=left)
            heads = heads_of(model)
            kept, model.padding_left = model.padding_left, left
            try:
                with torch.no_grad():
                    expected, found = model(padded, heads), graph(padded, heads)
            finally:
                model.padding_left = kept
            for head in heads:
                for one, other in zip(expected[head].floating(), found[head].floating(), strict=True):
                    _compare(one, other, head, lengths, left, config)


def _compare(one: Any, other: Any, head: str, lengths: Sequence[int], left: bool, config: GraphConfig) -> None:
    expected, found = in_fp32(one), in_fp32(other)
    where = (
        f"{head} of {len(lengths)} texts of up to {max(lengths)} tokens, padded on the {'left' if left else 'right'}"
    )
    if not bool(found.isfinite().all()):
        fix = "export with --dtype fp32: some values of this model are too large for 16 bits"
        raise ModelError(f"the graph's values are not finite ({where})", fix=fix)
    if config.dtype != "fp32":
        return
    apart = float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-9))
    if expected.shape != found.shape or apart > SAME:
        raise ModelError(
            f"the graph does not compute what the model does: {where} differ by {apart:.2g} of the largest value",
            expected=f"at most {SAME:g}",
            fix="serve the model with torch: embedsmith serve MODEL",
        )


def _agreement(model: Embedder, graph: Embedder, texts: Sequence[str], config: GraphConfig) -> dict[str, float]:
    """Cosines between the vectors of the model and of the graph. Errors: `ModelError` below the floor."""
    ours, its = (in_fp32(one.represent(texts, role="document")["dense"].tensors()[0]) for one in (model, graph))
    cosine_N = F.cosine_similarity(ours, its, dim=-1)
    mean, least = round(float(cosine_N.mean()), 6), round(float(cosine_N.min()), 6)
    if config.dtype != "fp32" and not mean >= config.floor:
        raise ModelError(
            f"in {config.dtype} the vectors have a mean cosine of {mean:.4f} to the model's (the least is {least:.4f})",
            expected=f"at least {config.floor:g}",
            fix="give texts like those that will be encoded with --texts FILE, use --dtype fp16 or fp32, or accept it "
            f"with --floor {max(mean - 0.005, 0):.2f}",
        )
    return {"mean": mean, "least": least, "texts": len(texts)}


_NAMES = {"onnx": "ONNX", "openvino": "OpenVINO"}


def _card(facts: GraphFacts, config: GraphConfig) -> str:
    """The part of the model card that is about the graph."""
    heads = ", ".join(f"`{name}`" for head in facts.heads for name in facts.outputs(head))
    lines = [
        "## The graph\n",
        f"The folder holds no weights but a graph, `{FILES[config.to]}` ({_NAMES[config.to]}, {facts.dtype}), from "
        f"`input_ids` and `attention_mask` to `last_hidden_state` and {heads}; `embedsmith.load` runs it "
        "(with its extra `export`).\n",
        f"Beside the model it was made from: mean cosine {facts.cosine['mean']:.4f}, "
        f"least {facts.cosine['least']:.4f}, over {facts.cosine['texts']:.0f} texts.\n",
    ]
    if facts.scores:
        lines += ["| task | model | graph | lost |", "|---|---|---|---|"]
        lines += [f"| {task} | {_cells(both)} |" for task, both in facts.scores.items()]
        lines.append("\nMain scores, times 100.\n")
    return "\n".join(lines)


def _cells(both: Mapping[str, float], between: str = " | ") -> str:
    before, after = 100 * both["model"], 100 * both["graph"]
    return between.join([f"{before:.2f}", f"{after:.2f}", f"{before - after:.2f}"])


def _told(out: Path, facts: GraphFacts, config: GraphConfig) -> str:
    lines = [
        f"{out}: {_NAMES[config.to]} in {facts.dtype}, {', '.join(facts.heads)}; mean cosine to the model "
        f"{facts.cosine['mean']:.4f}, least {facts.cosine['least']:.4f}, over {facts.cosine['texts']:.0f} texts"
    ]
    lines += [f"{task}: {_cells(both, ', ')} (model, graph, lost)" for task, both in facts.scores.items()]
    lines.append(f'to open it: embedsmith.load("{out}"), or --model {out}; weights are not in the folder')
    log.info("checked against the model: lengths, batches, both padding sides")
    return "\n".join(lines)
