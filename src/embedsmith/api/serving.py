"""Models over HTTP: `serve` runs the server, `application` is what it runs, for tests and for other servers."""

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedsmith.core.encoder import Encoder, Reranker
from embedsmith.core.errors import EmbedsmithError, MissingExtraError, RecipeError
from embedsmith.core.inputs import local_path, read_text
from embedsmith.core.keys import checked_variable, key_from
from embedsmith.core.progress import lines_shown, log
from embedsmith.index import Store
from embedsmith.index.commands import Place
from embedsmith.models import CrossEncoder, load, load_reranker
from embedsmith.serve.limits import ServerLimits

Models = str | Path | Encoder | Sequence[str | Path | Encoder] | Mapping[str, str | Path | Encoder]
Folders = str | Path | Sequence[str | Path]


def application(
    models: Models,
    *,
    index: Folders = (),
    url: str | None = None,
    collection: str = "embedsmith",
    api_key_env: str | None = None,
    writable: bool = False,
    reranker: str | Path | Reranker | None = None,
    keys: Sequence[str] = (),
    run: str | Path | None = None,
    feedback: str | Path | None = None,
    limits: ServerLimits | None = None,
    **options: Any,
) -> Any:
    """The server's application (of FastAPI), to be called by a test or by a server of your own.

    >>> import embedsmith as es
    >>> from fastapi.testclient import TestClient
    >>> client = TestClient(es.application("my-model"))
    >>> answer = client.post("/v1/embeddings", json={"input": "a cat on the mat"}).json()
    >>> len(answer["data"])
    1

    `models`: a folder, a hub id or a model that is loaded; several of them; or a dict that names each. `index`: folders
    of indexes that these models made; or `url`, `collection` and `api_key_env` of a Qdrant server. `writable`: take
    documents into them, or into new ones; a folder is then open to no other process. `reranker`: a folder, a hub id or
    one that is loaded. `keys`: one of them has to come with every request. `run`: the folder of a run, whose report the
    page at `/` shows. `feedback`: a file of training records that marks of hits made there are written to. `options`:
    of `es.load`.
    Errors: those of loading, and `SearchError` for an index that none of the models made.
    """
    with _extra():
        from embedsmith.serve.app import http_app as made
        from embedsmith.serve.explorer import Explorer
        from embedsmith.serve.service import Service, Sources

    explorer = Explorer(*(None if path is None else local_path(path) for path in (run, feedback)))
    place = Place(url=url, collection=collection, api_key=key_from(checked_variable(api_key_env, "api_key_env")))
    stores: list[Callable[[], Store]] = [
        _folder_opener(folder, not writable) for folder in ([index] if isinstance(index, str | Path) else index)
    ]
    if url is not None:
        stores.append(place.open)
    named, open_reranker = reranker_named(reranker)
    loaders = {name: _loader(model, options) for name, model in named_models(models).items()}
    sources = Sources(loaders, stores, open_reranker, named, writable)
    with lines_shown():
        service = Service(sources, limits)
    app = made(service, keys, explorer)
    app.state.service = service
    return app


def serve(
    models: Models,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    keys_file: str | Path | None = None,
    key_env: str | None = None,
    drain: float = 30.0,
    **settings: Any,
) -> None:
    """Serve models over HTTP, until the process is told to end (TERM, or Ctrl-C).

    >>> import embedsmith as es
    >>> es.serve("my-model", port=-1)
    Traceback (most recent call last):
    embedsmith.serve.failures.AddressError: the port is -1
      expected: from 0 to 65535

    `host`, `port`: where. `keys_file`: a key a line; or `key_env`, the name of an environment variable with one.
    Without both, everybody who reaches the server may use it. `drain`: seconds to answer what was asked before the end.
    `settings`: of `es.application`. Errors: those of `es.application`, and `AddressError` for a port in use.
    """
    with _extra():
        from embedsmith.serve.listener import bind, listen

    listener = bind(host, port)
    try:
        keys = [*settings.pop("keys", ()), *read_keys(keys_file, key_env)]
        with lines_shown():
            if not keys and host not in ("127.0.0.1", "localhost", "::1"):
                log.warning("no keys: everybody who reaches %s can use this server (--keys FILE)", host)
            app = application(models, keys=keys, **settings)
            listen(app, app.state.service, listener, drain)
    finally:
        listener.close()


def read_keys(file: str | Path | None, variable: str | None) -> list[str]:
    """The keys in a file, one a line, and in an environment variable.

    Errors: `RecipeError` for a file without a key, and a key of fewer than 16 signs or with others than ASCII.
    """
    found: list[str] = []
    if file is not None:
        lines = (line.strip() for line in read_text(file, RecipeError).splitlines())
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise RecipeError("no key in this file", where=file, expected="a key a line")
    key = key_from(checked_variable(variable, "--key-env"))
    found += [] if key is None else [key]
    for number, one in enumerate(found):
        if len(one) < 16 or not one.isascii() or not one.isprintable() or " " in one:
            raise RecipeError(
                f"key {number + 1} is too short, or holds other signs than letters, digits and marks",
                where=file,
                expected="16 signs of ASCII or more, without spaces",
                fix="make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
            )
    return found


def named_models(models: Models) -> dict[str, Any]:
    """Each model under its name: as given (`NAME=FOLDER`, or a dict), else the folder's, where that is `model` the one
    above it; a hub id is its own name. Errors: `RecipeError` for a name that comes twice."""
    if isinstance(models, Mapping):
        return dict(models)
    found: dict[str, Any] = {}
    several = models if isinstance(models, list | tuple) else [models]
    for number, one in enumerate(several):
        name, model = _named(one) if isinstance(one, str | Path) else (f"model-{number}" if number else "model", one)
        if name in found:
            raise RecipeError(f"two models are called {name!r}", fix=f"name one of them: NAME={model}")
        found[name] = model
    return found


def _named(given: str | Path) -> tuple[str, str]:
    text = str(given)
    name, equals, path = text.partition("=")
    if equals and name and path and not os.path.exists(text):
        return name, path
    if not os.path.exists(text):
        return text, text  # a hub id, or what `load` says of it
    parts = [part for part in Path(text).absolute().parts if part != os.sep]
    return (parts[-2] if parts[-1] == "model" and len(parts) > 1 else parts[-1]), text


def _loader(model: Any, options: Mapping[str, Any]) -> Callable[[], Encoder]:
    if not isinstance(model, str | Path):
        if options:
            raise RecipeError(f"{next(iter(options))} of a model that is loaded", fix="give it to es.load(FOLDER, ...)")
        return lambda: model
    return lambda: load(str(model), **options)


def _folder_opener(folder: str | Path, read_only: bool) -> Callable[[], Store]:
    return lambda: Place(local_path(folder)).open(read_only=read_only)


def reranker_named(reranker: Any) -> tuple[str, Callable[[], Reranker] | None]:
    """A reranker's name, and how to get it: its scores as they are before the activation that its folder names, since
    the server answers with relevance from 0 to 1."""
    if reranker is None:
        return "", None
    if not isinstance(reranker, str | Path):
        return "reranker", lambda: _as_logits(reranker)
    name, path = _named(reranker)
    return name, lambda: _as_logits(load_reranker(path))


def _as_logits(reranker: Reranker) -> Reranker:
    if not isinstance(reranker, CrossEncoder):
        return reranker
    twin = copy.copy(reranker)  # the weights are shared
    twin.settings = dataclasses.replace(reranker.settings, activation="torch.nn.Identity")
    return twin


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except EmbedsmithError:
        raise
    except ImportError as error:
        raise MissingExtraError(error.name or "fastapi", "serve") from error
