"""Starting costs nothing heavy: neither the import nor the help loads torch or what loads it."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embedsmith.cli import app

HEAVY = ("torch", "transformers", "accelerate", "scipy", "pyarrow", "datasets", "sentence_transformers")
COMMANDS = {
    "import": "import embedsmith",
    "help": "sys.argv = ['embedsmith', '--help']; from embedsmith.cli import main; main()",
    "help of a verb": "sys.argv = ['embedsmith', 'train', '--help']; from embedsmith.cli import main; main()",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_starting_loads_nothing_heavy(name: str) -> None:
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('LOADED', sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr))\n"
        f"{COMMANDS[name]}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "LOADED []"


def test_public_names_load_on_first_use() -> None:
    loaded = "print('torch' in sys.modules)"
    code = f"import embedsmith, sys; {loaded}; embedsmith.load; {loaded}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have one heap")
@pytest.mark.parametrize("call", ["", "share_one_heap()"])
def test_threads_of_a_merge_share_one_heap(call: str, tmp_path: Path) -> None:
    code = f"""
import ctypes, threading
from embedsmith.cli.verbs.training import share_one_heap
{call}
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
barrier = threading.Barrier(4)
def take():
    libc.malloc(100_000)
    barrier.wait()  # a heap whose thread has ended goes to the next thread
threads = [threading.Thread(target=take) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
out = ctypes.c_void_p(libc.fopen({str(tmp_path / "heaps.xml")!r}.encode(), b"w"))
libc.malloc_info(0, out)
libc.fclose(out)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    heaps = (tmp_path / "heaps.xml").read_text().count("<heap nr=")
    assert heaps == 1 if call else heaps > 1


@pytest.mark.parametrize("arguments", [["inspect", ""], ["search", "a query", "--index", ""]])
def test_an_empty_argument_is_refused_and_not_the_current_folder(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert f"Argument {len(arguments) - 1} of {arguments[0]} is empty" in done.output
