"""Environments of their own for peers, beside ours: the same torch, plus packages that want other versions."""

from __future__ import annotations

import site
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.common import ROOT, WORK

VERSION = "0.1.5"
_PACKAGES = (f"mergekit=={VERSION}", "immutables", "sentencepiece")


def mergekit_python() -> Path:
    """The interpreter of the environment, made on first use under bench/out."""
    return installed("mergekit", _PACKAGES)


def installed(
    name: str, packages: Sequence[str], *, with_dependencies: bool = False, apart_from: Sequence[str] = ()
) -> Path:
    """The interpreter of an environment `bench/out/NAME` with these packages over ours, made on first use.

    `with_dependencies`: also what they need and ours does not have, within constraints.txt but for `apart_from`, where
    they want other versions."""
    folder = WORK / name
    python = folder / "bin" / "python"
    target = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    complete = folder / ".complete" if with_dependencies else target / name
    if not complete.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        (target / "parent.pth").write_text(site.getsitepackages()[0] + "\n", encoding="utf-8")
        if with_dependencies:  # by pip: uv does not look where the .pth leads, and would install torch again
            pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
            lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / "constraints.txt").write_text("".join(n for n in lines if n.partition("==")[0] not in apart_from))
            done = subprocess.run([*pip, "-c", str(folder / "constraints.txt"), *packages])
            if done.returncode:
                sys.exit(f"{packages[0]} could not be installed: it needs pip and a package index")
            complete.touch()
        else:
            _install(target, packages)
    return python


def _install(target: Path, packages: Sequence[str]) -> None:
    for command in (["uv", "pip"], [str(Path(sys.executable).with_name("uv")), "pip"], [sys.executable, "-m", "pip"]):
        try:
            subprocess.run([*command, "install", "--no-deps", "--target", str(target), *packages], check=True)
        except (FileNotFoundError, subprocess.CalledProcessError):
            continue
        return
    sys.exit(f"{packages[0]} could not be installed: it needs uv or pip and a package index")
