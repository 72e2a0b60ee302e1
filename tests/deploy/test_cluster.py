"""The launch files of deploy/cluster/: they are understood by the shell, torchrun, YAML and our own command line, they
give what they were given to the right program, and, in the slow tier, do so with real processes."""

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from embedsmith.core.recipe import parse, save_recipe
from embedsmith.train import Recipe, train
from tests.deploy.test_deploy import given
from tests.docs.blocks import ROOT
from tests.tinybert import tiny_bert

CLUSTER = ROOT / "deploy" / "cluster"
SCRIPTS = sorted(path.name for path in CLUSTER.glob("*.sh"))
SRUN = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
SBATCH = """
while [[ $# -gt 0 ]]; do
  case $1 in
    --array) array=$2; shift 2 ;;
    --export) export "SHARDS=${2##*SHARDS=}"; shift 2 ;;
    --wrap) eval "$2" >&2; echo 2; exit ;;
    --dependency | --job-name) shift 2 ;;
    --*) shift ;;
    *) break ;;
  esac
done
for SLURM_ARRAY_TASK_ID in $(seq "${array%-*}" "${array#*-}"); do export SLURM_ARRAY_TASK_ID; bash "$@" >&2; done
echo 1
"""


def told(command):
    """(options of torchrun, options of our verb) as both understand a command."""
    place = command.index("-m")
    run = get_args_parser().parse_args([*command[1:place], "-m", *command[place + 1 :]])
    assert run.training_script == "embedsmith"
    return run, given(run.training_script_args)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts programs of a line or two in front of the real ones. One that is `None` writes its arguments, one a line."""

    def put(**texts):
        (tmp_path / "bin").mkdir()
        for name, text in texts.items():
            path = tmp_path / "bin" / name
            path.write_text("#!/bin/bash\n" + (text or f"printf '%s\\n' {name} \"$@\" >> {tmp_path}/said"))
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        return tmp_path / "said"

    return put


def done(*command, **variables):
    found = subprocess.run(
        [str(part) for part in command], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_shell_reads_a_script_and_it_may_be_run(name):
    done("bash", "-n", CLUSTER / name)
    assert os.access(CLUSTER / name, os.X_OK)
    text = (CLUSTER / name).read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert re.search(rf"^#   .*{re.escape(name)}" if name != "shards.sh" else "submit.sh", text, re.M)


def test_a_job_of_several_nodes_starts_torchrun_on_each(programs):
    said = programs(srun=SRUN, scontrol="seq -f node%.0f 7 90000", torchrun=None)
    done(CLUSTER / "train.sh", "recipe.yaml", "output=runs/a b", SLURM_JOB_NUM_NODES="2", SLURM_JOB_ID="99")
    run, ours = told(said.read_text().splitlines())
    assert (run.nnodes, run.nproc_per_node, run.rdzv_endpoint, run.rdzv_id) == ("2", "8", "node7:29500", "99")
    assert (run.rdzv_backend, run.max_restarts) == ("c10d", 3)
    assert (str(ours["recipe"]), ours["overrides"]) == ("recipe.yaml", ["output=runs/a b"])


def test_ranks_without_a_scheduler(programs):
    said = programs(torchrun=None)
    done(CLUSTER / "torchrun.sh", "train", "recipe.yaml", NODES="4:8", FIRST="node0", PROCESSES="2")
    run, ours = told(said.read_text().splitlines())
    assert (run.nnodes, run.nproc_per_node, run.rdzv_endpoint) == ("4:8", "2", "node0:29500")
    assert str(ours["recipe"]) == "recipe.yaml"


def test_an_array_has_every_shard_once_and_then_the_join(programs):
    said = programs(sbatch=SBATCH, embedsmith=None)
    text = ["encode", "a b.jsonl", "vectors", "--model", "runs/a/model"]
    found = done(CLUSTER / "submit.sh", "3", *text)
    commands = said.read_text().split("embedsmith\n")[1:]
    more = [command.splitlines()[len(text) :] for command in commands]
    assert [command.splitlines()[: len(text)] for command in commands] == [text] * 4
    assert more == [["--shard", "0/3"], ["--shard", "1/3"], ["--shard", "2/3"], ["--join"]]
    assert found.stdout == "array 1, join 2\n"
    assert given([*text, "--shard", "0/3"])["shard"] == "0/3"


def test_kubernetes_jobs_say_what_the_programs_understand():
    service, training, encoding = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text(encoding="utf-8"))
    for job in (training, encoding):
        spec = job["spec"]
        assert spec["completionMode"] == "Indexed"
        assert spec["completions"] == spec["parallelism"]
        pod = spec["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}
    pod = training["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    values = {one["name"]: one["value"] for one in container["env"]}
    assert values["NODES"] == str(training["spec"]["completions"])
    run, ours = told(
        [*container["command"], *(re.sub(r"\$\((\w+)\)", lambda m: values[m[1]], a) for a in container["args"])]
    )
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert run.rdzv_endpoint == f"{training['metadata']['name']}-0.{pod['subdomain']}:{port}"
    assert (pod["subdomain"], service["spec"]["selector"]) == (name, {"job-name": training["metadata"]["name"]})
    assert run.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert str(ours["recipe"]).startswith("/shared/")
    (container,) = encoding["spec"]["template"]["spec"]["containers"]
    shard = given(container["args"])["shard"]
    assert shard == f"$(JOB_COMPLETION_INDEX)/{encoding['spec']['completions']}"


def test_the_ray_cluster_is_one():
    tree = yaml.safe_load((CLUSTER / "ray.yaml").read_text(encoding="utf-8"))
    assert {"cluster_name", "max_workers", "provider", "auth"} <= tree.keys()
    assert len(tree["provider"]["worker_ips"]) == tree["max_workers"]
    head, worker = (tree[f"{name}_start_ray_commands"][-1] for name in ("head", "worker"))
    port = shlex.split(head)[shlex.split(head).index("--port") + 1]
    assert f"$RAY_HEAD_IP:{port}" in worker
    assert "0.0.0.0" not in head  # whoever reaches Ray's dashboard may run what he likes


@pytest.mark.slow
def test_shards_of_an_array_give_the_vectors_of_one_process(programs, tmp_path, bert):
    programs(sbatch=SBATCH, embedsmith=f'exec {sys.executable} -m embedsmith "$@"')
    (tmp_path / "texts.txt").write_text("".join(f"the cat {number}\n" for number in range(20)))
    options = ["--model", bert, "--pooling", "mean", "--block", "4"]
    done(CLUSTER / "submit.sh", "2", "encode", tmp_path / "texts.txt", tmp_path / "shards", *options)
    done(sys.executable, "-m", "embedsmith", "encode", tmp_path / "texts.txt", tmp_path / "one", *options)
    left, right = (np.load(tmp_path / name / "vectors.npy") for name in ("shards", "one"))
    np.testing.assert_array_equal(left, right)


@pytest.mark.slow
@pytest.mark.dist
def test_a_job_goes_on_with_another_number_of_ranks(programs, tmp_path, tree):
    """Two ranks, one of which is killed and started again; then the rest on one: the weights of one process."""
    kill = (
        f"[[ $RANK == 1 && ! -e {tmp_path}/killed ]] && {{ touch {tmp_path}/killed; kill -9 $$; }}\n"
        f'exec {sys.executable} "$@"'
    )
    torchrun = f'PYTHON_EXEC={tmp_path}/bin/worker exec {sys.executable} -m torch.distributed.run "$@"'
    programs(srun=SRUN, scontrol="echo localhost", torchrun=torchrun, worker=kill)
    tree["model"] = {"path": str(tiny_bert(tmp_path / "plain", dropout=0.0)), "pooling": "mean"}
    tree["train"] |= {"steps": 6, "checkpoint_every": 2, "keep_checkpoints": 5, "log_with": []}
    recipe = parse(Recipe, tree)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    one = train(recipe)
    again = ["recipe.yaml", f"output={tmp_path}/again"]
    half = ["bash", "-c", f"cd {tmp_path} && {CLUSTER}/train.sh {' '.join(again)}"]
    stopped = subprocess.Popen(half, env=os.environ | {"PROCESSES": "2", "PORT": "0", "OMP_NUM_THREADS": "1"})
    try:
        assert stopped.wait(timeout=540) == 0
    finally:
        stopped.kill()
    assert (tmp_path / "killed").exists()
    close(tmp_path / "again/model", one)
    # what two ranks left half done, one goes on with
    for step in ("step-4", "step-6"):
        for path in (tmp_path / "again/checkpoints").glob(step):
            subprocess.run(["rm", "-r", str(path)], check=True)
    for name in ("finished.json", "model"):
        subprocess.run(["rm", "-r", str(tmp_path / "again" / name)], check=True)
    assert any((tmp_path / "again/checkpoints").iterdir())
    close(train(parse(Recipe, tree | {"output": str(tmp_path / "again")})), one)


def close(folder: Path, other: Path):
    left, right = (load_file(place / "model.safetensors") for place in (folder, other))
    for name, tensor in right.items():
        torch.testing.assert_close(left[name], tensor, rtol=0, atol=2e-5)
