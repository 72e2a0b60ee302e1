"""The language models that can be asked: any server that speaks OpenAI's chat completions (hosted, or vLLM, llama.cpp,
Ollama and others on your machines), and a model that runs here, through transformers."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from embedsmith.core.errors import EmbedsmithError, MissingExtraError, ModelError, RecipeError
from embedsmith.core.keys import checked_address, checked_variable, key_from
from embedsmith.core.seeds import derive_seed
from embedsmith.core.settings import Count, NotNegative, Positive
from embedsmith.core.shelf import generators
from embedsmith.core.text_out import remember_secrets_in, without_secrets
from embedsmith.curate.ask import Accept
from embedsmith.curate.keeper import Answer, Purse, Refusal, Spending

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_WRONG_SETUP = (401, 402, 403, 404, 405)
_LONGEST_PAUSE = 60.0


class EndpointError(EmbedsmithError):
    """The endpoint cannot be used, or does not answer any more. Answers so far are kept."""


@generators.register("endpoint", formula="POST {base_url}/chat/completions")
@dataclass(frozen=True)
class Endpoint:
    """A language model behind an OpenAI-compatible HTTP endpoint.

    Busy and failing servers (429, 5xx, broken connections, answers that are not what was asked for) are tried again.
    The bounds hold for the whole step, runs before a stop included: a request that could exceed them is not sent, its
    record leaves with the reason, and raising the limit later continues from there.

    - `base_url`: as the server's documentation gives it, usually ending in /v1;
    - `model`: the name the server knows it by;
    - `key_env`: the environment variable with the key, which itself is never written anywhere; `None` sends none;
    - `max_tokens`: that an answer has at most;
    - `temperature`: of the sampling; 0 takes the most probable token each time;
    - `system`: a system message before every prompt; `None` sends none;
    - `extra`: goes into the request as it is (seed: 1, chat_template_kwargs: ...); a key, token or password
      there is left out of reports and messages;
    - `parallel`: requests under way at once;
    - `retries`: how often a request is sent again;
    - `backoff`: seconds to wait before that, then twice as long each time, or as long as the server asks;
    - `timeout`: seconds to wait for an answer;
    - `requests_per_minute`: that start at most; `None` sets no limit;
    - `max_requests`: that the step may send; `None` sets no limit;
    - `max_cost`: that the step may cause, in the currency of the prices; `None` sets no limit;
    - `price_in`, `price_out`: per million tokens of prompts and of answers.

    Errors: `EndpointError` when the server refuses the key, the model or the address, or stays silent.
    """

    base_url: str
    model: str
    key_env: str | None = None
    max_tokens: Count = 256
    temperature: NotNegative = 0.7
    system: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    parallel: Count = 4
    retries: Annotated[int, Field(ge=0)] = 6
    backoff: NotNegative = 1.0
    timeout: Positive = 120.0
    requests_per_minute: Positive | None = None
    max_requests: Annotated[int, Field(ge=0)] | None = None
    max_cost: NotNegative | None = None
    price_in: NotNegative | None = None
    price_out: NotNegative | None = None

    def __post_init__(self) -> None:
        checked_address(self.base_url, "base_url")
        checked_variable(self.key_env, "key_env")
        remember_secrets_in(self.extra)
        if self.max_cost is not None and (self.price_in is None or self.price_out is None):
            raise RecipeError("max_cost needs price_in and price_out", expected="prices per million tokens")

    @property
    def window(self) -> int:
        return 16 * self.parallel

    def identity(self) -> object:
        """Not how fast or how much is asked, only what an answer depends on."""
        return [self.base_url, self.model, self.max_tokens, self.temperature, self.system, self.extra]

    def answers(self, prompts: Sequence[str], accept: Accept, purse: Purse) -> Iterator[tuple[int, Answer | Refusal]]:
        """As they come. After an error nothing more is sent, but what is under way is waited for: it is paid.

        The next prompt is sent when an answer was taken, and kept: so a kill loses `parallel` answers at most, however
        slow the disk.
        """
        if not prompts:
            return
        window = _Window(self, _key(self.key_env), purse)
        failed: EndpointError | None = None
        to_send = enumerate(prompts)
        under_way: dict[Future[Answer | Refusal], int] = {}
        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                while True:
                    for place, prompt in islice(to_send, 0 if failed else self.parallel - len(under_way)):
                        under_way[pool.submit(window.ask, prompt, accept)] = place
                    if not under_way:
                        break
                    future = next(as_completed(under_way))
                    place, error = under_way.pop(future), future.exception()
                    if error is None:
                        yield place, future.result()
                    elif isinstance(error, EndpointError):
                        failed = failed or error
                    else:
                        raise error
            finally:
                window.stopped.set()
        if failed is not None:
            raise failed

    def shared(self, workers: int) -> Endpoint:
        """With a share of the requests under way and of their pace; the bounds are the purse's."""
        pace = self.requests_per_minute
        share = None if pace is None else pace / workers
        return replace(self, parallel=max(1, self.parallel // workers), requests_per_minute=share)

    def price(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * (self.price_in or 0.0) + tokens_out * (self.price_out or 0.0)) / 1e6


def _key(variable: str | None) -> Callable[[Any], Any]:
    """Signs a request with our key and no other: without this, requests would take one from a .netrc file."""
    key = key_from(variable, EndpointError)

    def sign(request: Any) -> Any:
        if key is not None:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    return sign


@dataclass(frozen=True)
class _Trouble:
    """Something that may be over in a moment. `wait`: the seconds that the server asks for."""

    what: str
    wait: float = 0.0


@dataclass
class _Window:
    """One window of requests: who may send when, what it may cost, and what comes back. A request reserves the most
    it can cost, and gives back the rest."""

    settings: Endpoint
    sign: Callable[[Any], Any]
    purse: Purse
    stopped: threading.Event = field(default_factory=threading.Event)

    def ask(self, prompt: str, accept: Accept) -> Answer | Refusal:
        """One prompt, as often as needed. An error stops the other requests too. Errors: `EndpointError`."""
        settings = self.settings
        system = [] if settings.system is None else [{"role": "system", "content": settings.system}]
        messages = [*system, {"role": "user", "content": prompt}]
        body = {"model": settings.model, "messages": messages, "max_tokens": settings.max_tokens}
        body |= {"temperature": settings.temperature, **settings.extra}
        most_in = sum(len(message["content"].encode()) for message in messages) + 64  # a token has a byte or more
        reserved = settings.price(most_in, settings.max_tokens)
        total, trouble, unusable = Spending(), "", 0
        enough = 1 if settings.temperature == 0 else 3  # useless answers: without chance, the next is the same
        for attempt in range(settings.retries + 1):
            if self.stopped.is_set() or not _wait_for_turn(settings, self.stopped):
                return Refusal("stopped")
            if not self.purse.reserve(reserved, settings.max_requests, settings.max_cost):
                return Refusal("the budget is used up")
            outcome = self._send(body)
            answer = outcome if isinstance(outcome, Answer) else Answer("")
            self.purse.give_back(reserved - answer.cost)
            total.add(replace(answer, requests=1))
            if isinstance(outcome, Refusal):
                return outcome
            if isinstance(outcome, _Trouble):
                trouble = outcome.what
                longest = min(settings.backoff * 2**attempt, _LONGEST_PAUSE)
                self.stopped.wait(max(outcome.wait, longest * random.uniform(0.5, 1.0)))
                continue
            usable = accept(answer.text)
            unusable += not usable
            if usable or unusable >= enough:
                return Answer(answer.text, usable, **vars(total))
        self.stopped.set()
        raise EndpointError(
            f"no answer after {settings.retries + 1} tries; the last: {trouble or 'nothing usable'}",
            where=settings.base_url,
            fix="see whether the server runs; then run the same command again: what it answered so far is kept",
        )

    def _send(self, body: dict[str, Any]) -> Answer | Refusal | _Trouble:
        try:
            import requests
        except ImportError as error:
            raise MissingExtraError("requests", "curate") from error
        address = self.settings.base_url.rstrip("/") + "/chat/completions"
        try:
            response = requests.post(address, json=body, auth=self.sign, timeout=self.settings.timeout)
        except requests.RequestException as error:
            return _Trouble(f"{type(error).__name__}: {error}")
        said = without_secrets(response.text)[:200]  # before it is cut: half a key is a secret too
        reply = f"{response.status_code} {response.reason}: {said}"
        if response.status_code in _WRONG_SETUP:
            self.stopped.set()
            fix = "check base_url, model and key_env"
            raise EndpointError(f"the server refuses: {reply}", where=address, fix=fix)
        if response.status_code in _AGAIN:
            return _Trouble(reply, _seconds(response.headers.get("Retry-After")))
        if not response.ok:
            return Refusal(f"the endpoint refused it ({response.status_code})")
        try:
            value = response.json()
            choice = value["choices"][0]
            text, usage = choice["message"]["content"], value.get("usage")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return _Trouble(f"not a chat completion: {said}")
        return self._answer(body, text, usage, cut=choice.get("finish_reason") == "length")

    def _answer(self, body: dict[str, Any], text: Any, usage: Any, cut: bool) -> Answer:
        """With the server's own count of tokens, or half the characters. A cut answer loses its last line, which may be
        half a sentence."""
        text = text if isinstance(text, str) else ""  # null where a filter or a tool stepped in
        counts = []
        characters = sum(len(message["content"]) for message in body["messages"])
        for name, estimate in (("prompt_tokens", characters // 2), ("completion_tokens", len(text) // 2)):
            value = usage.get(name) if isinstance(usage, dict) else None
            counts.append(value if isinstance(value, int) and value >= 0 else estimate)
        if cut:
            text = text.rpartition("\n")[0] or text
        return Answer(text, True, 0, counts[0], counts[1], self.settings.price(counts[0], counts[1]))


def _seconds(retry_after: str | None) -> float:
    """A number or a date; 0 for anything else."""
    if retry_after is None:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), 10 * _LONGEST_PAUSE)


_TURNS = threading.Lock()
_next_turn: dict[str, float] = {}
"""When the next request to an address may start."""


def _wait_for_turn(settings: Endpoint, stopped: threading.Event) -> bool:
    """Whether the request may start now; false if everything was stopped meanwhile."""
    if settings.requests_per_minute is None:
        return True
    with _TURNS:
        start = max(_next_turn.get(settings.base_url, 0.0), time.monotonic())
        _next_turn[settings.base_url] = start + 60 / settings.requests_per_minute
    return not stopped.wait(max(start - time.monotonic(), 0))


@generators.register("local", formula="transformers' generate")
@dataclass(frozen=True)
class LocalModel:
    """A causal language model from a folder or a hub id, run here.

    With a chat template the prompt is a user's message.

    - `path`: the folder or id;
    - `max_tokens`: that an answer has at most;
    - `max_prompt`: tokens of a prompt that are read: the end is kept;
    - `temperature`: 0 takes the most probable token each time; above, tokens are drawn;
    - `batch_size`: prompts answered together;
    - `device`: such as `cuda:1`; `None` is a GPU where there is one;
    - `dtype`: of the weights; `None` is what they were saved in on a GPU, and fp32 on a CPU;
    - `seed`: of the draws, with the prompts of the batch.
    """

    path: str
    max_tokens: Count = 96
    max_prompt: Count = 2048
    temperature: NotNegative = 0.0
    batch_size: Count = 8
    device: str | None = None
    dtype: str | None = None
    seed: int = 0

    @property
    def window(self) -> int:
        return self.batch_size

    def identity(self) -> object:
        folder = Path(self.path)
        files = sorted(folder.glob("*")) if folder.is_dir() else []
        state = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
        return [self.path, state, self.max_tokens, self.max_prompt, self.temperature, self.seed]

    def answers(self, prompts: Sequence[str], accept: Accept, purse: Purse) -> Iterator[tuple[int, Answer | Refusal]]:
        import torch

        if not prompts:
            return
        model, tokenizer = _load(self.path, self.device, self.dtype)
        texts = list(prompts)
        if tokenizer.chat_template is not None:
            messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
            texts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in messages]
        inputs = tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self.max_prompt,
            add_special_tokens=tokenizer.chat_template is None,
        ).to(model.device)
        sampling: dict[str, Any] = {"max_new_tokens": self.max_tokens, "do_sample": self.temperature > 0}
        if self.temperature == 0:
            sampling |= {"temperature": None, "top_p": None, "top_k": None}
        else:
            sampling |= {"temperature": self.temperature}
        with torch.random.fork_rng(enabled=self.temperature > 0), torch.inference_mode():
            torch.manual_seed(derive_seed(self.seed, *prompts)) if self.temperature > 0 else None
            out_NT = model.generate(**inputs, **sampling, pad_token_id=tokenizer.pad_token_id)
        width = inputs["input_ids"].shape[1]
        for place, text in enumerate(tokenizer.batch_decode(out_NT[:, width:], skip_special_tokens=True)):
            read = int(inputs["attention_mask"][place].sum())
            written = int((out_NT[place, width:] != tokenizer.pad_token_id).sum())
            yield place, Answer(text, accept(text), 0, read, written)


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
