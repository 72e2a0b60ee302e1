"""Prove that the working tree behaves as another commit: `python scripts/freeze.py BASE` runs the same command lines
with the code of both, side by side on this machine, and compares what they wrote, byte for byte.

It prints a line a job, and ends with code 1 if anything differs that `freeze_removed.yaml` does not declare. Both
sides run on the CPU, in fp32, with one thread, offline, with caches of their own. Floating-point numbers hold on one
processor only, so nothing is kept: the base runs again every time. Python, torch and all other packages are those of
the Python that runs this script; they are loaded once, and every command is a fork that has seen no other command.
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
from collections.abc import Iterable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from freeze_compare import Comparison, Removed, compare_facts, compare_folders, file_facts, printed_facts
from freeze_inputs import write_inputs
from freeze_jobs import Job, jobs_of, setup_jobs

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("base", "tree")  # of one length: what is laid out by the length of a path comes out alike
LIMIT = 300  # seconds that a command may take
LOADED = """torch accelerate transformers.modeling_utils transformers.models.auto.modeling_auto safetensors.torch
scipy.stats pyarrow.parquet pydantic typer rich.console rich.table rich.progress peft plotly.graph_objects"""
FORK = multiprocessing.get_context("fork")


def main() -> int:
    parser = argparse.ArgumentParser(description=" ".join(str(__doc__).split("\n\n")[0].split()))
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="jobs whose name holds one of these")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this folder, and leave all there")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes a side (default 1)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="freeze.") as scratch:
        folder = (args.keep or Path(scratch)).resolve()
        if folder.exists() and any(folder.iterdir()):
            parser.error(f"{folder} is not empty")
        return freeze(folder, args.base, args.only, args.jobs)


def freeze(folder: Path, commit: str, only: Sequence[str], processes: int) -> int:
    removed = Removed.read(Path(__file__).with_name("freeze_removed.yaml"))
    code = {"base": archive(commit, folder / "code"), "tree": ROOT}
    isolate(folder / "home")
    endpoint = language_model()
    plans: dict[str, dict[str, Job]] = {}
    for side, root in code.items():
        shutil.copytree(root / "recipes", folder / side / "recipes")
        jobs = jobs_of(folder / side, verbs_of(root), f"http://127.0.0.1:{endpoint.server_port}/v1")
        plans[side] = {job.name: job for job in jobs if not only or any(word in job.name for word in only)}
    prepare(folder, code["base"])
    running = {side: start(folder / side, code[side], [*plans[side].values()], processes) for side in SIDES}
    threading.Thread(target=endpoint.serve_forever, daemon=True).start()  # behind the forks: none shares the thread
    same_place = {str(folder / side): "<here>" for side in SIDES} | {str(root): "<code>" for root in code.values()}
    names, bad = list(plans["base"] | plans["tree"]), 0
    try:
        for name in names:
            for side in SIDES:
                wait(folder / side / "said" / name, running[side])
            found = compared(folder, plans["base"].get(name), plans["tree"].get(name), removed, same_place)
            say(f"{found.word:8} {name}" + (f"  {found.short}" if found.short else ""))
            bad += bool(found.differs)
    finally:
        for worker in (*running["base"], *running["tree"]):
            worker.terminate()
    say(f"{len(names)} jobs, {bad} with differences that are not declared")
    return 1 if bad or not names else 0


def archive(commit: str, folder: Path) -> Path:
    """The code and the recipes of a commit."""
    folder.mkdir(parents=True)
    packed = subprocess.run(["git", "archive", commit, "src", "recipes"], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
    return folder


def isolate(home: Path) -> None:
    """Settings of this process and all that it starts, before any large library reads them."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    os.environ |= {"COLUMNS": "2000", "TERM": "dumb"}


def verbs_of(root: Path) -> list[str]:
    """The verbs that `embedsmith --help` names."""
    command, where = [sys.executable, "-m", "embedsmith", "--help"], os.environ | {"PYTHONPATH": str(root / "src")}
    page = subprocess.run(command, env=where, check=True, capture_output=True, text=True).stdout
    return re.findall(r"^  (\w\S*)", page.partition("Commands:")[2], re.MULTILINE)


def language_model() -> ThreadingHTTPServer:
    """An endpoint on this machine that answers a prompt with a question about its bytes."""

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
            message = {"role": "assistant", "content": f"Where did the cat of number {sum(asked.encode())} sit?"}
            answer = {"choices": [{"message": message, "finish_reason": "stop"}]}
            body = json.dumps(answer | {"usage": {"prompt_tokens": 9, "completion_tokens": 9}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)


def prepare(folder: Path, code: Path) -> None:
    """The inputs of both sides: random models and texts, and what the base's code makes of them."""
    for library in LOADED.split():
        importlib.import_module(library)
    write_inputs(folder / "setup/inputs")
    jobs = setup_jobs(folder / "setup")
    for worker in start(folder / "setup", code, jobs, 1):
        worker.join()
    for job in jobs:
        if failure := failure_of(folder / "setup", job):
            raise SystemExit(f"the base cannot make {job.name}: {failure}")
    for side in SIDES:
        shutil.copytree(folder / "setup/inputs", folder / side / "inputs")


def start(side: Path, code: Path, jobs: Sequence[Job], processes: int) -> list[Any]:
    """Processes that run a side's jobs, each its share of them."""
    workers = [FORK.Process(target=run_jobs, args=(side, code, jobs[n::processes])) for n in range(processes)]
    for worker in workers:
        worker.start()
    return workers


def run_jobs(side: Path, code: Path, jobs: Iterable[Job]) -> None:
    os.chdir(side)
    os.environ |= {"PYTHONPATH": str(code / "src"), "HOME": str(side / "home"), "XDG_CACHE_HOME": str(side / "home")}
    sys.pycache_prefix = str(side / "home")
    sys.path.insert(0, str(code / "src"))
    found = importlib.util.find_spec("embedsmith")
    if found is None or not str(found.origin).startswith(str(code)):
        raise SystemExit(f"embedsmith is taken from {found}, not from {code}")
    for job in jobs:
        said = side / "said" / job.name
        said.mkdir(parents=True)
        codes: list[int] = []
        while len(codes) < len(job.commands) and not any(codes):
            codes.append(run_command(job.commands[len(codes)], said / str(len(codes))))
        (said / "codes.part").write_text(json.dumps(codes))
        (said / "codes.part").rename(said / "codes.json")


def run_command(words: Sequence[str], said: Path) -> int:
    """Its exit code; what it prints goes to `SAID.out` and `SAID.err`."""
    if words[0] == "copy":
        shutil.copytree(words[1], words[2])
        return 0
    if words[0] == "remove":
        for path in map(Path, words[1:]):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return 0
    child = FORK.Process(target=as_typed, args=(words, said))
    child.start()
    child.join(LIMIT)
    if child.exitcode is None:
        child.kill()
        child.join()
    return child.exitcode or 0


def as_typed(words: Sequence[str], said: Path) -> None:
    """`python -m embedsmith WORDS`; of `ranks N WORDS`, in N processes."""
    for descriptor, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{ending}", os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv, module = ["embedsmith", *words], "embedsmith"
    if words[0] == "ranks":
        module = "torch.distributed.run"
        sys.argv = ["torchrun", "--standalone", "--nproc-per-node", words[1], "-m", "embedsmith", *words[2:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def wait(said: Path, workers: Sequence[Any]) -> None:
    while not (said / "codes.json").exists() and any(worker.is_alive() for worker in workers):
        time.sleep(0.05)


def failure_of(side: Path, job: Job) -> str:
    """The last line that a failed job printed; nothing if it ended well."""
    said = side / "said" / job.name
    codes = json.loads((said / "codes.json").read_text()) if (said / "codes.json").exists() else []
    if codes == [0] * len(job.commands):
        return ""
    error = said / f"{max(len(codes) - 1, 0)}.err"
    lines = [line for line in error.read_text(errors="replace").splitlines() if line] if error.exists() else []
    return next((line for line in lines if line.startswith("error:")), lines[-1] if lines else "it ended silently")


def compared(folder: Path, base: Job | None, tree: Job | None, removed: Removed, paths: dict[str, str]) -> Comparison:
    """What became of one job."""
    if base is None or tree is None:
        return Comparison(added=["not in the base"]) if base is None else without(base, "not in the tree", removed)
    if failure := failure_of(folder / "base", base):
        return Comparison(differs=[f"the base fails: {failure}"])
    if failure := failure_of(folder / "tree", tree):
        return without(base, f"the tree fails: {failure}", removed)
    outs = [folder / side / "out" / base.name for side in SIDES]
    found = compare_folders(outs[0], outs[1], removed, base.unread, paths)
    for one, other in base.same:
        if file_facts(outs[1] / one, removed, paths) != file_facts(outs[1] / other, removed, paths):
            found.differs.append(f"{one} and {other} are not the same")
    if base.printed:
        said = [folder / side / "said" / base.name for side in SIDES]
        printed = [printed_facts(one.printed, one.commands, at, paths) for one, at in zip((base, tree), said)]
        found += compare_facts(printed[0], printed[1], removed, may_add=base.printed != "json")
    return found


def without(job: Job, why: str, removed: Removed) -> Comparison:
    declared = [name for name in job.names if name in removed.names]
    return Comparison(removed=[f"{declared[0]}: {why}"]) if declared else Comparison(differs=[why])


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
