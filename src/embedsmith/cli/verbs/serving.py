"""The verb that answers others: serve."""

from pathlib import Path
from typing import Annotated

import typer

from embedsmith.cli.verbs import Backend, MaxLength, Pooling, Prompts, model_options
from embedsmith.core.shelf import verbs


@verbs.register("serve")
def serve_models(
    models: Annotated[list[str], typer.Argument(help="Model folders or hub ids; NAME=FOLDER to name one.")],
    index: Annotated[
        list[Path] | None, typer.Option("--index", "-i", help="Folder of an index that one of the models made.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Instead of a folder: URL of a Qdrant server.")] = None,
    collection: Annotated[str, typer.Option(help="Collection on that server.")] = "embedsmith",
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with that server's key.")] = None,
    writable: Annotated[bool, typer.Option("--writable", help="Take documents: POST /documents.")] = False,
    reranker: Annotated[str | None, typer.Option(help="Folder or hub id of a reranker.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of the machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.")] = 8080,
    keys: Annotated[Path | None, typer.Option(help="File of keys, one a line: every request has to send one.")] = None,
    key_env: Annotated[str | None, typer.Option(help="Environment variable with such a key.")] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of a run, whose report the page at / shows.")] = None,
    feedback: Annotated[
        Path | None, typer.Option(help="File of training records that marks of hits on the page are written to.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Texts that may wait; more are refused with 503.")] = 4096,
    max_body: Annotated[float, typer.Option(min=0.001, help="MB a request may have; more is refused, 413.")] = 8.0,
    max_inputs: Annotated[int, typer.Option(min=1, help="Texts a request may have.")] = 2048,
    drain: Annotated[float, typer.Option(min=1, help="Seconds to answer what was asked, once told to end.")] = 30.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the best there is by default.")] = None,
    pooling: Pooling = None,
    prompts: Prompts = None,
    max_length: MaxLength = None,
    backend: Backend = None,
) -> None:
    """Serve models over HTTP: embeddings as OpenAI's, sparse and token vectors, reranking, search.

    Example: embedsmith serve runs/mine/model --index my-index
    """
    from embedsmith.api.serving import serve
    from embedsmith.serve.limits import ServerLimits

    options = model_options(pooling, prompts, max_length, backend) | ({} if device is None else {"device": device})
    serve(
        models,
        host=host,
        port=port,
        keys_file=keys,
        key_env=key_env,
        drain=drain,
        index=index or (),
        url=url,
        collection=collection,
        api_key_env=api_key_env,
        writable=writable,
        reranker=reranker,
        run=run,
        feedback=feedback,
        limits=ServerLimits(queue=queue, body=round(max_body * 1e6), inputs=max_inputs),
        **options,
    )
