"""Merges by mergekit and sentence-transformers against ours, number by number, on tiny models made on the spot.

    python -m bench.merging_peers

Where the peers' method is right the weights agree to float32; where it is not, the table says what is wrong. The last
rows are mergekit's own YAML (bench/mergekit_configs.py), run by mergekit and read by us. mergekit gets an environment
of its own under bench/out on the first run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

import embedsmith
from bench.common import RESULTS, environment, write_json
from bench.mergekit_configs import config_rows
from bench.mergekit_env import VERSION, mergekit_python

STEPS = {"usual": 1e-3, "small": 1e-4}
"""How far weights move. Fine-tuning moves them by less: where thresholds made for larger numbers show."""

_BY_SENTENCE_TRANSFORMERS = """
import sys, json
from sentence_transformers import SentenceTransformer
job = json.loads(sys.argv[1])
SentenceTransformer.merge(job["models"], job["method"], base_model=job["base"], parameters=job["parameters"],
                          device="cpu").save(job["out"])
"""


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{place}" for place in range(60))]
    native = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    native.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=native, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def family(root: Path, kind: str, step: float, layers: int = 2) -> tuple[Path, list[Path]]:
    """A base and three parents: BERT as sentence-transformers folders, or a plain Qwen3 decoder."""
    torch.manual_seed(0)
    size = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    if kind == "bert":
        model: Any = BertModel(BertConfig(max_position_embeddings=32, **size))
    else:
        model = Qwen3Model(Qwen3Config(num_key_value_heads=2, head_dim=8, max_position_embeddings=64, **size))
    plain = root / "plain"
    model.save_pretrained(plain)
    tokenizer().save_pretrained(plain)
    base = root / "base"
    embedsmith.load(str(plain), pooling="mean", max_length=32).save(base)
    return base, [moved(base, root / f"parent{place}", place, step) for place in range(3)]


def moved(base: Path, folder: Path, seed: int, step: float) -> Path:
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed + 1)
    state = load_file(base / "model.safetensors")
    common = torch.Generator().manual_seed(99)  # a shared part, so that task vectors are 60 degrees apart
    state = {
        name: tensor
        + step * (torch.randn(tensor.shape, generator=common) + torch.randn(tensor.shape, generator=generator))
        for name, tensor in state.items()
    }
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def by_sentence_transformers(base: Path, parents: list[Path], out: Path, method: str, parameters: Any) -> None:
    needs_base = method not in ("linear", "slerp")
    job = {
        "models": [str(path) for path in parents],
        "base": str(base) if needs_base else None,
        "method": method,
        "parameters": parameters,
        "out": str(out),
    }
    _run([str(mergekit_python()), "-c", _BY_SENTENCE_TRANSFORMERS, json.dumps(job)])


def by_mergekit(base: Path, parents: list[Path], out: Path, method: str, parameters: Any) -> None:
    needs_base = method not in ("linear",)
    config = {
        "merge_method": method,
        "models": [{"model": str(path), "parameters": {"weight": 1.0, **parameters}} for path in parents],
        "dtype": "float32",
    }
    config |= {"base_model": str(base)} if needs_base else {}
    recipe = out.with_suffix(".yml")
    recipe.write_text(yaml.safe_dump(config), encoding="utf-8")
    _run([str(mergekit_python()), "-m", "mergekit.scripts.run_yaml", str(recipe), str(out)])


def _run(command: list[str]) -> None:
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the peer failed:\n{done.stderr[-3000:]}")


ROWS: tuple[dict[str, Any], ...] = (
    {"peer": "linear", "ours": "average", "count": 3, "agrees": True},
    {
        "peer": "task_arithmetic",
        "ours": {"type": "task_arithmetic", "scale": 0.3},
        "count": 3,
        "agrees": True,
        "parameters": {"weight": 0.3},
    },
    {
        "peer": "ties",
        "ours": {"type": "ties", "density": 0.4},
        "count": 3,
        "agrees": True,
        "parameters": {"density": 0.4, "normalize": True},
    },
    {"peer": "nuslerp", "ours": "slerp", "count": 2, "agrees": True},
    {"peer": "multislerp", "ours": "normalised_mean", "count": 3, "agrees": True},
    {
        "peer": "sce",
        "step": "small",
        "ours": {"type": "sce", "density": 0.4},
        "count": 3,
        "agrees": False,
        "parameters": {"select_topk": 0.4},
        "why": "mean squares below 1e-6 make the peer's weights uniform; ours are relative",
    },
    {
        "peer": "model_stock",
        "step": "small",
        "ours": "model_stock",
        "count": 3,
        "agrees": False,
        "why": "the peer clamps the product of norms at 1e-6, which shrinks the cosine of small tensors",
    },
    {
        "peer": "multislerp",
        "ours": "karcher",
        "count": 3,
        "agrees": False,
        "why": "the peer's tangent sum is zero, so it is a normalised mean and no spherical mean",
    },
    {
        "peer": "slerp",
        "ours": "slerp",
        "count": 2,
        "agrees": False,
        "why": "the peer turns raw weights, which are nearly parallel: an average",
    },
)
"""`agrees`: whether the weights must be the same to float32."""


def compare(row: Mapping[str, Any], base: Path, parents: list[Path], root: Path, tool: Any) -> dict[str, Any]:
    name = f"{row['peer']}-{tool.__name__}-{len(list(root.iterdir()))}"
    chosen = parents[: row["count"]]
    tool(base, chosen, root / name, row["peer"], row.get("parameters", {}))
    mine = embedsmith.merge(
        parents=[str(path) for path in chosen],
        base=str(base),
        method=row["ours"],
        granularity="tensor",
        output=str(root / f"ours-{name}"),
        cache=None,
    )
    theirs, ours, origin = (load_file(path / "model.safetensors") for path in (root / name, mine.path, base))
    theirs = {key.removeprefix("model."): tensor for key, tensor in theirs.items()}
    moved = torch.cat([(ours[key] - origin[key]).flatten() for key in ours])
    apart = torch.cat([(ours[key] - theirs[key].float()).flatten() for key in ours])
    return {
        "peer": row["peer"],
        "by": tool.__name__.removeprefix("by_"),
        "ours": row["ours"],
        "difference": float(apart.norm() / moved.norm()),
    }


def _name(method: Any) -> str:
    return method if isinstance(method, str) else str(method["type"])


def main() -> None:
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, tool in (("bert", by_sentence_transformers), ("qwen3", by_mergekit)):
            families = {}
            for name, step in STEPS.items():
                root = Path(folder) / f"{kind}-{name}"
                root.mkdir()
                families[name] = (*family(root, kind, step), root)
            rows = ROWS if kind == "bert" else [row for row in ROWS if row["peer"] in ("linear", "ties", "nuslerp")]
            for row in rows:
                result = compare(row, *families[row.get("step", "usual")], tool)
                found.append(result | {"agrees": row["agrees"], "why": row.get("why", "")})
        root = Path(folder) / "configs"
        root.mkdir()
        base, _ = family(root, "qwen3", STEPS["usual"], layers=5)
        found += [row | {"agrees": not row["why"]} for row in config_rows(root, base)]
    table = Table("peer", "run by", "ours", "difference / |merge - base|", "expected")
    for entry in found:
        verdict = "the same" if entry["agrees"] else entry["why"]
        table.add_row(entry["peer"], entry["by"], _name(entry["ours"]), f"{entry['difference']:.1e}", verdict)
    Console().print(table)
    write_json(RESULTS / "merging_peers.json", {**environment(), "mergekit": VERSION, "rows": found})
    wrong = [entry for entry in found if entry["agrees"] != (entry["difference"] < 1e-3)]
    if wrong:
        raise SystemExit(f"not as expected: {wrong}")


if __name__ == "__main__":
    main()
