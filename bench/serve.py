"""The server under load: throughput of 64 callers, latency, a soak, kill -9 and hostile bodies.

    python -m bench.serve                     # throughput and latency, beside two peers
    python -m bench.serve --soak 10           # minutes at 80 % of what it can do: memory, lost requests
    python -m bench.serve --fuzz 2000         # malformed and hostile bodies: no 500, no traceback

MiniLM on debian-dev, one text a request, as the official client of OpenAI sends it (base64). `short`: titles of
packages; `mixed`: titles and descriptions, up to the model's 256 tokens. The same requests go to our server from 64
callers, to our server one after another, and from 64 callers to a plain loop of FastAPI around sentence-transformers,
both as `def` (in FastAPI's threads) and as `async def`. Servers are processes of their own; the callers are coroutines
of this one, which read no more of an answer than they must. Results: bench/results/serve.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from tests.serve.fuzz import fault, requests

from bench.common import RESULTS, environment, minilm, read_json, write_json
from bench.encode_speed import documents, queries

CALLERS = 64


def texts_of(kind: str, count: int) -> list[str]:
    if kind == "short":
        return [text[:60] for text in queries(count)]
    chance = random.Random(0)
    mixed = [*queries(count // 2), *(text[:1200] for text in documents(count - count // 2))]
    return chance.sample(mixed, len(mixed))


# The servers.


@contextmanager
def ours(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`embedsmith serve`, and its port."""
    with _process([sys.executable, "-m", "embedsmith", "serve", minilm(), "--port", "0", *arguments]) as made:
        yield made


@contextmanager
def peer(style: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A plain loop of FastAPI around sentence-transformers."""
    with _process([sys.executable, "-m", "bench.serve", "--peer", style]) as made:
        yield made


@contextmanager
def _process(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            sys.exit(f"{command} did not start")
        port = int(found[1])
        _drain_in_background(process)
        asyncio.run(_until_it_answers(port))
        yield process, port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _drain_in_background(process: subprocess.Popen[str]) -> None:
    import threading

    threading.Thread(target=lambda: sys.stderr.writelines(process.stderr or ()), daemon=True).start()


async def _until_it_answers(port: int) -> None:
    for _ in range(1200):
        with suppress(OSError):
            caller = await Caller.open(port)
            status, _ = await caller.ask("/v1/embeddings", body("a"))
            await caller.close()
            if status == 200:
                return
        await asyncio.sleep(0.1)
    sys.exit("the server does not answer")


class Asked(BaseModel):
    """What the plain loop takes."""

    input: str | list[str]
    model: str | None = None
    encoding_format: str = "float"


def serve_peer(style: str) -> None:
    """What many write in an afternoon."""
    import base64
    import socket

    import numpy as np
    import uvicorn
    from fastapi import FastAPI
    from sentence_transformers import SentenceTransformer

    app, model = FastAPI(), SentenceTransformer(minilm(), device="cpu")

    def embed(asked: Asked) -> dict[str, Any]:
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        rows = model.encode(texts, show_progress_bar=False)
        form = lambda row: base64.b64encode(np.asarray(row, "<f4").tobytes()).decode()
        data = [{"object": "embedding", "index": n, "embedding": form(row)} for n, row in enumerate(rows)]
        return {"object": "list", "data": data, "model": "minilm"}

    async def embed_in_loop(asked: Asked) -> dict[str, Any]:
        return embed(asked)

    app.post("/v1/embeddings")(embed if style == "def" else embed_in_loop)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


# The callers.


def body(text: str) -> bytes:
    return json.dumps({"input": text, "encoding_format": "base64"}).encode()


@dataclass
class Caller:
    """A connection that is kept."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, port: int) -> Caller:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()

    async def ask(self, path: str, content: bytes, method: str = "POST", more: str = "") -> tuple[int, bytes]:
        """Status and body of an answer."""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
        head += more or "Content-Type: application/json\r\n"
        self.writer.write(f"{head}\r\n".encode("latin-1", "replace") + content)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        status = int(answer.split(b" ", 2)[1])
        length = re.search(rb"content-length: (\d+)", answer, re.IGNORECASE)
        size = int(length[1]) if length and method != "HEAD" else 0
        return status, await self.reader.readexactly(size)


async def load(port: int, texts: Sequence[str], callers: int) -> tuple[float, list[float]]:
    """All texts, one a request: seconds in all, and of each request."""
    waiting, times = list(reversed(texts)), []

    async def call() -> None:
        caller = await Caller.open(port)
        while waiting:
            content = body(waiting.pop())
            start = time.perf_counter()
            status, _ = await caller.ask("/v1/embeddings", content)
            times.append(time.perf_counter() - start)
            assert status == 200, status
        await caller.close()

    start = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(callers)))
    return time.perf_counter() - start, times


def measured(port: int, texts: Sequence[str], callers: int) -> dict[str, float]:
    asyncio.run(load(port, texts[: max(len(texts) // 10, callers)], callers))  # warm
    seconds, times = asyncio.run(load(port, texts, callers))
    cuts = statistics.quantiles(times, n=100)
    milliseconds = {f"p{share}_ms": 1000 * cuts[share - 1] for share in (50, 95, 99)}
    return {"requests_per_second": len(texts) / seconds, **milliseconds}


def throughput(count: int, rounds: int) -> dict[str, Any]:
    """Rounds alternate between the servers, which all run."""
    found: dict[str, Any] = {}
    for kind in ("short", "mixed"):
        texts = texts_of(kind, count)
        runs: dict[str, list[dict[str, float]]] = {}
        with ours() as (_, port), peer("def") as (_, in_threads), peer("async") as (_, in_loop):
            for _ in range(rounds):
                for name, where, callers, share in (
                    ("64 callers", port, CALLERS, 1.0),
                    ("one after another", port, 1, 0.3),
                    ("sentence-transformers, def", in_threads, CALLERS, 0.3),
                    ("sentence-transformers, async def", in_loop, CALLERS, 0.3),
                ):
                    runs.setdefault(name, []).append(measured(where, texts[: int(share * count)], callers))
                    print(kind, name, {key: round(value, 1) for key, value in runs[name][-1].items()}, flush=True)
        found[kind] = medians(runs)
        print(kind, "ratios", {name: round(value, 2) for name, value in found[kind]["ratios"].items()}, flush=True)
    return {"requests": count, "rounds": rounds, **found}


def medians(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Of every figure over the rounds, and of our requests a second to each other's in the same round."""
    middle = {
        name: {key: statistics.median(run[key] for run in some) for key in some[0]} for name, some in runs.items()
    }
    rates = {name: [run["requests_per_second"] for run in some] for name, some in runs.items()}
    ours_, others = rates["64 callers"], {name: some for name, some in rates.items() if name != "64 callers"}
    pairs = {name: [mine / theirs for mine, theirs in zip(ours_, some, strict=True)] for name, some in others.items()}
    return {"median": middle, "ratios": {name: statistics.median(some) for name, some in pairs.items()}}


# A soak.


def resident(process: subprocess.Popen[str]) -> float:
    """MiB of a process."""
    lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


async def steady(port: int, texts: Sequence[str], rate: float, seconds: float, sample: Any) -> dict[str, Any]:
    """Requests at a steady rate, whether answers come or not; `sample()` now and then."""
    idle: list[Caller] = []
    counts = {"sent": 0, "answered": 0, "refused": 0, "lost": 0}
    times: list[float] = []
    samples: list[float] = []
    tasks: set[asyncio.Task[None]] = set()

    async def free() -> Caller:
        while idle:
            caller = idle.pop()
            if not caller.reader.at_eof():  # the server ends connections that were idle for long, as every client knows
                return caller
            await caller.close()
        return await Caller.open(port)

    async def one(text: str) -> None:
        start = time.perf_counter()
        try:
            caller = await free()
            status, content = await caller.ask("/v1/embeddings", body(text))
            counts["answered" if status == 200 and b'"embedding"' in content else "refused"] += 1
            times.append(time.perf_counter() - start)
            idle.append(caller)
        except (OSError, asyncio.IncompleteReadError) as error:
            counts["lost"] += 1
            print("lost:", repr(error), flush=True)

    start = time.perf_counter()
    while (now := time.perf_counter() - start) < seconds:
        for number in range(counts["sent"], int(now * rate)):
            task = asyncio.create_task(one(texts[number % len(texts)]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            counts["sent"] += 1
        if len(samples) < now / max(seconds / 60, 1.0):
            samples.append(sample())
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks)
    cuts = statistics.quantiles(times, n=100)
    third = max(len(samples) // 3, 1)
    return {
        **counts,
        "rate": rate,
        "p50_ms": 1000 * cuts[49],
        "p99_ms": 1000 * cuts[98],
        "MiB_after_warm_up": statistics.mean(samples[third : 2 * third] or samples),
        "MiB_at_the_end": statistics.mean(samples[-third:]),
        "MiB": samples,
    }


def soak(minutes: float, count: int) -> dict[str, Any]:
    texts = texts_of("mixed", count)
    with ours() as (process, port):
        full = measured(port, texts, CALLERS)["requests_per_second"]
        found = asyncio.run(steady(port, texts, 0.8 * full, 60 * minutes, lambda: resident(process)))
    print({name: value for name, value in found.items() if name != "MiB"}, flush=True)
    return {"minutes": minutes, **found}


# Hostile bodies, over a real socket.


async def fuzz(port: int, count: int, seed: int) -> dict[str, Any]:
    statuses: dict[str, int] = {}
    wrong = []
    for sent in requests(seed, count):
        headers = "".join(f"{name}: {value}\r\n" for name, value in sent.headers.items())
        path = sent.path.replace("tiny", "x")
        caller = await Caller.open(port)
        try:
            status, content = await asyncio.wait_for(caller.ask(path, sent.body, sent.method, headers), 60)
        except (OSError, asyncio.IncompleteReadError) as error:
            status, content = 0, str(error).encode()
        statuses[str(status)] = statuses.get(str(status), 0) + 1
        if status == 0 or ((status != 400 or content.startswith(b"{")) and fault(status, content, sent)):
            wrong.append({"path": path, "body": repr(sent.body[:200]), "status": status, "answer": repr(content[:200])})
        await caller.close()
    return {"requests": count, "seed": seed, "statuses": statuses, "wrong": wrong}


def hostile(count: int, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        rows = [{"id": str(n), "text": text, "lang": "en", "n": n} for n, text in enumerate(documents(50))]
        path = Path(folder) / "documents.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        command = [sys.executable, "-m", "embedsmith", "index", minilm(), str(path), "--to", str(index)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with ours("--index", str(index), "--writable") as (process, port):
            found = asyncio.run(fuzz(port, count, seed))
            assert process.poll() is None
    print(found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak", type=float, default=0, help="minutes")
    parser.add_argument("--fuzz", type=int, default=0, help="hostile bodies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", choices=["def", "async"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        serve_peer(arguments.peer)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.fuzz:
        part, result = "fuzz", hostile(arguments.fuzz, arguments.seed)
    elif arguments.soak:
        part, result = "soak", soak(arguments.soak, arguments.requests)
    else:
        part, result = "throughput", throughput(arguments.requests, arguments.rounds)
    path = RESULTS / "serve.json"
    if arguments.requests >= 2000:  # fewer are a trial
        write_json(path, read_json(path, {}) | {part: result, f"{part}_environment": environment()})
    if part == "fuzz" and result["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
