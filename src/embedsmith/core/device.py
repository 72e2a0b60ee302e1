"""What this machine has: processor cores and their arithmetic."""

import os
import sys


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
