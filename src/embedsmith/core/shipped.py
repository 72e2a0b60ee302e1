"""The recipes that come with the package, found by name where no such file exists. In a checkout they lie in
`recipes/`, in an installed package beside its code."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from embedsmith.core.errors import RecipeError
from embedsmith.core.settings import did_you_mean

_HERE = Path(__file__).parents[1]
FOLDER = _HERE / "recipes" if (_HERE / "recipes").is_dir() else _HERE.parents[1] / "recipes"
_ENDINGS = (".yaml", ".yml")
_FIRST_KEYS = {
    "sweep": "sweep",
    "stages": "run",
    "parents": "merge",
    "searchers": "mine",
    "steps": "curate",
    "out": "tokenize",
}


@dataclass(frozen=True)
class Shipped:
    """One recipe: `name` as it is typed, the verb it is for, and what its first comment says."""

    name: str
    verb: str
    summary: str
    path: Path


def shipped_recipes() -> dict[str, Shipped]:
    """All of them by name: the path in the folder without its ending, as in `decoder/full`."""
    found = {}
    for path in sorted(FOLDER.rglob("*.yaml"), key=lambda path: (len(path.parts), path)):
        lines = path.read_text(encoding="utf-8").splitlines()
        name = path.relative_to(FOLDER).with_suffix("").as_posix()
        verb = verb_of_keys(line.partition(":")[0] for line in lines if line and not line.startswith((" ", "#")))
        comment = " ".join(line.removeprefix("# ") for line in lines if line.startswith("# "))
        summary = comment.partition(". ")[0].partition(" Run: ")[0].rstrip(".")
        found[name] = Shipped(name, "accelerate launch" if name.startswith("accelerate/") else verb, summary, path)
    return found


def verb_of_keys(keys: Iterable[str]) -> str:
    """The verb whose recipe has such keys."""
    known = set(keys)
    return next((verb for key, verb in _FIRST_KEYS.items() if key in known), "train")


def shipped_named(name: str) -> Shipped:
    """One by its name, with or without its verb in front. Errors: `RecipeError` with the nearest name."""
    known = shipped_recipes()
    short = {one.name.removeprefix(f"{one.verb}-"): one for one in known.values()} | known
    if name not in short:
        expected = f"one of {', '.join(known)}"
        raise RecipeError(f"no shipped recipe is called {name!r}{did_you_mean(name, short)}", expected=expected)
    return short[name]


def as_typed(path: str | Path) -> str:
    """A recipe's file as it is named on the command line: one that ships by its name."""
    path = Path(path)
    return path.relative_to(FOLDER).with_suffix("").as_posix() if path.is_relative_to(FOLDER) else str(path)


def names_recipe(given: str, verb: str) -> bool:
    """Whether a verb that reads data files too is given a recipe: a `.yaml`, or the name of a shipped recipe where no
    file or folder has it. Errors: `RecipeError` for the name of another verb's recipe."""
    if given.endswith(_ENDINGS):
        return True
    known = shipped_recipes()
    found = known.get(f"{verb}-{given}") or known.get(given)
    if found is None or Path(given).exists():
        return False
    if found.verb != verb:
        raise RecipeError(
            f"this looks like a recipe of {found.verb}", where=given, fix=f"embedsmith {found.verb} {given}"
        )
    return True


def recipe_file(given: str | Path, verb: str) -> Path:
    """The file that a verb's recipe is read from: the path itself where there is such a file, else the shipped recipe
    of this name, with or without the verb in front (`merge ties` is `merge-ties`). What ends in `.yaml` is meant to be
    a file: one that is missing is never replaced by a recipe that happens to have its name.

    Errors: `RecipeError` for neither, with the nearest name.
    """
    path = Path(given)
    try:
        if path.exists():
            return path
    except OSError:  # longer than any name may be
        return path
    known = shipped_recipes()
    name = path.as_posix().removeprefix("recipes/")
    name = next((name.removesuffix(ending) for ending in _ENDINGS if name.endswith(ending)), name)
    ships = next((each for each in (f"{verb}-{name}", name) if each in known), None)
    if ships is not None and path.suffix not in _ENDINGS:
        return known[ships].path
    if ships is not None:
        raise RecipeError(
            "cannot read the file (No such file or directory)",
            where=given,
            fix=f"check the path; embedsmith {known[ships].verb} {name} takes the recipe that ships under this name",
        )
    mine = [one.name for one in known.values() if one.verb == verb]
    short = [one.removeprefix(f"{verb}-") for one in mine]
    nearest = did_you_mean(name, short)
    raise RecipeError(
        f"cannot read the file (No such file or directory), and no recipe of this name ships{nearest}",
        where=given,
        expected=f"a file, or one of {', '.join(short)}",
        fix="check the path; embedsmith list recipe shows what ships",
    )
