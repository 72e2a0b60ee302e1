"""The endpoints: a service as an application of FastAPI."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from embedsmith.core.errors import EmbedsmithError
from embedsmith.index import Document
from embedsmith.serve import answers
from embedsmith.serve.bodies import (
    Body,
    DeletionBody,
    DocumentsBody,
    EmbeddingsBody,
    HeadBody,
    ReloadBody,
    RerankBody,
    SearchBody,
)
from embedsmith.serve.explorer import Explorer, router
from embedsmith.serve.failures import Failure, RequestError, UnknownModelError, failure_of, failure_of_body
from embedsmith.serve.gate import Gate, Keys
from embedsmith.serve.manual import manual
from embedsmith.serve.model import Encoded, Model, Text
from embedsmith.serve.served_index import Question
from embedsmith.serve.service import Service

_ABOUT = "Embeddings, reranking and search, in the shapes of OpenAI, Cohere and TEI."
_LARGE = 16
"""Texts whose answer is written in a thread, so that others need not wait for it."""


def http_app(service: Service, keys: Sequence[str] = (), explorer: Explorer | None = None) -> FastAPI:
    """All endpoints of a service. With `keys` every request but those of `gate.OPEN` has to send one of them.
    `explorer`: what the page at `/` may read and write."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(
        title="embedsmith",
        version=version("embedsmith"),
        description=_ABOUT,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(Gate, keys=Keys(keys), body=service.limits.body, metrics=service.metrics)
    _add_failures(app)
    _add_encoding(app, service)
    _add_search(app, service)
    _add_documents(app, service)
    _add_house(app, service)
    app.include_router(router(service, explorer))
    app.openapi = lambda: described(app)  # type: ignore[method-assign]
    return app


def described(app: FastAPI) -> dict[str, Any]:
    """The description of the API, with the failures that there are instead of those that FastAPI takes for given."""
    made = FastAPI.openapi(app)
    for operation in (one for methods in made["paths"].values() for one in methods.values()):
        if operation["responses"].pop("422", None):
            operation["responses"]["4XX"] = {"description": "What is wrong, in OpenAI's shape of an error."}
    for name in ("HTTPValidationError", "ValidationError"):
        made.get("components", {}).get("schemas", {}).pop(name, None)
    return made


def _add_failures(app: FastAPI) -> None:
    """Every error, in OpenAI's shape."""

    async def of_body(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        field = getattr(request.scope.get("route"), "body_field", None)
        kind = None if field is None else field.field_info.annotation
        known = list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, Body) else []
        return _told(failure_of_body(error.errors()[0], known))

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = (
            f"{error.detail}: {request.method} {request.url.path}" if error.status_code in (404, 405) else error.detail
        )
        return _told(Failure(error.status_code, str(what), headers=dict(error.headers or {})))

    async def of_any(request: Request, error: Exception) -> Response:
        return _told(failure_of(error))

    app.add_exception_handler(RequestValidationError, of_body)
    app.add_exception_handler(HTTPException, of_http)
    for kind in (EmbedsmithError, Exception):
        app.add_exception_handler(kind, of_any)


def _told(failure: Failure) -> Response:
    return Response(failure.body(), failure.status, dict(failure.headers), "application/json")


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


def _add_encoding(app: FastAPI, service: Service) -> None:
    """Texts to vectors."""

    async def made(asked: EmbeddingsBody | HeadBody, head: str, write: Callable[[Model, Encoded], bytes]) -> Response:
        texts: list[Text] = asked.input
        _check_count(texts, service.limits.inputs)
        model, encoded = await service.encode(texts, asked.input_type, (head,), asked.model)
        if len(texts) < _LARGE:
            return _json(write(model, encoded))
        return _json(await run_in_threadpool(write, model, encoded))

    @app.post("/v1/embeddings", tags=["encode"])
    async def embeddings(asked: EmbeddingsBody) -> Response:
        """One vector a text, as OpenAI's endpoint of this name."""
        base_64 = asked.encoding_format == "base64"
        service.model(asked.model).check_width(asked.dimensions)
        return await made(
            asked, "dense", lambda model, found: answers.embeddings(model, found, asked.dimensions, base_64)
        )

    @app.post("/v1/sparse", tags=["encode"])
    async def sparse(asked: HeadBody) -> Response:
        """Weights of vocabulary entries, of a model with a sparse head."""
        return await made(asked, "sparse", answers.sparse)

    @app.post("/v1/multivector", tags=["encode"])
    async def multivector(asked: HeadBody) -> Response:
        """A vector a token, of a model with a multi-vector head."""
        return await made(asked, "multivector", answers.multivector)


def _check_count(texts: Sequence[Any], most: int, param: str = "input") -> None:
    if len(texts) > most:
        raise RequestError(f"{len(texts):,} texts in one request", param=param, expected=f"at most {most:,}")


def _add_search(app: FastAPI, service: Service) -> None:
    """Queries with documents."""

    @app.post("/rerank", tags=["search"])
    @app.post("/v1/rerank", tags=["search"], include_in_schema=False)
    @app.post("/v2/rerank", tags=["search"], include_in_schema=False)
    async def rerank(asked: RerankBody) -> Response:
        """How well documents answer a query, in Cohere's shape (`documents`) or TEI's (`texts`)."""
        if (asked.documents is None) == (asked.texts is None):
            raise RequestError("send documents (Cohere's shape) or texts (TEI's)", param="documents")
        if asked.model is not None and service.reranker is not None and asked.model != service.reranker.name:
            raise UnknownModelError(f"no reranker {asked.model!r} is served here", expected=service.reranker.name)
        texts: list[str] = asked.documents if asked.texts is None else asked.texts  # type: ignore[assignment]
        _check_count(texts, service.limits.inputs, "documents" if asked.texts is None else "texts")
        made = await service.rerank(asked.query, texts)
        scores = (made.score_N if asked.raw_scores else made.relevance_N).tolist()
        if asked.texts is not None:
            return _json(answers.reranked_tei(scores, texts, asked.return_text))
        assert service.reranker is not None
        return _json(answers.reranked_cohere(service.reranker.name, scores, texts, asked.top_n, asked.return_documents))

    @app.post("/search", tags=["search"])
    async def search(asked: SearchBody) -> Response:
        """The best documents of the index, with the score of every head, and with `explain` the tokens that matched."""
        if asked.k > service.limits.hits:
            raise RequestError(f"k is {asked.k}", param="k", expected=f"at most {service.limits.hits}")
        question = Question(**{**asked.model_dump(exclude={"model"}), "filter": asked.filter or {}})
        name, found = await service.search(question, asked.model)
        return _json(answers.hits(name, found))


def _add_documents(app: FastAPI, service: Service) -> None:
    """What is looked for; taken where the server was started with an index that may be written."""

    @app.post("/documents", tags=["documents"])
    async def documents(asked: DocumentsBody) -> Response:
        """Write documents into the index. They are on the disk when the answer comes."""
        _check_count(asked.documents, service.limits.inputs, "documents")
        given = [Document(one.id, one.text, one.fields) for one in asked.documents]
        name, written, size = await service.add(given, asked.model)
        return _json(answers.as_json({"model": name, **asdict(written), "size": size}))

    @app.post("/documents/delete", tags=["documents"])
    async def delete(asked: DeletionBody) -> Response:
        """Delete documents by their ids."""
        _check_count(asked.ids, service.limits.inputs, "ids")
        name, size = await service.delete(asked.ids, asked.model)
        return _json(answers.as_json({"model": name, "size": size}))


def _add_house(app: FastAPI, service: Service) -> None:
    """What is served, how it is, and what it may be told."""
    started = int(time.time())

    def about(model: Model) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": started,
            "owned_by": "embedsmith",
            "heads": list(model.heads),
            "dimension": model.dimension,
            "max_length": model.max_length,
            "indexed": model.name in service.indexes,
        }

    @app.get("/v1/models", tags=["server"])
    async def models() -> Response:
        """The models that are served."""
        data = [about(model) for model in service.models.values()]
        return _json(answers.as_json({"object": "list", "data": data}))

    @app.get("/v1/models/{name:path}", tags=["server"])
    async def one_model(name: str) -> Response:
        """One of them."""
        return _json(answers.as_json(about(service.model(name))))

    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["server"])
    async def health() -> Response:
        """200 while requests are taken, 503 when the server ends."""
        return Response(
            answers.as_json({"status": "ends" if service.draining else "ok"}),
            503 if service.draining else 200,
            media_type="application/json",
        )

    @app.get("/metrics", tags=["server"])
    async def metrics() -> Response:
        """Counters for Prometheus."""
        waiting = {name: model.batcher.waiting for name, model in service.models.items()}
        return Response(service.metrics.page(waiting), headers={"Content-Type": service.metrics.content_type})

    @app.post("/admin/reload", tags=["server"])
    async def reload(asked: ReloadBody) -> Response:
        """Load models anew from their folders, with the indexes and the reranker; nobody's request is dropped."""
        loaded = await run_in_threadpool(service.reload, asked.models or ())
        return _json(answers.as_json({"reloaded": loaded}))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(manual(app.openapi()))
