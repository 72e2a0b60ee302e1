#!/bin/bash
# Training on several nodes under Slurm: one torchrun a node, which starts a process for each of its cards.
#
#   sbatch --nodes 8 deploy/cluster/train.sh recipe.yaml output=/shared/runs/a
#
# After a preemption or a lost node the job comes back by itself (--requeue) and goes on from the last checkpoint; so does
# the same command by hand, after its time limit or on another number of nodes. The output lies on a disk that all nodes
# see.
#SBATCH --job-name=embedsmith-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
set -euo pipefail

nodes=${SLURM_JOB_NUM_NODES:-1}
names=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}")
first=${names%%$'\n'*}
processes=${PROCESSES:-8}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# TERM comes five minutes before the end (--signal): train ends its step, saves and leaves, for which torchrun gives it
# half a minute.
exec srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$nodes" --nproc-per-node "$processes" \
  --rdzv-backend c10d --rdzv-endpoint "$first:${PORT:-29500}" --rdzv-id "${SLURM_JOB_ID:-0}" \
  --max-restarts 3 \
  -m embedsmith train "$@"
