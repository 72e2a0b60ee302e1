"""The page at `/`: its files, and what it asks for beside the endpoints that everybody uses.

Everything that the page shows is sent as plain values, and the page makes texts of them; its content security policy
forbids it to run, load or send anything but what this server gives, and the browser to make markup of a text.
"""

import hashlib
import threading
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from embedsmith.core.errors import EmbedsmithError, EvaluationError
from embedsmith.index import HybridIndex
from embedsmith.report import run_facts
from embedsmith.search.hybrid import M3_WEIGHTS
from embedsmith.serve.answers import as_json
from embedsmith.serve.atlas import Atlas
from embedsmith.serve.bodies import Body, OneText
from embedsmith.serve.failures import RequestError, UnknownModelError
from embedsmith.serve.feedback import FeedbackFile
from embedsmith.serve.service import Service

_STATIC = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_QUERY = 4000
_MARKS = 200


@dataclass(frozen=True)
class Explorer:
    """What the page may read and write beside the models. `run`: the folder of a run, for its report. `feedback`: the
    file that marks are written to; without one, none are taken.

    Errors: `EvaluationError` for a run that is no folder; those of `FeedbackFile.check`.
    """

    run: Path | None = None
    feedback: Path | None = None

    def __post_init__(self) -> None:
        if self.run is not None and not self.run.is_dir():
            raise EvaluationError("there is no such folder", where=self.run, expected="the output of a run or a merge")
        if self.feedback is not None:
            FeedbackFile(self.feedback).check()


class Mark(Body):
    """1 for an answer, -1 for none, 0 to take the mark back."""

    id: Annotated[str, Field(max_length=_QUERY)]
    vote: Annotated[int, Field(ge=-1, le=1)]


class FeedbackBody(Body):
    """Marks of hits of one question."""

    query: Annotated[OneText, Field(max_length=_QUERY)]
    marks: Annotated[list[Mark], Field(min_length=1, max_length=_MARKS)]
    model: str | None = None


def router(service: Service, explorer: Explorer | None = None) -> APIRouter:
    """The page and its own endpoints. They are no part of the API that others are promised."""
    explorer = explorer or Explorer()
    made = APIRouter(include_in_schema=False)
    _add_files(made)
    _add_facts(made, service, explorer)
    _add_feedback(made, service, explorer)
    return made


def _add_files(made: APIRouter) -> None:
    """Each file has a route of its own, so that no path can lead to another."""
    for file in sorted(_STATIC.iterdir()):
        kind, content = _TYPES[file.suffix], file.read_bytes()
        tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
        headers = {**_HEADERS, "ETag": tag}

        def answer(request: Request, content: bytes = content, kind: str = kind, headers: Any = headers) -> Response:
            if request.headers.get("if-none-match") == headers["ETag"]:
                return Response(status_code=304, headers=headers)
            return Response(content, media_type=kind, headers=headers)

        path = "/" if file.name == "index.html" else f"/explorer/static/{file.name}"
        made.add_api_route(path, answer, methods=["GET", "HEAD"], response_model=None)


def _add_facts(made: APIRouter, service: Service, explorer: Explorer) -> None:
    atlas, report = Atlas(), _Report(explorer.run)

    @made.get("/explorer/about")
    def about() -> Response:
        indexes = service.indexes
        first = next(iter(indexes), None)
        models: list[dict[str, Any]] = []
        for name, index in indexes.items():
            weights = {head: M3_WEIGHTS.get(head, 1.0) for head in index.heads}
            models.append({"name": name, "heads": list(index.heads), "weights": weights})
        facts = {
            "version": version("embedsmith"),
            "models": models,
            "index": None if first is None else {**models[0], "model": first, "documents": len(indexes[first])},
            "reranker": service.reranker is not None,
            "feedback": None if explorer.feedback is None else explorer.feedback.name,
            "run": explorer.run is not None,
        }
        return _json(facts)

    @made.get("/explorer/map")
    def map_of_index(method: str = "pca", model: str | None = None) -> Response:
        return _json(atlas.map(*_index(service, model), method))

    @made.get("/explorer/report")
    def report_of_run() -> Response:
        return _json(report.facts())


def _add_feedback(made: APIRouter, service: Service, explorer: Explorer) -> None:
    file = None if explorer.feedback is None else FeedbackFile(explorer.feedback)

    @made.post("/explorer/feedback")
    def feedback(request: Request, body: FeedbackBody) -> Response:
        _refuse_other_pages(request)
        if file is None:
            raise RequestError("this server takes no marks", fix="start it with --feedback feedback.jsonl")
        query = body.query.strip()
        if not query:
            raise RequestError("the question is empty", param="query")
        _, index = _index(service, body.model)
        texts = index.texts([mark.id for mark in body.marks])
        missing = [mark.id for mark in body.marks if mark.id not in texts]
        if missing:
            raise RequestError(f"no document {missing[0][:80]!r} is in the index", param="marks")
        saved, records = file.mark(query, {texts[mark.id]: mark.vote for mark in body.marks})
        return _json({"saved": saved, "records": records, "file": file.path.name})


def _refuse_other_pages(request: Request) -> None:
    """A page of another site could make a browser send marks here; what it sends says so. Errors: `RequestError`."""
    plain = request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"
    if not plain or request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise RequestError("marks are taken from this server's own page, as application/json")


def _index(service: Service, model: str | None) -> tuple[str, HybridIndex]:
    """That of a model, or the first, with the model's name. Errors: `RequestError` for a server without an index,
    `UnknownModelError` for a model without one."""
    indexes = service.indexes
    if not indexes:
        raise RequestError("this server has no index", fix="start it with one: embedsmith serve MODEL --index FOLDER")
    if model is None:
        return next(iter(indexes.items()))
    if model not in indexes:
        raise UnknownModelError(f"the model {model[:80]!r} has no index here", expected=f"one of {', '.join(indexes)}")
    return model, indexes[model]


class _Report:
    """The run's report, read anew when one of its files has changed: a run may still be going."""

    def __init__(self, run: Path | None) -> None:
        self._run = run
        self._stamp: Any = None
        self._facts: dict[str, Any] = {}
        self._lock = threading.Lock()

    def facts(self) -> dict[str, Any]:
        """Errors: `RequestError` without a run, or where it has nothing to tell."""
        if self._run is None:
            raise RequestError("no run was given", fix="start the server with one: embedsmith serve MODEL --run FOLDER")
        with self._lock:
            files = [file for folder in (self._run, self._run / "evaluation") for file in folder.glob("*.json*")]
            stamp = sorted((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
            if stamp != self._stamp:
                try:
                    self._facts = run_facts(self._run)
                except EmbedsmithError as error:
                    raise RequestError(str(error)) from error
                self._stamp = stamp
            return self._facts


def _json(value: Any) -> Response:
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return Response(as_json(value), media_type="application/json", headers=headers)
