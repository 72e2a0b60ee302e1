"""Two ranks of one training that do not agree, or of which one is lost."""

import socket
from typing import Any

from tests.faults.fuzz import Judge, copied
from tests.faults.server import Call, Outcome
from tests.faults.workplace import MAKING

TRAIN = next(command for command in MAKING if command.name == "train")
DIFFERENCES: dict[str, tuple[str, ...]] = {
    "model": ("model.path=parent",),
    "learning rate": ("train.learning_rate=3e-5",),
    "data": ("data.0.limit=12",),
    "steps": ("train.steps=3",),
    "seed": ("train.seed=7",),
    "batch": ("train.batch_size=2",),
    "loss": ("data.0.loss.type=infonce", "data.0.loss.temperature=0.07"),
}
"""What the second rank has that the first has not."""
LOST = ("rank killed early", "rank killed on its way", "rank killed near its end")


def two_ranks(judge: Judge, changes: tuple[str, ...] = (), kill_after: float | None = None) -> list[Outcome]:
    place = copied(judge.base, judge.scratch / "ranks", TRAIN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    calls = []
    for rank in range(2):
        own: dict[str, Any] = {"env": shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}}
        if rank == 1 and kill_after is not None:
            own["kill_after"] = kill_after
        calls.append(Call((*TRAIN.args, "train.steps=4", *(changes if rank == 1 else ())), str(place), **own))
    return judge.server.run(*calls)


def rank_round(judge: Judge, case: str, seconds: float) -> str | None:
    """What is wrong with how the two ended, if anything: all that are left must say what it is, and none may go on."""
    lost = {name: share * seconds for name, share in zip(LOST, (0.3, 0.6, 0.9), strict=True)}
    ends = two_ranks(judge, DIFFERENCES.get(case, ()), lost.get(case))
    if case in lost:
        ends = ends[:1]
    for end in ends:
        if end.hung:
            return "hang"
        if end.crashed:
            return f"traceback: {end.text[-600:]}"
        if end.code == 0 and not (case in lost and (judge.scratch / "ranks" / "run" / "finished.json").exists()):
            return "accepted"  # the other rank had no part left where it was killed after the end
    words = case.replace("batch", "batch_size").split()
    if case in DIFFERENCES and not any(word in end.text for word in words for end in ends):
        return f"vague: {ends[0].text[-400:]}"
    return None


def fair_round(judge: Judge) -> str | None:
    """Two ranks that agree work."""
    ends = two_ranks(judge)
    return None if [end.code for end in ends] == [0, 0] else f"two ranks do not work: {ends[0].text}{ends[1].text}"


__all__ = ["DIFFERENCES", "LOST", "fair_round", "rank_round"]
