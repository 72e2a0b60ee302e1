"""What goes wrong, as clients of OpenAI read it: `{"error": {"message", "type", "param", "code"}}` and a status."""

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from embedsmith.core.errors import DataError, DeviceMemoryError, EmbedsmithError, ModelError, RecipeError
from embedsmith.core.progress import log
from embedsmith.core.settings import did_you_mean
from embedsmith.core.text_out import printable, without_secrets
from embedsmith.serve.batching import BusyError

_LONGEST = 600
"""Characters of a message: it may repeat what came."""
_LONGEST_KEY = 80


class RequestError(EmbedsmithError):
    """A request cannot be answered as it is. `param`: the key that is wrong."""

    def __init__(self, what: str, *, param: str | None = None, expected: str | None = None, fix: str | None = None):
        super().__init__(what, expected=expected, fix=fix)
        self.param = param


class UnknownModelError(RequestError):
    """No model of this name is served."""


class ClosedError(EmbedsmithError):
    """The server ends, and takes nothing more."""


class ReloadingError(EmbedsmithError):
    """Models are being loaded anew already."""


class AddressError(EmbedsmithError):
    """A server cannot listen at this address."""


@dataclass(frozen=True)
class Failure:
    """An answer that says what went wrong."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        text = printable(without_secrets(self.message))
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
        error = {"message": text, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")


def failure_of(error: BaseException) -> Failure:
    """What a client is told. What is no fault of its own request is written into the log, where it is ours with the
    traceback, which no client sees."""
    if isinstance(error, BusyError):
        return Failure(503, str(error), "server_error", code="busy", headers={"Retry-After": str(error.seconds)})
    if isinstance(error, ClosedError):
        return Failure(503, str(error), "server_error", code="closing", headers={"Retry-After": "5"})
    if isinstance(error, ReloadingError):
        return Failure(409, str(error), "server_error", code="reloading")
    if isinstance(error, UnknownModelError):
        return Failure(404, str(error), param="model", code="model_not_found")
    if isinstance(error, RequestError):
        return Failure(400, str(error), param=error.param)
    if isinstance(error, DataError | ModelError | RecipeError) and not isinstance(error, DeviceMemoryError):
        return Failure(400, str(error))
    if isinstance(error, EmbedsmithError):
        log.warning("%s", error)
        return Failure(503, str(error), "server_error", headers={"Retry-After": "5"})
    log.error("%s", without_secrets("".join(traceback.format_exception(error))))
    return Failure(500, "the server failed at this request; its log says why", "server_error")


def failure_of_body(problem: Mapping[str, Any], known: Sequence[str]) -> Failure:
    """What pydantic says of a body: the first problem. `known`: the body's keys."""
    location = [str(part) for part in problem["loc"] if part != "body"]
    param = ".".join(location)[:_LONGEST_KEY] or None
    kind = problem["type"]
    if kind == "json_invalid":
        return Failure(400, f"the body is not JSON: {problem.get('ctx', {}).get('error', problem['msg'])}")
    if kind == "extra_forbidden":
        return Failure(400, f"unknown key {param!r}{did_you_mean(str(param), known)}", param=param)
    if kind == "missing":
        return Failure(400, "the body is empty" if param is None else f"the key {param!r} is missing", param=param)
    what = problem["msg"].removeprefix("Value error, ")
    what = f"the body: {what}; is its Content-Type application/json?" if param is None else f"{param}: {what}"
    return Failure(400, what, param=param)
