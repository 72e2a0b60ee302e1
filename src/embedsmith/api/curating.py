"""A curation for the verb `curate`: what its arguments mean, and the models and evaluation sets that steps ask for."""

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from embedsmith.core.encoder import Encoder, Reranker
from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import apply_override, parse, read_tree
from embedsmith.curate import CurateRecipe, EvaluationText, Report, Tools, curate
from embedsmith.evaluate import load_task, split_names
from embedsmith.evaluate.overlap import texts_of
from embedsmith.models import load, load_reranker


def run_curate(
    source: str,
    more: Sequence[str],
    steps: Sequence[str],
    *,
    data: str | None = None,
    overwrite: bool = False,
    engine: str | None = None,
    address: str | None = None,
) -> Report:
    """`RECIPE.yaml [key=value ...]`, or `IN OUT [key=value ...]` with steps. `engine`, and the `address` of a Ray
    cluster, go before what the recipe says.

    Errors: `RecipeError` for arguments that are neither, and all that a curation raises.
    """
    tree = tree_of(source, more, steps)
    if engine or address:
        known, name = tree.get("engine"), engine or "ray"
        settings = known if isinstance(known, dict) and known.get("type") == name else {}
        tree["engine"] = {**settings, "type": name} | ({"address": address} if address else {})
    recipe = parse(CurateRecipe, tree, where=source if _is_recipe(source) else "curate")
    return curate(recipe, curation_tools(data), overwrite=overwrite)


def tree_of(source: str, more: Sequence[str], steps: Sequence[str]) -> dict[str, Any]:
    overrides = [text for text in more if "=" in text]
    places = [text for text in more if "=" not in text]
    if _is_recipe(source):
        tree = read_tree(source)
        if places:
            raise RecipeError(f"{places[0]!r} after a recipe", expected="changes such as output=kept.jsonl")
    else:
        if len(places) != 1:
            raise RecipeError(
                "where should the result go?" if not places else f"one output, not {len(places)}",
                expected="embedsmith curate IN OUT.jsonl --step NAME",
            )
        tree = {"input": {"path": source}, "output": places[0], "steps": []}
    if steps:
        tree["steps"] = [*(tree.get("steps") or []), *map(step_of, steps)]
    for override in overrides:
        apply_override(tree, override)
    return tree


def step_of(text: str) -> dict[str, Any]:
    """`length query_min=3` (or a YAML mapping) as a recipe writes it. Errors: `RecipeError`."""
    name, *settings = shlex.split(text)
    step: dict[str, Any] = {"type": name}
    for setting in settings:
        apply_override(step, setting)
    return step


def _is_recipe(source: str) -> bool:
    return source.endswith((".yaml", ".yml"))


def curation_tools(data: str | None = None) -> Tools:
    """`data`: the folder where the names of evaluation tasks are looked up."""
    return Tools(encoder=load_encoder, reranker=open_reranker, evaluation=lambda names: evaluation_texts(names, data))


def load_encoder(path: str) -> tuple[Encoder, str]:
    """A model, and its fingerprint."""
    model = load(path)
    return model, model.fingerprint()


def open_reranker(path: str) -> tuple[Reranker, str]:
    """A reranker, and its fingerprint."""
    model = load_reranker(path)
    return model, model.fingerprint()


def evaluation_texts(names: Sequence[str], data: str | None) -> Iterator[EvaluationText]:
    """The texts of evaluation tasks, named as for `embedsmith evaluate`: texts of pairs and texts to classify count as
    queries; what a classifier is fitted on does not count. Errors: `EvaluationError` for unknown names."""
    for name in split_names(names):
        task = load_task(name, data_dir=data)
        if (found := texts_of(task)) is None:
            raise RecipeError(f"decontaminate cannot read the texts of {name!r} ({task.kind})")
        for role, texts in found:
            yield from (EvaluationText(text, name, role) for text in texts)
