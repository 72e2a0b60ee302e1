"""The command line. Verbs only: each imports its room inside the function, so that `--help` costs no torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from embedsmith.cli.evaluate import VERBS

app = typer.Typer(
    name="embedsmith",
    help="Make a text-embedding model from start to finish.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes around the help would double what it costs to show it
)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it: key.path=value")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is already there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", "--dry_run", help="Check everything, run one step.")] = False,
) -> None:
    """Train a model as a recipe says. The same command continues a run that was stopped."""
    from embedsmith.compat.config import read_recipe
    from embedsmith.core.collectives import rank
    from embedsmith.train import rehearse
    from embedsmith.train import train as run

    loaded = read_recipe(recipe, overrides or [])
    said = rehearse(loaded) if dry_run else f"model: {run(loaded, overwrite=overwrite)}"
    if rank() == 0:
        typer.echo(said)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a training recipe, for your editor."""
    from embedsmith.core.recipe import schema_json
    from embedsmith.train import Recipe

    typer.echo(schema_json(Recipe))


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A data file, BEIR folder, dataset; or a recipe (.yaml): its plan.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="How to read it: task=sts columns.query=title")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="Records to show.")] = 3,
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Of a recipe: time a few training steps.")] = True,
) -> None:
    """Print what is understood of a data file (counts, fields, lengths, samples), or the plan of a recipe's epoch."""
    import json
    from typing import Any

    from rich.console import Console

    from embedsmith.core.recipe import apply_override, parse
    from embedsmith.core.settings import to_plain
    from embedsmith.data.inspect import inspect_source, render
    from embedsmith.data.source import Source

    if path.endswith((".yaml", ".yml")):
        from embedsmith.cli.overview import overview
        from embedsmith.cli.overview import render as render_plan
        from embedsmith.core.recipe import load_recipe
        from embedsmith.train import Recipe

        plan = overview(load_recipe(path, Recipe, overrides or []), timed=timed)
        if as_json:
            typer.echo(json.dumps(to_plain(plan), indent=2, ensure_ascii=False))
        else:
            Console().print(render_plan(plan), soft_wrap=True)
        return
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
    """Train, score and search something real, offline, in minutes."""
    from rich.console import Console

    from embedsmith.cli.demo import QUESTION, demonstrate, render

    Console().print(render(demonstrate(output, steps, ask or QUESTION, typer.echo)))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print versions, devices and disk space, what is missing and how to get it; exit 1 if it is needed."""
    import json

    from embedsmith.cli.doctor import diagnose, render

    found = diagnose()
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        from rich.console import Console

        Console().print(render(found))
    if not found.healthy:
        raise typer.Exit(1)


@app.command()
def encode(
    files: Annotated[list[Path], typer.Argument(help="Files of texts: .txt, .jsonl, .csv, .tsv, .parquet, also .gz.")],
    out: Annotated[Path, typer.Argument(help="Folder for vectors.npy, ids.txt and meta.json.")],
    model: Annotated[str, typer.Option(help="Model folder or hub id.")],
    role: Annotated[str, typer.Option(help="query or document: which prompt is put before the texts.")] = "document",
    task: Annotated[str | None, typer.Option(help="Use the prompt of this task.")] = None,
    column: Annotated[str | None, typer.Option(help="Column or JSON key that holds the texts.")] = None,
    dim: Annotated[int | None, typer.Option(help="Keep this many leading coordinates.")] = None,
    stored: Annotated[str, typer.Option(help="Numbers on disk: float32, float16 or int8.")] = "float32",
    dtype: Annotated[str | None, typer.Option(help="Compute in bfloat16 or float16.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes; they share the CPU's threads.")] = 1,
    block: Annotated[int, typer.Option(min=1, help="Texts between two saves of the state.")] = 4096,
) -> None:
    """Turn files of texts into memory-mapped vectors; the same command continues after a kill."""
    from embedsmith.core.recipe import parse
    from embedsmith.models.encode_files import EncodeJob, encode_files

    options = {"role": role, "task": task, "column": column, "dim": dim, "stored": stored, "dtype": dtype}
    tree = {"model": model, "files": files, "out": out, "block": block, "processes": processes, **options}
    count = encode_files(parse(EncodeJob, tree, where="encode"))
    typer.echo(f"{count} vectors in {out}")


@app.command("merge")
def merge_models(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it: key.path=value")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a merge that is already there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compare the models and print the plan.")] = False,
    explain: Annotated[Path | None, typer.Option(help="Write a report on the merge to this folder, not it.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check the result against its parents.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="As --verify; what fails is not written.")] = False,
    probe: Annotated[list[str] | None, typer.Option(help="Texts to look at: one file a parent, or one.")] = None,
) -> None:
    """Merge models as a recipe says."""
    share_one_heap()
    from embedsmith.core.recipe import load_recipe
    from embedsmith.merge import MergeRecipe, merge
    from embedsmith.merge.run import plan_in_words

    loaded = load_recipe(recipe, MergeRecipe, overrides or [])
    if dry_run:
        typer.echo(plan_in_words(loaded))
    elif explain is not None:
        from embedsmith.calibrate.explain_report import write_explanation

        typer.echo(f"report: {write_explanation(loaded, explain, probe or [])}")
    elif verify or strict:
        from embedsmith.calibrate.verify import merge_verified

        typer.echo(f"model: {merge_verified(loaded, probe or [], strict, overwrite)}")
    else:
        typer.echo(f"model: {merge(loaded, overwrite=overwrite)}")


def share_one_heap() -> None:
    """glibc gives every thread a heap of its own; holes in those of the threads that read and hash would add to the
    peak of a merge. Other C libraries know no such setting, and need none."""
    import ctypes
    from contextlib import suppress

    arena_max = -8  # M_ARENA_MAX of malloc.h
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(arena_max, 1)


@app.command("losses")
def list_losses(
    name: Annotated[str | None, typer.Argument(help="One loss: print all that is known about it.")] = None,
) -> None:
    """List the losses a recipe can name, with formula, settings and source; NAME explains one."""
    from rich.console import Console

    from embedsmith.cli.losses import explain, table

    console = Console()
    console.print(table() if name is None else explain(name), markup=False, highlight=False, soft_wrap=name is not None)


@app.command()
def tokenize(
    data: Annotated[list[str], typer.Argument(help="Data files or datasets; or one YAML recipe of this verb.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model whose tokenizer and prompts.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="The folder of the token cache.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="For every source: key=value")] = None,
    max_length: Annotated[int | None, typer.Option(min=4, help="Tokens a text may have.")] = None,
    pooling: Annotated[str | None, typer.Option(help="As in training: last puts an end token behind texts.")] = None,
    layout: Annotated[str | None, typer.Option(help="corpus: documents once; inline: in each row.")] = None,
    keep_text: Annotated[bool, typer.Option("--keep-text", help="Keep the texts beside their tokens.")] = False,
    adopt: Annotated[str | None, typer.Option(help="DATA is a cache of another tool, of this task.")] = None,
) -> None:
    """Tokenize sources once, to Parquet, for training without the tokenizer; after a stop, the same command goes on."""
    from embedsmith.cli.tokenize import run_tokenize

    tree = {"model": model, "out": out, "max_length": max_length, "layout": layout, "keep_text": keep_text or None}
    tree["pooling"] = pooling
    for line in run_tokenize(data, tree, changes or [], adopt):
        typer.echo(line)


@app.command("curate")
def curate_data(
    source: Annotated[str | None, typer.Argument(help="A YAML recipe; or a file, folder or pattern.")] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[OUT] [KEY=VALUE]...", help="Result; changes.")] = None,
    steps: Annotated[
        list[str] | None, typer.Option("--step", "-s", help="A step and its settings: 'length query_min=3'")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder where names of evaluation tasks are looked up.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do it again; scores and answers stay.")] = False,
    list_steps: Annotated[bool, typer.Option("--list", help="List the steps and their settings.")] = False,
) -> None:
    """Clean, filter and make training data: `embedsmith curate IN OUT --step length --step exact_duplicates`."""
    from rich.console import Console

    from embedsmith.curate.step import render, table_of_steps

    if list_steps or source is None:
        Console().print(table_of_steps())
        return
    from embedsmith.cli.curate import run_curate

    Console().print(render(run_curate(source, more or [], steps or [], data=data, overwrite=overwrite)))


@app.command("index")
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


@app.command("search")
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


for verb in VERBS:
    app.command()(verb)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="A folder or hub id of a model, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The embedder's folder.")],
    changes: Annotated[list[str] | None, typer.Argument(help="key=value: pooling=mean attention=bidirectional")] = None,
) -> None:
    """Make an (untrained) embedder of any model: a decoder gets last-token pooling unless you say otherwise."""
    from embedsmith.models.export import convert as run

    typer.echo(run(model, out, changes or []))


@app.command("export")
def export_one_head(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    head: Annotated[str, typer.Option(help="dense, sparse, multivector, or pylate (multivector there).")] = "dense",
) -> None:
    """Write one head of a model as a folder for sentence-transformers or PyLate, with the same scores."""
    from typing import cast

    from embedsmith.models.export import Head, run_export

    typer.echo(run_export(model, out, cast("Head", head)))


@app.command("mine")
def mine_negatives(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it: key.path=value")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Mine again; kept vectors stay.")] = False,
) -> None:
    """Find hard negatives for records. The same command continues a run that was stopped; torchrun shares the work."""
    from embedsmith.cli.stages import run_mine
    from embedsmith.core.recipe import apply_override, read_tree

    tree = read_tree(recipe)
    for override in overrides or []:
        apply_override(tree, override)
    report = run_mine(tree, str(recipe), overwrite)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(report.lines())


@app.command("run")
def run_stages(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe with stages.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes: stages.0.recipe.output=...")] = None,
) -> None:
    """Run stages in order: curate, mine, train, merge, evaluate. The same command goes on after a stop."""
    from embedsmith.cli.stages import PipelineRecipe, run
    from embedsmith.core.recipe import load_recipe

    made = run(load_recipe(recipe, PipelineRecipe, overrides or []))
    if os.environ.get("RANK", "0") == "0":
        typer.echo("\n".join(f"{name}: {result}" for name, result in made.items()))


def main() -> None:
    """Run the command line; an error a user can cause is one message and exit code 1, an interrupt exits with 130."""
    import logging

    from embedsmith.core.errors import EmbedsmithError

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("embedsmith").setLevel(logging.INFO)
    try:
        app()
    except EmbedsmithError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)
