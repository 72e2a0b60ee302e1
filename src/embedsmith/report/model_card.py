"""What a card tells of how its model was made, and taking the folder to a hub."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedsmith.core.errors import ModelError
from embedsmith.core.files import atomic_file

_START, _END = "<!-- embedsmith: how it was made -->", "<!-- embedsmith: end -->"


@dataclass(frozen=True)
class Score:
    """Main score of a task after training, and before where it was measured."""

    task: str
    metric: str
    after: float
    before: float | None = None


@dataclass(frozen=True)
class Story:
    """Sources by name with what is known of each (`task`, `rows`, `seen`), scores, the resolved recipe, versions."""

    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scores: tuple[Score, ...] = ()
    recipe: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)


def add_story(folder: str | Path, story: Story) -> None:
    """Put the story into the folder's README.md; one that is there already is replaced.

    Errors: `ModelError` for a folder without a card.
    """
    card = Path(folder) / "README.md"
    if not card.is_file():
        raise ModelError("the folder has no README.md", where=folder, expected="a saved model")
    text = card.read_text(encoding="utf-8")
    before, start, rest = text.partition(_START)
    after = rest.partition(_END)[2].lstrip("\n") if start else ""
    with atomic_file(card) as file:
        file.write(f"{before.rstrip()}\n\n{_START}\n{story_text(story)}\n{_END}\n{after}")


def story_text(story: Story) -> str:
    """Markdown: scores, data, recipe, versions; what is empty is left out."""
    parts = []
    if story.scores:
        rows = [f"| {s.task} | {s.metric} | {_percent(s.before)} | {_percent(s.after)} |" for s in story.scores]
        parts.append("## Scores\n\nTimes 100.\n\n" + _table("task", "metric", "before", "after", rows=rows))
    if story.sources:
        rows = [f"| {name} | {facts.get('task', '')} | {_rows(facts)} |" for name, facts in story.sources.items()]
        parts.append("## Training data\n\n" + _table("source", "task", "rows", rows=rows))
    if story.recipe:
        recipe = f"```yaml\n{story.recipe.strip()}\n```"
        parts.append(
            f"## Recipe\n\n<details><summary>Everything it was trained with</summary>\n\n{recipe}\n\n</details>"
        )
    if story.versions:
        parts.append("Made with " + ", ".join(f"{name} {version}" for name, version in story.versions.items()) + ".")
    return "\n\n".join(parts)


def _table(*head: str, rows: list[str]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])


def _percent(value: float | None) -> str:
    return "" if value is None else "undefined" if math.isnan(value) else f"{100 * value:.2f}"


def _rows(facts: Mapping[str, Any]) -> str:
    rows, seen = facts.get("rows"), facts.get("seen", {}).get("rows")
    if rows is None:
        return ""
    return f"{rows:,}" if seen is None or seen == rows else f"{rows:,}, of which {seen:,} were seen"


def push(folder: str | Path, repository: str, *, private: bool = True, message: str = "Add the model") -> str:
    """Upload a model folder to a hub repository `owner/name`, which is made if need be; returns its address.

    Errors: `ModelError` for a folder that holds no model, and whatever the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not (Path(folder) / "config.json").is_file():
        raise ModelError("no model to push", where=folder, expected="a saved model with config.json")
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=repository, commit_message=message)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"the hub refused ({str(error).splitlines()[0]})",
            where=repository,
            fix="log in with `hf auth login`, check the name, and that the hub can be reached",
        ) from error
    return str(address)
