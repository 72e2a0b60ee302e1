"""How a model was made, as its card describes it, and taking the folder to a hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from embedsmith.core.errors import ModelError
from embedsmith.core.files import atomic_file
from embedsmith.core.inputs import read_text
from embedsmith.core.markdown import block, in_line, row, without_folders
from embedsmith.core.text_out import remember_secret
from embedsmith.evaluate.result import Results, percent
from embedsmith.models.folder import read_folder_json

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
            return read_folder_json(path) if (path := output / name).is_file() else {}

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
            known = yaml.safe_load(self.recipe)
            plain = without_folders(known)
            text = self.recipe if plain == known else yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
            recipe = block(text, "yaml")
            summary = "<details><summary>Everything it was trained with</summary>"
            parts.append(f"## Recipe\n\n{summary}\n\n{recipe}\n\n</details>")
        if self.versions:
            parts.append(
                "Made with "
                + ", ".join(f"{in_line(name)} {in_line(value)}" for name, value in self.versions.items())
                + "."
            )
        return "\n\n".join(parts)

    def write_into(self, folder: str | Path) -> None:
        """Put them into the card of a model, the folder's README.md; those that are there already are replaced.

        Errors: `ModelError` for a folder without a card.
        """
        card = Path(folder) / "README.md"
        if not card.is_file():
            raise ModelError("the folder has no README.md", where=folder, expected="a saved model")
        text = read_text(card, ModelError)
        before, start, rest = text.partition(_START)
        after = rest.rpartition(_END)[2].lstrip("\n") if start else ""
        with atomic_file(card) as file:
            file.write(f"{before.rstrip()}\n\n{_START}\n{self.markdown()}\n{_END}\n{after}")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [row(*map(in_line, cells)) for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def push(folder: str | Path, repository: str, *, private: bool = True, message: str = "Add the model") -> str:
    """Upload a model folder to a hub repository `owner/name`, which is made if need be; returns its address.

    Of absolute paths in the card and in the settings only the last name goes along; hidden files, the report and the
    recipe (the card holds it) stay here.
    Errors: `ModelError` for a folder that holds no model, and whatever the hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not (Path(folder) / "config.json").is_file():
        raise ModelError("no model to push", where=folder, expected="a saved model with config.json")
    remember_secret(get_token() or "")
    with TemporaryDirectory() as public:
        _without_what_is_private(Path(folder), Path(public))
        try:
            address = HfApi().create_repo(repository, private=private, exist_ok=True)
            HfApi().upload_folder(folder_path=public, repo_id=repository, commit_message=message)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ModelError(
                f"the hub refused ({(str(error) or type(error).__name__).splitlines()[0]})",
                where=repository,
                fix="log in with `hf auth login`, check the name, and that the hub can be reached",
            ) from None  # the hub's words may hold the token
    return str(address)


_NOT_PUSHED = ("recipe.yaml", "report.html")
_SETTINGS = ("config.json", "adapter_config.json", "embedding_config.json", "merge.json", "verify.json")
_PATH = re.compile(r"(?<![\w:/.~-])(?:/[\w.@+-]+){2,}")


def _without_what_is_private(folder: Path, public: Path) -> None:
    """A copy to push: links to the files as they are; a card and settings that name folders of this machine anew."""
    for file in folder.rglob("*"):
        place = file.relative_to(folder)
        if not file.is_file() or file.name in _NOT_PUSHED or any(part.startswith(".") for part in place.parts):
            continue
        target = public / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.name == "README.md":
            text = read_text(file, ModelError)
            here = lambda found: Path(found[0]).name if Path(found[0]).exists() else found[0]
            target.write_text(_PATH.sub(here, text), encoding="utf-8")
        elif file.name in _SETTINGS and (plain := without_folders(known := read_folder_json(file))) != known:
            target.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            target.symlink_to(file.resolve())
