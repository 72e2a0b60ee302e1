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
