"""Run by torchrun in test_audio_avatar.py: talking avatars by several processes; rank 0 keeps the latents.

torchrun … avatar_worker.py OUT.mp4 FLAG … -- OUT.mp4 FLAG … -- …        several runs in one start
"""

import itertools
import sys

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import infer_audio_avatar
from pipelines.audio_avatar.pipeline import AvatarMaker
from pipelines.distributed import Processes


def keep_latents(denoise):
    def denoise_and_keep(self, job, state):
        latents = denoise(self, job, state)
        models = self.wan.transformer(0), self.wan.part("audio_adapter")
        weights = models[0].blocks[0].self_attn.q.weight, next(models[1].blocks[0].parameters())
        held = [len(w.to_local() if isinstance(w, DTensor) else w) for w in weights]  # rows, by this process
        tensors = {"latents": latents.clone(), "rows": torch.tensor(held)}
        if self.wan.processes.writes:
            save_file(tensors, job.output.with_suffix(".safetensors"))
        return latents

    return denoise_and_keep


if __name__ == "__main__":
    AvatarMaker.denoise = keep_latents(AvatarMaker.denoise)
    close, Processes.close = Processes.close, lambda self: None  # a process group cannot be joined twice
    for is_end, flags in itertools.groupby(sys.argv[1:], lambda flag: flag == "--"):
        if not is_end:
            infer_audio_avatar.main(infer_audio_avatar.parse_args(["--output", *flags]))
    close(Processes)
