"""What this machine has, what is missing and how to get it. Imports nothing heavy until it is asked about devices."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Group
from rich.table import Table
from rich.text import Text

from embedsmith.core.device import cores, cpu_multiplies_bf16, why_no_cuda

_PACKAGE = "embedsmith"
_ALWAYS_SHOWN = ("torch", "transformers", "accelerate", "tokenizers", "sentence-transformers")
_LOW_DISK_GB = 5.0
_BF16 = {True: "yes", False: "no", None: "unknown"}


@dataclass(frozen=True)
class Dependency:
    """One package. `installed` is its version, or `None`; `wanted` the versions that fit, from our own metadata."""

    name: str
    installed: str | None
    wanted: str

    @classmethod
    def of(cls, requirement: Requirement) -> Dependency:
        return cls(requirement.name, installed_version(requirement.name), str(requirement.specifier))

    @property
    def problem(self) -> str:
        """What is wrong where it does not fit, and the command that mends it."""
        state = "is missing" if self.installed is None else f"is {self.installed}"
        fix = f'pip install "{self.name}{self.wanted}"'
        return f"{self.name} {state}, {self.wanted or 'any version'} is needed: {fix}"

    @property
    def fits(self) -> bool:
        return self.installed is not None and SpecifierSet(self.wanted).contains(self.installed, prereleases=True)


@dataclass(frozen=True)
class Extra:
    """An optional part, and the command that installs it."""

    name: str
    packages: tuple[Dependency, ...]

    @property
    def fits(self) -> bool:
        return all(package.fits for package in self.packages)

    @property
    def install(self) -> str:
        return f'pip install "{_PACKAGE}[{self.name}]"'


@dataclass(frozen=True)
class Device:
    name: str
    what: str
    memory_gb: float | None = None
    bf16: bool | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Everything `embedsmith doctor` prints. `problems` stop the toolkit from working; `advice` does not."""

    versions: dict[str, str | None]
    required: tuple[Dependency, ...]
    extras: tuple[Extra, ...]
    devices: tuple[Device, ...]
    disk_free_gb: float
    problems: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        extras = [{"name": extra.name, "installed": extra.fits, "install": extra.install} for extra in self.extras]
        details = [asdict(extra)["packages"] for extra in self.extras]
        plain = [one | {"packages": list(packages)} for one, packages in zip(extras, details, strict=True)]
        return asdict(self) | {"extras": plain, "healthy": self.healthy}

    def table(self) -> Group:
        """Tables for a terminal, problems last."""
        packages = Table("package", "installed", "needed", title="Packages", title_justify="left")
        floors = {package.name: package.wanted for package in self.required}
        for name, installed in self.versions.items():
            packages.add_row(name, installed or "-", floors.get(name, ""))
        extras = Table("extra", "installed", "to get it", title="Extras", title_justify="left")
        for extra in self.extras:
            extras.add_row(extra.name, "yes" if extra.fits else "no", "" if extra.fits else Text(extra.install))
        devices = Table("device", "what", "memory", "bf16", title="Devices", title_justify="left")
        for device in self.devices:
            memory = "-" if device.memory_gb is None else f"{device.memory_gb} GB"
            devices.add_row(device.name, device.what, memory, _BF16[device.bf16])
        lines: list[str | Text] = [f"{self.disk_free_gb} GB free on this disk", *self.advice]
        lines += [Text.assemble(("problem:", "red"), " ", problem) for problem in self.problems]
        return Group(packages, extras, devices, *lines, "all that is needed is here" if self.healthy else "")


def diagnose(folder: str | Path = ".") -> Diagnosis:
    """Look at the installed packages, the devices, and the disk that holds `folder`."""
    needed = [Requirement(line) for line in requires(_PACKAGE) or []]
    plain = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    required = tuple(map(Dependency.of, plain))
    marked = [one for one in needed if one not in plain and one.marker is not None]
    extras = tuple(
        Extra(name, tuple(Dependency.of(one) for one in marked if one.marker and one.marker.evaluate({"extra": name})))
        for name in metadata(_PACKAGE).get_all("Provides-Extra") or []
    )
    problems = [package.problem for package in required if not package.fits]
    python = platform.python_version()
    wanted = metadata(_PACKAGE)["Requires-Python"]
    if not SpecifierSet(wanted).contains(python, prereleases=True):
        problems.append(f"Python is {python}, {wanted} is needed: make a new environment with it")
    disk_free_gb = shutil.disk_usage(folder).free / 1e9
    low = f"{disk_free_gb:.1f} GB free here: checkpoints of a large model may not fit"
    found = devices() if installed_version("torch") else ()
    no_gpu = f"everything runs on the CPU: {why_no_cuda()}" if [device.name for device in found] == ["cpu"] else ""
    versions = {_PACKAGE: installed_version(_PACKAGE), "python": python}
    return Diagnosis(
        versions=versions | {name: installed_version(name) for name in _ALWAYS_SHOWN},
        required=required,
        extras=extras,
        devices=found,
        disk_free_gb=round(disk_free_gb, 1),
        problems=tuple(problems),
        advice=((low,) if disk_free_gb < _LOW_DISK_GB else ()) + ((no_gpu,) if no_gpu else ()),
    )


def installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def devices() -> tuple[Device, ...]:
    """The CPU, then every GPU that torch can use."""
    import torch

    no_sysconf = sys.platform == "win32"
    memory = None if no_sysconf else round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    found = [Device("cpu", f"{cores()} cores, {torch.get_num_threads()} threads", memory, cpu_multiplies_bf16())]
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        bf16 = facts.major >= 8 or torch.version.hip is not None
        found.append(Device(f"cuda:{number}", facts.name, round(facts.total_memory / 1e9, 1), bf16))
    if torch.backends.mps.is_available():
        found.append(Device("mps", platform.machine(), None, True))
    return tuple(found)
