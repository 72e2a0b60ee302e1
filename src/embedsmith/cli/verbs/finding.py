"""The verbs of the hybrid index: index and search."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from embedsmith.core.shelf import verbs


@verbs.register("index")
def index_documents(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    documents: Annotated[str, typer.Argument(help="A file of documents (_id, text, ...), or a BEIR folder.")],
    to: Annotated[Path | None, typer.Option(help="Folder of the index; an index that is there is updated.")] = None,
    url: Annotated[str | None, typer.Option(help="Instead of a folder: URL of a Qdrant server.")] = None,
    collection: Annotated[str, typer.Option(help="Collection on the server.")] = "embedsmith",
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the server's key.")] = None,
    heads: Annotated[
        list[str] | None, typer.Option("--head", help="dense, sparse, multivector; all by default.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Documents written together.")] = 256,
) -> None:
    """Index documents under every head of a model; the same command continues after a stop, and updates."""
    from embedsmith.index.verb import Place, run_index

    place = Place(to, url, collection, os.environ.get(api_key_env) if api_key_env else None)
    written, size = run_index(model, documents, place, heads, batch)
    typer.echo(f"{written.new} new, {written.changed} changed, {written.unchanged} unchanged; {size} in the index")


@verbs.register("search")
def search_index(
    queries: Annotated[list[str] | None, typer.Argument(help="One or more queries.")] = None,
    index: Annotated[Path | None, typer.Option("--index", "-i", help="Folder of the index.")] = None,
    url: Annotated[str | None, typer.Option(help="Instead of a folder: URL of a Qdrant server.")] = None,
    collection: Annotated[str, typer.Option(help="Collection on the server.")] = "embedsmith",
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the server's key.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's new place, if it was moved.")] = None,
    file: Annotated[str | None, typer.Option(help="A file of queries (_id, text).")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Hits a query.")] = 10,
    weights: Annotated[list[str] | None, typer.Option("--weight", help="Weight of a head: sparse=0.3")] = None,
    rrf: Annotated[bool, typer.Option("--rrf", help="Fuse ranks instead of scores.")] = False,
    candidates: Annotated[int, typer.Option(min=1, help="Documents each head proposes.")] = 100,
    filters: Annotated[list[str] | None, typer.Option("--filter", help="lang=en, or 'year={gte: 2000}'")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show which tokens matched.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON a query.")] = False,
) -> None:
    """Search an index by all heads together, with the score of each."""
    from embedsmith.index import verb as indexing

    place = indexing.Place(index, url, collection, os.environ.get(api_key_env) if api_key_env else None)
    texts = [*(queries or []), *(indexing.read_queries(file) if file else [])]
    where = indexing.parse_pairs(filters or [], "the filter")
    asked = indexing.Asked(texts, k, indexing.parse_weights(weights or []), rrf, candidates, where)
    for answer in indexing.run_search(place, model, asked, explain):
        if as_json:
            typer.echo(indexing.as_json(answer))
        else:
            from rich.console import Console

            Console().print(indexing.table(answer))
