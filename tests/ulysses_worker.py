"""Run by torchrun in test_distributed.py: one forward pass split over the processes; rank 0 saves what came out."""

import os
import sys

import torch
from safetensors.torch import save_file

from pipelines.distributed import split_sequence, start_processes
from tests import tiny
from tests.tiny import GRID, TIMESTEP


def main(output: str) -> None:
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    processes = start_processes("cpu", ulysses_degree=count)
    model = tiny.transformer()
    split_sequence(model, ulysses_degree=count, ring_degree=1, device=processes.device)
    identity = tiny.stand_in(model).encode(model, [tiny.photo()], GRID).shard(rank, count)
    branch = tiny.vace_branch()
    split_sequence(branch, ulysses_degree=count, ring_degree=1, device=processes.device)
    control = branch.plugin(tiny.latents(seed=5, channels=96))
    layers = tiny.multitalk()
    split_sequence(layers, ulysses_degree=count, ring_degree=1, device=processes.device)
    speech, pose = layers.speech(tiny.audio(20), 4, 9), tiny.pose().shard(rank, count)
    per_token = torch.full((1, 3 * GRID[0] * GRID[1]), 600.0)
    per_token[:, : GRID[0] * GRID[1]] = 0
    with torch.no_grad():
        out = {
            "plain": model(tiny.latents(), TIMESTEP, tiny.prompt()),
            "identity": model(tiny.latents(), TIMESTEP, tiny.prompt(), plugins=[identity]),
            "vace": model(tiny.latents(), TIMESTEP, tiny.prompt(), plugins=[identity, control]),
            "speech": model(tiny.latents(), TIMESTEP, tiny.prompt(), plugins=[speech]),
            "pose": model(tiny.latents(), TIMESTEP, tiny.prompt(), plugins=[pose]),
            "per_token": model(tiny.latents(), per_token, tiny.prompt()),
        }
    if rank == 0:
        save_file(out, output)
    processes.wait()
    processes.close()


if __name__ == "__main__":
    main(sys.argv[1])
