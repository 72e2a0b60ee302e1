"""What goes on at once: copies between host and device that no one waits for, the one place where a step waits, and the
next of several things, made while one is used."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

T = TypeVar("T")


def to_device(values: Tensor | npt.NDArray[np.generic], device: torch.device | str) -> Tensor:
    """An array or a tensor of the host on a device. To a CUDA card it goes from pinned memory, so that the host queues
    the copy and goes on; anything else is moved as ever."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def read(values: Tensor) -> list[float]:
    """The numbers of a small tensor [N]. The host waits here until the device has computed them."""
    numbers: list[float] = values.tolist()
    return numbers


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each made in a thread while the one before is used. An error while one is made is raised where it
    would have been given; however this ends, the thread has ended before."""
    end: Any = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as worker:
        waiting = worker.submit(next, items, end)
        while (item := waiting.result()) is not end:
            waiting = worker.submit(next, items, end)
            yield item
