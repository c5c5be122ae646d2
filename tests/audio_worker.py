"""Run by torchrun in test_audio_adapter.py: one forward pass with speech, split over the processes; rank 0 saves it."""

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pipelines.distributed import split_sequence
from tests import tiny
from tests.test_audio_adapter import NUM_FRAMES, avatar_forward


def main(output: str) -> None:
    dist.init_process_group("gloo")
    model = tiny.avatar_transformer()
    adapter = tiny.audio_adapter(model)
    for part in (model, adapter):
        split_sequence(part, ulysses_degree=dist.get_world_size(), ring_degree=1, device=torch.device("cpu"))
    features = tiny.audio_features()
    with torch.no_grad():
        out = {
            "frames": avatar_forward(model, [adapter.plugin(features, NUM_FRAMES)]),
            "clip": avatar_forward(model, [adapter.plugin(features, NUM_FRAMES, clip_level=True)]),
            "batch": avatar_forward(model, [adapter.plugin(features, NUM_FRAMES, hears=[False, True])], batch=2),
        }
    if dist.get_rank() == 0:
        save_file(out, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
