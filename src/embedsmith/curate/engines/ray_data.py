"""Ray Data: the cores of one machine, or of all machines of a cluster.

Parts lie in a folder that all machines share and are read and written where they are dealt with. What goes through Ray
is little: numbers of parts, ledgers, and of records that are compared their keys, and then the sketches of those that
share one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import EmbedsmithError, EngineError, MissingExtraError
from embedsmith.core.settings import Count, Word
from embedsmith.core.shelf import engines
from embedsmith.curate.comparing import ComparingStep, Places, leaving, linked, linked_groups
from embedsmith.curate.keeper import Cache, Purse
from embedsmith.curate.ledger import Ledger, PerRecord, Tools
from embedsmith.curate.parts import PART_SHIFT, Advance, Drop, PartWork, StageParts, key_rows, sketches_at

T = TypeVar("T")
Columns = dict[str, npt.NDArray[Any]]
"""Of rows that go through Ray."""
_RETRIES = 3
"""How often a part is done again whose worker was lost; Ray itself would never end."""
_MOST_PIECES = 1000
"""Of a shuffle: each of them sends something to each other."""


@engines.register("ray")
@dataclass(frozen=True)
class RayEngine:
    """Run a curation as stages of Ray Data, on this machine or on a cluster.

    The same records come out as of the local engine, in the same order. The folder `work`, and models and evaluation
    sets by their paths, must be where all machines of a cluster see them.

    - `address`: of a cluster, as `ray start` prints it (`10.0.0.1:6379`), or `auto` on one of its machines; `None`
      starts Ray on this machine, for this curation, where nothing but this machine reaches it;
    - `workers`: parts dealt with at once; `None` is one for each core;
    - `models`: actors that hold a model or ask one; `None` is one for each GPU, one where there is none.

    Errors: `MissingExtraError` without Ray; `EngineError` where no cluster answers, or a worker is lost for good.
    """

    address: Word | None = None
    workers: Count | None = None
    models: Count | None = None

    @contextmanager
    def start(self, folder: Path) -> Iterator[Cluster]:
        with _connected(self.address, self.workers) as ray, _settings(ray):
            there = ray.cluster_resources()
            gpus = int(there.get("GPU", 0))
            workers = self.workers or max(int(there.get("CPU", 1)), 1)
            cluster = Cluster(ray, folder, workers, self.models or max(gpus, 1), 1 if gpus else 0)
            try:
                yield cluster
            finally:
                cluster.close()


@contextmanager
def _connected(address: str | None, workers: int | None) -> Iterator[Any]:
    """Ray, connected. One that the program has connected itself is used, and left as it is.

    Errors: `MissingExtraError`, `EngineError`.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would report to its makers
    ours = Path(__file__).parents[2]
    alone = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's word for: listen on 127.0.0.1 and nowhere else
    same_code = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ours.parent), os.environ.get("PYTHONPATH"))))}
    with _environment({} if address else alone | same_code):
        try:
            import ray
            import ray.data
            from ray._private import ray_constants
        except ImportError as error:
            raise MissingExtraError("ray", "ray") from error
        if ray.is_initialized():
            yield ray
            return
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            ray_constants.ENABLE_RAY_CLUSTER = False  # where Ray was imported before
            ray.init("local", num_cpus=workers or len(os.sched_getaffinity(0)), include_dashboard=False, **quiet)
        else:
            ray_constants.ENABLE_RAY_CLUSTER = True
            _check_reachable(address)
            try:
                ray.init(address, runtime_env={"py_modules": [str(ours)]}, **quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise _no_cluster(address, error) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Errors: `EngineError` at once, where Ray would try for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> EngineError:
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    fix = "start one (ray start --head prints its address), or leave the address out to use this machine alone"
    return EngineError(f"no Ray cluster answers ({said})", where=address, fix=fix)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """For the processes that are started within the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@contextmanager
def _settings(ray: Any) -> Iterator[None]:
    """Of Ray Data, within the block: results in the order of the parts, no bars and lines of its own, and the shuffle
    that runs on as few cores as there are."""
    from ray.data.context import DataContext, ShuffleStrategy

    context, log = DataContext.get_current(), logging.getLogger("ray.data")
    before = (context.shuffle_strategy, context.execution_options.preserve_order, context.enable_progress_bars)
    level = log.level
    log.setLevel(logging.ERROR)
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`ray_remote_args`")  # nothing else bounds retries until 2.64
            yield
    finally:
        context.shuffle_strategy, context.execution_options.preserve_order, context.enable_progress_bars = before
        log.setLevel(level)


@dataclass
class Cluster:
    """Divides parts among the workers of a cluster that this process is connected to."""

    ray: Any
    folder: Path
    workers: int
    models: int
    gpus: int
    _keeper: Any = None
    _purses: Iterator[int] = field(default_factory=count)

    def equip(self, step: PerRecord, tools: Tools) -> tuple[PerRecord, Tools]:
        """What is kept lies in the folder of this process, and one purse is for all: an actor here holds both."""
        tools = replace(tools, evaluation=None)
        if not step.holds_model:
            return step, replace(tools, encoder=None, reranker=None)
        if self._keeper is None:
            here = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                self.ray.get_runtime_context().get_node_id(), soft=False
            )
            actor = self.ray.remote(_Keeper).options(num_cpus=0, scheduling_strategy=here)
            self._keeper = actor.remote(self.folder.resolve())
        return step.shared(self.models), replace(
            tools,
            purse=_Far(self._keeper, f"purse {next(self._purses)}"),  # type: ignore[arg-type]
            caches=_FarCaches(self._keeper),
        )

    def close(self) -> None:
        if self._keeper is not None:
            with contextlib.suppress(self.ray.exceptions.RayError):
                self.ray.get(self._keeper.close.remote(), timeout=10)
            self.ray.kill(self._keeper)

    def each(
        self, work: PartWork[T], parts: Iterable[int], advance: Advance, *, holds_model: bool = False
    ) -> Iterator[T]:
        rows = [{"part": number} for number in parts]
        if not rows:
            return
        held = self.ray.put(work)
        pieces = self.ray.data.from_items(rows, override_num_blocks=len(rows))
        if holds_model:
            actors = self.ray.data.ActorPoolStrategy(size=self.models)
            place = {"num_gpus": self.gpus} if self.gpus else {"num_cpus": 1}
            done = pieces.map(_Holder, fn_constructor_args=(held,), compute=actors, max_task_retries=_RETRIES, **place)
        else:
            tasks = self.ray.data.TaskPoolStrategy(size=self.workers)
            done = pieces.map(lambda row: _outcome(_fetched(held), row), compute=tasks, max_retries=_RETRIES)
        with self._watched():
            for row in done.iter_rows():
                outcome: _Outcome[T] = row["outcome"]
                if outcome.error is not None:
                    raise outcome.error
                advance(outcome.count)
                yield outcome.value

    def without_like(
        self,
        comparison: ComparingStep,
        source: StageParts,
        target: StageParts,
        parts: Iterable[int],
        advance: Advance,
        examples: int,
    ) -> Iterator[Ledger]:
        """Keys are grouped first, to find the records that are linked by them; then the sketches of those, to compare
        within each group. Of all others nothing is sent."""
        numbers = list(parts)
        links = self._links(comparison, source, numbers)
        told = self._told(comparison, source, *linked_groups(*links))
        drop = Drop(comparison, source, target, _Fetched({n: self.ray.put(told[n]) for n in told}), examples)
        for ledger in self.each(drop, numbers, advance):
            advance(ledger.taken)
            yield ledger

    def _links(self, comparison: ComparingStep, source: StageParts, numbers: list[int]) -> tuple[Places, Places]:
        pieces = self._pieces(len(numbers))
        rows = [{"parts": np.array(some)} for some in np.array_split(np.array(numbers), pieces)] if numbers else []

        def keys_of(batch: Columns) -> Columns:
            keys, places = key_rows(comparison, source, batch["parts"][0])
            return {"bucket": (keys % np.uint64(pieces)).astype(np.int64), "key": keys, "place": places}

        def links_of(group: Columns) -> Columns:
            one, other = linked(group["key"], group["place"])
            return {"one": one, "other": other}

        found = self._shuffled(rows, keys_of, links_of)
        return found("one"), found("other")

    def _told(
        self, comparison: ComparingStep, source: StageParts, place_N: Places, group_N: Places
    ) -> dict[int, dict[int, str]]:
        """Of each part, the lines that leave and what they are like."""
        _, cuts = np.unique(place_N >> PART_SHIFT, return_index=True)  # a part is in one piece
        pieces = self._pieces(len(cuts))
        starts = [int(some[0]) for some in np.array_split(cuts, pieces) if len(some)]
        spans = [slice(start, end) for start, end in zip(starts, [*starts[1:], len(place_N)])]
        rows = [{"place": place_N[span], "group": group_N[span]} for span in spans]

        def sketches_of(batch: Columns) -> Columns:
            places, sketches = batch["place"][0], np.empty(len(batch["place"][0]), object)
            sketches[:] = sketches_at(comparison, source, places)
            group = batch["group"][0]
            return {"bucket": group % pieces, "group": group, "place": places, "sketch": sketches}

        def leaving_of(group: Columns) -> Columns:
            gone = list(leaving(comparison, group["group"].tolist(), group["place"].tolist(), list(group["sketch"])))
            places, likes = zip(*gone) if gone else ((), ())
            return {"place": np.array(places, np.int64), "like": np.array(likes, str)}

        found = self._shuffled(rows, sketches_of, leaving_of)
        told: defaultdict[int, dict[int, str]] = defaultdict(dict)
        for place, like in zip(found("place").tolist(), found("like").tolist()):
            told[place >> PART_SHIFT][place & (2**PART_SHIFT - 1)] = like
        return told

    def _pieces(self, parts: int) -> int:
        """In how many pieces a shuffle cuts so many parts."""
        return max(min(parts, 4 * self.workers, _MOST_PIECES), 1)

    def _shuffled(
        self, rows: list[dict[str, Any]], make: Callable[[Columns], Columns], reduce: Callable[[Columns], Columns]
    ) -> Callable[[str], npt.NDArray[Any]]:
        """Rows are made of each of `rows` and brought together by their `bucket`; what is made of each bucket, by
        column."""
        found: list[Columns] = []
        if rows:
            made = self.ray.data.from_items(rows, override_num_blocks=len(rows))
            made = made.map_batches(make, batch_size=None, batch_format="numpy", max_retries=_RETRIES)
            with self._watched():
                reduced = made.groupby("bucket").map_groups(reduce, batch_format="numpy")
                found = list(reduced.iter_batches(batch_size=None, batch_format="numpy"))
        return lambda name: np.concatenate([np.zeros(0, np.int64), *(some[name] for some in found if len(some[name]))])

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Errors: `EngineError` in place of what Ray says of workers and machines that it could not replace."""
        errors = self.ray.exceptions
        try:
            yield
        except errors.RayTaskError:
            raise  # a step's own fault
        except errors.RayError as error:
            raise EngineError(
                f"Ray lost a worker for good ({type(error).__name__}: {str(error).strip().splitlines()[0]})",
                fix="see that its machines are up and have memory; then run the same command again: finished steps are "
                "kept",
            ) from error


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What became of a part: the value and how many records were read, or why there is none."""

    value: T
    count: int
    error: EmbedsmithError | None = None


def _outcome(work: PartWork[Any], row: Mapping[str, Any]) -> dict[str, Any]:
    counts: list[int] = []
    try:
        outcome = _Outcome(work(int(row["part"]), counts.append), sum(counts))
    except EmbedsmithError as error:
        outcome = _Outcome(None, 0, error)
    return {"part": row["part"], "outcome": outcome}


_works: dict[str, PartWork[Any]] = {}
"""The last one that this worker was sent."""


def _fetched(held: Any) -> PartWork[Any]:
    import ray

    if held.hex() not in _works:
        _works.clear()
        _works[held.hex()] = ray.get(held)
    return _works[held.hex()]


class _Holder:
    """An actor that deals with part after part, with a model that it opens once."""

    def __init__(self, held: Any) -> None:
        self.work = _fetched(held)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return _outcome(self.work, row)


@dataclass(frozen=True)
class _Fetched:
    """What is told of each part, fetched where the part is dealt with."""

    told: dict[int, Any]

    def __call__(self, number: int) -> Mapping[int, str]:
        import ray

        found: Mapping[int, str] = ray.get(self.told[number]) if number in self.told else {}
        return found


class _Keeper:
    """An actor beside the folder of what is kept: its caches, and the purses of steps, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stack = folder, ExitStack()
        self.held: dict[str, Any] = {}

    def call(self, name: str, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The result, or the error: as a value it arrives as it was raised."""
        try:
            if name not in self.held:
                purse = name.startswith("purse ")
                self.held[name] = Purse() if purse else self.stack.enter_context(Cache.open(self.folder, name))
            return getattr(self.held[name], method)(*arguments, **named)
        except EmbedsmithError as error:
            return error

    def close(self) -> None:
        self.stack.close()


@dataclass(frozen=True)
class _Far:
    """Something that the keeper holds, as if it were here."""

    keeper: Any
    name: str

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*arguments: Any, **named: Any) -> Any:
            import ray

            result = ray.get(self.keeper.call.remote(self.name, method, arguments, named))
            if isinstance(result, EmbedsmithError):
                raise result
            return result

        return call


@dataclass(frozen=True)
class _FarCaches:
    keeper: Any

    def __call__(self, name: str) -> AbstractContextManager[Any]:
        return nullcontext(_Far(self.keeper, name))
