"""The launch files of recipes/accelerate/, each on two CPU processes: the weights of one process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from embedsmith.core.recipe import parse, save_recipe
from embedsmith.train import Recipe, train
from tests.tinybert import tiny_bert

CONFIGS = Path(__file__).parents[2] / "recipes/accelerate"
SHARD = {"ddp": "false", "fsdp2": "true", "zero2": "zero2"}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("config", sorted(SHARD))
def test_a_launched_run_equals_one_process(tree, tmp_path, config):
    if config == "zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip('needs DeepSpeed: pip install "embedsmith[deepspeed]"')
    tree["model"] = {"path": str(tiny_bert(tmp_path / "plain", dropout=0.0)), "pooling": "mean"}
    tree["train"] = tree["train"] | {"steps": 3, "log_with": []}
    recipe = parse(Recipe, tree)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    one = train(recipe)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    ours = ["--num_processes", "2", "--main_process_port", "0", "-m", "embedsmith", "train"]
    changes = [f"train.shard={SHARD[config]}", f"output={tmp_path / 'two'}"]
    done = subprocess.run(
        [*launch, *ours, str(tmp_path / "recipe.yaml"), *changes],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("model: ") == 1
    weights = load_file(tmp_path / "two/model/model.safetensors")
    for name, tensor in load_file(one / "model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=2e-5)


def test_every_launch_file_is_tried():
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == sorted(SHARD)
