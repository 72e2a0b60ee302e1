"""What stands before every endpoint: who may enter, how much may be sent, and what is counted."""

import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from ipaddress import ip_address
from typing import Any

from starlette.exceptions import HTTPException

from embedsmith.core.text_out import remember_secret
from embedsmith.serve.counters import Metrics
from embedsmith.serve.failures import Failure

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

OPEN = ("/", "/health", "/favicon.ico")
OPEN_BELOW = "/explorer/static/"
"""What needs no key: the page itself, which asks for it, and what a load balancer asks."""


class Keys:
    """The keys that open a server. Compared in constant time, by their hashes; shown nowhere."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._hashes = [_hash(remember_secret(key)) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def opened_by(self, key: str) -> bool:
        given = _hash(key)
        found = False
        for known in self._hashes:  # all of them: which one fits takes no shorter
            found |= hmac.compare_digest(known, given)
        return found


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _named_locally(host: str) -> bool:
    """Whether the name that the caller knows the server by is no name of the web, which may point here without leave
    (DNS rebinding)."""
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    if name in ("", "localhost") or name.endswith(".localhost"):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


class Gate:
    """An application behind keys, with bodies of at most `body` bytes."""

    def __init__(self, app: App, *, keys: Keys, body: int, metrics: Metrics) -> None:
        self._app, self._keys, self._body, self._metrics = app, keys, body, metrics

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 499  # nobody waited for the answer

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            failure = self._turned_away(scope)
            if failure is not None:
                await answer(failure, counted)
                return
            await self._app(scope, self._bounded(receive), counted)
        finally:
            route = scope.get("route")
            endpoint = getattr(route, "path", None) or "other"
            self._metrics.request(endpoint, status, time.monotonic() - start)

    def _turned_away(self, scope: Any) -> Failure | None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["path"]
        server = scope.get("server")
        arrived_locally = bool(server) and server[0] in ("127.0.0.1", "::1")
        if not self._keys and arrived_locally and not _named_locally(headers.get(b"host", "")):
            return Failure(
                403,
                "a server without keys on this machine's own address answers to localhost alone; start it with --keys, "
                "or let the proxy send Host: localhost",
                "permission_error",
                code="host",
            )
        if self._keys and path not in OPEN and not path.startswith(OPEN_BELOW):
            scheme, _, key = headers.get(b"authorization", "").partition(" ")
            given = key.strip() if scheme.lower() == "bearer" else headers.get(b"x-api-key", "")
            if not given or not self._keys.opened_by(given):
                what = "the key is wrong" if given else "this server asks for a key"
                return Failure(
                    401,
                    f"{what}; send it as Authorization: Bearer KEY",
                    "authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", "0")
        return self._too_long() if length.isdecimal() and int(length[:20]) > self._body else None

    def _too_long(self) -> Failure:
        what = f"the body is longer than {self._body:,} bytes; send fewer or shorter texts"
        return Failure(413, what, headers={"Connection": "close"})

    def _bounded(self, receive: Receive) -> Receive:
        """Counts what arrives, whatever the header said."""
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._body:
                failure = self._too_long()
                raise HTTPException(failure.status, failure.message, dict(failure.headers))
            return message

        return bounded


async def answer(failure: Failure, send: Send) -> None:
    body = failure.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **failure.headers}
    pairs = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": failure.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
