"""An environment of its own for mergekit, beside ours: the same torch and transformers, plus mergekit."""

from __future__ import annotations

import site
import subprocess
import sys
from pathlib import Path

from bench.common import WORK

VERSION = "0.1.5"
_PACKAGES = (f"mergekit=={VERSION}", "immutables", "sentencepiece")


def mergekit_python() -> Path:
    """The interpreter of the environment, made on first use under bench/out."""
    folder = WORK / "mergekit"
    python = folder / "bin" / "python"
    target = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if not (target / "mergekit").exists():
        WORK.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        (target / "parent.pth").write_text(site.getsitepackages()[0] + "\n", encoding="utf-8")
        _install(target)
    return python


def _install(target: Path) -> None:
    for command in (["uv", "pip"], [str(Path(sys.executable).with_name("uv")), "pip"], [sys.executable, "-m", "pip"]):
        try:
            subprocess.run([*command, "install", "--no-deps", "--target", str(target), *_PACKAGES], check=True)
        except (FileNotFoundError, subprocess.CalledProcessError):
            continue
        return
    sys.exit("mergekit could not be installed: it needs uv or pip and a package index")
