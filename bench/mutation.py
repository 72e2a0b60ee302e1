"""Do the tests see plausible bugs? Mutants of every room, each under the tests of its room.

    python -m bench.mutation [--room train] [--sample 300] [--seed 0] [--jobs 2]

1. cosmic-ray, in an environment of its own, makes the mutants (`bench/mutants.py`; operators of our own in
   `bench/mutation_operators`).
2. The tests of the rooms run once and note which test runs which line (coverage.py's contexts). A line that runs at
   import or in a fixture belongs to every test that uses its module; tests on several processes belong to every
   module of their room, since the lines that their children run are not noted.
3. Each mutant gets the tests that run its line, the quickest first, until one fails. Mutants run in copies of the
   tree, in processes forked from one that has the heavy libraries loaded.

Results are kept as they come in `bench/results/mutation.json`, so that a run can be stopped and continued. A mutant
that was killed stays killed while its line stands; a survivor runs again where its room's tests have changed.
Equivalent mutants, which no test can see, stand in `bench/mutation_equivalent.yaml` with the reason.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import Any

import pytest
import yaml

from bench.common import RESULTS, ROOT, WORK, environment, read_json, write_json
from bench.mergekit_env import installed

PACKAGE = ROOT / "src" / "embedsmith"
PACKAGES = ("cosmic-ray==8.7.0", "parso", "stevedore", "attrs", "toml", str(ROOT / "bench" / "mutation_operators"))
KEPT = RESULTS / "mutation.json"
EQUIVALENT = ROOT / "bench" / "mutation_equivalent.yaml"
FOLDER = WORK / "mutation"
HEAVY = ["torch", "transformers", "numpy", "scipy.stats", "pyarrow.parquet", "safetensors.torch", "pydantic", "pytest"]
LEAST = 12  # mutants of the smallest room
LONGEST = 300  # seconds of tests for a mutant: one that lives so long is counted as a survivor
# Tests that reach a room through the verb above it, and so stand in that verb's room.
VERBS = ["tests/cli/test_evaluate.py", "tests/cli/test_ranks_and_shards.py", "tests/cli/test_verbs.py"]
ALSO = {"data": ["tests/api/test_tokenizing.py"], "api": ["tests/serve/test_server.py", *VERBS]}
ALSO_OF_ALL = ["tests/test_keys.py"]  # every key and fingerprint, of whatever room
Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--room", action="append", help="only this room; may be given several times")
    parser.add_argument("--sample", type=int, default=300, help="mutants in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    rooms = given.room or sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())
    mutants = make_mutants(rooms, given.sample, given.seed)
    maps = {room: tests_of(room) for room in sorted({mutant["room"] for mutant in mutants})}
    kept = read_json(KEPT, {"environment": environment(), "mutants": {}})
    run_all([m for m in mutants if not settled(kept["mutants"].get(m["key"]), maps[m["room"]])], maps, kept, given.jobs)
    print(table([kept["mutants"][mutant["key"]] for mutant in mutants]))


# ---------------------------------------------------------------------------------------------------------- mutants


def make_mutants(rooms: list[str], count: int, seed: int) -> list[Json]:
    python = installed("cosmic_ray", PACKAGES)
    lines = {room: sum(p.read_bytes().count(b"\n") for p in (PACKAGE / room).rglob("*.py")) for room in rooms}
    shares = [f"{room}={max(LEAST, round(count * size / sum(lines.values())))}" for room, size in lines.items()]
    command = [str(python), "-m", "bench.mutants", *shares, "--seed", str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


def settled(kept: Json | None, tests: Json) -> bool:
    """Whether this mutant needs no run: it was killed, or it survived these very tests."""
    return kept is not None and (kept["killed_by"] is not None or kept["tests"] == tests["digest"])


# ------------------------------------------------------------------------------------------- which test runs which line


def tests_of(room: str) -> Json:
    """`lines`: module -> line -> tests; `modules`: module -> tests; `seconds`: test -> time; `several`: those of
    several processes. Made once for a state of the room and its tests."""
    digest = _digest(*(ROOT / name for name in (f"src/embedsmith/{room}", *tests_for(room))))
    path = FOLDER / f"tests-{room}.json"
    found = read_json(path, None)
    if found is None or found["digest"] != digest:
        print(f"which tests run which line of {room} ...", flush=True)
        found = {"digest": digest, **_observe(room)}
        write_json(path, found)
    return found


def tests_for(room: str) -> list[str]:
    """The folder with a room's tests, and files beside it."""
    return [f"tests/{room}", *ALSO.get(room, []), *ALSO_OF_ALL]


def _observe(room: str) -> Json:
    data = FOLDER / f"coverage-{room}"
    data.unlink(missing_ok=True)
    watch = Watch()
    child = multiprocessing.get_context("spawn").Process(target=_run_covered, args=(ROOT, room, str(data), watch))
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(f"the tests of {room} do not pass without a mutant")
    seen = json.loads(Path(f"{data}.json").read_text(encoding="utf-8"))
    return seen | _contexts(room, data, list(seen["seconds"]))


class Watch:
    """A plug-in of pytest: how long each test takes, and which are of several processes."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.several: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.several = [item.nodeid for item in items if item.get_closest_marker("dist")]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration


def _run_covered(tree: Path, room: str, data: str, watch: Watch) -> None:
    _enter(tree)
    os.environ["COVERAGE_FILE"] = data
    code = pytest.main(
        ["-q", *_NO_CACHE, *tests_for(room), "--cov=embedsmith", "--cov-context=test", "--cov-report="], [watch]
    )
    seen = {"seconds": {k: round(v, 3) for k, v in watch.seconds.items()}, "several": watch.several}
    Path(f"{data}.json").write_text(json.dumps(seen), encoding="utf-8")
    sys.exit(int(code))


def _contexts(room: str, data: Path, tests: list[str]) -> Json:
    from coverage import CoverageData

    found = CoverageData(str(data))
    found.read()
    lines: dict[str, dict[int, list[str]]] = {}
    modules: dict[str, list[str]] = {}
    for path in found.measured_files():
        module = Path(path)
        if not module.is_relative_to(PACKAGE / room):
            continue
        name, by_line, users = str(module.relative_to(PACKAGE)), defaultdict(set), set()
        shared = set()  # lines that run at import or in a fixture
        for line, contexts in found.contexts_by_lineno(path).items():
            for context in contexts:
                test, _, phase = context.rpartition("|")
                if phase == "run":
                    by_line[line].add(test)
                    users.add(test)
                else:
                    shared.add(line)
        modules[name] = sorted(users)
        lines[name] = {line: [] if line in shared else sorted(who) for line, who in by_line.items()}
    return {"lines": lines, "modules": modules, "all": tests}


def chosen(mutant: Json, tests: Json) -> list[str]:
    """The tests for a mutant, the quickest first, those of several processes last."""
    module = mutant["module"]
    of_line = tests["lines"].get(module, {}).get(str(mutant["line"]))
    names = of_line or tests["modules"].get(module) or tests["all"]
    quick = sorted(set(names) - set(tests["several"]), key=lambda name: tests["seconds"].get(name, 0))
    return [*quick, *sorted(tests["several"], key=lambda name: tests["seconds"].get(name, 0))]


# ---------------------------------------------------------------------------------------------------------- the runs


def run_all(mutants: list[Json], maps: dict[str, Json], kept: Json, jobs: int) -> None:
    context = multiprocessing.get_context("forkserver")
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    context.set_forkserver_preload(HEAVY)
    trees: Queue[Path] = Queue()
    for number in range(jobs):
        trees.put(_copy_of_tree(FOLDER / f"tree-{number}"))
    lock, left, equivalent = Lock(), len(mutants), reasons()

    def one(mutant: Json) -> None:
        nonlocal left
        tests = maps[mutant["room"]]
        if mutant["key"] in equivalent:
            found = outcome(mutant, None, 0, 0.0, tests)
        else:
            tree = trees.get()
            try:
                found = judge(mutant, tests, tree, context)
            finally:
                trees.put(tree)
        with lock:
            left -= 1
            kept["mutants"][mutant["key"]] = found
            kept["environment"] = environment()
            write_json(KEPT, kept)
            fate = f"killed by {found['killed_by']}" if found["killed_by"] else "SURVIVED"
            print(
                f"{left:4} left  {mutant['key']}  {mutant['module']}:{mutant['line']} {mutant['operator']}: {fate}",
                flush=True,
            )

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, mutants))


def judge(mutant: Json, tests: Json, tree: Path, context: Any) -> Json:
    """What became of one mutant. Time is up for a test at four times what it takes without it, and a minute."""
    names = chosen(mutant, tests)
    target = tree / "src" / "embedsmith" / mutant["module"]
    original, said = target.read_bytes(), tree / "failed.txt"
    said.unlink(missing_ok=True)
    target.write_text(mutant["text"], encoding="utf-8")
    started = time.monotonic()
    try:
        seconds = {name: tests["seconds"].get(name, 0) for name in names}
        child = context.Process(target=_run_tests, args=(tree, seconds, said))
        child.start()
        child.join(LONGEST)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # what its tests started
        lived = child.exitcode in (None, 0)
        child.join()
    finally:
        target.write_bytes(original)
    killed_by = None
    if not lived:
        killed_by = "time" if child.exitcode == -signal.SIGALRM else "import"
        killed_by = said.read_text(encoding="utf-8") if said.exists() else killed_by
    seconds = round(time.monotonic() - started, 1)
    return outcome(mutant, killed_by, len(names), seconds, tests)


def outcome(mutant: Json, killed_by: str | None, tried: int, seconds: float, tests: Json) -> Json:
    kept = {name: mutant[name] for name in ("key", "room", "module", "line", "operator", "before", "after")}
    return kept | {"killed_by": killed_by, "tried": tried, "seconds": seconds, "tests": tests["digest"]}


class Chosen:
    """A plug-in of pytest: only these tests, in this order; the first that fails is written to a file. A test that
    takes too long ends the process, whatever it waits for."""

    def __init__(self, seconds: dict[str, float], said: Path) -> None:
        self.order, self.seconds, self.said = {name: at for at, name in enumerate(seconds)}, seconds, said

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self.order), key=lambda item: self.order[item.nodeid]
        )

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        signal.alarm(60 + int(4 * self.seconds[nodeid]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.said.exists():
            self.said.write_text(report.nodeid, encoding="utf-8")


def _run_tests(tree: Path, seconds: dict[str, float], said: Path) -> None:
    os.setpgrp()  # so that what the tests start ends with them
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _enter(tree)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    files = sorted({name.partition("::")[0] for name in seconds})
    code = pytest.main(["-x", "-q", *_NO_CACHE, *files], [Chosen(seconds, said)])
    sys.exit(int(code))


_NO_CACHE = ("-p", "no:cacheprovider")


def _enter(tree: Path) -> None:
    """This process, and what it starts, works in that copy of the tree."""
    os.chdir(tree)
    sys.path[:0] = [str(tree / "src"), str(tree)]
    os.environ.update(PYTHONPATH=f"{tree / 'src'}:{tree}", PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    for name in [name for name in sys.modules if name.split(".")[0] in ("embedsmith", "tests", "bench")]:
        del sys.modules[name]  # what the parent had loaded stands elsewhere


def _copy_of_tree(target: Path) -> Path:
    """What git knows of the working tree, beside a link to the shared data that some tests look for."""
    shutil.rmtree(target, ignore_errors=True)
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    shared = target.parent / "shared"
    if not shared.exists() and (ROOT.parent / "shared").exists():
        shared.symlink_to((ROOT.parent / "shared").resolve())
    return target


def _digest(*places: Path) -> str:
    files = sorted(path for place in places for path in ([place] if place.is_file() else place.rglob("*.py")))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- the table


def reasons() -> Json:
    """Equivalent mutants by key: why no test can see them."""
    return yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8")) or {} if EQUIVALENT.exists() else {}


def table(found: list[Json]) -> str:
    equivalent = reasons()
    lines = [f"{'room':10} {'mutants':>8} {'equivalent':>11} {'killed':>7} {'%':>6}"]
    rooms = sorted({one["room"] for one in found})
    for room in [*rooms, "all"]:
        ours = [one for one in found if room in ("all", one["room"])]
        same = sum(one["killed_by"] is None and one["key"] in equivalent for one in ours)
        killed = sum(one["killed_by"] is not None for one in ours)
        lines.append(f"{room:10} {len(ours):8} {same:11} {killed:7} {100 * killed / max(len(ours) - same, 1):6.1f}")
    for one in found:
        if one["killed_by"] is None and one["key"] not in equivalent:
            lines.append(
                f"{one['key']} {one['module']}:{one['line']} {one['operator']}\n  - {one['before']}\n  + {one['after']}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
