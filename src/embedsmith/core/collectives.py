"""Talk between ranks. Everything here is the identity in a single process.

No function in this file is differentiated by autograd: a collective inside a backward pass hangs as soon as one
rank's loss does not need it. Gradients of gathered values are settled explicitly (see `core/batch.py`).
"""

import atexit
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from embedsmith.core.errors import EmbedsmithError, TrainingError

T = TypeVar("T")

Group = Any  # a process group; None means all ranks
_BUCKET_BYTES = 32 * 2**20


ALONE: Group = "alone"
"""Stands for a group of this rank only, in which everything here is the identity."""


STARTING = timedelta(minutes=10)
"""How long a rank waits for all others to start."""
_WORKING = timedelta(days=365)


def world_size(group: Group = None) -> int:
    several = group is not ALONE and dist.is_available() and dist.is_initialized()
    return dist.get_world_size(group) if several else 1


def rank(group: Group = None) -> int:
    several = group is not ALONE and dist.is_available() and dist.is_initialized()
    return dist.get_rank(group) if several else 0


def join_ranks(patience: timedelta = default_pg_timeout) -> None:
    """Join the ranks that torchrun (or accelerate launch) started. Nothing without a launcher, nor where they are
    joined already. Small objects travel by gloo, tensors of a GPU by NCCL. `patience`: how long one rank waits for
    another before it ends (`lost_ranks`).

    They are left when the process ends, and not before: what joins again after leaving waits for ranks that are gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or (dist.is_available() and dist.is_initialized()):
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        store, own, count = next(rendezvous("env://", timeout=STARTING))
    except ValueError as error:  # a variable of the launcher is missing
        fix = "start it with torchrun or accelerate launch, or unset WORLD_SIZE for one process"
        raise TrainingError(f"WORLD_SIZE is set, but no launcher is here: {error}", fix=fix) from error
    store.set_timeout(patience)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    joined = PrefixStore("default_pg", store)
    dist.init_process_group(backend, timeout=patience, store=joined, rank=own, world_size=count)
    atexit.register(_leave)


def refuse_launcher(verb: str, fix: str) -> None:
    """Errors: `EmbedsmithError` where a launcher started several ranks of a verb that knows of none."""
    if (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise EmbedsmithError(
            f"{verb} works in one process, and a launcher started it on {count} ranks that would do the same", fix=fix
        )


def _leave() -> None:
    """Leave the ranks, with a moment for gloo's threads: one that lets go of its last tensor while the interpreter is
    taken down now and then ends the process with SIGABRT, its work done."""
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)  # FSDP2 keeps the group and its threads alive beyond that call


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Errors: `TrainingError` in place of what gloo or NCCL says when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if "imed out" in str(error) and dist.is_initialized():
            raise TrainingError(
                f"rank {os.environ.get('RANK', rank())} has waited for another one for as long as it may",
                fix="see what the others do; where they only need longer (the first rank scores, or the data lie far "
                "away), raise train.rank_timeout, in minutes; the same command goes on",
            ) from error
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise TrainingError(
                f"rank {os.environ.get('RANK', rank())} lost another process of this run, or never found it",
                fix="see what that process said, or whether it was killed; the same command goes on",
            ) from error
        raise


def gather_rows(tensor: Tensor, group: Group = None) -> Tensor:
    """Rows of all ranks in rank order, [W*N, ...] from [N, ...]; shapes must agree on all ranks. Detached."""
    if world_size(group) == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(world_size(group))]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    return torch.cat(parts)


def sum_over_ranks(tensor: Tensor, group: Group = None) -> Tensor:
    if world_size(group) == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def mean_over_ranks(tensor: Tensor, group: Group = None) -> Tensor:
    ranks = world_size(group)
    return tensor if ranks == 1 else sum_over_ranks(tensor, group) / ranks


def highest_over_ranks(tensor: Tensor, group: Group = None) -> Tensor:
    """Each number's maximum over the ranks, left on its device: nobody waits for it."""
    if world_size(group) == 1:
        return tensor
    highest = tensor.detach().clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    return highest


def agreed_by_hosts(value: int, group: Group = None) -> int:
    """The maximum over the ranks, by way of the hosts where they can talk: no device is waited for."""
    if world_size(group) == 1:
        return value
    return int(highest_over_ranks(torch.tensor(value, device=_meeting_place(group)), group))


def gather_by_hosts(tensor: Tensor, group: Group = None) -> Tensor:
    """`gather_rows` of a tensor that lies on the host, by the same way."""
    return tensor if world_size(group) == 1 else gather_rows(tensor.to(_meeting_place(group)), group).cpu()


def _meeting_place(group: Group) -> torch.device:
    """Where small things travel: the host, but of ranks that somebody else has joined for NCCL alone."""
    alone = world_size(group) > 1 and dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if alone else torch.device("cpu")


def objects_of_all_ranks(value: Any, group: Group = None) -> list[Any]:
    """The (small, picklable) value of every rank, in rank order."""
    if world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def refuse_different(facts: Mapping[str, object], fix: str) -> None:
    """Collective. Errors: `TrainingError` where ranks hold other values, naming each and its ranks."""
    seen: list[Mapping[str, object]] = objects_of_all_ranks(dict(facts))
    different: list[str] = []
    for key in dict.fromkeys(key for each in seen for key in each):
        ranks: dict[str, list[int]] = {}
        for number, each in enumerate(seen):
            ranks.setdefault(str(each.get(key, "nothing")), []).append(number)
        if len(ranks) > 1:
            held = (f"{value} on rank {', '.join(map(str, numbers))}" for value, numbers in ranks.items())
            different.append(f"{key} is {', '.join(held)}")
    if different:
        raise TrainingError(f"the processes of this run differ: {'; '.join(different)}", fix=fix)


def on_first_rank(act: Callable[[], T], group: Group = None) -> T:
    """Run `act` on the first rank only; every rank gets its (small, picklable) result, or raises its error."""
    outcome: tuple[Any, EmbedsmithError | None] = (None, None)
    if rank() == 0:
        try:
            outcome = (act(), None)
        except EmbedsmithError as error:
            outcome = (None, error)
    result, raised = objects_of_all_ranks(outcome, group)[0]
    if raised is not None:
        raise raised
    value: T = result
    return value


class FailedElsewhereError(EmbedsmithError):
    """Another rank failed, and has told all ranks; this one stops too."""


def on_every_rank(act: Callable[[], T], where: object, fix: str | None = None, group: Group = None) -> T:
    """Run `act` on every rank, and wait for all of them. Errors: the rank's own; an `EmbedsmithError` with its message
    on the others."""
    failed: EmbedsmithError | None = None
    outcome: Any = None
    try:
        outcome = act()
    except FailedElsewhereError:
        raise  # it was told already
    except EmbedsmithError as error:
        failed = error
    told = objects_of_all_ranks(None if failed is None else str(failed), group)
    if failed is not None:
        raise failed
    if messages := [message for message in told if message]:
        raise EmbedsmithError(f"another rank failed: {messages[0]}", where=where, fix=fix)
    value: T = outcome
    return value


def patient_ranks() -> Group:
    """All ranks, as a group in which one may be waited for as long as its share of a work takes. A rank that is gone is
    still noticed at once: its connections end. Collective."""
    return _patient(dist.group.WORLD) if world_size() > 1 else None


@cache
def _patient(world: Group) -> Group:
    return dist.new_group(backend="gloo", timeout=_WORKING)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over ranks; one that is missing on some ranks counts as zero there, one that
    is missing on all stays missing, so that an optimizer leaves the parameter alone, as it would in one process.

    This is all that data parallelism is here. Unlike a wrapper's hooks it does not care how many chunks a rank
    encoded, in which order, or which heads its loss read.
    """
    if world_size() == 1:
        return
    for bucket in _buckets(complete_gradients(parameters)):
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat)
        flat /= world_size()
        for gradient, mean in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            gradient.copy_(mean)


def complete_gradients(parameters: Iterable[torch.nn.Parameter]) -> list[Tensor]:
    """The gradients that any rank has, in the same order on every rank; zeros stand in where one is missing here."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:  # all of them are in shards
        return []
    holders = sum_over_ranks(torch.tensor([float(p.grad is not None) for p in trained], device=_meeting_place(None)))
    gradients: list[Tensor] = []
    for parameter, count in zip(trained, holders.tolist(), strict=True):
        if count > 0:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    return gradients


def _buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        size = sum(t.numel() * t.element_size() for t in bucket)
        if bucket and (
            size + tensor.numel() * tensor.element_size() > _BUCKET_BYTES or tensor.dtype != bucket[0].dtype
        ):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
