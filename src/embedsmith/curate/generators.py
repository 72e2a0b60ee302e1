"""Any server that speaks OpenAI's chat completions: hosted, or vLLM, llama.cpp, Ollama and others on your machines."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsmith.core.errors import EmbedsmithError, MissingExtraError, ModelError, RecipeError
from embedsmith.core.seeds import derive_seed
from embedsmith.core.shelf import generators
from embedsmith.curate.ask import Accept, Answer, Refusal, Spending

if TYPE_CHECKING:
    import requests


_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_WRONG_SETUP = (401, 402, 403, 404, 405)
_LONGEST_PAUSE = 60.0


class EndpointError(EmbedsmithError):
    """The endpoint cannot be used, or does not answer any more. Answers so far are kept."""


@generators.register("endpoint", formula="POST {base_url}/chat/completions")
@dataclass(frozen=True)
class Endpoint:
    """A language model behind an OpenAI-compatible HTTP endpoint.

    `base_url` as the server's documentation gives it, usually ending in /v1. `key_env` names the environment variable
    with the key; the key itself is never written anywhere. Busy and failing servers (429, 5xx, broken connections,
    answers that are not what was asked for) are tried again `retries` times, waiting `backoff` seconds, then twice as
    long each time, or as long as the server asks. `parallel` requests are under way at once, at most
    `requests_per_minute` start. `max_requests` and `max_cost` bound the whole step, runs before a stop included: a
    request that could exceed them is not sent, its record leaves with the reason, and raising the limit later continues
    from there. `price_in` and `price_out` are per million tokens, in the currency of `max_cost`. `extra` goes into the
    request as it is (`{seed: 1}`, `{chat_template_kwargs: ...}`).

    Errors: `EndpointError` when the server refuses the key, the model or the address, or stays silent.
    """

    base_url: str
    model: str
    key_env: str | None = None
    max_tokens: int = 256
    temperature: float = 0.7
    system: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    parallel: int = 4
    retries: int = 6
    backoff: float = 1.0
    timeout: float = 120.0
    requests_per_minute: float | None = None
    max_requests: int | None = None
    max_cost: float | None = None
    price_in: float | None = None
    price_out: float | None = None

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise RecipeError(f"base_url is {self.base_url!r}", expected="an address such as http://localhost:8000/v1")
        if self.max_cost is not None and (self.price_in is None or self.price_out is None):
            raise RecipeError("max_cost needs price_in and price_out", expected="prices per million tokens")
        for name in ("max_tokens", "parallel", "timeout", "requests_per_minute"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise RecipeError(f"{name} is {value}", expected="a number above 0")
        for name in ("retries", "backoff", "temperature", "max_requests", "max_cost", "price_in", "price_out"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise RecipeError(f"{name} is {value}", expected="a number of 0 or more")

    @property
    def window(self) -> int:
        return 16 * self.parallel

    def identity(self) -> object:
        """Not how fast or how much is asked, only what an answer depends on."""
        return [self.base_url, self.model, self.max_tokens, self.temperature, self.system, self.extra]

    def answers(
        self, prompts: Sequence[str], accept: Accept, spent: Spending
    ) -> Iterator[tuple[int, Answer | Refusal]]:
        if not prompts:
            return
        line = _Line(self, Budget(self, spent), _Key(self.key_env))
        with ThreadPoolExecutor(self.parallel) as pool:
            places = {pool.submit(line.ask, prompt, accept): place for place, prompt in enumerate(prompts)}
            yield from _collect(places, line)

    def request(self, prompt: str) -> dict[str, Any]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*system, {"role": "user", "content": prompt}]
        body = {"model": self.model, "messages": messages, "max_tokens": self.max_tokens}
        return {**body, "temperature": self.temperature, **self.extra}

    def price(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * (self.price_in or 0.0) + tokens_out * (self.price_out or 0.0)) / 1e6


def _collect(places: dict[Future[Answer | Refusal], int], line: _Line) -> Iterator[tuple[int, Answer | Refusal]]:
    """Answers as they come. After an error nothing more is sent, but what is under way is waited for: it is paid."""
    failed: EndpointError | None = None
    try:
        for future in as_completed(places):
            if future.cancelled():
                continue
            error = future.exception()
            if error is None:
                yield places[future], future.result()
            elif isinstance(error, EndpointError):
                failed = failed or error
                for other in places:
                    other.cancel()
            else:
                raise error
    finally:
        line.stopped.set()
        for other in places:
            other.cancel()
    if failed is not None:
        raise failed


@dataclass
class Budget:
    """What may still be sent. A request reserves the most it can cost, and gives back the rest."""

    settings: Endpoint
    spent: Spending
    lock: threading.Lock = field(default_factory=threading.Lock)
    requests: int = 0
    cost: float = 0.0

    def __post_init__(self) -> None:
        self.requests, self.cost = self.spent.requests, self.spent.cost

    def reserve(self, cost: float) -> bool:
        limits = self.settings
        with self.lock:
            if limits.max_requests is not None and self.requests >= limits.max_requests:
                return False
            if limits.max_cost is not None and self.cost + cost > limits.max_cost:
                return False
            self.requests += 1
            self.cost += cost
            return True

    def settle(self, reserved: float, cost: float) -> None:
        with self.lock:
            self.cost += cost - reserved


@dataclass
class _Line:
    """One window of requests: who may send when, and what comes back."""

    settings: Endpoint
    budget: Budget
    key: _Key
    stopped: threading.Event = field(default_factory=threading.Event)

    def ask(self, prompt: str, accept: Accept) -> Answer | Refusal:
        """One prompt, as often as needed. An error stops the other requests too. Errors: `EndpointError`."""
        try:
            return self._ask(prompt, accept)
        except EndpointError:
            self.stopped.set()
            raise

    def _ask(self, prompt: str, accept: Accept) -> Answer | Refusal:
        body = self.settings.request(prompt)
        most_in = (
            sum(len(message["content"].encode()) for message in body["messages"]) + 64
        )  # a token has a byte or more
        reserved = self.settings.price(most_in, self.settings.max_tokens)
        total, trouble, unusable = Spending(), "", 0
        for attempt in range(self.settings.retries + 1):
            if self.stopped.is_set() or not _PACER.wait(self.settings, self.stopped):
                return Refusal("stopped")
            if not self.budget.reserve(reserved):
                return Refusal("the budget is used up")
            outcome = self._send(body)
            answer = outcome if isinstance(outcome, Answer) else Answer("")
            self.budget.settle(reserved, answer.cost)
            total.add(replace(answer, requests=1))
            if isinstance(outcome, Refusal):
                return outcome
            if isinstance(outcome, _Trouble):
                trouble = outcome.what
                self._pause(attempt, outcome.wait)
                continue
            usable = accept(answer.text)
            unusable += not usable
            if usable or unusable >= self._patience():
                return Answer(answer.text, usable, **vars(total))
        raise EndpointError(
            f"no answer after {self.settings.retries + 1} tries; the last: {trouble or 'nothing usable'}",
            where=self.settings.base_url,
            fix="see whether the server runs; then run the same command again: what it answered so far is kept",
        )

    def _patience(self) -> int:
        """How many useless answers to one prompt are enough: without chance in it, the next would be the same."""
        return 1 if self.settings.temperature == 0 else 3

    def _pause(self, attempt: int, wait: float) -> None:
        longest = min(self.settings.backoff * 2**attempt, _LONGEST_PAUSE)
        self.stopped.wait(max(wait, longest * random.uniform(0.5, 1.0)))

    def _send(self, body: dict[str, Any]) -> Answer | Refusal | _Trouble:
        requests = _requests()
        address = self.settings.base_url.rstrip("/") + "/chat/completions"
        try:
            response = requests.post(address, json=body, auth=self.key, timeout=self.settings.timeout)
        except requests.RequestException as error:
            return _Trouble(f"{type(error).__name__}: {error}")
        said = f"{response.status_code} {response.reason}: {response.text[:200]}"
        if response.status_code in _WRONG_SETUP:
            raise EndpointError(
                f"the server refuses: {said}",
                where=address,
                fix="check base_url, model and key_env",
            )
        if response.status_code in _AGAIN:
            return _Trouble(said, _retry_after(response.headers.get("Retry-After")))
        if not response.ok:
            return Refusal(f"the endpoint refused it ({response.status_code})")
        return self._read(response, body)

    def _read(self, response: requests.Response, body: dict[str, Any]) -> Answer | _Trouble:
        """The answer's text and usage. A cut answer loses its last line, which may be half a sentence."""
        try:
            value = response.json()
            choice = value["choices"][0]
            text = choice["message"]["content"]
            usage = value.get("usage")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return _Trouble(f"not a chat completion: {response.text[:200]}")
        text = text if isinstance(text, str) else ""  # null where a filter or a tool stepped in
        characters = sum(len(message["content"]) for message in body["messages"])
        tokens_in = _count(usage, "prompt_tokens", characters // 2)
        tokens_out = _count(usage, "completion_tokens", len(text) // 2)
        if choice.get("finish_reason") == "length":
            text = text.rpartition("\n")[0] or text
        return Answer(text, True, 0, tokens_in, tokens_out, self.settings.price(tokens_in, tokens_out))


def _requests() -> Any:
    try:
        import requests
    except ImportError as error:
        raise MissingExtraError("requests", "curate") from error
    return requests


@dataclass(frozen=True)
class _Trouble:
    """Something that may be over in a moment."""

    what: str
    wait: float = 0.0


def _count(usage: Any, name: str, estimate: int) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value >= 0 else estimate


def _retry_after(value: str | None) -> float:
    """Seconds, as a number or a date; 0 for anything else."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), 10 * _LONGEST_PAUSE)


class _Key:
    """Our key and no other: without this, requests would take one from a .netrc file."""

    def __init__(self, variable: str | None) -> None:
        self.key = None if variable is None else os.environ.get(variable)
        if variable is not None and not self.key:
            raise EndpointError(f"the environment variable {variable} is not set", fix="put the endpoint's key in it")

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.key is not None:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


class _Pacer:
    """When the next request to an address may start."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.next: dict[str, float] = {}

    def wait(self, settings: Endpoint, stopped: threading.Event) -> bool:
        """Wait for this request's turn; false if everything was stopped meanwhile."""
        if settings.requests_per_minute is None:
            return True
        with self.lock:
            start = max(self.next.get(settings.base_url, 0.0), time.monotonic())
            self.next[settings.base_url] = start + 60 / settings.requests_per_minute
        return not stopped.wait(max(start - time.monotonic(), 0))


_PACER = _Pacer()


# A causal language model on this machine, through transformers.


@generators.register("local", formula="transformers' generate")
@dataclass(frozen=True)
class LocalModel:
    """A causal language model from a folder or a hub id, run here.

    With a chat template the prompt is a user's message. `temperature: 0` takes the most probable token each time;
    above, tokens are drawn with a seed made of `seed` and the batch. `max_prompt` tokens of a prompt are read: the end
    is kept. `dtype: None` is what the checkpoint was saved in on a GPU, and fp32 on a CPU.
    """

    path: str
    max_tokens: int = 96
    max_prompt: int = 2048
    temperature: float = 0.0
    batch_size: int = 8
    device: str | None = None
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.max_prompt, self.batch_size) < 1 or self.temperature < 0:
            raise RecipeError("max_tokens, max_prompt and batch_size must be 1 or more, temperature 0 or more")

    @property
    def window(self) -> int:
        return self.batch_size

    def identity(self) -> object:
        folder = Path(self.path)
        files = sorted(folder.glob("*")) if folder.is_dir() else []
        state = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
        return [self.path, state, self.max_tokens, self.max_prompt, self.temperature, self.seed]

    def answers(
        self, prompts: Sequence[str], accept: Accept, spent: Spending
    ) -> Iterator[tuple[int, Answer | Refusal]]:
        import torch

        if not prompts:
            return
        model, tokenizer = _load(self.path, self.device, self.dtype)
        texts = [_chat(tokenizer, prompt) for prompt in prompts]
        inputs = tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self.max_prompt,
            add_special_tokens=tokenizer.chat_template is None,
        ).to(model.device)
        with torch.random.fork_rng(enabled=self.temperature > 0), torch.inference_mode():
            torch.manual_seed(derive_seed(self.seed, *prompts)) if self.temperature > 0 else None
            out_NT = model.generate(**inputs, **self._sampling(), pad_token_id=tokenizer.pad_token_id)
        width = inputs["input_ids"].shape[1]
        for place, said in enumerate(tokenizer.batch_decode(out_NT[:, width:], skip_special_tokens=True)):
            read = int(inputs["attention_mask"][place].sum())
            written = int((out_NT[place, width:] != tokenizer.pad_token_id).sum())
            yield place, Answer(said, accept(said), 0, read, written)

    def _sampling(self) -> dict[str, Any]:
        common = {"max_new_tokens": self.max_tokens}
        if self.temperature == 0:
            return common | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return common | {"do_sample": True, "temperature": self.temperature}


@lru_cache(maxsize=1)
def _load(path: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", truncation_side="left")
        kind = dtype or ("float32" if chosen == "cpu" else "auto")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load a causal language model ({str(error).splitlines()[0]})",
            where=path,
            expected="a folder with a model and its tokenizer, or a hub id",
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(chosen).eval(), tokenizer


def _chat(tokenizer: Any, prompt: str) -> str:
    if tokenizer.chat_template is None:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
