"""How long does Self-Positioning of two MiniLM parents take?

`python -m bench.self_positioning_time` makes two parents a hundredth away from MiniLM (the time does not depend on what
they learned), and merges them with the shipped recipe's probe of Debian's pairs and the STS benchmark, at several
lengths of the probe's texts, with few and with more steps: the difference is the time of a step, what is left over that
of the rest. Prints both, and the minutes of the default number of steps (without the looks at the held-out part on the
way, eight passes over a fifth of the examples). Results go to
bench/results/self_positioning_time.json. About 10 minutes on two quiet cores; `--lengths 64` is a sixth.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import embedsmith as es
from bench.common import RESULTS, ROOT, WORK, environment, minilm, write_json
from bench.conflict import source
from embedsmith.calibrate.self_positioning import SelfPositioning
from embedsmith.core.recipe import read_tree
from embedsmith.models import load

FEW, MORE = 2, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--model", help="an encoder's folder in place of MiniLM")
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--work", type=Path, default=WORK / "self_positioning_time")
    parser.add_argument("--results", type=Path, default=RESULTS / "self_positioning_time.json")
    a = parser.parse_args()
    base = a.model or minilm()
    parents = [moved(base, a.work / f"parent-{number}", number) for number in range(2)]
    recipe = read_tree(ROOT / "recipes" / "merge-self-positioning.yaml")["method"]
    steps = recipe.get("steps", SelfPositioning.steps)
    rows: dict[int, dict[str, float]] = {}
    for length in a.lengths:
        probe = recipe["probe"] | {"max_length": length, "examples": a.examples, "sources": probed(a.work)}
        took = {
            n: merged(base, parents, recipe | {"probe": probe, "steps": n}, a.work / f"{length}-{n}")
            for n in (FEW, MORE)
        }
        step = (took[MORE] - took[FEW]) / (MORE - FEW)
        whole = (took[FEW] + (steps - FEW) * step) / 60
        rows[length] = {"seconds_a_step": step, "seconds_beside": took[FEW] - FEW * step, "minutes": whole}
        print(f"texts of {length} tokens: {step:.2f} s a step, {whole:.1f} minutes for {steps} steps")
    write_json(a.results, {"environment": environment(), "examples": a.examples, "steps": steps, "lengths": rows})


def probed(work: Path) -> list[dict[str, Any]]:
    """Sources of both tasks."""
    found = [source(name, work / "rows", 2500, (0, 1)) for name in ("debian", "stsb")]
    return [{name: each[name] for name in ("path", "task", "score_range") if name in each} for each in found]


def moved(base: str, folder: Path, seed: int) -> Path:
    """A model beside the base: every matrix is moved at random by a hundredth of its norm."""
    if not folder.exists():
        model, chance = load(base), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in (each for each in model.parameters() if each.dim() > 1):
                noise = torch.randn(weight.shape, generator=chance)
                weight.add_(noise * (0.01 * weight.norm() / noise.norm()))
        model.save(folder)
    return folder


def merged(base: str, parents: list[Path], method: dict[str, Any], output: Path) -> float:
    """Seconds of a merge."""
    started = time.perf_counter()
    es.merge(
        parents=[str(path) for path in parents], base=base, method=method, output=output, overwrite=output.exists()
    )
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
