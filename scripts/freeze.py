"""Prove that the working tree behaves as another commit: `python scripts/freeze.py BASE` runs the same command lines
with the code of both, side by side on this machine, and compares byte for byte what they wrote.

One line a job; exit code 1 if anything differs that `freeze_removed.yaml` does not declare. Both sides run with the
Python that runs this script, on the CPU, in fp32, with one thread, offline, each with a cache folder of its own.
Floating-point numbers hold on one processor only, so nothing is kept: the base is run again every time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from freeze_compare import (
    Comparison,
    Facts,
    Removed,
    compare_facts,
    compare_folders,
    file_facts,
    help_facts,
    leaves,
    plain,
    schema_facts,
    table_facts,
)
from freeze_jobs import SETUP, Job, jobs_of, save, setup_recipes, write_inputs

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("base", "tree")  # names of one length: what is laid out by the length of a path comes out alike
LIMIT = 300  # seconds a command may take


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="jobs whose name holds one of these")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this folder, and leave all there")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes a side (default 1)")
    parser.add_argument("--list", action="store_true", help="print the names of the jobs and stop")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="freeze.") as scratch:
        folder = (args.keep or Path(scratch)).resolve()
        if folder.exists() and any(folder.iterdir()):
            parser.error(f"{folder} is not empty")
        return freeze(folder, args.base, args.only, args.jobs, args.list)


def freeze(folder: Path, base: str, only: Sequence[str], processes: int, listing: bool) -> int:
    removed = Removed.read(Path(__file__).with_name("freeze_removed.yaml"))
    for side in SIDES:
        (folder / side).mkdir(parents=True)
    code = {"base": archive(base, folder / "code"), "tree": ROOT}
    verbs = sorted({verb for root in code.values() for verb in verbs_of(root, folder)})
    url = serve()
    plans: dict[str, dict[str, Job]] = {}
    for side, root in code.items():
        shutil.copytree(root / "recipes", folder / side / "recipes")
        made = {job.name: job for job in jobs_of(folder / side, verbs, url)}
        plans[side] = {name: job for name, job in made.items() if not only or any(word in name for word in only)}
    names = list(plans["base"] | plans["tree"])
    if listing or not names:
        say("\n".join(names) if names else "no job has such a name")
        return 0 if names else 1
    prepare(folder, code["base"], plans["base"].values())
    running = {side: start(folder / side, code[side], list(plans[side].values()), processes) for side in SIDES}
    paths = {str(folder / side): "<here>" for side in SIDES} | {str(root): "<code>" for root in code.values()}
    bad = 0
    for name in names:
        for side in SIDES:
            wait(folder / side, name, running[side])
        bad += tell(name, *compared(folder, name, plans, removed, paths))
    say(f"{len(names)} jobs, {bad} with undeclared differences")
    return 1 if bad else 0


def archive(commit: str, folder: Path) -> Path:
    """The code and the recipes of a commit."""
    folder.mkdir()
    packed = subprocess.run(["git", "archive", commit, "src", "recipes"], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
    return folder


def environment(root: Path, home: Path) -> dict[str, str]:
    fixed = {
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "COLUMNS": "2000",
        "CUDA_VISIBLE_DEVICES": "",
        "TERM": "dumb",
    }
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_PROXY": "127.0.0.1",
    }
    homes = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "HF_HOME": str(home / "hub")}
    return os.environ | fixed | offline | homes | {"PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}


def verbs_of(root: Path, home: Path) -> list[str]:
    """The verbs that `embedsmith --help` names."""
    command = [sys.executable, "-m", "embedsmith", "--help"]
    said = subprocess.run(command, env=environment(root, home), check=True, capture_output=True, text=True).stdout
    return re.findall(r"^  (\w\S*)", said.partition("Commands:")[2], re.MULTILINE)


def serve() -> str:
    """A language model's endpoint on this machine that answers every prompt with a question; its URL."""

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
            said = f"Where did the cat of {sum(asked.encode())} words sit?"
            choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            body = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 9}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1"


def prepare(folder: Path, code: Path, jobs: Sequence[Job]) -> None:
    """The inputs of both sides: random models and texts, and what the base makes of them as far as a job reads it."""
    side = folder / "inputs"
    write_inputs(side / "inputs")
    recipes = setup_recipes()
    for name, recipe in recipes.items():
        save(side, name, recipe)
    texts = (folder / "base").glob("jobs/*.yaml")
    read = " ".join([*(" ".join(words) for job in jobs for words in job.commands)])
    read += " ".join(path.read_text() for path in texts if path.name in read)
    read += str(
        [recipe for name, recipe in recipes.items() if name in read or "parent-" in name and "parent-*" in read]
    )
    needed = [
        Job(made, (tuple(line.split()),))
        for made, line in SETUP.items()
        if made in read or "inputs/parent-*" in read and "parent" in made
    ]
    for one in start(side, code, needed, 1):
        one.wait()
    for job in needed:
        if failure := failed(side, job):
            raise SystemExit(f"{job.name} cannot be made: {failure}")
    for name in SIDES:
        shutil.copytree(side / "inputs", folder / name / "inputs")


def start(side: Path, code: Path, jobs: Sequence[Job], processes: int) -> list[subprocess.Popen[bytes]]:
    """Processes that run a side's jobs, each its share of them."""
    running = []
    for number in range(processes):
        plan = side / f"plan-{number}.json"
        plan.write_text(json.dumps([asdict(job) for job in jobs[number::processes]]), encoding="utf-8")
        command = [sys.executable, __file__, "--share", str(plan), str(code / "src")]
        running.append(subprocess.Popen(command, cwd=side, env=environment(code, side / "home")))
    return running


def run_share(plan: Path, source: str) -> None:
    """One process of a side: load the large libraries once, then run each command in a fork that knows nothing else."""
    import accelerate.utils  # noqa: F401
    import sentence_transformers  # noqa: F401
    import torch  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    found = importlib.util.find_spec("embedsmith")
    assert found is not None and found.origin is not None and found.origin.startswith(source), found
    for job in json.loads(plan.read_text(encoding="utf-8")):
        said = Path("said") / job["name"]
        said.mkdir(parents=True)
        codes = []
        for number, words in enumerate(job["commands"]):
            codes.append(run_command(words, said / str(number)))
            if codes[-1] != 0:
                break
        Path(said / "codes.json").write_text(json.dumps(codes), encoding="utf-8")


def run_command(words: list[str], said: Path) -> int:
    """Its exit code; what it prints goes to `SAID.out` and `SAID.err`."""
    if words[0] == "copy":
        shutil.copytree(words[1], words[2])
        return 0
    if words[0] == "remove":
        for path in map(Path, words[1:]):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return 0
    child = multiprocessing.get_context("fork").Process(target=as_typed, args=(words, said))
    child.start()
    child.join(LIMIT)
    if child.exitcode is None:
        child.kill()
        child.join()
    return child.exitcode or 0


def as_typed(words: list[str], said: Path) -> None:
    """`python -m embedsmith WORDS`."""
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{ending}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["embedsmith", *words]
    runpy.run_module("embedsmith", run_name="__main__", alter_sys=True)


def wait(side: Path, name: str, running: Sequence[subprocess.Popen[bytes]]) -> None:
    while not (side / "said" / name / "codes.json").exists() and any(one.poll() is None for one in running):
        time.sleep(0.1)


def failed(side: Path, job: Job) -> str:
    """The end of what a job said that failed; nothing if it ended well."""
    said = side / "said" / job.name
    codes = json.loads((said / "codes.json").read_text()) if (said / "codes.json").exists() else []
    if codes == [0] * len(job.commands):
        return ""
    error = said / f"{max(len(codes) - 1, 0)}.err"
    lines = error.read_text(errors="replace").strip().splitlines() if error.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "it ended without a word")


def compared(
    folder: Path, name: str, plans: dict[str, dict[str, Job]], removed: Removed, paths: dict[str, str]
) -> tuple[str, Comparison]:
    """One word and what was found for one job."""
    base, tree = (plans[side].get(name) for side in SIDES)
    if base is None or tree is None:
        gone = "this job is only in the " + ("tree" if base is None else "base")
        return verdict(Comparison(added=[gone]) if base is None else missing(name, base, gone, removed))
    if failure := failed(folder / "base", base):
        return "broken", Comparison(differs=[f"the base fails: {failure}"])
    if failure := failed(folder / "tree", tree):
        return verdict(missing(name, base, f"the tree fails: {failure}", removed))
    outs = [folder / side / "out" / name for side in SIDES]
    found = compare_folders(*outs, removed, base.unread, paths)
    if base.printed:
        facts = [printed(folder / side / "said" / name, base, paths) for side in SIDES]
        more = compare_facts(facts[0], facts[1], removed, may_add=base.printed != "json")
        found = Comparison(found.differs + more.differs, found.removed + more.removed, found.added + more.added)
    for one, other in base.same:
        if file_facts(outs[1] / one, removed, paths) != file_facts(outs[1] / other, removed, paths):
            found.differs.append(f"{one} and {other} are not the same")
    return verdict(found)


def missing(name: str, job: Job, why: str, removed: Removed) -> Comparison:
    declared = [word for word in job.names if word in removed.names]
    return Comparison(removed=[f"{declared[0]} ({why})"]) if declared else Comparison(differs=[why])


def verdict(found: Comparison) -> tuple[str, Comparison]:
    return "differs" if found.differs else "removed" if found.removed else "added" if found.added else "same", found


def printed(said: Path, job: Job, paths: dict[str, str]) -> Facts:
    """What the commands of a job printed, as facts."""
    facts: Facts = {}
    for number, words in enumerate(job.commands):
        text = plain((said / f"{number}.out").read_text(encoding="utf-8"), paths)
        if job.printed == "help":
            facts |= help_facts(" ".join(words[:-1]), text)
        elif job.printed == "json" and text.lstrip().startswith(("{", "[")):
            rows = [text] if text.startswith(("{\n", "[\n")) else text.splitlines()
            facts |= {
                f"{number}.{n}.{key}": value for n, row in enumerate(rows) for key, value in leaves(json.loads(row))
            }
        elif job.printed in ("schema", "table"):
            facts |= schema_facts(text) if job.printed == "schema" else table_facts(text)
    return facts


def tell(name: str, word: str, found: Comparison) -> int:
    """Print a line for a job, or a few; 1 if it counts against the tree."""
    lines = found.differs or found.removed or found.added
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    say(f"{word:8} {name}" + (f"  {lines[0]}{more}" if lines else ""))
    for line in lines[1:] if name in ("schema", "help", "losses", "curate.list") else ():
        say(f"{'':8}   {line}")
    return int(bool(found.differs))


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--share"]:
        run_share(Path(sys.argv[2]), sys.argv[3])
        sys.exit(0)
    sys.exit(main())
