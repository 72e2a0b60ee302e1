"""Commands that are hurt on their way, and continued: kills, full disks, limits of a file's size, two at once."""

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.fuzz import Judge, copied, results
from tests.faults.server import WATCHED, Call, Outcome
from tests.faults.workplace import Command

OVERWRITES = ("curate", "mine", "train", "merge", "convert", "export")


def made(judge: Judge, command: Command, place: Path) -> dict[str, str]:
    """What stands in a workplace as the result of a command."""
    found = results(command, place, "")
    if command.shown:
        outcome = judge.server.one(command.shown, place)
        found["shown"] = outcome.text if outcome.code == 0 else "not readable"
    return found


class Undisturbed:
    """A command that nobody hurts: its result, seconds, calls of the system, and bytes it needs."""

    def __init__(self, judge: Judge, command: Command) -> None:
        place = copied(judge.base, judge.scratch / "good", command)
        before = _taken(place)
        self.outcome = judge.server.one(command.args, place)
        if self.outcome.code != 0:
            raise RuntimeError(f"{command.name} does not work: {self.outcome.text}")
        self.result, self.bytes = made(judge, command, place), _taken(place) - before
        self.largest = max(path.stat().st_size for path in _files(place / str(command.out)))


def _files(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]


def _taken(place: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in place.rglob("*"))


def kill_moments(good: Undisturbed, count: int, chance: random.Random) -> Iterator[dict[str, Any]]:
    """Half by the clock, half before a call of the system by its number."""
    calls = [(name, number) for name in WATCHED for number in range(1, good.outcome.calls[name] + 1)]
    for place in range(count):
        if calls and place % 2:
            yield {"kill_at": chance.choice(calls)}
        else:
            yield {"kill_after": chance.uniform(0.1, 1.0) * good.outcome.seconds}


def continued(judge: Judge, command: Command, good: Undisturbed, place: Path) -> str | None:
    """Run the command again, undisturbed; what is wrong with the end, if anything."""
    again = judge.server.one(command.args, place)
    if fault := _clear(again):
        return fault
    if again.code != 0:
        return f"does not continue: {again.text[-300:]}"
    if made(judge, command, place) != good.result:
        return "another result"
    out = str(command.out)
    near = [path for path in place.iterdir() if path.name == out or path.name.startswith((f".{out}.", f"..{out}."))]
    litter = [path.name for top in near for path in (top, *top.rglob("*")) if path.name.startswith(".")]
    return f"left over: {litter[:3]}" if litter else None


def _clear(outcome: Outcome) -> str | None:
    return "hang" if outcome.hung else f"traceback: {outcome.text[-500:]}" if outcome.crashed else None


def kill_round(judge: Judge, command: Command, good: Undisturbed, moment: dict[str, Any]) -> str | None:
    place = copied(judge.base, judge.scratch / "killed", command)
    outcome = judge.server.one(command.args, place, **moment)
    if outcome.code >= 0 and (fault := _clear(outcome)):
        return fault
    return continued(judge, command, good, place)


def limit_round(judge: Judge, command: Command, good: Undisturbed, share: float) -> str | None:
    """No file may grow beyond a share of the largest that the command writes."""
    place = copied(judge.base, judge.scratch / "limited", command)
    hurt = judge.server.one(command.args, place, file_size=max(1, int(good.largest * share)))
    return _refused_for_space(hurt) or continued(judge, command, good, place)


def full_round(judge: Judge, command: Command, good: Undisturbed, share: float, disk: Path, over: bool) -> str | None:
    """The disk has room for a share of what the command needs, until it is run again. `over`: it overwrites a result
    of its own, where the verb can."""
    place, ballast = copied(judge.base, disk / "full", command), disk / "ballast"
    over = over and command.verb in OVERWRITES
    if over:
        judge.server.one(command.args, place)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, _free(disk) - int(good.bytes * share)))
    hurt = judge.server.one((*command.args, *(("--overwrite",) if over else ())), place)
    ballast.unlink()
    if fault := _refused_for_space(hurt):
        return fault
    if over and hurt.code != 0 and made(judge, command, place) != good.result:
        return "the old result is lost"
    return continued(judge, command, good, place)


def _free(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


def _refused_for_space(outcome: Outcome) -> str | None:
    if fault := _clear(outcome):
        return fault
    words = ("space", "quota", "too large", "largest", "limit")
    unclear = outcome.code != 0 and not any(word in outcome.text for word in words)
    return f"does not say why: {outcome.text[-300:]}" if unclear else None


def pair_round(judge: Judge, command: Command, good: Undisturbed) -> str | None:
    """Two at once: one does it, the other says who holds the output, or that it is finished."""
    place = copied(judge.base, judge.scratch / "pair", command)
    ends = sorted(judge.server.run(*[Call(command.args, str(place))] * 2), key=lambda end: end.code)
    if fault := _clear(ends[0]) or _clear(ends[1]):
        return fault
    late = ends[1].code == 0 and any("before" in end.text for end in ends)  # it began when the first had ended
    if [end.code for end in ends] != [0, 1] and not late:
        return f"ended with {[end.code for end in ends]}: {ends[1].text[-300:]}"
    if "process" not in ends[1].text and not late:
        return f"the holder is not named: {ends[1].text[-300:]}"
    return None if made(judge, command, place) == good.result else "another result"


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path | None]:
    """A disk of its own in memory; `None` where mounting is not allowed."""
    place.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "faults", place], capture_output=True).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)
