"""A Router: queries go through one list of modules, documents through another; what stands behind it is for both.

Each route is a model of its own, of any form that is known: SPLADE for documents with a table of weights for queries,
two dense models, one model with two heads. `write` gives each route a folder of modules again.
"""

import ast
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from embedsmith.core.errors import ModelError
from embedsmith.core.shelf import forms
from embedsmith.models.folder import FolderFacts, FolderFiles, module_of, read_folder_file, read_folder_json, write_json
from embedsmith.models.layout import ST, modules_in, name_model, write_modules
from embedsmith.models.write import Saved

ROUTES = ("query", "document")
_GENERAL = "config_sentence_transformers.json"


@dataclass(frozen=True)
class _Parameters:
    default_route: str | None = None
    route_mappings: Mapping[str, str] | None = None


@dataclass(frozen=True)
class _RouterFile:
    """router_config.json, of older folders config.json."""

    types: Mapping[str, str]
    structure: Mapping[str, Sequence[str]]
    parameters: _Parameters = field(default_factory=_Parameters)


@forms.register("router")
class Router:
    """Router (or Asym) of the routes query and document, and modules for both around it."""

    @staticmethod
    def facts(files: FolderFiles) -> FolderFacts | None:
        places = [place for place, kind in enumerate(files.kinds) if kind in ("Router", "Asym")]
        if len(places) != 1:
            return None
        (place,) = places
        folder = files.modules[place].path
        path = folder / "router_config.json"
        path = path if path.exists() else folder / "config.json"
        said = read_folder_file(_RouterFile, path)
        before, behind = files.modules[:place], files.modules[place + 1 :]
        made: dict[str, FolderFacts] = {}
        for role in ROUTES:
            route = route_of(role, said, path)
            modules = tuple(
                module_of(said.types[name], folder / name, files.folder, path) for name in said.structure[route]
            )
            made[role] = replace(files, modules=(*before, *modules, *behind), place=path).facts()
        if (mains := {facts.main for facts in made.values()}) and len(mains) > 1:
            raise ModelError(
                f"the routes give {made['query'].main} for queries and {made['document'].main} for documents",
                where=path,
                expected="one kind of vectors, which can be compared",
                fix="check that the folder was copied as a whole and not mixed with another",
            )
        return replace(made["document"], query=made["query"])

    @staticmethod
    def write(saved: Saved, root: Path) -> None:
        """Each route as a model of its own, whose files then move into folders of its modules, as a Router has them.
        `root` is empty."""
        assert saved.query is not None
        types: dict[str, str] = {}
        structure: dict[str, list[str]] = {}
        inside = root / ".routes"
        for role, part in (("query", saved.query), ("document", replace(saved, query=None))):
            folder = inside / role
            folder.mkdir(parents=True)
            part.write(folder)
            structure[role] = []
            for place, entry in enumerate(modules_in(folder)):
                name = f"{role}_{place}_{entry['type'].rpartition('.')[2]}"
                _move(folder, entry["path"], root / name, first=place == 0)
                types[name] = entry["type"]
                structure[role].append(name)
        kind = read_folder_json(inside / "document" / _GENERAL)
        (inside / "document" / _GENERAL).rename(root / _GENERAL)
        shutil.rmtree(inside)
        (root / "README.md").write_text(saved.model_card(), encoding="utf-8")
        parameters = {"default_route": "document", "allow_empty_key": True}
        write_json(root / "router_config.json", {"types": types, "structure": structure, "parameters": parameters})
        write_modules(root, {"": ST + "models.Router"})
        name_model(root, kind.get("model_type", "SentenceTransformer"), kind["similarity_fn_name"])


def route_of(role: str, said: _RouterFile, path: Path) -> str:
    """The route of texts of a role, by the rules of sentence-transformers' Router: the mapping that says the most of
    them, wherever it is listed, else the route that is called by the role, or `text`. Errors: `ModelError` for none."""
    mapped: dict[tuple[object, object], str] = {}
    for key, route in (said.parameters.route_mappings or {}).items():
        try:
            task, modality = ast.literal_eval(key)
        except (ValueError, SyntaxError, TypeError) as error:
            raise ModelError(f"route_mappings has the key {key!r}", where=path, expected="(task, modality)") from error
        mapped[task, modality] = route
    fitting = (mapped.get(key) for key in ((role, "text"), (role, None), (None, "text"), (None, None)))
    for name in (*fitting, role, "text"):
        if name is not None and name in said.structure:
            return name
    names = ", ".join(said.structure) or "(none)"
    raise ModelError(
        f"this Router has no route for the role {role!r}: its routes are {names}",
        where=path,
        expected="routes for queries and for documents",
        fix=f'say which it is under "parameters": "route_mappings": {{"(\'{role}\', None)": "NAME"}}, one of {names}',
    )


def _move(folder: Path, path: str, target: Path, first: bool) -> None:
    """The files of a module to a folder of its own; the first module's lie in the root beside the list of modules."""
    if not first:
        (folder / path).rename(target) if (folder / path).exists() else target.mkdir()
        return
    target.mkdir()
    lists = ("modules.json", _GENERAL, "README.md")
    for file in (folder / path).iterdir():
        if file.is_file() and file.name not in lists:
            file.rename(target / file.name)
