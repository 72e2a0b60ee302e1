"""Every figure of GPU speed from one command on one card, in at most five minutes:

    python -m bench.gpu                              # all parts; bench/results/gpu.json
    python -m bench.gpu --parts minilm encode        # some of them
    python -m bench.gpu --profile minilm             # where the time of a part goes, by kind of kernel
    python -m bench.gpu --rehearse                   # the same code, tiny, on a CPU

Each part runs in a process of its own under a time limit: one that fails or is stopped leaves what it had measured, and
the others' results. Weights are random in the real shapes (`bench/gpu_models.py`), texts made up in the lengths of
package descriptions; `--model FOLDER` takes a real one in the place of MiniLM's shape. Nothing is downloaded.

Warm-up is left out, and figures are medians. MFU = 6 x parameters outside of embedding tables x real tokens a second /
the card's bf16 peak (989 TFLOP/s for H100 and H200). Where sentence-transformers is installed it runs beside, in the
same process, after ours.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from bench.common import RESULTS, WORK, environment, read_json, write_json

LIMITS = {
    "gradients": 40,
    "search": 20,
    "minilm": 30,
    "bert": 35,
    "decoder": 55,
    "m3": 40,
    "caching": 30,
    "encode": 45,
}
"""Seconds that each part may take, 295 in all: what is imported once comes on top."""

TARGETS: list[tuple[str, str, str, float]] = [
    ("decoder", "full.mfu", ">=", 0.50),
    ("decoder", "full.peak_GiB", "<=", 40),
    ("decoder", "lora_over_full", ">=", 1.3),
    ("m3", "dense.mfu", ">=", 0.45),
    ("m3", "three_heads_over_dense", "<=", 1.35),
    ("bert", "times_as_fast", ">=", 3),
    ("bert", "times_as_fast_as_flattened", ">=", 1.3),
    ("minilm", "times_as_fast_64", ">=", 2),
    ("minilm", "times_as_fast_256", ">=", 2),
    ("caching", "memory_ratio", "<=", 1.3),
    ("caching", "time_a_text_ratio", "<=", 1.6),
    ("encode", "minilm_times_as_fast", ">=", 3),
    ("encode", "minilm.share_of_time_the_card_computes", ">=", 0.85),
    ("encode", "bert_times_as_fast", ">=", 3),
    ("encode", "bert.share_of_time_the_card_computes", ">=", 0.85),
    ("search", "own_over_torch", "<=", 1.3),
]

PRELOAD = ["bench.gpu_parts", "sentence_transformers", "datasets"]
"""Imported once, for the processes of all parts."""

Part = Callable[[Any], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--model", help="a model folder in the place of MiniLM's shape")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on whatever there is, in this process")
    parser.add_argument("--profile", choices=list(LIMITS), help="print the largest costs of one part by kind of kernel")
    parser.add_argument("--results", type=Path, help="bench/results/gpu.json; of a rehearsal bench/out/gpu.json")
    arguments = parser.parse_args()
    if arguments.profile:
        profile(arguments.profile, arguments.model, arguments.rehearse)
        return
    results = arguments.results or (WORK if arguments.rehearse else RESULTS) / "gpu.json"
    found = measured(arguments.parts, arguments.model, arguments.rehearse, results)
    print("a rehearsal: that the code runs is all it says" if arguments.rehearse else table(found))


def measured(parts: list[str], model: str | None, tiny: bool, results: Path) -> dict[str, Any]:
    """Run the parts, each as soon as the one before is done, and keep what each gives."""
    found: dict[str, Any] = read_json(results, {})
    WORK.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for name in parts:
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            options = {"folder": folder, "model": model, "tiny": tiny}
            made = child(name, **options) if tiny else limited(name, LIMITS[name], options)
        found[name] = made
        write_json(results, found)
        print(f"{name}: {made.get('error') or 'done'} in {made['seconds']:.1f} s", flush=True)
    print(f"{time.perf_counter() - started:.0f} s in all; written: {results}")
    return found


def limited(name: str, limit: float, options: dict[str, Any], work: Callable[..., Any] | None = None) -> dict[str, Any]:
    """What a part gives in a process of its own; one that takes too long is stopped, and what it had is kept."""
    context = ways_to_start()
    started = time.perf_counter()
    process = context.Process(target=work or child, args=(name,), kwargs=options)
    process.start()
    process.join(limit)
    late = process.is_alive()
    if late:
        process.kill()
        process.join()
    made: dict[str, Any] = read_json(Path(options["folder"]) / "figures.json", {})
    made.setdefault("seconds", round(time.perf_counter() - started, 1))
    if late:
        made["error"] = f"stopped after {limit:g} s"
    elif process.exitcode and "error" not in made:
        made["error"] = f"ended with {process.exitcode}"
    return made


@cache
def ways_to_start() -> Any:
    """How a part gets its process: forked from a server that has imported everything, where a card can be used in such
    a process, which takes that nothing imported has touched it; else from nothing, with ten seconds of imports."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a card then does not touch it
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    first = server.Process(target=touch_card)
    first.start()
    first.join()
    return server if first.exitcode == 0 else multiprocessing.get_context("spawn")


def touch_card() -> None:
    import torch

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")


def child(
    name: str, folder: str, model: str | None, tiny: bool, around: Any = None, run: Part | None = None
) -> dict[str, Any]:
    """Run a part here; each figure is in `figures.json` as soon as it is there."""
    from transformers.utils.logging import disable_progress_bar

    from bench import gpu_parts

    figures: dict[str, Any] = {}
    path, started = Path(folder) / "figures.json", time.perf_counter()

    def record(key: str, value: Any) -> None:
        figures[key] = value
        write_json(path, figures)

    disable_progress_bar()
    bench = gpu_parts.Bench(Path(folder), record, tiny, model, around)
    record("card", gpu_parts.card())
    record("environment", environment() | {"torch": gpu_parts.torch.__version__})
    try:
        (run or gpu_parts.PARTS[name])(bench)
    except Exception as error:  # noqa: BLE001  (whatever it is, the parts after it go on)
        traceback.print_exc()
        record("error", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    record("seconds", round(time.perf_counter() - started, 1))
    return figures


def profile(name: str, model: str | None, tiny: bool) -> None:
    """Print the costs of one run of each main work of a part."""
    from bench.gpu_parts import profiled

    WORK.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(dir=WORK)
    try:
        child(name, folder, model, tiny, around=profiled)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(found: dict[str, Any]) -> str:
    """The figures that have a target, and every gradient."""
    lines = ["| part | figure | target | measured |", "|---|---|---|---|"]
    for part, key, sign, target in TARGETS:
        value: Any = found.get(part, {})
        for step in key.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        if value is not None:
            reached = value >= target if sign == ">=" else value <= target
            lines.append(f"| {part} | {key} | {sign} {target} | {value}{'' if reached else ' (not reached)'} |")
    for label, value in found.get("gradients", {}).items():
        if isinstance(value, dict) and ("cosine" in value or "error" in value):
            apart = 1e-4 if "bfloat16" in label else 1e-5
            reached = value.get("cosine", 0.0) >= 1 - apart
            said = json.dumps(value) + ("" if reached else " (not reached)")
            lines.append(f"| gradients | {label} | cosine >= 1 - {apart:g} | {said} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
