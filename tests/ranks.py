"""Run a function on several gloo processes and get what rank 0 returned.

A gloo process may abort at interpreter exit after correct work, so workers leave with `os._exit` and are judged by
the file they wrote.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Workers are forked from a server that has imported everything once: starting one costs no import.
multiprocessing.set_forkserver_preload(["torch.distributed", "embedsmith.losses", "embedsmith.train.loop"])


def on_ranks(world: int, work: Callable[..., Any], folder: Path, *arguments: Any, may_die: bool = False) -> list[Any]:
    """The return value of `work(*arguments)` on every rank, in rank order. `work` must be importable.

    `may_die`: a rank that is killed gives `None`, and the others have a minute to notice.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (world, port, work, str(folder), arguments)
    started = mp.start_processes(_rank, given, nprocs=world, join=not may_die, start_method="forkserver")
    for process in started.processes if may_die else ():
        process.join(60)
        assert not process.is_alive(), "a rank hangs"
    paths = [folder / f"rank{r}.pt" for r in range(world)]
    return [torch.load(path, weights_only=False) if path.exists() or not may_die else None for path in paths]


def _rank(rank: int, world: int, port: int, work: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.save(work(*arguments), Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
