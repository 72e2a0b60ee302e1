"""mergekit's own YAML, run by mergekit and read by us: gradients over layers, filters by name, slices, densities of a
model's own. The rows of `python -m bench.merging_peers` that come from here are to agree to float32."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

import embedsmith
from bench.mergekit_env import mergekit_python

_BY_MERGEKIT = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for config, out in json.loads(sys.argv[1]):
    run_merge(MergeConfiguration.model_validate(config), out, MergeOptions(copy_tokenizer=False, quiet=True))
"""


def _models(*parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"model": f"parent{place}", "parameters": dict(own)} for place, own in enumerate(parameters)]


T = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.2]}, {"value": 0.5}]


CONFIGS: Mapping[str, dict[str, Any]] = {
    "linear, gradient and filter": {
        "merge_method": "linear",
        "models": _models({"weight": [0, 0.5, 1]}, {"weight": [{"filter": "norm", "value": 2}, {"value": [1, 0.25]}]}),
    },
    "linear, a negative weight": {
        "merge_method": "linear",
        "models": _models({"weight": 1.5}, {"weight": -0.5}),
    },
    "slerp, gradients by filter": {
        "merge_method": "slerp",
        "base_model": "parent0",
        "models": _models({}, {}),
        "parameters": {"t": T},
    },
    "slerp, two slices": {
        "merge_method": "slerp",
        "base_model": "parent1",
        "slices": [
            {"sources": [{"model": "parent0", "layer_range": [0, 2]}, {"model": "parent1", "layer_range": [0, 2]}],
             "parameters": {"t": [0.25, 0.75]}},
            {"sources": [{"model": "parent0", "layer_range": [2, 5]}, {"model": "parent1", "layer_range": [2, 5]}],
             "parameters": {"t": [{"filter": "bias", "value": 0.25}, {"value": [0.25, 0, 1]}]}},
        ],
    },
    "task arithmetic, gradient": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": _models({"weight": [0.2, 0.9, 0.1]}, {"weight": -0.3}, {}),
        "parameters": {"weight": 0.4, "lambda": 0.7},
    },
    "task arithmetic, divided": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "base"}, *_models({"weight": [0.2, 0.9]}, {"weight": 0.3})],
        "parameters": {"normalize": True},
    },
    "ties, mergekit's example": {
        "merge_method": "ties",
        "base_model": "base",
        "models": _models(
            {"density": [1, 0.7, 0.1], "weight": 1.0},
            {"density": 0.5, "weight": [0, 0.3, 0.7, 1]},
            {"density": 0.33, "weight": [{"filter": "mlp", "value": 0.5}, {"value": 0}]},
        ),
        "parameters": {"normalize": True, "int8_mask": True},
    },
    "ties, a sum": {
        "merge_method": "ties",
        "base_model": "base",
        "models": _models({"weight": 0.5}, {"weight": [0.1, 0.8]}, {"weight": 0.5}),
        "parameters": {"normalize": False, "rescale": True, "density": 0.4, "lambda": 1.2},
    },
    "breadcrumbs, a sum": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": _models({"weight": [0.5, 1]}, {"weight": 0.25, "density": [0.3, 0.6]}),
        "parameters": {"density": 0.5, "gamma": 0.04},
    },
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties",
        "base_model": "base",
        "models": _models({}, {}, {}),
        "parameters": {"density": 0.5, "gamma": 0.04, "weight": 0.5},
    },
    "nuslerp, gradient": {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": _models({"weight": [1, 0, 1]}, {"weight": [{"filter": "mlp", "value": 3}, {"value": 1}]}),
    },
    "nuslerp of raw weights": {
        "merge_method": "nuslerp",
        "models": _models({"weight": [1, 0, 1]}, {"weight": 0.5}),
    },
    "multislerp, gradient": {
        "merge_method": "multislerp",
        "base_model": "base",
        "models": _models({"weight": [1, 0.5]}, {"weight": 1}, {"weight": 0.3}),
    },
    "karcher of raw weights": {
        "merge_method": "karcher",
        "models": _models({}, {}, {}),
        "parameters": {"max_iter": 100, "tol": 1e-9},
    },
}  # fmt: skip
"""Names of models stand for folders of the family."""
DIFFERS = {"karcher of raw weights": "the peer takes arc cosines of nearly 1 in float32, which lose half the digits"}
"""Configs whose results are not the same, and why."""


def written(config: Any, root: Path, names: list[str]) -> Any:
    """A config with the family's folders in the place of their names, without filters that fit no tensor (an error
    here, without effect there)."""
    if isinstance(config, dict):
        return {key: written(value, root, names) for key, value in config.items()}
    if isinstance(config, list):
        kept = [one for one in config if not isinstance(one, dict) or any(one.get("filter", "") in n for n in names)]
        return [written(one, root, names) for one in kept]
    if isinstance(config, str) and all((root / part).exists() for part in config.split("+")):
        return "+".join(str(root / part) for part in config.split("+"))
    return config


def config_rows(root: Path, base: Path) -> list[dict[str, Any]]:
    """Every config merged by both; how far they are apart, against how far the merge is from the base."""
    names = list(load_file(base / "model.safetensors"))
    configs = {name: written(config, root, names) | {"dtype": "float32"} for name, config in CONFIGS.items()}
    jobs = [[config, str(root / f"theirs {name}")] for name, config in configs.items()]
    command = [str(mergekit_python()), "-c", _BY_MERGEKIT, json.dumps(jobs)]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"mergekit failed:\n{done.stderr[-3000:]}")
    rows = []
    origin = load_file(base / "model.safetensors")
    for name, config in configs.items():
        file = root / f"{name}.yml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        mine = embedsmith.merge(file, output=str(root / f"ours {name}"), cache=None)
        theirs = {
            key.removeprefix("model."): tensor
            for path in sorted((root / f"theirs {name}").glob("*.safetensors"))
            for key, tensor in load_file(path).items()
        }
        ours = load_file(mine.path / "model.safetensors")
        moved = torch.cat([(ours[key] - origin[key]).double().flatten() for key in ours])
        apart = torch.cat([(ours[key] - theirs[key]).double().flatten() for key in ours])
        row = {"peer": name, "by": "mergekit's YAML", "ours": config["merge_method"]}
        rows.append(row | {"difference": float(apart.norm() / moved.norm()), "why": DIFFERS.get(name, "")})
    return rows
