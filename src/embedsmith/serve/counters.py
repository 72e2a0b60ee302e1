"""Counters for Prometheus: requests, tokens, batches and what waits. Each server has counters of its own."""

from collections.abc import Callable, Mapping
from typing import Any

from embedsmith.core.errors import MissingExtraError

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """What `GET /metrics` shows."""

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise MissingExtraError("prometheus-client", "serve") from error
        self._registry: Any = prometheus.CollectorRegistry()
        one: dict[str, Any] = {"namespace": "embedsmith", "registry": self._registry}
        self._requests = prometheus.Counter("requests", "Requests answered.", ["endpoint", "status"], **one)
        self._seconds = prometheus.Histogram(
            "request_seconds",
            "From a request's first byte to its answer's last.",
            ["endpoint"],
            buckets=_SECONDS,
            **one,
        )
        self._texts = prometheus.Counter("texts", "Texts computed.", ["model"], **one)
        self._tokens = prometheus.Counter("tokens", "Tokens computed, roughly.", ["model"], **one)
        self._batch_texts = prometheus.Histogram("batch_texts", "Texts in a batch.", ["model"], buckets=_TEXTS, **one)
        self._batch_seconds = prometheus.Histogram(
            "batch_seconds", "What a batch took.", ["model"], buckets=_SECONDS, **one
        )
        self._waiting = prometheus.Gauge("waiting_texts", "Texts that wait for a batch.", ["model"], **one)
        self.reloads = prometheus.Counter("reloads", "How often models were loaded anew.", **one)
        self._generate: Callable[[Any], bytes] = prometheus.generate_latest
        self.content_type: str = prometheus.CONTENT_TYPE_LATEST

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """One request was answered."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def batch(self, model: str, texts: int, tokens: int, seconds: float) -> None:
        """One batch was computed."""
        self._texts.labels(model).inc(texts)
        self._tokens.labels(model).inc(tokens)
        self._batch_texts.labels(model).observe(texts)
        self._batch_seconds.labels(model).observe(seconds)

    def page(self, waiting: Mapping[str, int]) -> bytes:
        """The text that Prometheus reads. `waiting`: texts that wait, by model."""
        for model, count in waiting.items():
            self._waiting.labels(model).set(count)
        return self._generate(self._registry)
