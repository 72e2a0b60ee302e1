"""Is anything lost, or wrong in silence? Malformed files, kills, full disks, two writers, ranks, files of strangers.

    python -m bench.faults                         # everything: about an hour of one core
    python -m bench.faults --parts kills --share 0.1

Every input and moment follows from the seed. One table is printed, verb by kind; what was wrong stands in
bench/results/faults.json with its input, and can be done again with --verbs and the same seed.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tests.faults.fuzz import Judge, inputs
from tests.faults.hostile import CASES, hostile_round
from tests.faults.rank_rounds import DIFFERENCES, LOST, fair_round, rank_round
from tests.faults.rounds import Undisturbed, full_round, kill_moments, kill_round, limit_round, pair_round, small_disk
from tests.faults.server import Server
from tests.faults.workplace import MAKING, furnish, use

from bench.common import RESULTS, environment, read_json, write_json

PARTS = ("files", "kills", "limits", "disks", "pairs", "ranks", "hostile")
KILLS, MOMENTS, PAIRS, CHANGES = 36, 10, 5, 11
"""Kills a verb, moments of a full disk and of a limit a verb, pairs a verb, changes a file."""
Row = tuple[str, str, str, str | None, str]
"""Verb, kind, what was done, the fault if there is one, and what was printed."""


class Work:
    """The workplace that all parts share, in memory where the machine has a disk there."""

    def __init__(self, server: Server, root: Path, seed: int, share: float, verbs: list[str]) -> None:
        self.base, self.seed, self.share, self.verbs = furnish(root / "base"), seed, share, verbs
        use(server, self.base)
        self.judge, self.root = Judge(server, self.base, root), root

    def some(self, count: int) -> int:
        return max(1, round(count * self.share))

    def files(self) -> Iterator[Row]:
        for one in inputs(self.base, self.seed, self.some(CHANGES)):
            if not self.verbs or one.command.verb in self.verbs:
                found = self.judge.judge(one)
                yield one.command.verb, one.kind, str(one), found and found.fault, found.text if found else ""

    def kills(self) -> Iterator[Row]:
        def rounds(command, good, chance):  # type: ignore[no-untyped-def]
            for moment in kill_moments(good, self.some(KILLS), chance):
                yield str(moment), kill_round(self.judge, command, good, moment)

        yield from self._each("kill", rounds)

    def limits(self) -> Iterator[Row]:
        def rounds(command, good, chance):  # type: ignore[no-untyped-def]
            for place in range(self.some(MOMENTS)):
                share = (place + chance.random()) / self.some(MOMENTS)
                yield f"{share:.3f}", limit_round(self.judge, command, good, share)

        yield from self._each("limit", rounds)

    def disks(self) -> Iterator[Row]:
        with small_disk(self.root / "disk", "600m") as disk:
            if disk is None:
                print("disks: left out, since mounting is not allowed here", file=sys.stderr)
                return

            def rounds(command, good, chance):  # type: ignore[no-untyped-def]
                for place in range(self.some(MOMENTS)):
                    share = (place + chance.random()) / self.some(MOMENTS)
                    over = bool(place % 2)
                    yield f"{share:.3f}, over {over}", full_round(self.judge, command, good, share, disk, over)

            yield from self._each("full disk", rounds)

    def pairs(self) -> Iterator[Row]:
        def rounds(command, good, chance):  # type: ignore[no-untyped-def]
            for place in range(self.some(PAIRS)):
                yield f"pair {place}", pair_round(self.judge, command, good)

        yield from self._each("pair", rounds)

    def _each(self, kind: str, rounds: Callable[..., Iterator[tuple[str, str | None]]]) -> Iterator[Row]:
        for command in MAKING:
            if self.verbs and command.verb not in self.verbs:
                continue
            good = Undisturbed(self.judge, command)
            for what, fault in rounds(command, good, random.Random(f"{self.seed} {kind} {command.name}")):
                short = None if fault is None else fault.partition(":")[0]
                yield command.verb, kind, f"{command.name}: {what}", short, fault or ""

    def ranks(self) -> Iterator[Row]:
        started = time.monotonic()
        fault = fair_round(self.judge)
        seconds = time.monotonic() - started
        yield "train", "ranks", "agreeing", fault and "fail", fault or ""
        for case in (*DIFFERENCES, *LOST):
            fault = rank_round(self.judge, case, seconds)
            yield "train", "ranks", case, fault and fault.partition(":")[0], fault or ""

    def hostile(self) -> Iterator[Row]:
        for case, (name, _) in CASES.items():
            fault = hostile_round(self.judge, case)
            yield name.split()[0], "hostile", case, None if fault is None else fault.partition(":")[0], fault or ""


def table(counts: dict[tuple[str, str], Counter[str]]) -> Table:
    faults = sorted({fault for count in counts.values() for fault in count} - {"inputs"})
    view = Table("verb", "kind", "inputs", *faults)
    for (verb, kind), count in sorted(counts.items()):
        view.add_row(verb, kind, *(str(count[name]) for name in ("inputs", *faults)))
    total = sum(counts.values(), Counter())
    view.add_section()
    view.add_row("all", "", *(str(total[name]) for name in ("inputs", *faults)))
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--verbs", nargs="*", default=[], help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs and moments")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="faults-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    counts: dict[tuple[str, str], Counter[str]] = {}
    wrong: list[dict[str, str]] = []
    started = time.monotonic()
    try:
        with Server() as server:
            work = Work(server, root, arguments.seed, arguments.share, arguments.verbs)
            for part in arguments.parts:
                for verb, kind, what, fault, text in getattr(work, part)():
                    count = counts.setdefault((verb, kind), Counter())
                    count["inputs"] += 1
                    if fault is not None:
                        count[fault] += 1
                        wrong.append({"fault": fault, "what": what, "text": text})
                        print(f"{fault}: {what}: {' '.join(text.split())[-300:]}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    Console(width=160).print(table(counts))
    keep(arguments.parts, counts, wrong, time.monotonic() - started)
    sys.exit(bool(wrong))


def keep(
    parts: list[str], counts: dict[tuple[str, str], Counter[str]], wrong: list[dict[str, str]], seconds: float
) -> None:
    """Add to what is in bench/results/faults.json, part by part."""
    path = RESULTS / "faults.json"
    kept = read_json(path, {})
    rows = [{"verb": verb, "kind": kind, **count} for (verb, kind), count in sorted(counts.items())]
    kept["+".join(parts)] = environment() | {"seconds": round(seconds), "rows": rows, "wrong": wrong}
    write_json(path, kept)


if __name__ == "__main__":
    main()
