"""The recipe of a sweep: a recipe of `train` or `run` in which ranges stand where values would, and a section `sweep`
that says what is searched for.

    train: {learning_rate: {log: [1e-6, 1e-4]}, batch_size: {from: [32, 64, 128]}}
    sweep: {trials: 20, objectives: {retrieval: [questions-dev], outside: {forgetting: [cranfield]}}}
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from embedsmith.cli.stages import EvaluateStage, ExportStage, PipelineRecipe, placeholders, recipe_class, resolved
from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import parse, schema_tree
from embedsmith.core.settings import Count, Range, Word, did_you_mean, section
from embedsmith.data.source import source_name
from embedsmith.evaluate import load_task
from embedsmith.train import Recipe
from embedsmith.train.config import HeadScored

_Number = int | float
_KINDS = ("log", "range", "from")


@dataclass(frozen=True)
class SearchRange:
    """What a key of the recipe may be: one of `choices`, or without them a number from `low` to `high`, a whole one
    where both are; `log`: drawn so that each order of magnitude counts the same."""

    place: tuple[str | int, ...]
    low: _Number = 0
    high: _Number = 0
    log: bool = False
    choices: tuple[Any, ...] = ()

    @staticmethod
    def read(place: tuple[str | int, ...], kind: str, given: Any) -> "SearchRange":
        """The range that `{kind: given}` is. Errors: `RecipeError` naming the key."""
        where = ".".join(map(str, place))
        if kind == "from":
            if not isinstance(given, list) or not given:
                raise RecipeError(f"{{from: {given}}} is no list of choices", where=where, expected="{from: [32, 64]}")
            return SearchRange(place, choices=tuple(given))
        try:
            low, high = map(_number, given)
        except (TypeError, ValueError):
            example = "{log: [1e-6, 1e-4]}" if kind == "log" else "{range: [0.01, 0.1]}"
            raise RecipeError(f"{{{kind}: {given}}} is no range of numbers", where=where, expected=example) from None
        if not low < high or (kind == "log" and low <= 0):
            least = "above 0 and " if kind == "log" else ""
            what = f"{{{kind}: [{low}, {high}]}} holds nothing"
            raise RecipeError(what, where=where, expected=f"a lower end {least}below the upper one")
        return SearchRange(place, low, high, kind == "log")

    @property
    def name(self) -> str:
        """The key, as an override names it."""
        return ".".join(map(str, self.place))

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that the recipe's schema must allow: every choice, or both ends."""
        return self.choices or (self.low, self.high)

    def distribution(self) -> Any:
        """What Optuna draws from; choices by their JSON, since it holds only plain values."""
        from optuna import distributions

        if self.choices:
            return distributions.CategoricalDistribution([_text(choice) for choice in self.choices])
        if isinstance(self.low, int) and isinstance(self.high, int):
            return distributions.IntDistribution(self.low, self.high, log=self.log)
        return distributions.FloatDistribution(self.low, self.high, log=self.log)

    def value(self, drawn: Any) -> Any:
        """What Optuna drew as the recipe has it; a number with a fraction has four digits."""
        if self.choices:
            return next(choice for choice in self.choices if _text(choice) == drawn)
        return drawn if isinstance(drawn, int) else min(max(float(f"{drawn:.4g}"), self.low), self.high)

    def __str__(self) -> str:
        """As the recipe has it."""
        if self.choices:
            return f"{{from: {_text(list(self.choices))}}}"
        return f"{{{'log' if self.log else 'range'}: [{self.low}, {self.high}]}}"


def _number(given: Any) -> _Number:
    """YAML reads 1e-6 as text. Errors: `TypeError`, `ValueError` for what is no finite number."""
    number = float(given)
    if isinstance(given, bool) or number - number != 0:
        raise ValueError
    return given if isinstance(given, int) else number


def _text(choice: Any) -> str:
    return json.dumps(choice, ensure_ascii=False, default=str)


def ranges_in(tree: Any, place: tuple[str | int, ...] = ()) -> Iterator[SearchRange]:
    """Every range in a recipe's tree. Errors: `RecipeError` for one that is none."""
    if isinstance(tree, dict) and len(tree) == 1 and (kind := next(iter(tree))) in _KINDS:
        yield SearchRange.read(place, kind, tree[kind])
        return
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from ranges_in(value, (*place, key))


@section
@dataclass(frozen=True, kw_only=True)
class SweepObjective:
    """What is good, of one of two kinds. Names are those of tasks that the recipe scores; with another than a task's
    main score `TASK/METRIC`, with a narrower width or another head, as `evaluate.dims` and `evaluate.heads` have them,
    `TASK/256` and `TASK/sparse`. Of several the mean counts.

    `score`: scores after training, to be high. `forgetting`: how far scores fell since the start, to be low.
    """

    score: tuple[Word, ...] = ()
    forgetting: tuple[Word, ...] = ()

    def __post_init__(self) -> None:
        if self.score and self.forgetting:
            fix = "make two objectives of it, each with a name"
            raise RecipeError("score and forgetting in one objective", where="sweep.objectives", fix=fix)

    @property
    def names(self) -> tuple[str, ...]:
        return self.score or self.forgetting

    def value(self, first: Mapping[str, float], last: Mapping[str, float]) -> float | None:
        """From scores at the start and now; `None` where one is missing. Without names the mean of all tasks."""
        names = self.names or [n for n in last if not any(n.startswith(f"{other}/") for other in last)]
        if not names or not last.keys() >= set(names) or (self.forgetting and not first.keys() >= set(names)):
            return None
        values = [first[name] - last[name] if self.forgetting else last[name] for name in names]
        return sum(values) / len(values)


@section
@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What is searched for, and how.

    - `objectives`: by a name of your own, each the names of tasks whose scores are to be high, or
      `{forgetting: [TASK, ...]}`; without any the mean of all tasks that the recipe scores.
    - `trials`: how many recipes are tried, those that are pruned or fail among them.
    - `sampler`: `tpe` models where good values lie (Bergstra 2011); `nsga2` breeds them from the best so far (Deb
      2002), for several objectives and many trials.
    - `startup`: trials that are drawn at random and never pruned: what TPE learns from first, NSGA-II's population.
    - `prune`: ends a trial in which, at an evaluation while training, every objective is behind the median of the
      trials that were finished before.
    - `keep`: `best` removes the folders of trials that another beats in every objective; `all` keeps them.
    - `seed`: of what is drawn.
    """

    objectives: dict[str, SweepObjective] = field(default_factory=dict)
    trials: Count = 20
    sampler: Literal["tpe", "nsga2"] = "tpe"
    startup: Annotated[int, Range(ge=2)] = 8
    prune: bool = True
    keep: Literal["best", "all"] = "best"
    seed: int = 0


@dataclass(frozen=True)
class SweepRecipe:
    """A recipe with ranges. `tree`: without the section `sweep`, which is `settings`; `where`: where it was read."""

    tree: Mapping[str, Any]
    ranges: tuple[SearchRange, ...]
    settings: SweepSettings
    where: str

    @staticmethod
    def read(tree: Mapping[str, Any], where: str) -> "SweepRecipe":
        """Errors: `RecipeError` for no range, a range that is none, and whatever the recipe's own schema refuses of
        each end of a range and of each choice, the others being at their first."""
        rest = {key: value for key, value in tree.items() if key != "sweep"}
        settings = parse(SweepSettings, _objectives_spelled_out(tree.get("sweep") or {}), f"{where}: sweep")
        ranges = tuple(ranges_in(rest))
        if not ranges:
            fix = "put one where a value stands: 'train.learning_rate={log: [1e-6, 1e-4]}'"
            raise RecipeError("there is no range to search", where=where, fix=fix)
        recipe = SweepRecipe(rest, ranges, settings, where)
        for one in ranges:
            for end in one.ends:
                recipe.check(recipe.tried({each.name: end if each is one else each.ends[0] for each in ranges}))
        recipe._check_objectives()
        return recipe

    @property
    def output(self) -> Path:
        return Path(self.tree["output"])

    @property
    def verb(self) -> str:
        """What a trial is: a training run, or a pipeline's."""
        return "run" if "stages" in self.tree else "train"

    @property
    def objectives(self) -> Mapping[str, SweepObjective]:
        return self.settings.objectives or {"score": SweepObjective()}

    def tried(self, values: Mapping[str, Any], output: str | Path | None = None) -> dict[str, Any]:
        """The tree with a value in the place of each range, and with another output."""
        tree = copy.deepcopy(dict(self.tree))
        for one in self.ranges:
            node: Any = tree
            for key in one.place[:-1]:
                node = node[key]
            node[one.place[-1]] = copy.deepcopy(values[one.name])
        return tree if output is None else tree | {"output": str(output)}

    def check(self, tree: dict[str, Any]) -> None:
        """Errors: `RecipeError` for what the schema refuses, of a pipeline that of each stage."""
        for _ in self._parsed(tree):
            pass

    def _parsed(self, tree: dict[str, Any]) -> Iterator[Any]:
        """The recipe; of a pipeline those of its stages."""
        if self.verb == "train":
            yield parse(Recipe, tree, self.where)
            return
        pipeline = parse(PipelineRecipe, tree, self.where)
        for stage, made in placeholders(pipeline):
            schema: Any = {"evaluate": EvaluateStage, "export": ExportStage}.get(stage.verb)
            yield parse(schema or recipe_class(stage.verb), resolved(stage, made), f"{self.where}: stage {stage.name}")

    def _check_objectives(self) -> None:
        """Errors: `RecipeError` for a name that no task has that the recipe scores, as far as that can be told before
        anything is made, and for forgetting without scores at the start."""
        tree = self.tried({one.name: one.ends[0] for one in self.ranges})
        recipes = list(self._parsed(tree))
        rounds = [names for recipe in recipes for names in _rounds(recipe)]
        if not rounds:
            fix = "evaluate.held_out=500, or evaluate.tasks=[FILE]"
            raise RecipeError("nothing is scored, so nothing can be searched for", where=self.where, fix=fix)
        known = [name for names in rounds for name in names]
        for title, objective in self.objectives.items():
            for name in objective.names if "" not in known else ():
                task = name if name in known else name.rpartition("/")[0]
                if task not in known:
                    what = f"no task that the recipe scores is called {name!r}{did_you_mean(name, known)}"
                    expected = f"one of {', '.join(dict.fromkeys(known))}"
                    raise RecipeError(what, where=f"sweep.objectives.{title}", expected=expected)
                _check_column(name.removeprefix(task).removeprefix("/"), recipes, f"sweep.objectives.{title}")
                if objective.forgetting and known.count(task) < 2:
                    fix = "evaluate.before=true; in a pipeline an evaluate stage of the model to start from"
                    what = f"{task} is scored once, so that what is forgotten of it cannot be told"
                    raise RecipeError(what, where=f"sweep.objectives.{title}", fix=fix)


def _check_column(column: str, recipes: Sequence[Any], where: str) -> None:
    """Errors: `RecipeError` for a width or a head, in the place of a metric, that no training scores."""
    runs = [recipe.evaluate for recipe in recipes if isinstance(recipe, Recipe)]
    if column.isdigit() and not any(int(column) in run.dims for run in runs):
        raise RecipeError(f"no training scores the width {column}", where=where, fix=f"evaluate.dims=[{column}]")
    if column in get_args(HeadScored) and not any(column in run.heads for run in runs):
        raise RecipeError(f"no training scores the head {column}", where=where, fix=f"evaluate.heads=[{column}]")


def sweep_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe of `train` in which any value may be a range, with the section `sweep`."""
    trained, searched = schema_tree(Recipe), schema_tree(SweepSettings)
    definitions = trained.pop("$defs", {})
    whole = {"type": "object", **_with_ranges(trained)}
    objectives = searched["properties"]["objectives"]["additionalProperties"]
    short = [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
    searched["properties"]["objectives"]["additionalProperties"] = {"anyOf": [objectives, *short]}
    whole["properties"]["sweep"] = {key: value for key, value in searched.items() if key != "$defs"}
    named = {"type": "array", "minItems": 2, "maxItems": 2}
    kinds = {"log": named, "range": named, "from": {"type": "array", "minItems": 1}}
    ranges = [
        {"type": "object", "properties": {kind: value}, "required": [kind], "additionalProperties": False}
        for kind, value in kinds.items()
    ]
    of_train = {name: _with_ranges(each) for name, each in definitions.items()}
    return whole | {"$defs": of_train | searched.get("$defs", {}) | {_RANGE: {"anyOf": ranges}}}


_RANGE = "SearchRange"


def _with_ranges(schema: Any) -> Any:
    """A schema in which every property, however deep, may be a range as well."""
    if isinstance(schema, list):
        return [_with_ranges(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _with_ranges(value) for key, value in schema.items()}
    for name, value in made.get("properties", {}).items():
        text = {"description": value["description"]} if "description" in value else {}
        made["properties"][name] = {"anyOf": [value, {"$ref": f"#/$defs/{_RANGE}"}], **text}
    return made


def _objectives_spelled_out(given: Any) -> Any:
    """`retrieval: [a, b]` and `retrieval: a` are short for `retrieval: {score: [a, b]}`."""
    if not isinstance(given, dict) or not isinstance(given.get("objectives"), dict):
        return given
    spelled: dict[str, Any] = {}
    for name, value in given["objectives"].items():
        made = {"score": value} if isinstance(value, str | list) else value
        listed = made.items() if isinstance(made, dict) else ()
        spelled[name] = {key: [one] if isinstance(one, str) else one for key, one in listed} or made
    return given | {"objectives": spelled}


def _rounds(recipe: Any) -> list[Sequence[str]]:
    """Names of the tasks that a recipe scores, for each time it does; an empty name stands for tasks that an earlier
    stage makes."""
    if isinstance(recipe, EvaluateStage):
        return [_names(recipe.tasks, recipe.data)]
    if not isinstance(recipe, Recipe) or not recipe.evaluate.scores:
        return []
    evaluate = recipe.evaluate
    names = _names(evaluate.tasks, evaluate.data) or [f"{source_name(source)}-test" for source in recipe.data]
    return [names, names] if evaluate.before else [names]


def _names(tasks: Sequence[str], data: str | None) -> list[str]:
    return ["" if "(what stage" in task else load_task(task, data_dir=data).name for task in tasks]
