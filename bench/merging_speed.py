"""Time and peak memory of whole merge processes, against mergekit: `python -m bench.merging_speed [--megabytes 750]`.

Four random decoders of the given size (float32, one file each) are made in a temporary folder and merged by the mean,
by SLERP of task vectors and by TIES, in one process a merge, interpreter and imports included; then the same by
mergekit. The files are removed at the end: it needs seven times the size on disk. What is reported: seconds from start
to exit; the peak of anonymous and shared memory above the same process with nothing but its imports. `--rounds` runs
each, in turns, of which the fastest counts; the results go to bench/results/merging_speed.json. Both tools find their
modules compiled, as they are after a first use, even where the environment forbids Python to keep them. Ours remembers
an architecture that it has met, so its first merge of one takes longer: a row of its own (`linear, first`). Statistics
of the weights are measured anew in every run.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from bench.common import RESULTS, WORK, environment, write_json
from bench.mergekit_env import VERSION, mergekit_python

METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"method": "average"}, {"merge_method": "linear"}),
    "slerp": ({"method": "slerp", "granularity": "tensor"}, {"merge_method": "multislerp"}),
    "ties": (
        {"method": {"type": "ties", "density": 0.2}, "granularity": "tensor"},
        {"merge_method": "ties"},
    ),
}
"""Our recipe and the peer's configuration. Its `slerp` and `nuslerp` take two parents, `multislerp` any number."""

FIRST = "linear, first"

_OURS = "import sys, embedsmith; from embedsmith.cli import app; sys.argv = ['embedsmith', *{arguments!r}]; app()"
_IDLE = {
    "embedsmith": "import embedsmith.merge.methods, embedsmith.cli",
    "mergekit": "import mergekit.scripts.run_yaml, mergekit.merge",
}


def make_models(root: Path, megabytes: int) -> list[Path]:
    """A base and four parents. The widths are fixed, the number of layers fits the size."""
    from transformers import Qwen3Config, Qwen3Model

    from bench.merging_peers import tokenizer

    config = Qwen3Config(
        vocab_size=20000,
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        num_hidden_layers=max(1, round((megabytes * 1e6 / 4 - 20.5e6) / 12.6e6)),
    )
    torch.manual_seed(0)
    base = root / "base"
    base.mkdir(parents=True)
    Qwen3Model(config).save_pretrained(base, max_shard_size="100GB")
    tokenizer().save_pretrained(base)
    folders = [base]
    for place in range(4):
        folder = root / f"parent{place}"
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        generator = torch.Generator().manual_seed(place)
        state = load_file(base / "model.safetensors")
        for tensor in state.values():
            tensor += 1e-3 * torch.randn(tensor.shape, generator=generator)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    return folders


def ours(folders: list[Path], method: str, root: Path) -> list[str]:
    recipe = {
        **METHODS[method][0],
        "base": str(folders[0]),
        "parents": [str(folder) for folder in folders[1:]],
        "output": str(root / "ours"),
        "cache": str(root / "cache"),
    }
    for statistics in (root / "cache").glob("*.npz"):
        statistics.unlink()
    path = root / "ours.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return [sys.executable, "-c", _OURS.format(arguments=["merge", str(path)])]


def theirs(folders: list[Path], method: str, root: Path) -> list[str]:
    setting = {"weight": 1.0, **({"density": 0.2} if method == "ties" else {})}
    config = {
        **METHODS[method][1],
        "models": [{"model": str(folder), "parameters": setting} for folder in folders[1:]],
        "dtype": "float32",
        **({} if method == "linear" else {"base_model": str(folders[0])}),
    }
    path = root / "theirs.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [str(mergekit_python()), "-m", "mergekit.scripts.run_yaml", str(path), str(root / "theirs")]


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds from start to exit, and the peak in MiB of memory that is the process's own.

    Pages of mapped files are the system's to take back, so they do not count: for nobody.
    """
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings.pop("PYTHONDONTWRITEBYTECODE", None)
    settings["PYTHONPYCACHEPREFIX"] = str(WORK / "compiled")
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        peak = max(peak, own_memory(process.pid))
        time.sleep(0.02)
    seconds = time.monotonic() - started
    if process.returncode:
        assert process.stderr is not None
        sys.exit(f"{' '.join(command[:4])} failed:\n{process.stderr.read().decode()[-3000:]}")
    return seconds, peak / 1024


def own_memory(process: int) -> int:
    """KiB of anonymous and shared memory in use now; 0 once the process is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=750)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--skip-peer", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = make_models(root, options.megabytes)
        size = (folders[0] / "model.safetensors").stat().st_size / 1e6
        tools = {"embedsmith": (ours, sys.executable)}
        if not options.skip_peer:
            tools["mergekit"] = (theirs, str(mergekit_python()))
        small = make_models(root / "small", 1)
        for command, _ in tools.values():  # the first use, in which Python compiles
            measured(command(small, "linear", root))
            shutil.rmtree(root / command.__name__)
        idle = {tool: measured([python, "-c", _IDLE[tool]]) for tool, (_, python) in tools.items()}
        for label in [FIRST, *itertools.chain(*([method] * options.rounds for method in options.methods))]:
            for tool, (command, _) in tools.items():
                seconds, peak = measured(command(folders, "linear" if label == FIRST else label, root))
                shutil.rmtree(root / command.__name__)
                facts = {"seconds": seconds, "mib": peak, "mib_above_imports": peak - idle[tool][1]}
                rows.append({"method": label, "tool": tool, **facts})
    table = Table("method", "tool", "seconds", "peak MiB", "above imports")
    best = [min((r for r in rows if key == (r["method"], r["tool"])), key=lambda r: r["seconds"])
            for key in dict.fromkeys((r["method"], r["tool"]) for r in rows)]  # fmt: skip
    for row in best:
        table.add_row(
            row["method"], row["tool"], *(f"{row[key]:.1f}" for key in ("seconds", "mib", "mib_above_imports"))
        )
    Console().print(f"four parents of {size:.0f} MB", table)
    about = {**environment(), "mergekit": VERSION, "megabytes": size, "idle": idle}
    write_json(RESULTS / "merging_speed.json", {**about, "rows": best, "runs": rows})


if __name__ == "__main__":
    main()
