"""Inputs from a seed, run and judged: a clear error or the right result, and never a traceback or a hang."""

import hashlib
import random
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.faults.mutate import Mutation, mutations
from tests.faults.server import Outcome, Server
from tests.faults.workplace import MAKING, READING, Command

KINDS = {
    ".safetensors": "weights",
    ".json": "json",
    ".jsonl": "rows",
    ".gz": "rows",
    ".yaml": "recipe",
    ".parquet": "table",
    ".csv": "table",
    ".tsv": "table",
    ".npy": "vectors",
    ".txt": "text",
}


@dataclass(frozen=True)
class Input:
    """A command and one changed file."""

    command: Command
    file: str
    mutation: Mutation

    @property
    def kind(self) -> str:
        return KINDS.get(Path(self.file).suffix, "other")

    def __str__(self) -> str:
        return f"{self.command.name}: {self.file}: {self.mutation.name} ({self.mutation.verdict})"


@dataclass(frozen=True)
class Finding:
    """What was wrong with how an input ended: traceback, accepted, hang, refused, differs, vague, escapes, owned."""

    input: Input
    fault: str
    text: str


def inputs(base: Path, seed: int, each: int, share: float = 1.0) -> Iterator[Input]:
    """`each` changes of every file that a command reads, and a third as many where it only may read it; of a share of
    the files."""
    for command in (*MAKING, *READING):
        chance = random.Random(f"{seed} {command.name}")
        seen: set[str] = set()
        for must, patterns in ((True, command.reads), (False, command.looks)):
            files = sorted({path for pattern in patterns for path in base.glob(pattern) if path.is_file()})
            names = [str(path.relative_to(base)) for path in files]
            for name in names:
                if name in seen or chance.random() > (share / 5 if "/segments/" in name else share):
                    continue
                seen.add(name)
                every = [one for one in mutations(base / name, chance) if must or one.verdict != "same"]
                for one in chance.sample(every, min(len(every), each if must else max(1, each // 3))):
                    verdict = one.verdict if must else "either"
                    yield Input(command, name, Mutation(one.name, verdict, one.put))


class Judge:
    """Runs inputs in copies of a workplace and says what is wrong with how they end."""

    def __init__(self, server: Server, base: Path, scratch: Path) -> None:
        self.server, self.base, self.scratch = server, base, scratch
        self._expected: dict[str, dict[str, str]] = {}

    def judge(self, one: Input) -> Finding | None:
        place = copied(self.base, self.scratch / "place", one.command)
        one.mutation.put(place / one.file)
        outcome = self.server.one(one.command.args, place)
        fault = self._fault(one, outcome, place)
        return None if fault is None else Finding(one, fault, outcome.text[-1500:])

    def _fault(self, one: Input, outcome: Outcome, place: Path) -> str | None:
        verdict = one.mutation.verdict
        if outcome.hung:
            return "hang"
        if (place / "owned").exists():
            return "owned"
        if outcome.crashed:
            return "traceback"
        if "\x1b" in outcome.text:
            return "escapes"
        if outcome.code != 0:
            return "refused" if verdict == "same" else None if _names(one, outcome.text) else "vague"
        if verdict == "refuse":
            return "accepted"
        if verdict == "same" and self.expected(one.command) != results(one.command, place, outcome.text):
            return "differs"
        return None if finite(one.command, place) else "not finite"

    def expected(self, command: Command) -> dict[str, str]:
        """What the command makes of good input, as far as that is the same twice."""
        if command.name not in self._expected:
            place = copied(self.base, self.scratch / "good", command)
            outcome = self.server.one(command.args, place)
            if outcome.code != 0:
                raise RuntimeError(f"{command.name} does not work: {outcome.text}")
            self._expected[command.name] = results(command, place, outcome.text)
        return self._expected[command.name]


def copied(base: Path, place: Path, command: Command) -> Path:
    """A fresh copy of what a command needs of a workplace: not what others made, and not its own result unless that is
    what it reads."""
    wanted = {Path(each).parts[0] for each in (*command.args, *command.reads, *command.looks) if each}
    patterns = {each for each in wanted if "*" in each}
    made = {other.out for other in MAKING if other.out and other is not command}
    skipped = {name for name in made if name not in wanted and not any(Path(name).match(each) for each in patterns)}
    skipped |= {command.out} if command in MAKING and command.out else set()
    if command.verb in ("index", "search") and command not in MAKING:
        skipped.discard("index")
    skipped |= {entry.name for entry in base.glob("run*") if entry.is_dir() and command.name != "report"}
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    beside = tuple(name.removesuffix("jsonl") for name in skipped if name.endswith(".jsonl"))
    entries = [each for each in base.iterdir() if each.name not in skipped and not each.name.startswith(beside)]
    subprocess.run(["cp", "-a", "--sparse=always", *entries, place], check=True)
    return place


def results(command: Command, place: Path, text: str) -> dict[str, str]:
    """Hashes of what a command makes, by name; what it prints where that is all."""
    files = {str(path.relative_to(place)): path for pattern in command.makes for path in place.glob(pattern)}
    found = {name: hashlib.sha256(_lasting(path)).hexdigest() for name, path in sorted(files.items()) if path.is_file()}
    return found | ({"": text.replace(str(place), "")} if command.prints else {})


def _lasting(path: Path) -> bytes:
    """What a file holds, without how long it took."""
    data = path.read_bytes()
    return re.sub(rb'"seconds": [0-9.e-]+', b"", data) if path.suffix == ".json" else data


def finite(command: Command, place: Path) -> bool:
    """Whether all numbers of what was made are."""
    for pattern in command.makes:
        for path in place.glob(pattern):
            if path.suffix == ".safetensors" and not all(np.isfinite(each).all() for each in load_file(path).values()):
                return False
            if path.suffix == ".npy" and not np.isfinite(np.load(path).astype("float64")).all():
                return False
    return True


def _names(one: Input, text: str) -> bool:
    """Whether an error names the changed file, its folder, or the key that was changed."""
    parts = [part for part in Path(one.file).parts if len(part) > 1]
    keys = [key for key in one.mutation.name.split(" ")[0].split(".") if len(key) > 2 and not key.isdigit()]
    unread = one.command.args[1:] if one.command.verb == "push" else ()  # the hub is asked first
    return any(word in text for word in (*parts, Path(one.file).stem, *keys, *unread))


def fuzz(judge: Judge, chosen: Sequence[Input]) -> list[Finding]:
    return [found for one in chosen if (found := judge.judge(one)) is not None]
