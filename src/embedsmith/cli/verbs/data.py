"""The verbs of data: inspect, split, curate and tokenize."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from embedsmith.cli.verbs import Join, MaxLength, Pooling, Prompts, ShardOf, first_rank, model_options, print_table, say
from embedsmith.core.errors import EmbedsmithError
from embedsmith.core.shelf import verbs


@contextmanager
def fixes_of_one_file() -> Iterator[None]:
    """A fix that names a source by its place in a recipe, as it is typed behind a verb of data files."""
    try:
        yield
    except EmbedsmithError as error:
        from embedsmith.data.record import for_one_file

        fix = for_one_file(error.fix or "")
        if fix == (error.fix or ""):
            raise
        raise type(error)(error.what, where=error.where, expected=error.expected, fix=fix) from error


@verbs.register("inspect")
def inspect_data(
    path: Annotated[str, typer.Argument(help="A data file, BEIR folder, dataset; or a recipe (.yaml): its plan.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="How to read it: task=sts columns.query=title")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="Records to show.")] = 3,
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Of a recipe: time a few training steps.")] = True,
    model: Annotated[str | None, typer.Option(help="Of data: tell how much of it this model would cut.")] = None,
    pooling: Pooling = None,
    prompts: Prompts = None,
    max_length: MaxLength = None,
) -> None:
    """Print what is understood of a data file (counts, fields, lengths, samples), or the plan of a recipe's epoch.

    Example: embedsmith inspect faq.csv columns.query=title columns.positives=body
    """
    from embedsmith.core.recipe import apply_override, parse
    from embedsmith.core.settings import to_plain
    from embedsmith.core.shipped import names_recipe, recipe_file
    from embedsmith.data.inspect import inspect_source
    from embedsmith.data.source import Source

    if names_recipe(path, "train"):
        from embedsmith.cli.overview import overview
        from embedsmith.core.recipe import load_recipe
        from embedsmith.train import Recipe

        plan = overview(load_recipe(recipe_file(path, "train"), Recipe, overrides or []), timed=timed)
        if as_json:
            say(json.dumps(to_plain(plan), indent=2, ensure_ascii=False))
        else:
            print_table(plan.table(), soft_wrap=True)
        return
    tree: dict[str, Any] = {"path": path}
    for override in overrides or []:
        apply_override(tree, override)
    source = parse(Source, tree, where="inspect")
    with fixes_of_one_file():
        found, cut = inspect_source(source, samples), None
    if model is not None:
        from embedsmith.data.read import read_source
        from embedsmith.models.config import ModelConfig
        from embedsmith.models.cut import cut_of
        from embedsmith.models.load import without_weights

        reader = without_weights(ModelConfig(model, **model_options(pooling, prompts, max_length)))
        cut = cut_of(reader, read_source(source))
    if as_json:
        plain = to_plain(found, exact=True) | ({"cut": to_plain(cut)} if model is not None else {})
        say(json.dumps(plain, indent=2, ensure_ascii=False))
        return
    print_table(found.tables())
    if cut is not None:
        say(f"{model}: {cut}")


@verbs.register("split")
def split_data(
    path: Annotated[str, typer.Argument(help="A data file or dataset: pairs, scored pairs or labelled texts.")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[OUT] [KEY=VALUE]...", help="Folder (NAME-split); how to read it.")
    ] = None,
    test: Annotated[float, typer.Option(help="Rows to hold out: a share below 1, or their number.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Another seed holds out other rows.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a split that is already there.")] = False,
) -> None:
    """Split a data file into a part to train on and a part to be scored on, which share no text.

    Example: embedsmith split pairs.jsonl --test 0.1 --seed 0
    """
    from embedsmith.core.errors import RecipeError
    from embedsmith.core.recipe import apply_override, parse
    from embedsmith.data.source import Source, source_name
    from embedsmith.data.split import split_source

    tree: dict[str, Any] = {"path": path}
    places = [text for text in more or [] if "=" not in text]
    for override in (text for text in more or [] if "=" in text):
        apply_override(tree, override)
    if len(places) > 1:
        raise RecipeError(f"{len(places)} outputs: {', '.join(places)}", expected="embedsmith split FILE [OUT]")
    if not test > 0:
        raise RecipeError(f"--test {test:g}", expected="a share such as 0.1, or a number of rows from 1")
    source = parse(Source, tree, where="split")
    out = places[0] if places else f"{source_name(source)}-split"
    with fixes_of_one_file():
        say(split_source(source, out, test=test, seed=seed, overwrite=overwrite).lines())


@verbs.register("curate")
def curate_data(
    source: Annotated[
        str | None, typer.Argument(help="A YAML or shipped recipe; or a file, folder or pattern.")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[OUT] [KEY=VALUE]...", help="Result; changes.")] = None,
    steps: Annotated[
        list[str] | None, typer.Option("--step", "-s", help="A step and its settings: 'length query_min=3'")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder where names of evaluation tasks are looked up.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do it again; scores and answers stay.")] = False,
    list_steps: Annotated[bool, typer.Option("--list", help="List the steps and their settings.")] = False,
    engine: Annotated[str | None, typer.Option(help="What it runs on: local (this machine's cores) or ray.")] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster: host:port, or auto.")] = None,
) -> None:
    """Clean, filter and make training data.

    Example: embedsmith curate pairs.jsonl clean.jsonl --step 'length query_min=3' --step exact_duplicates
    """
    from embedsmith.curate.outcome import table_of_steps

    if list_steps or source is None:
        print_table(table_of_steps())
        return
    from embedsmith.api.curating import run_curate
    from embedsmith.core.shipped import names_recipe, recipe_file

    if names_recipe(source, "curate"):
        source = str(recipe_file(source, "curate"))
    options: dict[str, Any] = {"data": data, "overwrite": overwrite, "engine": engine, "address": address}
    print_table(run_curate(source, more or [], steps or [], **options).table())


@verbs.register("tokenize")
def tokenize_data(
    data: Annotated[
        list[str], typer.Argument(help="Data files, datasets, a folder of F2LLM's files; or a YAML or shipped recipe.")
    ],
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model whose tokenizer and prompts.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="The folder of the token cache.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="For every source: key=value")] = None,
    max_length: Annotated[int | None, typer.Option(min=4, help="Tokens a text may have.")] = None,
    pooling: Annotated[str | None, typer.Option(help="As in training: last puts an end token behind texts.")] = None,
    layout: Annotated[str | None, typer.Option(help="corpus: documents once; inline: in each row.")] = None,
    keep_text: Annotated[bool, typer.Option("--keep-text", help="Keep the texts beside their tokens.")] = False,
    adopt: Annotated[str | None, typer.Option(help="DATA is a cache of another tool, of this task, or auto.")] = None,
    shard: ShardOf = None,
    join: Join = False,
) -> None:
    """Tokenize sources once, to Parquet, for training without the tokenizer; after a stop, the same command goes on.
    Ranks of torchrun share the work.

    Example: embedsmith tokenize pairs.jsonl --model runs/mine/model --out tokens
    """
    from embedsmith.api.tokenizing import run_tokenize

    tree = {"model": model, "out": out, "max_length": max_length, "layout": layout, "keep_text": keep_text or None}
    tree["pooling"] = pooling
    lines = run_tokenize(data, tree, changes or [], adopt, shard, join)
    for line in lines if shard is None and first_rank() else []:
        say(line)
