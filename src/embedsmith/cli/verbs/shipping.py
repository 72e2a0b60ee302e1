"""The verbs that take models elsewhere: convert, export and push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embedsmith.core.shelf import verbs


@verbs.register("convert")
def convert(
    model: Annotated[str, typer.Argument(help="A folder or hub id of a model, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The embedder's folder.")],
    changes: Annotated[list[str] | None, typer.Argument(help="key=value: pooling=mean attention=bidirectional")] = None,
) -> None:
    """Make an (untrained) embedder of any model: a decoder gets last-token pooling unless you say otherwise."""
    from embedsmith.models.export import convert as run

    typer.echo(run(model, out, changes or []))


@verbs.register("export")
def export_one_head(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    head: Annotated[str, typer.Option(help="dense, sparse, multivector, or pylate (multivector there).")] = "dense",
) -> None:
    """Write one head of a model as a folder for sentence-transformers or PyLate, with the same scores."""
    from typing import cast

    from embedsmith.models.export import Head, run_export

    typer.echo(run_export(model, out, cast("Head", head)))


@verbs.register("push")
def push(
    folder: Annotated[Path, typer.Argument(help="A saved model.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the hub; made if need be.")],
    public: Annotated[bool, typer.Option("--public", help="Anyone may see it; private by default.")] = False,
) -> None:
    """Upload a saved model with its card to the hub you are logged in to."""
    from embedsmith.report.model_card import push as upload

    typer.echo(f"pushed: {upload(folder, repository, private=not public)}")
