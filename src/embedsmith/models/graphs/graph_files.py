"""Where an exported graph lies in a model's folder, how its outputs are called, and what it says of itself.

The names are those that other programs look for: sentence-transformers opens `onnx/model.onnx` with `backend="onnx"`
and `openvino/openvino_model.xml` with `backend="openvino"`, text-embeddings-inference and transformers.js the former;
all of them know the outputs `last_hidden_state` and `sentence_embedding`. `graph.json` beside the graph is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.core.recipe import parse
from embedsmith.core.reps import Dense, MultiVector, Representation, Sparse
from embedsmith.core.settings import section, to_plain
from embedsmith.models.folder import read_folder_json, write_json

GraphBackend = Literal["onnx", "openvino"]
Numbers = Literal["fp32", "fp16", "int8"]
FILES: Mapping[GraphBackend, str] = {"onnx": "onnx/model.onnx", "openvino": "openvino/openvino_model.xml"}
FACTS = "graph.json"
STATES, VECTOR = "last_hidden_state", "sentence_embedding"
IDS, MASK, PROMPT = "input_ids", "attention_mask", "prompt_length"
KINDS: Mapping[str, type[Representation]] = {kind.__name__: kind for kind in (Dense, Sparse, MultiVector)}
_WEIGHTS = ("*.safetensors", "*.bin", "adapter_config.json")


@section
@dataclass(frozen=True)
class GraphFacts:
    """What `graph.json` says.

    `version`: of this file's form. `dtype`: the numbers that the graph computes with.
    `heads`: its outputs by the head's name, with the kind of each. `dimension`: numbers in a dense vector.
    `max_length`: tokens that it was proven for.
    `prompt_length`: whether it wants to be told how many tokens of a text are its prompt, to leave them out.
    `made_from`: the fingerprint of the model it was made from.
    `cosine`: how close its vectors came to that model's, on average and at worst.
    `scores`: by task, of that model and of the graph.
    """

    dtype: Numbers
    heads: Mapping[str, str]
    dimension: int
    max_length: int
    prompt_length: bool = False
    made_from: str = ""
    cosine: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    version: int = 1

    @classmethod
    def read(cls, folder: Path, backend: GraphBackend) -> "GraphFacts":
        """Errors: `ModelError` for a graph that `embedsmith export` did not make, and a damaged or newer file."""
        path = (folder / FILES[backend]).with_name(FACTS)
        if not path.exists():
            raise ModelError(
                f"this graph does not say what its outputs are: it was not made by embedsmith export --to {backend}",
                where=path.parent,
                fix=f"export the model itself: embedsmith export MODEL OUT --to {backend}",
            )
        tree = read_folder_json(path)
        if tree.get("version", 1) != 1:
            raise ModelError(f"version {tree['version']}", where=path, expected="1", fix="install a newer embedsmith")
        try:
            facts = parse(cls, tree, where=str(path))
        except RecipeError as error:
            raise ModelError(f"cannot read this file: {error}", where=path) from error
        if unknown := [kind for kind in facts.heads.values() if kind not in KINDS]:
            raise ModelError(f"a head of the kind {unknown[0]!r}", where=path, expected=", ".join(KINDS))
        return facts

    def write(self, folder: Path, backend: GraphBackend) -> None:
        plain: Any = to_plain(self, exact=True)
        write_json((folder / FILES[backend]).with_name(FACTS), plain)

    def outputs(self, head: str) -> tuple[str, ...]:
        """The graph's names of what a head gives, in the order of its kind's fields."""
        return output_names(head, KINDS[self.heads[head]])


def output_names(head: str, kind: type[Representation]) -> tuple[str, ...]:
    """`sentence_embedding` for the dense head; else the head's name and what the field holds: `sparse_weight`."""
    if head == "dense":
        return (VECTOR,)
    return tuple(f"{head}_{one.name.rpartition('_')[0]}" for one in fields(kind))


def has_weights(folder: Path) -> bool:
    """Whether torch can load what lies here."""
    return any(next(folder.glob(pattern), None) is not None for pattern in _WEIGHTS)


def backend_of(folder: Path, asked: str | None) -> GraphBackend | None:
    """Which graph of a folder runs; `None` for torch. Where nothing is asked for, a folder with weights is torch's, and
    one without runs as the graph that it holds.

    Errors: `ModelError` where the graph that is asked for is not there.
    """
    there = [name for name, file in FILES.items() if (folder / file).exists()]
    if asked is None:
        return None if has_weights(folder) or not there else there[0]
    if asked == "torch":
        return None
    found = next((name for name in there if name == asked), None)
    if found is None:
        fix = f"make one: embedsmith export {folder} NEW_FOLDER --to {asked}"
        if there and not has_weights(folder):
            fix = f"this folder holds one for {there[0]}: --backend {there[0]}"
        raise ModelError(
            f"this folder has no graph for {asked}",
            where=folder / FILES["onnx" if asked == "onnx" else "openvino"],
            fix=fix,
        )
    return found
