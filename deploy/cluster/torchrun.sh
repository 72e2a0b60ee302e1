#!/bin/bash
# Ranks without a scheduler: the same command on every node, with NODES, and the name of the first one as FIRST.
#
#   NODES=2 FIRST=node0 deploy/cluster/torchrun.sh train recipe.yaml output=/shared/runs/a
#   PROCESSES=4 deploy/cluster/torchrun.sh encode passages.jsonl vectors --model runs/a/model
#
# Nodes may be given as a range, such as NODES=4:8: a run starts with as many as are there, and when one is lost the
# others are started again without it and go on from the last checkpoint.
set -euo pipefail

exec torchrun \
  --nnodes "${NODES:-1}" --nproc-per-node "${PROCESSES:-gpu}" \
  --rdzv-backend c10d --rdzv-endpoint "${FIRST:-localhost}:${PORT:-29500}" --rdzv-id "${RUN:-embedsmith}" \
  --max-restarts 3 \
  -m embedsmith "$@"
