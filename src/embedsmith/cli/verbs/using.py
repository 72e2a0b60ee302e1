"""The verbs that use a model: encode, index and search, and those that take it elsewhere: convert, export and push."""

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
from embedsmith.core.shelf import verbs


@verbs.register("encode")
def encode_texts(
    files: Annotated[list[str], typer.Argument(help="Files of texts: .txt, .jsonl, .csv, .tsv, .parquet, also .gz.")],
    out: Annotated[Path, typer.Argument(help="Folder for vectors.npy, ids.txt and meta.json.")],
    model: Annotated[str, typer.Option(help="Model folder or hub id.")],
    role: Annotated[str, typer.Option(help="query or document: which prompt is put before the texts.")] = "document",
    task: Annotated[str | None, typer.Option(help="Use the prompt of this task.")] = None,
    column: Annotated[str | None, typer.Option(help="Column or JSON key that holds the texts.")] = None,
    dim: Annotated[int | None, typer.Option(help="Keep this many leading coordinates.")] = None,
    stored: Annotated[str, typer.Option(help="Numbers on disk: float32, float16 or int8.")] = "float32",
    dtype: Annotated[
        str | None, typer.Option(help="Compute in bfloat16, float16, or auto: as the hardware can.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes; they share the CPU's threads.")] = 1,
    block: Annotated[int, typer.Option(min=1, help="Texts between two saves of the state.")] = 4096,
    device: Device = None,
    pooling: Pooling = None,
    prompts: Prompts = None,
    max_length: MaxLength = None,
    backend: Backend = None,
    shard: ShardOf = None,
    join: Join = False,
) -> None:
    """Turn files of texts into memory-mapped vectors; the same command continues after a kill, torchrun shares.

    Example: embedsmith encode passages.jsonl vectors --model runs/mine/model --role document
    """
    from embedsmith.core.inputs import local_path
    from embedsmith.core.recipe import parse
    from embedsmith.models.encode_files import EncodeJob, encode_files

    options = {"role": role, "task": task, "column": column, "dim": dim, "stored": stored, "dtype": dtype}
    tree = {
        "model": model,
        "changes": model_options(pooling, prompts, max_length, backend),
        "files": [local_path(file) for file in files],
        "out": out,
        "block": block,
        "processes": processes,
        **options,
    }
    count = encode_files(parse(EncodeJob, tree, where="encode"), shard=shard, join=join)
    if shard is None and first_rank():
        say(f"{count} vectors in {out}")


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
    precision: Annotated[
        str | None, typer.Option(help="int8 or binary: find dense vectors by such codes, kept in memory.")
    ] = None,
    device: Device = None,
    pooling: Pooling = None,
    prompts: Prompts = None,
    max_length: MaxLength = None,
    backend: Backend = None,
    shard: ShardOf = None,
    join: Join = False,
) -> None:
    """Index documents under every head of a model; the same command continues after a stop, and updates. Ranks of
    torchrun share the encoding.

    Example: embedsmith index runs/mine/model passages.jsonl --to my-index
    """
    from embedsmith.core.keys import checked_variable, key_from
    from embedsmith.index.commands import Place, checked_precision
    from embedsmith.index.filling import run_index

    place = Place(to, url, collection, key_from(checked_variable(api_key_env, "--api-key-env")))
    options = model_options(pooling, prompts, max_length, backend)
    codes = checked_precision(precision)
    written, size = run_index(model, documents, place, heads, batch, options, codes, shard=shard, join=join)
    if shard is None and first_rank():
        say(f"{written.new} new, {written.changed} changed, {written.unchanged} unchanged; {size} in the index")


def _queries_of(file: str | None) -> list[str]:
    """Errors: `DataError` for a file without one."""
    from embedsmith.core.errors import DataError
    from embedsmith.index import read_documents

    found = [document.text for document in read_documents(file)] if file else []
    if file and not found:
        raise DataError("no query in this file", where=file)
    return found


def _refuse_mixed(vectors: bool, of_index: dict[str, Any], of_vectors: dict[str, Any]) -> None:
    """Errors: `SearchError` for an option that says nothing of what is searched."""
    from embedsmith.core.errors import SearchError

    for name in (name for name, value in (of_index if vectors else of_vectors).items() if value):
        if vectors:
            fix = f"leave {name} out, or make an index (embedsmith index)"
            raise SearchError(f"{name} with --vectors", fix=fix)
        fix = f"leave {name} out, or name vectors: --vectors FOLDER"
        raise SearchError(f"{name} without --vectors", fix=fix)


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
    rescore: Annotated[
        int, typer.Option(min=0, help="Index with codes: how many times as many candidates are scored in full.")
    ] = 4,
    filters: Annotated[list[str] | None, typer.Option("--filter", help="lang=en, or 'year={gte: 2000}'")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show which tokens matched.")] = False,
    rerank: Annotated[str | None, typer.Option(help="A reranker that orders the candidates anew.")] = None,
    vectors: Annotated[
        list[str] | None, typer.Option(help="Instead of an index: a folder that encode has written; may be repeated.")
    ] = None,
    texts_of: Annotated[
        list[str] | None, typer.Option("--texts", help="With --vectors: the files that were encoded, to show texts.")
    ] = None,
    approximate: Annotated[
        str | None, typer.Option(help="With --vectors: search by such an index of FAISS (IVF4096,Flat); made once.")
    ] = None,
    effort: Annotated[int, typer.Option(min=1, help="With --approximate: candidates a query looks at.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON a query.")] = False,
    device: Device = None,
    pooling: Pooling = None,
    prompts: Prompts = None,
    max_length: MaxLength = None,
    backend: Backend = None,
) -> None:
    """Search an index by all heads together, with the score of each; or folders of vectors, of any size.

    Example: embedsmith search 'how do I reset my password' --index my-index -k 5
    """
    from embedsmith.core.keys import checked_variable, key_from
    from embedsmith.index import commands as indexing
    from embedsmith.index.stored_search import run_stored_search

    place = indexing.Place(index, url, collection, key_from(checked_variable(api_key_env, "--api-key-env")))
    texts = [*(queries or []), *_queries_of(file)]
    where, heads = indexing.parse_pairs(filters or [], "the filter"), indexing.parse_weights(weights or [])
    more: dict[str, Any] = {"model": model, "options": model_options(pooling, prompts, max_length, backend)}
    _refuse_mixed(
        bool(vectors),
        {"--index": index, "--url": url, "--weight": weights, "--rrf": rrf, "--filter": filters, "--explain": explain}
        | {"--rerank": rerank},
        {"--texts": texts_of, "--approximate": approximate},
    )
    if vectors:
        more |= {"texts": texts_of or (), "approximate": approximate, "effort": effort}
        hits = run_stored_search(vectors, texts, k, **more)
    else:
        more |= {"weights": heads, "rrf": rrf, "candidates": candidates, "rescore": rescore, "rerank": rerank}
        hits = indexing.run_search(place, texts, k, filter=where, explained=explain, **more)
    for found in hits if first_rank() else ():
        if as_json:
            say(found.as_json())
        else:
            print_table(found.table())


@verbs.register("convert")
def convert_model(
    model: Annotated[str, typer.Argument(help="A folder or hub id of a model, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The embedder's folder.")],
    changes: Annotated[list[str] | None, typer.Argument(help="key=value: pooling=mean attention=bidirectional")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another saved model.")] = False,
    pooling: Pooling = None,
    prompts: Prompts = None,
    max_length: MaxLength = None,
) -> None:
    """Make an (untrained) embedder of any model: a decoder gets last-token pooling unless you say otherwise.

    Example: embedsmith convert Qwen/Qwen3-0.6B my-embedder pooling=last
    """
    from embedsmith.models.exports.libraries import convert as run

    options = model_options(pooling, prompts, max_length)
    say(run(model, out, changes or [], overwrite=overwrite, options=options))


@verbs.register("export")
def export_model(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; with --to gguf a file.")],
    to: Annotated[
        str | None, typer.Option(help="onnx, openvino or gguf: the whole model, for another runtime.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="With --to: fp32, fp16 or int8.")] = "fp32",
    texts: Annotated[str | None, typer.Option(help="A file of texts on which int8 is calibrated and measured.")] = None,
    floor: Annotated[float | None, typer.Option(help="Refuse a mean cosine to the model's below this: 0.98.")] = None,
    task: Annotated[list[str] | None, typer.Option("--task", "-t", help="Score it on this, beside the model.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder where names of tasks are looked up.")] = None,
    head: Annotated[
        str | None, typer.Option(help="Without --to: dense (the default), sparse, multivector, or pylate.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another saved model.")] = False,
    pooling: Pooling = None,
    prompts: Prompts = None,
    max_length: MaxLength = None,
) -> None:
    """Write a model as a graph for ONNX Runtime or OpenVINO, or for llama.cpp; or one head of it as a folder for
    sentence-transformers or PyLate, with the same scores.

    Example: embedsmith export runs/mine/model my-graph --to onnx --dtype int8 --texts passages.jsonl
    """
    from typing import cast

    from embedsmith.core.errors import ModelError
    from embedsmith.core.outputs import claimed, delivered
    from embedsmith.models.exports.libraries import ExportedHead, export_head
    from embedsmith.models.load import load
    from embedsmith.models.write import saved_model

    options = model_options(pooling, prompts, max_length)
    if to is not None:
        if head is not None:
            raise ModelError(
                f"--head {head} with --to {to}", fix="leave --head out: a graph has all heads of the model"
            )
        from embedsmith.api.exporting import export

        asked: dict[str, Any] = {
            "dtype": dtype,
            "texts": texts or (),
            "floor": floor,
            "tasks": task or (),
            "data": data,
        }
        say(export(model, out, cast(Any, to), overwrite=overwrite, **asked, **options))
        return
    if given := [name for name, value in (("--texts", texts), ("--floor", floor), ("--task", task)) if value]:
        raise ModelError(f"{given[0]} without --to", fix="add --to onnx or --to openvino")
    name = cast("ExportedHead", head or "dense")
    with delivered(out, "export") as place, claimed(place, "export"):
        saved_model().refuse_other(Path(place))
        say(export_head(load(model, device="cpu", **options), Path(place), name, overwrite=overwrite))


@verbs.register("push")
def push_model(
    folder: Annotated[Path, typer.Argument(help="A saved model.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the hub; made if need be.")],
    public: Annotated[bool, typer.Option("--public", help="Anyone may see it; private by default.")] = False,
) -> None:
    """Upload a saved model with its card to the hub you are logged in to.

    Example: embedsmith push runs/mine/model my-name/my-model
    """
    from embedsmith.report.model_card import push as upload

    say(f"pushed: {upload(folder, repository, private=not public)}")
