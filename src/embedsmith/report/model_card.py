"""How a model was made, as its card describes it, and taking the folder to a hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedsmith.core.errors import ModelError
from embedsmith.core.files import atomic_file
from embedsmith.evaluate.result import Results, percent

_START, _END = "<!-- embedsmith: how it was made -->", "<!-- embedsmith: end -->"


@dataclass(frozen=True)
class Score:
    """Main score of a task after training, and before where it was measured."""

    task: str
    metric: str
    after: float
    before: float | None = None


@dataclass(frozen=True)
class TrainingFacts:
    """Sources by name with what is known of each (`task`, `rows`, `seen`), scores, the resolved recipe, versions."""

    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scores: tuple[Score, ...] = ()
    recipe: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of_run(output: Path) -> TrainingFacts:
        """Data, scores and recipe of a run, as far as its folder holds them."""

        def facts(name: str) -> dict[str, Any]:
            found: dict[str, Any] = json.loads(path.read_text("utf-8")) if (path := output / name).is_file() else {}
            return found

        paths = [output / "evaluation" / f"{name}.json" for name in ("before", "after")]
        before, after = ({r.task: r for r in Results.load(path)} if path.is_file() else {} for path in paths)
        scores = tuple(
            Score(task, result.metric, result.main_score, before[task].main_score if task in before else None)
            for task, result in after.items()
        )
        recipe = (output / "recipe.yaml").read_text(encoding="utf-8")
        return TrainingFacts(facts("manifest.json").get("sources", {}), scores, recipe, facts("environment.json"))

    def markdown(self) -> str:
        """Scores, data, recipe, versions; what is empty is left out."""
        parts = []
        if self.scores:
            rows = [
                (s.task, s.metric, "" if s.before is None else percent(s.before), percent(s.after)) for s in self.scores
            ]
            parts.append("## Scores\n\nTimes 100.\n\n" + _table(("task", "metric", "before", "after"), rows))
        if self.sources:
            counts = []
            for name, facts in self.sources.items():
                read, seen = facts.get("rows"), facts.get("seen", {}).get("rows")
                count = "" if read is None else f"{read:,}"
                count += "" if read is None or seen in (None, read) else f", of which {seen:,} were seen"
                counts.append((name, str(facts.get("task", "")), count))
            parts.append("## Training data\n\n" + _table(("source", "task", "rows"), counts))
        if self.recipe:
            recipe = f"```yaml\n{self.recipe.strip()}\n```"
            summary = "<details><summary>Everything it was trained with</summary>"
            parts.append(f"## Recipe\n\n{summary}\n\n{recipe}\n\n</details>")
        if self.versions:
            parts.append("Made with " + ", ".join(f"{name} {value}" for name, value in self.versions.items()) + ".")
        return "\n\n".join(parts)

    def write_into(self, folder: str | Path) -> None:
        """Put them into the card of a model, the folder's README.md; those that are there already are replaced.

        Errors: `ModelError` for a folder without a card.
        """
        card = Path(folder) / "README.md"
        if not card.is_file():
            raise ModelError("the folder has no README.md", where=folder, expected="a saved model")
        text = card.read_text(encoding="utf-8")
        before, start, rest = text.partition(_START)
        after = rest.partition(_END)[2].lstrip("\n") if start else ""
        with atomic_file(card) as file:
            file.write(f"{before.rstrip()}\n\n{_START}\n{self.markdown()}\n{_END}\n{after}")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


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
