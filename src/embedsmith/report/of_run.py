"""A finished run gives account of itself: the report in its folder, and the story in its model's card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedsmith.core.errors import EmbedsmithError
from embedsmith.core.files import atomic_file
from embedsmith.core.progress import log
from embedsmith.evaluate import Results
from embedsmith.report import write_report
from embedsmith.report.model_card import Score, Story, add_story
from embedsmith.report.page import environment


def save_environment(output: Path) -> None:
    """Versions and machine of this start of the run."""
    with atomic_file(output / "environment.json") as file:
        json.dump(environment(), file, indent=2)


def tell(output: Path, model: Path) -> None:
    """Write what the run was made of into the model's card, and the report.

    What cannot be written (a full disk, no plotly) is a line in the log: the run is over and its model is saved.
    """
    try:
        add_story(model, story_of(output))
        log.info("report: %s", write_report(output))
    except EmbedsmithError as error:
        log.warning("no report: %s", error)


def story_of(output: Path) -> Story:
    """Data, scores and recipe of a run, as far as its folder tells."""
    manifest = _json(output / "manifest.json").get("sources", {})
    recipe = (output / "recipe.yaml").read_text(encoding="utf-8")
    versions = _json(output / "environment.json")
    return Story(manifest, tuple(_scores(output / "evaluation")), recipe, versions)


def _scores(folder: Path) -> list[Score]:
    before, after = (_results(folder / f"{name}.json") for name in ("before", "after"))
    return [
        Score(task, result.metric, result.main_score, before[task].main_score if task in before else None)
        for task, result in after.items()
    ]


def _results(path: Path) -> dict[str, Any]:
    return {result.task: result for result in Results.load(path)} if path.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
