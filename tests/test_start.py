"""Starting costs nothing heavy: neither the import nor the help loads torch or what loads it."""

import subprocess
import sys

import pytest

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
