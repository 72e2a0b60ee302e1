"""The processes of one machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from embedsmith.core.errors import EngineError
from embedsmith.core.settings import Count
from embedsmith.core.shelf import engines
from embedsmith.curate.comparing import ComparingStep
from embedsmith.curate.ledger import Ledger, PerRecord, Tools
from embedsmith.curate.parts import Advance, Drop, PartWork, Sketches, StageParts

T = TypeVar("T")


@engines.register("local")
@dataclass(frozen=True)
class LocalEngine:
    """Run a curation on the cores of this machine.

    Records are read by one process and dealt with by several, which take part after part; models stay in the first.
    What comes out does not depend on how many there are.

    - `processes`: how many; `None` is one for each core that this process may use.

    Errors: `EngineError` when one of them is killed.
    """

    processes: Count | None = None

    @contextmanager
    def start(self, folder: Path) -> Iterator[Processes]:
        # One where processes cannot be forked safely: those started anew would run the user's script again.
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
        yield Processes(self.processes or cores)


@dataclass(frozen=True)
class Processes:
    """So many processes, started anew for each work: they have what it holds without being sent it."""

    count: int

    def equip(self, step: PerRecord, tools: Tools) -> tuple[PerRecord, Tools]:
        return step, tools

    def each(
        self, work: PartWork[T], parts: Iterable[int], advance: Advance, *, holds_model: bool = False
    ) -> Iterator[T]:
        rest = iter(parts)
        first = list(islice(rest, 2))
        if holds_model or self.count == 1 or len(first) < 2:
            yield from (work(number, advance) for number in chain(first, rest))
            return
        with ProcessPoolExecutor(self.count, _FORK, _begin, (work, os.getpid())) as pool:
            under_way: deque[Future[tuple[T, int]]] = deque()
            try:
                for number in chain(first, rest):
                    under_way.append(pool.submit(_do, number))
                    if len(under_way) > 2 * self.count:
                        yield _taken(under_way.popleft(), advance)
                while under_way:
                    yield _taken(under_way.popleft(), advance)
            except BrokenProcessPool as error:
                raise EngineError(
                    "a process of this curation was killed, perhaps for the memory it took",
                    fix="run the same command again, where finished steps are kept; engine.processes=1 takes least",
                ) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def without_like(
        self,
        comparison: ComparingStep,
        source: StageParts,
        target: StageParts,
        parts: Iterable[int],
        advance: Advance,
        examples: int,
    ) -> Iterator[Ledger]:
        """Sketches are made by all, and compared here, one after the other."""
        like_earlier = comparison.memory()
        for number, sketches in enumerate(self.each(Sketches(comparison, source), parts, advance)):
            told = ((place, like_earlier(sketch)) for place, sketch in enumerate(sketches) if sketch is not None)
            leaving = {place: like for place, like in told if like is not None}
            yield Drop(comparison, source, target, {number: leaving}.__getitem__, examples)(number, advance)


_FORK = multiprocessing.get_context("fork") if sys.platform == "linux" else None
_work: PartWork[Any] | None = None


def _begin(work: PartWork[Any], parent: int) -> None:
    """In a new process: it ends with the one that started it, however that ends, and not by itself on Ctrl-C."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _do(number: int) -> tuple[Any, int]:
    assert _work is not None
    counts: list[int] = []
    return _work(number, counts.append), sum(counts)


def _taken(future: Future[tuple[T, int]], advance: Advance) -> T:
    result, count = future.result()
    advance(count)
    return result
