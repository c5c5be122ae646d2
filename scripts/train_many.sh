#!/bin/bash
# Train on several machines that see the same folders; run this on each of them:
#   bash scripts/train_many.sh CONFIG HOST MACHINES NUMBER [--set NAME=VALUE …]      HOST is machine 0; NUMBER is this one's
set -e
usage="CONFIG HOST MACHINES NUMBER"
config=${1:?$usage} host=${2:?$usage} machines=${3:?$usage} number=${4:?$usage}
gpus=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
exec torchrun --nnodes "$machines" --node_rank "$number" --master_addr "$host" --master_port "${MASTER_PORT:-29500}" \
  --nproc_per_node "$gpus" train.py --config "$config" "${@:5}"
