#!/bin/bash
# Train on all GPUs of this machine: bash scripts/train_one.sh CONFIG [--set NAME=VALUE …]
set -e
config=${1:?a YAML file, or a name of configs/train/}
gpus=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
exec torchrun --standalone --nproc_per_node "$gpus" train.py --config "$config" "${@:2}"
