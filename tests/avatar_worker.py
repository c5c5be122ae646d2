"""Run by torchrun in test_audio_avatar.py: talking avatars by several processes; rank 0 keeps the latents.

torchrun … avatar_worker.py OUT.mp4 FLAG … -- OUT.mp4 FLAG … -- …        several runs in one start
"""

import itertools
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import infer_audio_avatar
from pipelines.audio_avatar.pipeline import AvatarMaker
from pipelines.distributed import Processes


def keep_latents(decode):
    def decode_and_keep(self, latents, writer):
        weight = self.wan.transformer(0).blocks[0].self_attn.q.weight
        rows = len(weight.to_local() if isinstance(weight, DTensor) else weight)  # that this process holds
        tensors = {"latents": latents.clone(), "rows": torch.tensor(rows)}
        save_file(tensors, Path(writer.path).with_suffix(".safetensors"))
        decode(self, latents, writer)

    return decode_and_keep


if __name__ == "__main__":
    AvatarMaker.decode = keep_latents(AvatarMaker.decode)
    close, Processes.close = Processes.close, lambda self: None  # a process group cannot be joined twice
    for is_end, flags in itertools.groupby(sys.argv[1:], lambda flag: flag == "--"):
        if not is_end:
            infer_audio_avatar.main(infer_audio_avatar.parse_args(["--output", *flags]))
    close(Processes)
