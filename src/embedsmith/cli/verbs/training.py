"""The verbs that make models: train, mine, merge, run, sweep and demo."""

from pathlib import Path
from typing import Annotated

import typer

from embedsmith.cli.verbs import Device, Join, ShardOf, first_rank, print_table, say
from embedsmith.core.shelf import verbs


@verbs.register("train")
def train_model(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it: key.path=value")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is already there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", "--dry_run", help="Check everything, run one step.")] = False,
    device: Device = None,
) -> None:
    """Train a model as a recipe says. The same command continues a run that was stopped.

    Example: embedsmith train joint model.path=my/encoder data.0.path=pairs.jsonl data.1.path=scored.jsonl
    output=runs/mine
    """
    from embedsmith.compat.config import read_recipe
    from embedsmith.core.collectives import rank
    from embedsmith.core.shipped import recipe_file
    from embedsmith.train import rehearse
    from embedsmith.train import train as run

    loaded = read_recipe(recipe_file(recipe, "train"), overrides or [])
    outcome = rehearse(loaded, overwrite=overwrite) if dry_run else f"model: {run(loaded, overwrite=overwrite)}"
    if rank() == 0:
        say(outcome)


@verbs.register("mine")
def mine_negatives(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it: key.path=value")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Mine again; kept vectors stay.")] = False,
    device: Device = None,
    shard: ShardOf = None,
    join: Join = False,
) -> None:
    """Find hard negatives for records. The same command continues a run that was stopped; torchrun shares the work.

    Example: embedsmith mine mine data.path=pairs.jsonl searchers.0.model=runs/mine/model output=mined.jsonl
    """
    from embedsmith.cli.stages import run_mine
    from embedsmith.core.recipe import apply_override, read_tree
    from embedsmith.core.shipped import recipe_file

    path = recipe_file(recipe, "mine")
    tree = read_tree(path)
    for override in overrides or []:
        apply_override(tree, override)
    report = run_mine(tree, str(path), overwrite, shard, join)
    if first_rank():
        say(report.lines())


@verbs.register("distil")
def distil_model(
    teacher: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="The student's folder.")],
    data: Annotated[list[str] | None, typer.Option(help="Files whose texts it learns from: texts or pairs.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers that it keeps, at even distances.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Its hidden width.")] = None,
    static: Annotated[bool, typer.Option("--static", help="A table of token vectors, no transformer.")] = False,
    dims: Annotated[int, typer.Option(min=1, help="With --static: numbers of a text's vector.")] = 256,
    tasks: Annotated[list[str] | None, typer.Option(help="Score both on these.")] = None,
    tasks_folder: Annotated[str | None, typer.Option("--tasks-folder", help="Where tasks are looked up.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps, in place of one pass.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="The highest rate.")] = 1e-4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a student that is there.")] = False,
    device: Device = None,
) -> None:
    """Make a small student of a model: fewer layers, narrower ones, or a static table.

    Example: embedsmith distil my/encoder runs/static --static --data texts.jsonl --tasks pairs-split/pairs-test
    """
    from embedsmith.data import Source
    from embedsmith.distil.run import DistilRecipe, distil
    from embedsmith.evaluate import split_names

    recipe = DistilRecipe(
        teacher=teacher,
        output=str(out),
        data=tuple(Source(path=path) for path in data or ()),
        layers=layers,
        hidden=hidden,
        static=static,
        dims=dims,
        tasks=tuple(split_names(tasks or [])),
        tasks_folder=tasks_folder,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )
    print_table(distil(recipe, overwrite=overwrite).table())


@verbs.register("merge")
def merge_models(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it: key.path=value")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a merge that is already there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compare the models and print the plan.")] = False,
    explain: Annotated[Path | None, typer.Option(help="Write a report on the merge to this folder, not it.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check the result against its parents.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="As --verify; what fails is not written.")] = False,
    probe: Annotated[list[str] | None, typer.Option(help="Texts to look at: one file a parent, or one.")] = None,
) -> None:
    """Merge models as a recipe says, ours or a YAML file of mergekit.

    Example: embedsmith merge merge base=my/encoder parents.0.path=runs/a/model parents.1.path=runs/b/model
    output=runs/merged
    """
    share_one_heap()
    from embedsmith.compat.mergekit import read_merge
    from embedsmith.core.shipped import recipe_file
    from embedsmith.merge import merge
    from embedsmith.merge.run import plan_in_words

    loaded = read_merge(recipe_file(recipe, "merge"), overrides or [])
    if dry_run:
        say(plan_in_words(loaded, overwrite=overwrite))
    elif explain is not None:
        from embedsmith.calibrate.explain import write_explanation

        say(f"report: {write_explanation(loaded, explain, probe or [])}")
    elif verify or strict:
        from embedsmith.calibrate.verify import merge_verified

        say(f"model: {merge_verified(loaded, probe or [], strict, overwrite)}")
    else:
        say(f"model: {merge(loaded, overwrite=overwrite)}")


def share_one_heap() -> None:
    """glibc gives every thread a heap of its own; holes in those of the threads that read and hash would add to the
    peak of a merge. Other C libraries know no such setting, and need none."""
    import ctypes
    from contextlib import suppress

    arena_max = -8  # M_ARENA_MAX of malloc.h
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(arena_max, 1)


@verbs.register("run")
def run_stages(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe with stages, or a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes: stages.0.recipe.output=...")] = None,
    device: Device = None,
) -> None:
    """Run stages in order: curate, mine, train, merge, evaluate. The same command goes on after a stop.

    Example: embedsmith run conan-weak stages.0.recipe.input.path=pairs.jsonl
    stages.1.recipe.model.path=my/encoder
    """
    from embedsmith.cli.stages import PipelineRecipe, run
    from embedsmith.core.recipe import load_recipe
    from embedsmith.core.shipped import recipe_file

    made = run(load_recipe(recipe_file(recipe, "run"), PipelineRecipe, overrides or []))
    if first_rank():
        say("\n".join(f"{name}: {result}" for name, result in made.items()))


@verbs.register("sweep")
def sweep_recipe(
    recipe: Annotated[Path, typer.Argument(help="A recipe of train or run, with ranges, or a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes and ranges: key.path=value")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a sweep that is already there.")] = False,
    device: Device = None,
) -> None:
    """Search a recipe's best values: any of them may be a range. The same command continues, or helps.

    Example: embedsmith sweep joint model.path=my/encoder data.0.path=pairs.jsonl data.1.path=scored.jsonl
    'train.learning_rate={log: [1e-6, 1e-4]}' sweep.trials=20 output=runs/sweep
    """
    from embedsmith.cli.sweeping import read_sweep, run_sweep

    print_table(run_sweep(read_sweep(recipe, overrides or []), overwrite=overwrite).table())


@verbs.register("demo")
def run_demo(
    output: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 48,
    ask: Annotated[str | None, typer.Option(help="The question to answer at the end.")] = None,
) -> None:
    """Train, score and search something real, offline, in minutes.

    Example: embedsmith demo --output runs/demo --steps 48
    """
    from embedsmith.cli.demo import QUESTION, demonstrate

    print_table(demonstrate(output, steps, ask or QUESTION, say).table())
