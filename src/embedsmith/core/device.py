"""What this machine has: memory, processor cores and their arithmetic."""

import os
import sys
from pathlib import Path
from typing import Any

from embedsmith.core.errors import ModelError


def memory() -> int | None:
    """Bytes of memory this process may use, which in a container are fewer than the machine has; `None`: unknown."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    try:
        return min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no limit, or no such file
        return whole


def check_fits(size: int, what: str, where: object = None) -> None:
    """Before anything is allocated. Errors: `ModelError` for more bytes than there is memory."""
    limit = memory()
    if limit is not None and size > limit:
        raise ModelError(
            f"{what} would take {size / 1e9:,.0f} GB, and this machine has {limit / 1e9:,.0f} GB of memory",
            where=where,
            fix="check the sizes that were asked for; where they are meant, use a machine with more memory",
        )


def device_named(name: Any) -> Any:
    """A `torch.device` by its name. Errors: `ModelError` for one that this machine or this torch does not have, before
    anything is loaded."""
    import torch

    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"no device is called {name!r}", expected="cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ModelError(
                f"the device {str(device)!r} is asked for, and {why_no_cuda()}",
                fix="leave the device out for what there is, or look at what there is: embedsmith doctor",
            )
        if (device.index or 0) >= count:
            raise ModelError(f"the device {str(device)!r} is asked for", expected=f"cuda:0 to cuda:{count - 1}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("the device 'mps' is asked for, and this is no Mac with Apple's GPU", expected="cpu or cuda")
    return device


def use_device(name: str) -> None:
    """From here on this process and those it starts run on one device, as if the machine had no other. To be called
    before anything runs on a GPU.

    Errors: `ModelError` for a device that is not here, and for one card under a launcher of several processes, which
    gives each its own.
    """
    global _cpu_alone
    wanted = f"cuda:{name}" if name.isdecimal() else name
    kind, _, number = wanted.partition(":")
    if kind == "cuda" and number and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ModelError(
            f"--device {name} under a launcher, which gives every process a card",
            fix="leave --device out, and name the cards with CUDA_VISIBLE_DEVICES",
        )
    try:
        device_named(wanted)
    except ModelError as error:
        fix = "leave --device out, or say --device cpu"
        raise ModelError(f"--device {name}: {error.what}", expected=error.expected, fix=fix) from error
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"], _cpu_alone = "", True
    elif number.isdecimal():  # of those that this process was given
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(number)] if visible != [""] else number


_cpu_alone = False


def has_mps() -> bool:
    """Whether there is Apple's GPU, and it may be used."""
    import torch

    return torch.backends.mps.is_available() and not _cpu_alone


def why_no_cuda() -> str:
    """Why torch uses no CUDA card, where it uses none."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    return f"torch ({torch.__version__}) sees no CUDA card: look at nvidia-smi, and at CUDA_VISIBLE_DEVICES"


def cores() -> int:
    """CPU cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_multiplies_bf16() -> bool | None:
    """Whether the CPU multiplies bf16 itself; without it bf16 works, and is slower than fp32."""
    import torch

    try:
        capabilities = torch.cpu.get_capabilities()
    except AttributeError:  # an older torch does not say
        return None
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
