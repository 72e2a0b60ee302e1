"""The verbs that measure models: evaluate, compare, geometry and report."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from embedsmith.cli.verbs import (
    Backend,
    Device,
    Join,
    MaxLength,
    Pooling,
    Prompts,
    ShardOf,
    first_rank,
    model_options,
    print_table,
    say,
)
from embedsmith.core.errors import EvaluationError
from embedsmith.core.shelf import verbs

Tasks = Annotated[list[str] | None, typer.Option("--tasks", "-t", help="Names or paths, one or several.")]


Data = Annotated[Path | None, typer.Option(help="Folder where names of tasks are looked up.")]


Split = Annotated[str, typer.Option(help="Which judgements of a BEIR folder.")]


JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]


Head = Annotated[str | None, typer.Option(help="dense, sparse, multivector or hybrid: which output is scored.")]


Weight = Annotated[list[str] | None, typer.Option("--weight", help="Of a head in hybrid or all: sparse=0.3")]


Dims = Annotated[list[str] | None, typer.Option(help="Widths of the vectors that are scored too: 64 128 256")]


Keep = Annotated[Path | None, typer.Option(help="Folder for vectors and results: a stopped command continues.")]


@contextmanager
def _claimed(verb: str, keep: Path | None, *files: tuple[Path | None, str]) -> Iterator[None]:
    """What a verb writes, before anything is scored: `files` with a text that stands in each, and a folder to keep."""
    from embedsmith.core.outputs import claimed, clear_left, refuse_foreign_file

    with ExitStack() as claims:
        for path, text in files:
            if path is not None:
                claims.enter_context(claimed(path, verb))
                refuse_foreign_file(path, text)
        if keep is not None:
            claims.enter_context(claimed(keep, verb))
            clear_left(keep / "vectors")
            clear_left(keep / "results")
        yield


Engine = Annotated[str, typer.Option(help="embedsmith or sentence-transformers: who encodes.")]
AtOnce = Annotated[int, typer.Option(min=1, help="Texts at once, for sentence-transformers.")]
Items = Annotated[bool, typer.Option("--items", help="Keep the values of every query or pair in the JSON.")]
AnyHead = Annotated[
    str | None, typer.Option(help="dense, sparse, multivector, hybrid; all: side by side; else the model's own.")
]
Tune = Annotated[list[str] | None, typer.Option(help="With --head all: choose weights on these, dev split.")]
Codes = Annotated[
    list[str] | None, typer.Option(help="int8, binary: retrieval by such codes too, beside the full vectors.")
]
Rescore = Annotated[
    int, typer.Option(min=0, help="With --precision: how many times as many documents are scored in full.")
]
TokenBits = Annotated[
    int | None, typer.Option(help="With --head multivector: documents as residual codes of 1, 2, 4 or 8 bits.")
]
Mteb = Annotated[Path | None, typer.Option(help="Let mteb score, and write its JSON below this folder.")]
Limits = Annotated[int | None, typer.Option(min=1, help="With --mteb: queries to sample.")]
Reranker = Annotated[str | None, typer.Option(help="A reranker that orders the model's rankings anew.")]
Depth = Annotated[int, typer.Option(min=1, help="With a reranker: documents it reads of a ranking.")]


@verbs.register("evaluate")
def evaluate_model(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[TASK]...", help="More tasks, and how to load: model.mcls=256")
    ] = None,
    tasks: Tasks = None,
    data: Data = None,
    json_file: JsonFile = None,
    split: Split = "test",
    pooling: Pooling = None,
    prompts: Prompts = None,
    max_length: MaxLength = None,
    backend: Backend = None,
    engine: Engine = "embedsmith",
    batch_size: AtOnce = 32,
    device: Device = None,
    items: Items = False,
    head: AnyHead = None,
    weight: Weight = None,
    tune: Tune = None,
    dims: Dims = None,
    precision: Codes = None,
    rescore: Rescore = 4,
    token_bits: TokenBits = None,
    keep: Keep = None,
    mteb: Mteb = None,
    limits: Limits = None,
    rerank: Reranker = None,
    depth: Depth = 100,
    shard: ShardOf = None,
    join: Join = False,
) -> None:
    """Score a model, an embedding model or a reranker. Ranks of torchrun share the work.

    Example: embedsmith evaluate runs/mine/model --tasks pairs-split/pairs-test --json scores.json
    """
    from embedsmith.api.evaluating import evaluation_sharing

    shared = shard is not None or join
    with _made_here(json_file) as json_file, _made_here(keep, shared) as keep:
        sharing = evaluation_sharing(keep, shard, join)
        if shard is not None:
            ctx.with_resource(sharing.claim())
        else:
            sharing.first(lambda: ctx.with_resource(_claimed("evaluate", keep, (json_file, '"tasks": ['))))
        options, more = _model_options(more or [])
        widths, more = _widths(dims, more)
        codes, more = _precisions(precision, more)
        weights = _weights(weight)
        what = _Scored(head, tuple(widths), codes, rescore, token_bits, weights, tuple(tune or ()), mteb, limits)
        what.check(engine, rerank)
        options |= model_options(pooling, prompts, None, backend)
        about = {"model": model, "engine": engine, "max_length": max_length, "split": split, **options}
        about |= {} if rerank is None else {"rerank": rerank, "depth": depth}
        named = _named_tasks([*(tasks or []), *more], data, split, with_mteb=mteb is not None)
        encoder = _encoder(model, engine, max_length, batch_size, options)
        places = (data, split, keep)
        results = what.results(encoder, _ranker(encoder, model, rerank, depth), named, places, about, sharing)
        if shard is not None or not first_rank():
            return
        if json_file is not None:
            results.save(json_file, items=items)
    print_table(results.table())


@contextmanager
def _made_here(output: Path | None, shared: bool = False) -> Iterator[Path | None]:
    """A path on this machine for an output, which is sent in the end where it belongs into object storage."""
    from embedsmith.core.outputs import delivered

    with nullcontext() if output is None else delivered(output, "evaluate", shared=shared) as place:
        yield None if place is None else Path(place)


@dataclass(frozen=True)
class _Scored:
    """What of a model `evaluate` scores: a head or all, at which widths, by which codes, with whose evaluator."""

    head: str | None
    widths: tuple[int, ...]
    codes: tuple[Any, ...]
    rescore: int
    token_bits: int | None
    weights: Mapping[str, float] | None
    tune: tuple[str, ...]
    mteb: Path | None
    limits: int | None

    def check(self, engine: str, rerank: str | None) -> None:
        """Errors: `EvaluationError` for options that do not go together."""
        head, mteb = self.head, self.mteb is not None
        if head == "all" and (engine != "embedsmith" or mteb):
            raise EvaluationError("--head all is scored by embedsmith alone", fix="leave out --engine and --mteb")
        if self.tune and head != "all":
            raise EvaluationError("--tune is for --head all", fix="add --head all")
        if self.weights and head not in ("all", "hybrid"):
            raise EvaluationError(f"--weight with --head {head or 'of the model'}", fix="use --head hybrid or all")
        for option, given in (("--dims", self.widths), ("--precision", self.codes)):
            if given and (head not in (None, "dense") or mteb):
                what = f"{option} is for dense vectors, scored by embedsmith"
                raise EvaluationError(what, fix="leave out --head and --mteb")
        if rerank is not None and (self.widths or self.codes or head == "all" or mteb):
            what = "--rerank with --dims, --precision, --head all or --mteb"
            raise EvaluationError(what, fix="leave one of them out")
        if self.token_bits is not None and head != "multivector":
            raise EvaluationError(f"--token-bits with --head {head}", fix="add --head multivector")
        if self.limits is not None and not mteb:
            raise EvaluationError("--limits is for mteb's tasks", fix="add --mteb FOLDER")

    def results(
        self, encoder: Any, ranker: Any, tasks: list[str], places: tuple[Any, ...], about: Any, sharing: Any
    ) -> Any:
        """`places`: the folder of tasks, the split, the folder of what is kept."""
        from embedsmith import __version__
        from embedsmith.api.evaluating import Scoring
        from embedsmith.core.encoder import main_head
        from embedsmith.evaluate.variants import HEADS
        from embedsmith.models import CrossEncoder

        encoder = None if isinstance(encoder, CrossEncoder) else encoder
        if self.token_bits is not None:
            from embedsmith.search.residual import ResidualEncoder

            if encoder is None:
                raise EvaluationError("--token-bits of a reranker, which has no vectors", fix="leave it out")
            encoder = ResidualEncoder(encoder, self.token_bits)
        data, split, keep = places
        scoring = Scoring(tuple(tasks), data, split, self.head, keep, self.weights, ranker, sharing)
        if self.mteb is not None:
            from embedsmith.evaluate.mteb.tasks import SampleLimits

            limits = None if self.limits is None else SampleLimits(self.limits)
            return scoring.with_mteb(encoder, about["model"], self.mteb, limits)
        head = self.head or ("dense" if encoder is None else main_head(encoder))
        about = {**about, "head": head, "embedsmith": __version__}
        if head == "all":
            return scoring.side_by_side(encoder, [name for name in HEADS if name in encoder.outputs], self.tune, about)
        if self.widths or self.codes:
            return scoring.at_widths(encoder, self.widths, about, self.codes, self.rescore)
        return scoring.score(encoder, about)


def _weights(given: list[str] | None) -> Mapping[str, float] | None:
    from embedsmith.index.commands import parse_weights

    return parse_weights(given) if given else None


def _named_tasks(given: list[str], data: Path | None, split: str, *, with_mteb: bool) -> list[str]:
    """The tasks by name. Wrong names are told before a model is loaded."""
    from embedsmith.evaluate import load_task, split_names

    names = split_names(given)
    for name in [] if with_mteb else names:
        load_task(name, data_dir=data, split=split)
    return names


def _ranker(model: Any, name: str, rerank: str | None, depth: int) -> Any:
    """What orders rankings anew: the reranker that was named, or the model itself where it is one."""
    from embedsmith.api.evaluating import rerank_of
    from embedsmith.evaluate.rerank import Rerank
    from embedsmith.models import CrossEncoder

    if not isinstance(model, CrossEncoder):
        return rerank_of(rerank, depth)
    if rerank is not None:
        raise EvaluationError(f"{name} is a reranker itself", fix=f"embedsmith evaluate EMBEDDER --rerank {rerank}")
    return Rerank(model, depth)


def _widths(dims: list[str] | None, others: list[str]) -> tuple[list[int], list[str]]:
    """The widths, and what else was named. Typer takes one value an option: of `--dims 64 128` the 128 is among the
    others, so whole numbers there that are no paths are widths too."""
    if not dims:
        return [], others
    more = [name for name in others if name.isdecimal() and not os.path.exists(name)]
    parts = [part for text in [*dims, *more] for part in text.replace(",", " ").split()]
    if wrong := [part for part in parts if not part.isdecimal() or int(part) < 1]:
        raise EvaluationError(f"--dims {wrong[0]}", expected="whole numbers from 1, such as --dims 64 128")
    return [int(part) for part in parts], [name for name in others if name not in more]


def _precisions(given: list[str] | None, others: list[str]) -> tuple[tuple[Any, ...], list[str]]:
    """The precisions, and what else was named: of `--precision int8 binary` the second is among the others, too."""
    from embedsmith.api.evaluating import checked_precisions

    if not given:
        return (), others
    more = [name for name in others if name in ("int8", "binary") and not os.path.exists(name)]
    parts = [part for text in [*given, *more] for part in text.replace(",", " ").split()]
    return checked_precisions(parts), [name for name in others if name not in more]


def _model_options(others: list[str]) -> tuple[dict[str, Any], list[str]]:
    """`model.key=value` among other names: options of `embedsmith.load`, and what is left."""
    from embedsmith.core.recipe import apply_override

    tree: dict[str, Any] = {"model": {}}
    options = [name for name in others if name.startswith("model.") and "=" in name and not os.path.exists(name)]
    for override in options:
        apply_override(tree, override)
    return tree["model"], [name for name in others if name not in options]


def _encoder(model: str, engine: str, max_length: int | None, batch_size: int, options: dict[str, Any]) -> Any:
    if engine == "sentence-transformers" and options:
        raise EvaluationError(f"model.{next(iter(options))} with this engine", fix="leave out --engine")
    if engine == "sentence-transformers":
        from embedsmith.evaluate.encoding import SentenceTransformersEncoder

        return SentenceTransformersEncoder.load(model, max_length=max_length, batch_size=batch_size)
    if engine == "embedsmith":
        from embedsmith.api.evaluating import load_either

        return load_either(model, options if max_length is None else {**options, "max_length": max_length})
    raise EvaluationError(f"no engine is called {engine!r}", expected="embedsmith or sentence-transformers")


@verbs.register("compare")
def compare_results(
    ctx: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Folders, hub ids or results (.json); the baseline first.")],
    tasks: Tasks = None,
    data: Data = None,
    json_file: JsonFile = None,
    split: Split = "test",
    head: Head = None,
    dims: Dims = None,
    keep: Keep = None,
    device: Device = None,
    pooling: Pooling = None,
    prompts: Prompts = None,
    max_length: MaxLength = None,
    backend: Backend = None,
    report: Annotated[Path | None, typer.Option(help="Write the table and charts to this HTML file.")] = None,
) -> None:
    """Score models side by side, with the confidence of their differences.

    Example: embedsmith compare my/encoder runs/mine/model --tasks pairs-split/pairs-test --report
    comparison.html
    """
    from embedsmith.api.evaluating import Scoring, compare_models
    from embedsmith.core.files import atomic_file
    from embedsmith.evaluate import split_names
    from embedsmith.models import load
    from embedsmith.report.page import PAGE_MARK

    ctx.with_resource(_claimed("compare", keep, (json_file, '"differences": {'), (report, PAGE_MARK)))
    options, models = _model_options(models)
    options |= model_options(pooling, prompts, max_length, backend)
    widths, models = _widths(dims, models)
    if widths and head not in (None, "dense"):
        raise EvaluationError("--dims is for dense vectors, scored by embedsmith", fix="leave out --head")
    named, asked = _models_and_tasks(models, split_names(tasks or []))
    by_name = dict(zip(named, named, strict=True))
    if len(by_name) < len(named):
        raise EvaluationError("two models have the same name", fix="give each model once")
    made = compare_models(by_name, Scoring(tuple(asked), data, split, head, keep), partial(load, **options), widths)
    if json_file is not None:
        with atomic_file(json_file) as file:
            json.dump(made.as_dict(), file, indent=2, ensure_ascii=False, allow_nan=False)
    if report is not None:
        from embedsmith.report import comparison_page

        text = comparison_page(made)
        with atomic_file(report) as file:
            file.write(text)
    print_table(made.table())
    if report is not None:
        say(f"report: {report}")


def _models_and_tasks(models: list[str], tasks: list[str]) -> tuple[list[str], list[str]]:
    """Typer takes one value an option, so `--tasks a b` leaves b among the models. What is no model folder, no file
    of results and no hub id with an owner is a task then."""

    def is_model(name: str) -> bool:
        path = Path(name)
        return name.endswith(".json") or (path / "config.json").is_file() or (not path.exists() and "/" in name)

    if not tasks:
        return models, []
    return [name for name in models if is_model(name)], [*tasks, *(name for name in models if not is_model(name))]


@verbs.register("geometry")
def show_geometry(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    task: Annotated[str, typer.Option("--task", "-t", help="Task whose texts are looked at, or a .txt file.")],
    against: Annotated[str | None, typer.Option(help="A second model on the same texts.")] = None,
    texts: Annotated[int, typer.Option(min=3, help="How many texts.")] = 1000,
    data: Data = None,
    device: Device = None,
    pooling: Pooling = None,
    prompts: Prompts = None,
    max_length: MaxLength = None,
    backend: Backend = None,
    json_file: JsonFile = None,
    report: Annotated[Path | None, typer.Option(help="Write the pictures to this HTML file.")] = None,
) -> None:
    """Look at the shape of a model's space: directions in use, hubs, widths, prompts, token states.

    Example: embedsmith geometry runs/mine/model --task stsb-en-test --report geometry.html
    """
    from embedsmith.core.files import atomic_file
    from embedsmith.evaluate import load_task
    from embedsmith.evaluate.model_geometry import Geometry, Sample, geometry_table
    from embedsmith.evaluate.result import finite_or_none
    from embedsmith.models import load
    from embedsmith.report.page import PAGE_MARK

    ctx.with_resource(_claimed("geometry", None, (json_file, '"geometry": {'), (report, PAGE_MARK)))
    path = Path(task)
    sample = Sample.read(path, texts) if path.suffix == ".txt" else Sample.of(load_task(task, data_dir=data), texts)
    names = [model] if against is None else [model, against]
    encoders = [load(name, **model_options(pooling, prompts, max_length, backend)) for name in names]
    geometries = [Geometry.of(encoder, sample, about={"model": name}) for encoder, name in zip(encoders, names)]
    together = sample.agreement(encoders[0], encoders[1]) if against is not None else {}
    if json_file is not None:
        with atomic_file(json_file) as file:
            both = {name: finite_or_none(value) for name, value in together.items()}
            plain = {"models": [each.as_dict() for each in geometries], "both": both}
            json.dump(plain, file, indent=2, ensure_ascii=False, allow_nan=False)
    if report is not None:
        from embedsmith.report import geometry_page

        text = geometry_page([each.as_dict() for each in geometries], names, together)
        with atomic_file(report) as file:
            file.write(text)
    print_table(geometry_table(geometries, names, together))
    if report is not None:
        say(f"report: {report}")


@verbs.register("report")
def write_page(
    folder: Annotated[Path, typer.Argument(help="The output of a run, finished or not, or of a merge.")],
    output: Annotated[Path | None, typer.Option(help="Where to write it; FOLDER/report.html by default.")] = None,
) -> None:
    """Write a folder's report: one HTML file that opens without a network.

    Example: embedsmith report runs/mine
    """
    from embedsmith.report import write_report

    say(f"report: {write_report(folder, output)}")
