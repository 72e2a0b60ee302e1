"""What the report of a merge proposes: each step says what was found, and has the line that does it."""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from embedsmith.data.split import held_out_tasks
from embedsmith.evaluate.compare import Difference
from embedsmith.report.next_steps import SHOWN, NextStep

_UNEQUAL = 2.0
"""How many times as far as another a parent moves before it is worth a word."""


def merge_steps(
    folder: str, recipe: Mapping[str, Any], models: Sequence[Mapping[str, Any]], changes: Sequence[Difference] | None
) -> list[NextStep]:
    """`recipe`: the resolved one. `models`: base and parents as merge.json has them. `changes`: differences of the
    scores to those before, `None` where nothing was scored."""
    method = recipe.get("method")
    parents = [model for model in models if str(model.get("distance", "-")).endswith("%")]
    if not isinstance(method, Mapping) or len(parents) < 2:
        return []
    steps = [_scored(folder, parents) if changes is None else None, _less(folder, method, changes or ())]
    steps += [_weighed(folder, recipe, parents), _another(folder, method)]
    return [step for step in steps if step is not None][:SHOWN]


def _again(folder: str, name: str, *changes: str) -> str:
    return shlex.join(["embedsmith", "merge", f"{folder}/recipe.yaml", *changes, f"output={folder}-{name}"])


def _scored(folder: str, parents: Sequence[Mapping[str, Any]]) -> NextStep:
    """On what the runs of the parents scored."""
    paths = [str(parent.get("path", "")) for parent in parents]
    tasks = dict.fromkeys(task for path in paths for task in _scored_by(Path(path).parent))
    return NextStep(
        "Score it beside the models it was made of",
        "Nothing was scored, so that nothing is known of what the merge keeps of each.",
        shlex.join(["embedsmith", "compare", *paths, folder, "--tasks", *(tasks or ["FILE"])]),
    )


def _scored_by(run: Path) -> list[str]:
    """The tasks of a run; none where its recipe cannot be read."""
    with suppress(OSError, ValueError, yaml.YAMLError, AttributeError, TypeError):
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        return [*map(str, recipe["evaluate"]["tasks"]), *held_out_tasks(run)]
    return []


def _less(folder: str, method: Mapping[str, Any], changes: Sequence[Difference]) -> NextStep | None:
    """Part of the way from the base, where the method goes all of it."""
    scale = method.get("scale")
    worse = [change for change in changes if change.clear and change.interval.value < 0]
    if not isinstance(scale, int | float) or scale <= 0.5:
        return None
    names = ", ".join(f"{change.task} ({100 * change.interval.value:+.2f})" for change in worse)
    why = f"Clearly worse than before: {names}. " if worse else ""
    return NextStep(
        "Go less far from the base",
        f"{why}The scale is {scale:g}: of what the parents learned, a smaller share often keeps most of the gain and "
        "forgets less.",
        _again(folder, "closer", f"method.scale={0.7 * scale:.2g}"),
    )


def _weighed(folder: str, recipe: Mapping[str, Any], parents: Sequence[Mapping[str, Any]]) -> NextStep | None:
    """Where one parent went much further than another, both with one weight."""
    weights = {model.get("weight") for model in parents}
    moved = {place: float(str(model["distance"]).rstrip("%")) for place, model in enumerate(parents)}
    far, near = max(moved, key=lambda place: moved[place]), min(moved, key=lambda place: moved[place])
    if len(weights) > 1 or len(recipe.get("parents") or ()) != len(parents) or moved[far] < _UNEQUAL * moved[near]:
        return None
    return NextStep(
        "Give the parent that moved less a larger weight",
        f"{parents[far]['id']} moved {parents[far]['distance']} from the base, {parents[near]['id']} only "
        f"{parents[near]['distance']}: what moves further decides more of the result.",
        _again(folder, "weighed", f"parents.{near}.weight=2"),
    )


def _another(folder: str, method: Mapping[str, Any]) -> NextStep:
    name = "slerp" if method.get("type") == "ties" else "ties"
    why = {
        "ties": "TIES drops the smallest changes, and where parents pull in two directions follows the stronger.",
        "slerp": "SLERP keeps every change, and the length of the way that the parents went.",
    }[name]
    return NextStep("Try another method", why, _again(folder, name, f"method={name}"))
