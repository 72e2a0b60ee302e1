"""The verbs before a run: init, which writes a recipe, and plan, which tells what one would take."""

import json
from pathlib import Path
from typing import Annotated, Any

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


@verbs.register("plan")
def plan_recipe(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe of any verb or pipeline, or a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it: key.path=value")] = None,
    texts: Annotated[str, typer.Option(help="For how many texts: 1e6,1e9")] = "1e6,1e7,1e8,1e9",
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpu: Annotated[
        str | None, typer.Option(help="Their cards, such as h100; by default this machine, measured.")
    ] = None,
    cards: Annotated[int, typer.Option(min=1, help="With --gpu: cards of a machine.")] = 8,
    cores: Annotated[int | None, typer.Option(min=1, help="CPU cores of a machine; by default 12 a card.")] = None,
    utilisation: Annotated[float, typer.Option(help="The share of a card's arithmetic that is reached.")] = 0.3,
    rate: Annotated[list[str] | None, typer.Option(help="Known tokens/s of a card: train=9000, encode=50000")] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens a text, in the place of a look at the data.")] = None,
    size: Annotated[float | None, typer.Option("--bytes", help="Bytes a text, likewise.")] = None,
    disk: Annotated[float | None, typer.Option(help="Bytes/s of a machine's disk; by default measured here.")] = None,
    network: Annotated[float, typer.Option(help="Bytes/s of a machine's network.")] = 12.5e9,
    price: Annotated[float | None, typer.Option(help="Of a card (without --gpu a machine) for an hour.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Tell what a recipe takes of hours, disk, memory and money at a million to a billion texts, and why.

    Example: embedsmith plan joint model.path=my/encoder data.0.path=pairs.jsonl data.1.path=scored.jsonl
    --nodes 8 --gpu h100 --price 2.5
    """
    from embedsmith.cli.planning.forecast import plan
    from embedsmith.core.errors import RecipeError

    def numbers(option: str, given: list[str]) -> list[float]:
        try:
            return [float(one) for one in given]
        except ValueError as error:
            raise RecipeError(f"{option} {','.join(given)}", expected="numbers, such as 1e6 or 250000") from error

    pairs = [one.partition("=") for one in rate or []]
    values = numbers("--rate", [value for _, _, value in pairs])
    options: dict[str, Any] = {"nodes": nodes, "gpu": gpu, "cards": cards, "cores": cores, "price": price}
    options |= {"utilisation": utilisation, "disk": disk, "network": network}
    options |= {"tokens_a_text": tokens, "bytes_a_text": size}
    options |= {"tokens_a_second": {verb: value for (verb, _, _), value in zip(pairs, values)} or None}
    found = plan(recipe, overrides=overrides or [], texts=numbers("--texts", texts.split(",")), **options)
    if as_json:
        say(json.dumps(found.as_dict(), indent=2))
    else:
        print_table(found.table(), soft_wrap=True)
