"""Items of many callers computed together, by the tokens they have.

One thread a model takes what waits, as much as it computes in about a tenth of a second, and hands every caller its own
rows. While it computes, the next items gather: nobody waits for a batch to fill up. Callers take turns, so that a long
list does not hold up a short one. In a crowd a batch is larger: whoever comes now waits for the others anyway, and of
more items more are of similar length. Models take turns too: two that compute at the same time would each be slower.

A row does not depend on who shares its batch. Padding is masked in attention and left out of pooling, and every other
operation works on each token by itself; what remains is the order in which a product of another shape adds up, in the
last bits of fp32.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

from embedsmith.core.errors import EmbedsmithError

_SECONDS = 0.1
"""What one batch should take at most: whoever comes now waits for the batch that is computed."""
_CROWD, _LARGER = 16, 4.0
"""From so many waiting callers on a batch grows with their number, to so many times that at most."""
_LEAST, _MOST = 512, 2**17
"""Tokens in a batch, whatever was measured."""
_START = 10_000.0
"""Tokens a second, before anything was measured."""
_COMPUTING = threading.Lock()


class BusyError(EmbedsmithError):
    """The queue is full. `seconds`: when to come again."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(
            f"the server is busy: {waiting:,} texts are waiting", fix=f"send it again in {seconds} seconds"
        )
        self.seconds = seconds


class RetiredError(Exception):
    """The batcher takes nothing more: another is in its place."""


class Batchable(Protocol):
    """What is computed of N items."""

    def rows(self, index: list[int]) -> Self:
        """Those of some items."""
        ...

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts in order."""
        ...


R = TypeVar("R", bound=Batchable)
T = TypeVar("T")


@dataclass(eq=False)
class _Job(Generic[T, R]):
    """The items of one caller; `next` is the first one that is not computed yet."""

    items: Sequence[T]
    costs: Sequence[int]
    kind: Hashable
    future: "Future[R]" = field(default_factory=Future)
    parts: list[R] = field(default_factory=list)
    next: int = 0

    @property
    def waits(self) -> bool:
        return self.next < len(self.items) and not self.future.done()


class Batcher(Generic[T, R]):
    """`compute(items, kind)` in a thread of its own. Items of one kind are computed together. `most_waiting`: items
    that may wait; `on_batch` is told the items and tokens of every batch, and its seconds."""

    def __init__(
        self,
        compute: Callable[[Sequence[T], Any], R],
        name: str,
        most_waiting: int,
        on_batch: Callable[[int, int, float], None] = lambda items, tokens, seconds: None,
    ) -> None:
        self._compute, self._most_waiting, self._on_batch = compute, most_waiting, on_batch
        self._changed = threading.Condition()
        self._jobs: deque[_Job[T, R]] = deque()
        self._closed = False
        self._waiting = self._waiting_tokens = 0
        self._tokens_a_second = _START
        self._thread = threading.Thread(target=self._run, name=f"batches of {name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Items that are not computed yet."""
        return self._waiting

    def submit(self, items: Sequence[T], costs: Sequence[int], kind: Hashable = None) -> "Future[R]":
        """The rows of the items in their order, when they are computed. `costs`: tokens of each, roughly. A future that
        is cancelled is not computed any further.

        Errors: `BusyError` where too much is waiting already; `RetiredError` after `close`.
        """
        job: _Job[T, R] = _Job(items, costs, kind)
        with self._changed:
            if self._closed:
                raise RetiredError
            if self._waiting and self._waiting + len(items) > self._most_waiting:
                raise BusyError(self._waiting, math.ceil(self._waiting_tokens / self._tokens_a_second) or 1)
            self._jobs.append(job)
            self._waiting += len(items)
            self._waiting_tokens += sum(costs)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Take nothing more, and wait until what was taken is computed."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs:
                    if self._closed:
                        return
                    self._changed.wait()
                batch = self._next_batch()
            if batch:
                self._compute_batch(batch)

    def _next_batch(self) -> list[tuple[_Job[T, R], int]]:
        """Items of the kind of the first job, one a job in turn. Jobs of other kinds are then the first."""
        seconds = _SECONDS * min(max(len(self._jobs) / _CROWD, 1.0), _LARGER)
        room = min(max(self._tokens_a_second * seconds, _LEAST), _MOST)
        kind = self._jobs[0].kind
        others = deque(job for job in self._jobs if job.kind != kind)
        turn = deque(job for job in self._jobs if job.kind == kind)
        batch: list[tuple[_Job[T, R], int]] = []
        while turn and (room > 0 or not batch):
            job = turn.popleft()
            if not job.waits:  # it failed, or nobody waits for it any more
                self._forget(job.costs[job.next :])
                continue
            batch.append((job, job.next))
            room -= job.costs[job.next]
            job.next += 1
            if job.next < len(job.items):
                turn.append(job)
        self._jobs = others + turn
        self._forget([job.costs[place] for job, place in batch])
        return batch

    def _forget(self, costs: Sequence[int]) -> None:
        self._waiting -= len(costs)
        self._waiting_tokens -= sum(costs)

    def _compute_batch(self, batch: Sequence[tuple[_Job[T, R], int]]) -> None:
        """Where a batch fails its jobs are computed one by one: the text of one caller is no other's trouble."""
        rows_of: dict[_Job[T, R], list[int]] = {}
        for row, (job, _) in enumerate(batch):
            rows_of.setdefault(job, []).append(row)
        tokens = sum(job.costs[place] for job, place in batch)
        try:
            with _COMPUTING:
                start = time.monotonic()
                made = self._compute([job.items[place] for job, place in batch], batch[0][0].kind)
                seconds = max(time.monotonic() - start, 1e-6)
        except BaseException as error:  # noqa: BLE001  (the native code of tokenizers panics; the thread goes on)
            if len(rows_of) == 1:
                _settle(batch[0][0].future, error)
            else:
                for rows in rows_of.values():
                    self._compute_batch([batch[row] for row in rows])
            return
        self._tokens_a_second += 0.2 * (tokens / seconds - self._tokens_a_second)
        self._on_batch(len(batch), tokens, seconds)
        for job, rows in rows_of.items():
            job.parts.append(made.rows(rows))
            if job.next == len(job.items):
                _settle(job.future, job.parts[0] if len(job.parts) == 1 else type(made).join(job.parts))


def _settle(future: "Future[Any]", outcome: Any) -> None:
    """Hand over what was computed, or the error, to a caller that still waits."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
