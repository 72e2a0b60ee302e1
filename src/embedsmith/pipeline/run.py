"""Run the stages of a pipeline in order. What is finished is in a journal; the same command goes on behind it."""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedsmith.core.collectives import join_ranks, on_first_rank
from embedsmith.core.errors import CheckpointError, RecipeError
from embedsmith.core.files import atomic_file
from embedsmith.core.progress import log
from embedsmith.core.recipe import apply_override, read_tree
from embedsmith.core.registry import did_you_mean
from embedsmith.pipeline.config import PipelineRecipe, Stage
from embedsmith.pipeline.verbs import VERBS

JOURNAL = "pipeline.json"
_REFERENCE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class Finished:
    """A stage that is over. `key`: a hash of its recipe and of all stages before it."""

    key: str
    result: str
    seconds: float


def run(recipe: PipelineRecipe) -> dict[str, Path]:
    """Run every stage that the journal does not name as finished with the same recipe; what each made, by name.

    A stage whose recipe, or that of an earlier stage, changed since is run again; its verb then says what it does
    with an output that is already there. On several ranks (torchrun) every stage runs on all of them, or on the first
    where it knows no other. Errors: `RecipeError` for a reference to no earlier stage; those of the verbs.
    """
    check(recipe)
    join_ranks()
    results: dict[str, str] = {"output": recipe.output}
    key = ""
    for stage in recipe.stages:
        tree = resolved(stage, results)
        key = _key(key, stage, tree)
        done = _known(recipe).get(stage.name)
        if done is not None and done.key == key and Path(done.result).exists():
            log.info("stage %s: finished before, %s", stage.name, done.result)
        else:
            log.info("stage %s: %s", stage.name, stage.verb)
            started = time.monotonic()
            made = VERBS[stage.verb].run(tree, f"stage {stage.name}")
            done = Finished(key, str(made), round(time.monotonic() - started, 1))
            _note(recipe, stage.name, done)
        results[stage.name] = done.result
    return {stage.name: Path(results[stage.name]) for stage in recipe.stages}


def check(recipe: PipelineRecipe) -> None:
    """Resolve every stage before any runs, so that a wrong reference costs nothing. Errors: `RecipeError`."""
    results: dict[str, str] = {"output": recipe.output}
    for stage in recipe.stages:
        resolved(stage, results)
        results[stage.name] = f"(what stage {stage.name} makes)"


def resolved(stage: Stage, results: dict[str, str]) -> dict[str, Any]:
    """The tree of the stage's verb, with changes made and references filled in."""
    tree = read_tree(stage.recipe) if isinstance(stage.recipe, str) else json.loads(json.dumps(stage.recipe))
    for change in stage.set:
        apply_override(tree, change)
    tree.setdefault("output", f"${{output}}/{stage.name}{VERBS[stage.verb].suffix}")
    filled: dict[str, Any] = _filled(tree, results, stage.name)
    return filled


def _filled(value: Any, results: dict[str, str], where: str) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item, results, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, results, where) for item in value]
    return _REFERENCE.sub(lambda found: _lookup(found[1], results, where), value) if isinstance(value, str) else value


def _lookup(name: str, results: dict[str, str], where: str) -> str:
    if name not in results:
        raise RecipeError(
            f"${{{name}}} is no earlier stage{did_you_mean(name, list(results))}",
            where=f"stage {where}",
            expected=f"one of {', '.join(results)}",
        )
    return results[name]


def _key(before: str, stage: Stage, tree: dict[str, Any]) -> str:
    content = json.dumps([before, stage.verb, tree], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _known(recipe: PipelineRecipe) -> dict[str, Finished]:
    path = Path(recipe.output) / JOURNAL
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {name: Finished(**entry) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the journal of stages cannot be read ({error})",
            where=path,
            fix="delete it; verbs find what they finished by themselves",
        ) from error


def _note(recipe: PipelineRecipe, name: str, done: Finished) -> None:
    """Enter a finished stage. On several ranks after all of them are through."""

    def write() -> None:
        entries = {known: asdict(entry) for known, entry in _known(recipe).items()} | {name: asdict(done)}
        with atomic_file(Path(recipe.output) / JOURNAL) as file:
            json.dump(entries, file, indent=1)

    on_first_rank(write)
