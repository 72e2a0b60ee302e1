"""What is served: models by name, the indexes that they made, a reranker; and how new ones take their place.

Everything that a request needs is in one value, `Loaded`, and is replaced as a whole: a request that began with the old
one ends with it, and is never answered by a model and an index that do not belong together.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from embedsmith.core.encoder import Encoder, Reranker, Role
from embedsmith.core.errors import ModelError, SearchError
from embedsmith.core.progress import log
from embedsmith.core.settings import did_you_mean
from embedsmith.index import Document, HybridIndex, Store, Written
from embedsmith.serve.batching import RetiredError
from embedsmith.serve.counters import Metrics
from embedsmith.serve.failures import ClosedError, ReloadingError, RequestError, UnknownModelError
from embedsmith.serve.limits import ServerLimits
from embedsmith.serve.model import Encoded, Model, Scores, ServedReranker, Text
from embedsmith.serve.served_index import Found, Question, ServedIndex, open_served

T = TypeVar("T")


@dataclass(frozen=True)
class Sources:
    """Where models (by name), indexes and the reranker come from: called at the start, and to load them anew.
    `writable`: documents are taken into the indexes, which stay open when models are loaded anew."""

    models: Mapping[str, Callable[[], Encoder]]
    stores: Sequence[Callable[[], Store]] = ()
    reranker: Callable[[], Reranker] | None = None
    reranker_name: str = "reranker"
    writable: bool = False


@dataclass(frozen=True)
class Loaded:
    """Models, the searchers of those that have an index, and a reranker that belong together."""

    models: Mapping[str, Model] = field(default_factory=dict)
    searchers: Mapping[str, ServedIndex] = field(default_factory=dict)
    reranker: ServedReranker | None = None

    def close(self, stores: bool = True) -> None:
        """Wait for what they are asked already, then end their threads and (with `stores`) let go of the indexes."""
        for searcher in self.searchers.values():
            searcher.close(stores)
        for model in self.models.values():
            model.batcher.close()
        if self.reranker is not None:
            self.reranker.batcher.close()


class Service:
    """Loads what `sources` names. Errors: theirs, and `SearchError` for an index that none of the models made."""

    def __init__(self, sources: Sources, limits: ServerLimits | None = None) -> None:
        if not sources.models:
            raise ModelError("no model to serve", expected="one or more")
        self.limits = limits or ServerLimits()
        self.metrics = Metrics()
        self.draining = False
        self._sources = sources
        self._reloading = threading.Lock()
        self._stores: list[Store] = []
        self._loaded = self._load()

    @property
    def models(self) -> Mapping[str, Model]:
        return self._loaded.models

    @property
    def indexes(self) -> Mapping[str, HybridIndex]:
        """By the name of the model that made each."""
        return {name: searcher.index for name, searcher in self._loaded.searchers.items()}

    @property
    def index(self) -> HybridIndex | None:
        """The first one."""
        return next(iter(self.indexes.values()), None)

    @property
    def reranker(self) -> ServedReranker | None:
        return self._loaded.reranker

    def model(self, name: str | None = None) -> Model:
        """By its name, or the first one. Errors: `UnknownModelError`."""
        models = self._loaded.models
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            raise UnknownModelError(
                f"no model {name!r} is served here{did_you_mean(name, models)}", expected=f"one of {', '.join(models)}"
            )
        return models[name]

    async def encode(
        self,
        texts: Sequence[Text],
        role: Role = "document",
        outputs: Sequence[str] = ("dense",),
        model: str | None = None,
    ) -> tuple[Model, Encoded]:
        """The representations of texts or token ids, and the model that made them. Errors: those of `Model.submit`,
        `UnknownModelError`."""

        def ask() -> "tuple[Model, Future[Encoded]]":
            chosen = self.model(model)
            return chosen, chosen.submit(texts, role, outputs)

        chosen, made = self._of_the_present(ask)
        return chosen, await asyncio.wrap_future(made)

    async def search(self, question: Question, model: str | None = None) -> tuple[str, list[Found]]:
        """The hits of a question in the index of a model, and that model's name; without one, in the first index.

        Errors: `SearchError` where there is no index or no reranker; those of the index.
        """

        def ask() -> "tuple[str, Future[list[Found]]]":
            name, searcher = self._searcher(model)
            reranker = self._loaded.reranker if question.rerank else None
            if question.rerank and reranker is None:
                raise RequestError(_NO_RERANKER, param="rerank", fix=_WITH_RERANKER)
            return name, searcher.submit(question, reranker)

        while True:
            name, made = self._of_the_present(ask)
            try:
                return name, await asyncio.wrap_future(made)
            except RetiredError:  # in the middle of a search, which begins anew
                continue

    async def add(self, documents: Sequence[Document], model: str | None = None) -> tuple[str, Written, int]:
        """Write documents into the index of a model (or the first): durable when this returns. Gives the model's name,
        what was written, and how many documents the index holds. Errors: `RequestError` where nothing may be written.
        """
        name, written = await self._write(model, lambda searcher: searcher.add(documents))
        return name, written, await asyncio.to_thread(len, self.indexes[name])

    async def delete(self, ids: Sequence[str], model: str | None = None) -> tuple[str, int]:
        """Delete documents by their ids. Gives the model's name and how many documents the index holds."""
        name, _ = await self._write(model, lambda searcher: searcher.delete(ids))
        return name, await asyncio.to_thread(len, self.indexes[name])

    async def _write(self, model: str | None, work: "Callable[[ServedIndex], Future[T]]") -> tuple[str, T]:
        if not self._sources.writable:
            raise RequestError("this server takes no documents", fix="start it with --writable")

        def ask() -> "tuple[str, Future[T]]":
            name, searcher = self._searcher(model)
            return name, work(searcher)

        name, made = self._of_the_present(ask)
        return name, await asyncio.wrap_future(made)

    def _searcher(self, model: str | None) -> tuple[str, ServedIndex]:
        """By the name of its model, or the first. Errors: `RequestError` where there is no index."""
        searchers = self._loaded.searchers
        if not searchers:
            raise RequestError("this server has no index", fix="start it with one: embedsmith serve MODEL --index DIR")
        name = next(iter(searchers)) if model is None else self.model(model).name
        if name not in searchers:
            known = ", ".join(searchers)
            raise RequestError(f"the model {name} has no index here", param="model", expected=f"one of {known}")
        return name, searchers[name]

    async def rerank(self, query: str, documents: Sequence[str]) -> Scores:
        """Scores of the documents. Errors: `RequestError` where there is no reranker."""

        def ask() -> "tuple[None, Future[Scores]]":
            if self.reranker is None:
                raise RequestError(_NO_RERANKER, fix=_WITH_RERANKER)
            return None, self.reranker.submit(query, documents)

        _, made = self._of_the_present(ask)
        return await asyncio.wrap_future(made)

    def reload(self, names: Iterable[str] = ()) -> list[str]:
        """Load models anew (all, or those named), the indexes and the reranker; then put them in the place of the old
        ones, which end what they began. Gives the models' names. What fails to load changes nothing.

        Errors: `ReloadingError` where another call is at it; those of loading.
        """
        for name in names:
            self.model(name)
        if not self._reloading.acquire(blocking=False):
            raise ReloadingError("models are being loaded already", fix="wait until they are")
        try:
            before, chosen = self._loaded, list(names) or list(self._sources.models)
            kept = {name: model for name, model in before.models.items() if name not in chosen}
            self._loaded = self._load(kept)
            old = {name: model for name, model in before.models.items() if name in chosen}
            Loaded(old, before.searchers, before.reranker).close(stores=not self._sources.writable)
            self.metrics.reloads.inc()
            log.info("loaded anew: %s", ", ".join(chosen))
            return chosen
        finally:
            self._reloading.release()

    def close(self) -> None:
        """Answer what was asked already, then let go of everything."""
        self.draining = True
        with self._reloading:
            self._loaded.close()

    def _of_the_present(self, ask: Callable[[], T]) -> T:
        """Ask what is served now: what was served a moment ago may take nothing more."""
        while True:
            try:
                return ask()
            except RetiredError:
                if self.draining:
                    raise ClosedError("the server ends", fix="ask another, or this one when it is back") from None

    def _load(self, kept: Mapping[str, Model] | None = None) -> Loaded:
        models: dict[str, Model] = {}
        searchers: dict[str, ServedIndex] = {}
        reranker = None
        try:
            for name, load in self._sources.models.items():
                models[name] = (kept or {}).get(name) or Model(name, load(), self.limits.queue, **self._observer(name))
            kept_open = self._sources.writable and kept is not None
            stores = self._stores if kept_open else [open_store() for open_store in self._sources.stores]
            for store in stores:
                searcher = open_served(store, list(models.values()), self._sources.writable)
                if searcher.model.name in searchers:
                    raise SearchError(f"two indexes were made by {searcher.model.name}", expected="one index a model")
                searchers[searcher.model.name] = searcher
            if self._sources.reranker is not None:
                name = self._sources.reranker_name
                reranker = ServedReranker(name, self._sources.reranker(), self.limits.queue, **self._observer(name))
        except BaseException:
            fresh = {name: model for name, model in models.items() if name not in (kept or {})}
            Loaded(fresh, searchers, reranker).close(stores=kept is None or not self._sources.writable)
            raise
        self._stores = stores
        return Loaded(models, searchers, reranker)

    def _observer(self, name: str) -> dict[str, Any]:
        return {"on_batch": lambda items, tokens, seconds: self.metrics.batch(name, items, tokens, seconds)}


_NO_RERANKER = "this server has no reranker"
_WITH_RERANKER = "start it with one: embedsmith serve MODEL --reranker RERANKER"
