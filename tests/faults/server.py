"""Commands of the program in forked processes: everything is imported once, so one costs a fraction of a second.

A `Server` is a process of its own that has done no work: threads and caches of the caller are not inherited. Each
command runs in a fork of it, with its own folder, limits and output, and can be killed at a moment that is chosen.
"""

import fcntl
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.common import resident

CPU_SECONDS = 20
"""A command that computes for longer hangs."""
ASLEEP = 10
"""So does one that has waited for so many seconds without computing."""
MEMORY = 6 << 30
"""Bytes of address space over what the imports take."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Call:
    """One command. `kill_at`: (name of an `os` function, n) before whose n-th call the process kills itself.
    `kill_after`: seconds after which it is killed. `file_size`: the largest file it may write. `env`: added to its
    environment. `patience`: seconds that it may compute; with more than usual its memory has no limit either."""

    args: tuple[str, ...]
    cwd: str
    kill_at: tuple[str, int] | None = None
    kill_after: float | None = None
    file_size: int | None = None
    env: dict[str, str] = field(default_factory=dict)
    patience: int = CPU_SECONDS


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `code`: of its exit, below zero for a signal. `text`: all that it printed. `calls`: how
    often the functions of `WATCHED` were called. `memory`: MiB at most, over what the imports take."""

    code: int
    text: str
    seconds: float
    calls: dict[str, int]
    memory: float

    @property
    def hung(self) -> bool:
        return self.code in (-signal.SIGXCPU, -signal.SIGALRM)

    @property
    def crashed(self) -> bool:
        """A traceback, or an end that is no message of ours."""
        return not self.hung and ("Traceback (most recent" in self.text or self.code not in (0, 1, 2) or self.silent)

    @property
    def silent(self) -> bool:
        """It failed, but said only that it did."""
        return self.code != 0 and not self.text.replace("Aborted!", "").strip()


WATCHED = ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir", "open", "ftruncate", "posix_fallocate")


class Server:
    """The process that commands are forked from. Use it in a `with`."""

    def __init__(self) -> None:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
            text=True,
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, *calls: Call) -> list[Outcome]:
        """Run commands at the same time; each outcome in the order of the calls."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([asdict(call) for call in calls]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of commands ended with {self._process.wait()}")
        return [Outcome(**one) for one in json.loads(line)]

    def one(self, args: Sequence[str], cwd: Path, **options: Any) -> Outcome:
        return self.run(Call(tuple(args), str(cwd), **options))[0]


def serve() -> None:
    """Answer lines of calls with lines of outcomes, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import embedsmith.cli.stages
    import embedsmith.train.loop  # noqa: F401

    for line in sys.stdin:
        calls = [Call(**one) for one in json.loads(line)]
        children = [_Child(call) for call in calls]
        while not all([child.ended() for child in children]):
            time.sleep(0.002)
        print(json.dumps([asdict(child.outcome()) for child in children]), file=answers, flush=True)


class _Child:
    """A fork that runs a command. What it prints comes through a pipe, since the size of its files may be limited."""

    def __init__(self, call: Call) -> None:
        self._call, self._started, self._said = call, time.monotonic(), b""
        self._pipe, end = os.pipe()
        fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, 1 << 20)
        os.set_blocking(self._pipe, False)
        self._facts = Path(tempfile.gettempdir()) / f"faults-{os.getpid()}-{id(self)}.json"
        self._pid = os.fork() or _become(call, end, self._facts)
        os.close(end)
        self._code: int | None = None
        self._computed, self._since, self._seconds = 0.0, self._started, 0.0

    def ended(self) -> bool:
        """Whether it is over. One that has slept for `ASLEEP` seconds without computing is ended as hung."""
        if self._code is not None:
            return True
        with suppress(BlockingIOError):
            self._said += os.read(self._pipe, 1 << 20)
        now = time.monotonic()
        if self._call.kill_after is not None and now - self._started > self._call.kill_after:
            os.kill(self._pid, signal.SIGKILL)
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        if (computed := float(fields[11]) + float(fields[12])) != self._computed or fields[0] not in "SD":
            self._computed, self._since = computed, now
        elif now - self._since > ASLEEP:
            os.kill(self._pid, signal.SIGALRM)
        ended, status = os.waitpid(self._pid, os.WNOHANG)
        if ended:
            self._code, self._seconds = os.waitstatus_to_exitcode(status), now - self._started
        return bool(ended)

    def outcome(self) -> Outcome:
        with suppress(BlockingIOError):
            while piece := os.read(self._pipe, 1 << 20):
                self._said += piece
        os.close(self._pipe)
        calls: dict[str, int] = {}
        memory = 0.0
        if self._facts.exists():
            found = json.loads(self._facts.read_text())
            self._facts.unlink()
            calls, memory = found["calls"], found["memory"]
            for name in found["modules"]:  # the next fork finds them imported
                try:
                    importlib.import_module(name)
                except Exception:  # noqa: BLE001 (some are made up, such as six.moves)
                    continue
        assert self._code is not None
        return Outcome(self._code, self._said.decode("utf-8", "replace"), self._seconds, calls, memory)


def _become(call: Call, output: int, facts: Path) -> int:
    """Become the command: never returns."""
    code = 70
    try:
        known, taken = set(sys.modules), resident("VmRSS")
        os.chdir(call.cwd)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update({"XDG_CACHE_HOME": f"{call.cwd}/.cache"} | call.env)
        calls = _watch(call.kill_at)
        _limit(call)
        sys.argv = ["embedsmith", *call.args]
        code = _main()
        if code == 0 and call.file_size is None:
            new, most = sorted(set(sys.modules) - known), resident("VmHWM") - taken
            facts.write_text(json.dumps({"calls": calls, "modules": new, "memory": most}))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return 0


def _main() -> int:
    import traceback

    from embedsmith.cli import main

    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 (what a user would see)
        traceback.print_exc()
        return 1
    return 0


def _limit(call: Call) -> None:
    if call.file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (call.file_size, call.file_size))
    if call.patience == CPU_SECONDS:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (call.patience, call.patience + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _watch(kill_at: tuple[str, int] | None) -> dict[str, int]:
    """Count the calls of `WATCHED`, and kill this process before the one that is named."""
    calls = dict.fromkeys(WATCHED, 0)

    def watched(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            if kill_at is not None and (name, calls[name]) == (kill_at[0], kill_at[1]):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in WATCHED:
        setattr(os, name, watched(name, getattr(os, name)))
    return calls


if __name__ == "__main__":
    serve()
