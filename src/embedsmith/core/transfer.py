"""Between the host and the device: copies that no one waits for, and the one place where a step waits."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


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
