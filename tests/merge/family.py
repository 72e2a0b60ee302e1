"""A tiny base and parents a step away from it, in float64 and in memory: what the data methods are tested on."""

from __future__ import annotations

from pathlib import Path

import torch

from embedsmith.calibrate.live_model import LiveMerge
from embedsmith.data import Record, RecordSet
from embedsmith.merge.folders import open_folder
from embedsmith.merge.method import Combine, Job, groups
from embedsmith.models import load
from tests.merge.memory import float_names
from tests.tinybert import WORDS, tiny_bert

PROMPTS = {"query": "the ", "document": "cat "}


def family(
    folder: Path, parents: int = 3, size: float = 0.05, per_block: bool = False, prompts: dict[str, str] = PROMPTS
) -> LiveMerge:
    """theta_0 and V_i drawn at random, V_i of different lengths."""
    path = folder / "tiny"
    if not path.exists():
        tiny_bert(path, dropout=0.0)
    model = load(str(path), pooling="mean", prompts=prompts).double()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(7)
    deltas = [
        {name: size * (i + 1) * torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in base.items()}
        for i in range(parents)
    ]
    chosen = groups(list(base), "block" if per_block else "model")
    place = {name: number for number, members in enumerate(chosen.values()) for name in members}
    return LiveMerge(model, base, deltas, tuple(f"parent-{i}" for i in range(parents)), place, tuple(chosen))


def sentences(count: int, length: int = 4, seed: int = 0) -> list[str]:
    """Texts of different words and lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (count,), generator=generator).tolist()
    return [
        " ".join(WORDS[w] for w in torch.randint(0, len(WORDS), (n,), generator=generator)) + f" {chr(97 + k % 26)}"
        for k, n in enumerate(lengths)
    ]


def retrieval_records(count: int = 12, seed: int = 0) -> RecordSet:
    texts = sentences(2 * count, seed=seed)
    records = [Record(texts[2 * n], (texts[2 * n + 1],)) for n in range(count)]
    return RecordSet("pairs", "retrieval", records, f"pairs-{seed}")


def sts_records(count: int = 12, seed: int = 1) -> RecordSet:
    texts = sentences(2 * count, seed=seed)
    records = [
        Record(texts[2 * n], (texts[2 * n + 1],), task="sts", positive_scores=(n / (count - 1),)) for n in range(count)
    ]
    return RecordSet("graded", "sts", records, f"graded-{seed}")


def job(folders: Path, base: bool = True) -> Job:
    """The saved family as a method sees it, weights 1 and 3."""
    parents = tuple(open_folder(folders / f"parent-{place}", f"p{place}") for place in range(2))
    start = open_folder(folders / "base", "base") if base else None
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    return Job(parents, start, float_names([*parents, *([start] if start else [])]), weights)


def merged(job_: Job, combine: Combine) -> dict[str, torch.Tensor]:
    """Every tensor, flat, as the writer would get it."""
    found: dict[str, list[torch.Tensor]] = {}
    for block in job_.blocks():
        found.setdefault(block.name, []).append(combine(block))
    return {name: torch.cat(parts) for name, parts in found.items()}


def probe(folders: Path, *names: str) -> dict[str, object]:
    """A recipe's probe section on the saved files."""
    return {"sources": [{"path": str(folders / f"{name}.jsonl")} for name in names], "negatives": 2}
