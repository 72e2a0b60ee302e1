"""The verb of the first hour: init."""

from pathlib import Path
from typing import Annotated

import typer

from embedsmith.cli.verbs import print_table, say
from embedsmith.core.shelf import verbs


@verbs.register("init")
def start_recipe(
    places: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEMPLATE] [FOLDER] [KEY=VALUE]...",
            help="A shipped recipe; where to write it; how to read the files of --data: columns.query=title",
        ),
    ] = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="A data file to make a recipe for.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub id; by default by the texts' script.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a recipe that is already there.")] = False,
) -> None:
    """Write a commented recipe: for your data with --data, or a copy of a shipped one; without either, list those.

    Example: embedsmith init --data pairs.jsonl --data scored.jsonl --model my/encoder first
    """
    from embedsmith.core.errors import RecipeError

    read_as = [place for place in places or [] if data and "=" in place]
    given = [place for place in places or [] if place not in read_as and not (data and Path(place).is_file())]
    if data:
        from embedsmith.cli.first_recipe import first_recipe
        from embedsmith.cli.verbs.data import fixes_of_one_file

        if len(given) > 1:
            raise RecipeError(
                f"{len(given)} folders: {', '.join(given)}", expected="embedsmith init --data FILE [FOLDER]"
            )
        data += [place for place in places or [] if place not in (*given, *read_as)]  # of --data a.jsonl b.jsonl
        with fixes_of_one_file():
            say(first_recipe(data, Path(given[0] if given else "."), model, overwrite, read_as)[1])
        return
    if not given:
        from embedsmith.cli.listing import recipes

        print_table(recipes())
        say("a copy of one: embedsmith init NAME [FOLDER]; one for your data: embedsmith init --data FILE")
        return
    if len(given) > 2 or model is not None:
        what = "--model belongs to --data" if model is not None else f"{len(given)} names"
        raise RecipeError(what, expected="embedsmith init TEMPLATE [FOLDER], or embedsmith init --data FILE [FOLDER]")
    from embedsmith.cli.first_recipe import copy_recipe

    say(f"recipe: {copy_recipe(given[0], Path(given[1] if len(given) > 1 else '.'), overwrite)}")
