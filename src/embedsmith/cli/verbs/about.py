"""The verbs about embedsmith itself: list, losses, schema and doctor."""

import json
from typing import Annotated

import typer

from embedsmith.cli.verbs import print_table, say
from embedsmith.core.shelf import verbs


@verbs.register("list")
def list_things(
    kind: Annotated[str | None, typer.Argument(help="A kind: recipe, loss, pooling, metric and so on.")] = None,
    name: Annotated[str | None, typer.Argument(help="One of that kind: print all that is known about it.")] = None,
) -> None:
    """List everything that has a name in a recipe or on the command line, users' packages included; KIND lists one.

    Example: embedsmith list loss infonce
    """
    from embedsmith.cli.listing import all_shelves, everything_about, one_shelf, recipes, shelf_named

    if kind is None:
        print_table(all_shelves())
    elif kind in ("recipe", "recipes") and name is not None:
        from embedsmith.core.shipped import shipped_named

        say(shipped_named(name).path.read_text(encoding="utf-8").rstrip())
    elif kind in ("recipe", "recipes"):
        print_table(recipes())
    elif name is None:
        print_table(one_shelf(shelf_named(kind)))
    else:
        say(everything_about(shelf_named(kind), name))


@verbs.register("losses")
def list_losses(
    name: Annotated[str | None, typer.Argument(help="One loss: print all that is known about it.")] = None,
) -> None:
    """List the losses a recipe can name, with formula, settings and source; NAME explains one.

    Example: embedsmith losses cosent
    """
    list_things("loss", name)


@verbs.register("schema")
def print_schema(
    verb: Annotated[
        str, typer.Argument(help="Whose recipe: train, mine, merge, curate, tokenize, run, sweep.")
    ] = "train",
) -> None:
    """Print the JSON Schema of a recipe with the meaning of every key, for your editor.

    Example: embedsmith schema mine
    """
    from embedsmith.cli.stages import recipe_class
    from embedsmith.cli.sweep_recipe import sweep_schema
    from embedsmith.core.recipe import schema_json

    text = (
        json.dumps(sweep_schema(), indent=2, ensure_ascii=False) if verb == "sweep" else schema_json(recipe_class(verb))
    )
    say(text)


@verbs.register("doctor")
def run_doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print versions, devices and disk space, what is missing and how to get it; exit 1 if it is needed.

    Example: embedsmith doctor --json
    """
    from embedsmith.cli.doctor import diagnose

    found = diagnose()
    if as_json:
        say(json.dumps(found.as_dict(), indent=2))
    else:
        print_table(found.table())
    if not found.healthy:
        raise typer.Exit(1)
