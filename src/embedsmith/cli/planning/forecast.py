"""`embedsmith plan`: what a recipe or a pipeline would take, for a million texts and for a billion.

The verbs of the recipe come first, in their order; then `encode` and `index` of as many texts with its last model,
since those two have no recipe and are what a corpus costs afterwards.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from embedsmith.cli.planning.machines import Machines
from embedsmith.cli.planning.sample import ModelShape, TextFacts, sample_of, sample_of_input, shape_of
from embedsmith.cli.planning.work import (
    Rates,
    VerbWork,
    curate_work,
    encode_work,
    fixed_work,
    index_work,
    mine_work,
    tokenize_work,
    train_work,
)
from embedsmith.cli.stages import PipelineRecipe, recipe_class, resolved
from embedsmith.compat.config import recipe_tree
from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import apply_override, parse
from embedsmith.core.settings import Positive, section
from embedsmith.core.shipped import shipped_named, verb_of_keys
from embedsmith.core.terminal import Printed
from embedsmith.models import ModelConfig
from embedsmith.train.rank_memory import in_bytes

TEXTS = (1e6, 1e7, 1e8, 1e9)


@dataclass(frozen=True)
class VerbCost:
    """One verb at so many texts. `seconds`: by what takes them, one after the other; `disk`: bytes written; `memory`:
    bytes a rank, `None` where it is not known; `card_hours`: of all cards, or of all nodes where there is none; `cost`
    in the currency of the price."""

    name: str
    verb: str
    texts: float
    seconds: Mapping[str, float]
    disk: float
    memory: float | None
    card_hours: float
    cost: float | None

    @property
    def hours(self) -> float:
        return sum(self.seconds.values()) / 3600


@dataclass(frozen=True)
class Forecast(Printed):
    """What a plan found. `basis`: by verb, what its numbers rest on."""

    recipe: str
    machines: Machines
    costs: tuple[VerbCost, ...]
    basis: Mapping[str, tuple[str, ...]]

    def table(self) -> RenderableType:
        table = Table("texts", "verb", "hours", "most of it", "disk", "a rank holds", "card hours", "cost")
        for texts in dict.fromkeys(cost.texts for cost in self.costs):
            some = [cost for cost in self.costs if cost.texts == texts]
            for place, one in enumerate(some):
                most = max(one.seconds, key=lambda name: one.seconds[name], default="")
                held = "" if one.memory is None else in_bytes(one.memory)
                cells = (most, in_bytes(one.disk), held, f"{one.card_hours:,.2f}", _money(one.cost))
                table.add_row("" if place else f"{texts:.0e}", one.name, _hours(one.hours), *cells)
            total = sum(one.hours for one in some)
            money = None if any(one.cost is None for one in some) else sum(one.cost or 0.0 for one in some)
            card_hours, disk = sum(one.card_hours for one in some), sum(one.disk for one in some)
            cells = ("", in_bytes(disk), "", f"{card_hours:,.2f}", _money(money))
            table.add_row("", "all", _hours(total), *cells, end_section=True)
        lines = [f"on {self.machines}; work is shared evenly, and nothing fails"]
        lines += [f"{name}: {text}" for name, texts in self.basis.items() for text in dict.fromkeys(texts)]
        return Group(table, *(Text(line) for line in lines))

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        costs = [asdict(one) | {"hours": one.hours} for one in self.costs]
        machines = asdict(self.machines) | {"ranks": self.machines.ranks, "cores_a_node": self.machines.cores_a_node}
        return {"recipe": self.recipe, "machines": machines, "costs": costs, "basis": dict(self.basis)}


def _hours(hours: float) -> str:
    return f"{hours * 60:.2g} min" if hours < 1 else f"{hours:,.1f}"


def _money(cost: float | None) -> str:
    return "" if cost is None else f"{cost:,.2f}"


@section
@dataclass(frozen=True)
class TextCounts:
    """`counts`: for how many texts a plan is made."""

    counts: tuple[Positive, ...] = TEXTS


def plan(
    recipe: str | Path | Mapping[str, Any],
    /,
    *,
    overrides: Sequence[str] = (),
    texts: Sequence[float] = TEXTS,
    **machines: Any,
) -> Forecast:
    """What a recipe would take of hours, disk, memory and money, before anything is spent.

    >>> import embedsmith as es
    >>> recipe = {"model": {"path": "my-model"}, "data": [{"path": "pairs.jsonl"}], "output": "runs/far"}
    >>> found = es.plan(recipe, texts=[1e6, 1e9], nodes=8, gpu="h100", price=2.5)
    >>> [cost.name for cost in found.costs if cost.texts == 1e9]
    ['train', 'encode', 'index']

    `recipe`: the path of a YAML recipe of any verb or of a pipeline, the name of a shipped one, or a recipe as a dict.
    `overrides`: changes to it, as on the command line. `texts`: for how many texts. `machines`: the fields of
    `Machines`, such as `nodes`, `gpu`, `cards`, `price`, `utilisation`, `tokens_a_second`.
    Errors: `RecipeError` for an unknown recipe or card, or a rate that is no number; those of reading data and models.
    """
    counts = TextCounts(tuple(texts)).counts
    told = Machines(**machines)
    name = recipe if isinstance(recipe, str | Path) else "the recipe"
    rates = Rates(told, Path.cwd())
    works: dict[str, VerbWork] = {}
    last: _Last = None
    for step in _steps(recipe, overrides):
        works[step.name], last = _work(step, rates, last)
    if last is not None:
        works |= {"encode": encode_work(*last, rates), "index": index_work(*last, rates)}
    costs = []
    for count, (named, work) in product(counts, works.items()):
        seconds = dict(work.seconds(count))
        spent = sum(seconds.values()) / 3600 * told.ranks
        price = None if told.price is None else spent * told.price
        costs.append(VerbCost(named, work.verb, count, seconds, work.disk(count), work.memory, spent, price))
    return Forecast(str(name), told, tuple(costs), {named: work.basis for named, work in works.items()})


@dataclass(frozen=True)
class _Step:
    """A verb of the plan with the tree of its recipe."""

    name: str
    verb: str
    tree: Mapping[str, Any]


def _steps(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> list[_Step]:
    """The verbs of a recipe in their order; in a pipeline what an earlier stage will make is that which it is made of.

    Errors: `RecipeError`.
    """
    if isinstance(recipe, str | Path):
        path = Path(recipe)
        if not path.exists() and path.suffix not in (".yaml", ".yml", ".json"):
            path = shipped_named(str(recipe)).path
        tree = recipe_tree(path, overrides)
    else:
        tree = copy.deepcopy(dict(recipe))
        for override in overrides:
            apply_override(tree, override)
    verb = verb_of_keys(tree)
    if verb != "run":
        return [_Step(verb, verb, tree)]
    pipeline = parse(PipelineRecipe, tree, where=str(recipe))
    made, found = {"output": pipeline.output}, []
    for stage in pipeline.stages:
        whole = resolved(stage, made)
        made[stage.name] = _stands_for(stage.verb, whole)
        found.append(_Step(stage.name, stage.verb, whole))
    return found


def _stands_for(verb: str, tree: Mapping[str, Any]) -> str:
    """What is there already and is like the result of a verb."""
    if verb == "train":
        return str(tree["model"]["path"] if isinstance(tree.get("model"), Mapping) else tree.get("model"))
    if verb == "merge":
        parents = tree.get("parents") or [{}]
        return str(tree.get("base") or parents[0].get("path", ""))
    given = tree.get("input" if verb == "curate" else "data" if verb == "mine" else "model")
    path = given.get("path") if isinstance(given, Mapping) else given
    return str(path[0] if isinstance(path, list) else path)


_Last = tuple[ModelShape, TextFacts] | None


def _work(step: _Step, rates: Rates, last: _Last) -> tuple[VerbWork, _Last]:
    """What a verb has to do, and the model and the texts of the last one that had both."""
    machines = rates.machines
    if step.verb in ("merge", "export"):
        return fixed_work(step.verb, "its time is that of a model's weights, and does not grow with the texts"), last
    if step.verb == "evaluate":
        return fixed_work("evaluate", "its time is that of its tasks' texts, and does not grow with these"), last
    recipe: Any = parse(recipe_class(step.verb), step.tree, where=step.name)
    if step.verb == "curate":
        return curate_work(recipe, sample_of_input(recipe.input, machines), rates), last
    if step.verb == "mine":
        sample = sample_of([recipe.data], machines)
        models = [ModelConfig(one.model) for one in recipe.searchers if hasattr(one, "model")]
        shapes = [shape_of(model) for model in models]
        return mine_work(recipe, shapes, sample, rates), (shapes[0], sample) if shapes else last
    sample, shape = sample_of(recipe.data, machines), shape_of(recipe.model)
    if step.verb == "tokenize":
        return tokenize_work(recipe, shape, sample, rates), (shape, sample)
    if recipe.task == "rerank":
        raise RecipeError("a plan of a reranker's training", fix="see what a step takes: embedsmith train --dry-run")
    return train_work(recipe, shape, sample, rates), (shape, sample)
