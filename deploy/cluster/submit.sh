#!/bin/bash
# Send a verb (encode, tokenize, mine, evaluate, index) to Slurm in so many shards, and its join.
#
#   deploy/cluster/submit.sh 64 encode passages.jsonl /shared/vectors --model runs/a/model
set -euo pipefail

here=$(dirname "$(realpath "$0")")
shards=$1
shift
array=$(sbatch --parsable --array "0-$((shards - 1))" --export "ALL,SHARDS=$shards" "$here/shards.sh" "$@")
join=$(sbatch --parsable --dependency "afterok:$array" --job-name embedsmith-join --wrap "embedsmith $(printf '%q ' "$@")--join")
echo "array $array, join $join"
