#!/bin/bash
# A verb in shards as a Slurm array: each shard takes a card as one is free, and a join ends the work.
#
#   deploy/cluster/submit.sh 64 encode passages.jsonl /shared/vectors --model runs/a/model
#
# `submit.sh` sends this file as an array and the join behind it. A shard that was killed is sent again by Slurm.
#SBATCH --job-name=embedsmith-shard
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-12}
exec embedsmith "$@" --shard "$SLURM_ARRAY_TASK_ID/$SHARDS"
