"""The server itself: an address of its own, and signals that end it or load its models anew."""

import errno
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from embedsmith.core.errors import EmbedsmithError
from embedsmith.core.progress import log
from embedsmith.serve.failures import AddressError
from embedsmith.serve.service import Service


def bind(host: str, port: int) -> socket.socket:
    """The address, taken before anything is loaded. Nobody can connect yet: whoever tries is told so at once.

    Errors: `AddressError` for a port in use, one that asks for more rights, and a host that is none of this machine.
    """
    where = f"{host}:{port}"
    if not 0 <= port < 2**16:
        raise AddressError(f"the port is {port}", expected="from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise AddressError(
            f"no such address ({error})", where=where, expected="such as 127.0.0.1 or 0.0.0.0"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.set_inheritable(False)
    except OSError as error:
        listener.close()
        raise _taken(error, where, port) from error
    return listener


def _taken(error: OSError, where: str, port: int) -> AddressError:
    if error.errno == errno.EADDRINUSE:
        return AddressError(
            "this port is in use", where=where, fix=f"take another, --port {port + 1}, or end the program that has it"
        )
    if error.errno == errno.EACCES:
        return AddressError(
            "this port is not yours to take", where=where, fix="take one above 1023, such as --port 8080"
        )
    return AddressError(
        f"cannot listen here ({error.strerror})", where=where, expected="an address of this machine, such as 127.0.0.1"
    )


def listen(app: FastAPI, service: Service, listener: socket.socket, drain: float) -> None:
    """Serve until TERM or INT: nothing new is taken then, and what was asked is answered, for `drain` seconds at most.
    HUP loads the models anew."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(round(drain), 1),
        timeout_keep_alive=75,
    )
    host, port = listener.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    log.info("serving %s at http://%s:%d (process %d)", ", ".join(service.models), name, port, os.getpid())
    with _signals(service):
        uvicorn.Server(config).run(sockets=[listener])
    log.info("ended")


@contextmanager
def _signals(service: Service) -> Iterator[None]:
    """uvicorn ends at TERM and INT, and then sends them again, which should change nothing more."""

    def load_anew(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=reload, name="reload").start()

    def reload() -> None:
        try:
            service.reload()
        except EmbedsmithError as error:
            log.error("not loaded anew, the models before are still served: %s", error)
        except Exception:  # noqa: BLE001  (the server goes on)
            log.exception("not loaded anew, the models before are still served")

    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, load_anew)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
