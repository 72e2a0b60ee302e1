"""What starting costs: `import embedsmith` and `embedsmith --help`, over bare Python.

`python -m bench.start` starts each in a fresh process, in turn, many times, and reports the median over rounds of the
difference to `python -c pass` in the same round: of the clock, and of the processor's time, which a busy machine
hardly changes. Targets: 0.1 s and 0.4 s of the clock. Results: bench/results/start.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.common import RESULTS, environment, write_json

COMMANDS = {
    "bare python": "pass",
    "import embedsmith": "import embedsmith",
    "embedsmith --help": "import sys; sys.argv = ['embedsmith', '--help']; from embedsmith.cli import main; main()",
}
TARGETS = {"import embedsmith": 0.1, "embedsmith --help": 0.4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS / "start.json")
    arguments = parser.parse_args()
    for code in COMMANDS.values():  # once unmeasured: bytecode is written, files are in the page cache
        seconds(code)
    rounds = [{name: seconds(code) for name, code in COMMANDS.items()} for _ in range(arguments.rounds)]
    summary = {}
    for name, target in TARGETS.items():
        clock, processor = (
            statistics.median(each[name][kind] - each["bare python"][kind] for each in rounds) for kind in (0, 1)
        )
        summary[name] = {"seconds": clock, "processor_seconds": processor, "target": target}
        print(f"{name:20} {clock:.3f} s over bare Python (target {target}), {processor:.3f} s of the processor")
    write_json(arguments.results, {"environment": environment(), "summary": summary, "rounds": rounds})


def seconds(code: str) -> tuple[float, float]:
    """Seconds of the clock and of the processor that one fresh interpreter takes to run `code`."""
    before, started = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    clock, after = time.perf_counter() - started, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return clock, used


if __name__ == "__main__":
    main()
