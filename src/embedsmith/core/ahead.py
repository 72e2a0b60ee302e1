"""Making the next of several things while one is used."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each made in a thread while the one before is used. An error while one is made is raised where it
    would have been given; however this ends, the thread has ended before."""
    end: Any = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as worker:
        waiting = worker.submit(next, items, end)
        while (item := waiting.result()) is not end:
            waiting = worker.submit(next, items, end)
            yield item
