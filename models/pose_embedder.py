"""The pose embedder of SVI-Dance (UniAnimate-DiT's): a video of drawn skeletons -> terms for the video's patch tokens.

Source: arXiv 2504.11289; UniAnimate-DiT and Stable-Video-Infinity `diffsynth/pipelines/svi_video_dance.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from errors import WeightsError
from models.wan.checkpoint import assign_tensors, read_tensors
from models.wan.slots import BlockContext, Slots

KEY = "dwpose_embedding."  # what precedes it in a key is a wrapper's name


class PoseEmbedder(nn.Sequential):
    """Seven convolutions over time, rows and columns, down to the token grid: 4 x 16 x 16 pixels a token.

    Modules have the released file's numbers. It runs in float32, once a clip.
    """

    def __init__(self, dim: int):
        super().__init__(
            *(nn.Conv3d(3, 16, 3, padding=1), nn.SiLU()),
            *(nn.Conv3d(16, 16, 3, padding=1), nn.SiLU()),
            *(nn.Conv3d(16, 16, 3, padding=1), nn.SiLU()),
            *(nn.Conv3d(16, 16, 3, stride=(1, 2, 2), padding=1), nn.SiLU()),
            *(nn.Conv3d(16, 16, 3, stride=2, padding=1), nn.SiLU()),
            *(nn.Conv3d(16, 16, 3, stride=2, padding=1), nn.SiLU()),
            nn.Conv3d(16, dim, (1, 2, 2), stride=(1, 2, 2)),
        )

    @torch.no_grad()
    def encode(self, pose: Tensor | numpy.ndarray) -> "PoseTokens":
        """The plug-in of one clip from its pose video (T, H, W, 3) in 0 to 255, T = 4n + 1, H and W divisible by 16."""
        return self.embed(torch.as_tensor(pose)[None])

    def embed(self, poses: Tensor) -> "PoseTokens":
        """As `encode` for a batch (B, T, H, W, 3), with gradients where they are recorded."""
        if poses.shape[1] % 4 != 1 or poses.shape[2] % 16 or poses.shape[3] % 16:
            raise ValueError(
                f"a pose video of shape {tuple(poses.shape[1:])}; accepted are 4n + 1 frames of 16r x 16c pixels"
            )
        pixels = poses.to(self[0].weight.device, torch.float32) / 255
        # The first latent frame is of one video frame.
        pixels = torch.cat((pixels[:, :1].expand(-1, 3, -1, -1, -1), pixels), dim=1)
        features = self(pixels.permute(0, 4, 1, 2, 3))  # (B, D, F, H/16, W/16)
        # Rounded as upstream hands it over: what the LoRA beside it was trained with.
        return PoseTokens(features.flatten(2).transpose(1, 2).bfloat16(), tuple(features.shape[2:]))


@dataclass(frozen=True)
class PoseTokens:
    """What the pose of one clip adds to its patch tokens.

    tokens: (1 or B, L, D) bfloat16, frame-major; of a video split over processes, this process's part.
    grid: (F, rows, columns) of the whole clip in tokens.
    """

    tokens: Tensor
    grid: tuple[int, int, int]

    def __call__(self, tokens: Tensor, ctx: BlockContext) -> Slots:
        """The plug-in: the same terms at every step and in every guidance branch that gets it."""
        if ctx.grid != self.grid or tokens.shape[1] != self.tokens.shape[1]:
            raise ValueError(f"the pose video has a grid of {self.grid} tokens, the video one of {ctx.grid}")
        return Slots(added_tokens=self.tokens.to(tokens))

    def shard(self, rank: int, processes: int) -> "PoseTokens":
        """This process's part, for a sequence split over processes."""
        return replace(self, tokens=self.tokens.chunk(processes, dim=1)[rank])


def load_pose_embedder(path: str | Path, dim: int, hint: str = "") -> PoseEmbedder:
    """The embedder inside an SVI-Dance file, whose other keys are a LoRA, for a transformer of this width.

    Raises:
        WeightsError: unreadable, no embedder in it, or one for another width.
    """
    return pose_embedder_from_tensors(read_tensors(path, hint=hint), dim, source=path)


def pose_embedder_from_tensors(tensors: Mapping[str, Tensor], dim: int, source: str | Path = "") -> PoseEmbedder:
    """The embedder among tensors under the released names; others are left to their own reader."""
    own = {name.partition(KEY)[2]: tensor for name, tensor in tensors.items() if KEY in name}
    if not own:
        raise WeightsError(
            f"{source}: no pose embedder in it (keys {KEY}0.weight …); SVI-Dance's is in the same file as its LoRA, "
            "svi-dance.safetensors"
        )
    with torch.device("meta"):
        embedder = PoseEmbedder(dim)
    assign_tensors(embedder, own, dtype=torch.float32, source=source)
    return embedder.requires_grad_(False).eval()
