"""A model for other runtimes, from Python and for the verb `export`: a graph or a GGUF file, and what it costs in the
score of a task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.core.outputs import claimed, delivered
from embedsmith.core.progress import lines_shown
from embedsmith.core.recipe import parse
from embedsmith.core.settings import did_you_mean
from embedsmith.data.formats.texts import read_texts
from embedsmith.evaluate.run import evaluate
from embedsmith.evaluate.tasks.kinds import load_tasks
from embedsmith.models import Embedder, load
from embedsmith.models.exports.gguf import ExportedFile, write_gguf
from embedsmith.models.exports.write_graph import Exported, GraphConfig, export_graph
from embedsmith.models.graphs.graph_files import Numbers
from embedsmith.models.write import saved_model

Target = Literal["onnx", "openvino", "gguf"]


def export(
    model: str | Path | Embedder,
    out: str | Path,
    to: Target = "onnx",
    *,
    dtype: Numbers = "fp32",
    texts: str | Path | Sequence[str] = (),
    floor: float | None = None,
    tasks: str | Path | Sequence[str | Path] = (),
    data: str | Path | None = None,
    split: str = "test",
    overwrite: bool = False,
    **options: Any,
) -> Exported | ExportedFile:
    """Write a model for ONNX Runtime, OpenVINO or llama.cpp, checked against the model.

    >>> import embedsmith as es
    >>> made = es.export("my-model", "my-model.gguf", to="gguf", dtype="fp16")
    >>> made.path.name
    'my-model.gguf'

    A graph opens like any model: `es.export("my-model", "my-graph", to="onnx")`, then `es.load("my-graph")`.

    `model`: a folder, a hub id, or a model that is loaded. `out`: the folder of a graph, or a file `.gguf`.
    `dtype`: `fp32`, `fp16` or `int8`. `texts`: what 8 bits are calibrated and measured on, a file or texts; by default
    a small sample in several languages. `floor`: the least mean cosine to the model's vectors, 0.98 by default.
    `tasks`: what the graph is scored on beside the model; the loss goes into the card. `data`, `split`: as in
    `evaluate`. `overwrite`: replaces another saved model. `options`: of `embedsmith.load`.
    Errors: `ModelError` for what cannot be expressed, naming it, and for vectors too far from the model's; those of
    `load` and `evaluate`.
    """
    for name, value, known in (("to", to, get_args(Target)), ("dtype", dtype, get_args(Numbers))):
        if value not in known:
            raise RecipeError(f"{name}={value!r}{did_you_mean(value, known)}", expected=f"one of {', '.join(known)}")
    named = [tasks] if isinstance(tasks, str | Path) else list(tasks)
    with lines_shown(), delivered(out, "export") as place, claimed(place, "export"):
        out = Path(place)
        if to == "gguf":
            for name, of_graphs in (("texts", texts), ("floor", floor), ("tasks", named)):
                if of_graphs:
                    raise ModelError(f"{name} with to=gguf: it is for graphs", fix=f"leave {name} out")
            return write_gguf(_loaded(model, options), out, dtype, overwrite=overwrite)
        saved_model().refuse_other(out)
        given: dict[str, Any] = {"to": to, "dtype": dtype, **({} if floor is None else {"floor": floor})}
        config = parse(GraphConfig, given, where="export")
        loaded_tasks = load_tasks(named, data_dir=data, split=split)
        sample = [one.text for one in read_texts(texts)] if isinstance(texts, str | Path) else list(texts)
        if isinstance(texts, str | Path) and not sample:
            raise ModelError("no text in this file", where=texts, fix="give a file of texts like those to be encoded")

        def score(encoder: Embedder) -> Mapping[str, float]:
            return evaluate(encoder, loaded_tasks).main_scores()

        return export_graph(
            _loaded(model, options), out, config, sample, overwrite=overwrite, score=score if loaded_tasks else None
        )


def _loaded(model: str | Path | Embedder, options: Mapping[str, Any]) -> Embedder:
    if isinstance(model, Embedder):
        if options:
            raise ModelError(
                f"{next(iter(options))} of a model that is loaded", fix="give it to embedsmith.load(FOLDER, ...)"
            )
        return model
    return load(str(model), device="cpu", **options)
