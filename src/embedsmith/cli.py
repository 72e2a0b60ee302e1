"""The command line. Verbs only: each imports its room inside the function, so that `--help` costs no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="embedsmith",
    help="Make a text-embedding model from start to finish.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it: key.path=value")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is already there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, run one step, write nothing.")] = False,
) -> None:
    """Train a model as a recipe says. The same command continues a run that was stopped."""
    from embedsmith.core.recipe import load_recipe
    from embedsmith.train import Recipe, rehearse
    from embedsmith.train import train as run

    loaded = load_recipe(recipe, Recipe, overrides or [])
    if dry_run:
        typer.echo(rehearse(loaded))
    else:
        typer.echo(f"model: {run(loaded, overwrite=overwrite)}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a training recipe, for your editor."""
    from embedsmith.core.recipe import schema_json
    from embedsmith.train import Recipe

    typer.echo(schema_json(Recipe))


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A data file, a BEIR folder, a saved dataset or a dataset id.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="How to read it: task=sts columns.query=title")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="Records to show.")] = 3,
) -> None:
    """Print what is understood of a data file: counts, fields, lengths, duplicates, scores, samples."""
    import json
    from typing import Any

    from rich.console import Console

    from embedsmith.core.recipe import apply_override, parse
    from embedsmith.core.registry import to_plain
    from embedsmith.data.inspect import inspect_source, render
    from embedsmith.data.source import Source

    tree: dict[str, Any] = {"path": path}
    for override in overrides or []:
        apply_override(tree, override)
    found = inspect_source(parse(Source, tree, where="inspect"), samples)
    if as_json:
        typer.echo(json.dumps(to_plain(found), indent=2, ensure_ascii=False))
    else:
        Console().print(render(found))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 80,
    ask: Annotated[str | None, typer.Option(help="The question to answer at the end.")] = None,
) -> None:
    """Fine-tune a real encoder, score it before and after, and search with it: offline, in minutes."""
    from rich.console import Console

    from embedsmith.demo import QUESTION, demonstrate, render

    Console().print(render(demonstrate(output, steps, ask or QUESTION, typer.echo)))


def main() -> None:
    """Run the command line; an error a user can cause is one message and exit code 1, an interrupt 130."""
    from embedsmith.core.errors import EmbedsmithError

    try:
        app()
    except EmbedsmithError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.secho("stopped", err=True)
        sys.exit(130)
