"""What VACE is conditioned on: control frames, mask and reference pictures -> the 96-channel context.

Masks: white (1) is made by the model, black (0) is kept as it is in the control video. A pose, depth or sketch video
is given with an all-white mask: it says what to make, and no pixel of it is kept.

Clips are (1, 3, T, H, W) in [-1, 1], masks (1, 1, T, H, W) of 0 and 1, latents normalised.
Source: Wan2.1 `wan/vace.py` (vace_encode_frames, vace_encode_masks, prepare_source);
Stand-In `pipelines/wan_video.py` (WanVideoUnit_VACE, WanVideoUnit_NoiseInitializer).
"""

from collections.abc import Sequence

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from models.wan.vae import WanVAE
from pipelines.conditions import image_to_video, initial_noise
from pipelines.vace.settings import GRID

# ------------------------------------------------------------------------------------------------------ the context


def frames_to_video(frames: numpy.ndarray) -> Tensor:
    """(T, H, W, 3) uint8 -> (1, 3, T, H, W) in [-1, 1]."""
    return (torch.from_numpy(numpy.array(frames)).float() / 127.5 - 1).permute(3, 0, 1, 2)[None]


def mask_to_video(mask: numpy.ndarray) -> Tensor:
    """(T, H, W) uint8, 255 = make, 0 = keep -> (1, 1, T, H, W) of 0 and 1."""
    return (torch.from_numpy(numpy.array(mask)) > 127)[None, None].float()


def split_by_mask(video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The kept and the made part of a video, each mid-grey (0) where the other is."""
    mask = (mask > 0.5).to(video)
    return video * (1 - mask), video * mask


def fold_mask(mask: Tensor) -> Tensor:
    """(1, 1, T, H, W) -> (1, 64, F, h, w): each 8 x 8 pixels become channels (row · 8 + column).

    The frame of the mask that a latent frame gets is upstream's nearest one, ⌊(f + 0.5)·T/F⌋; it is not always one of
    the four frames that the latent frame encodes, but the weights know it this way.
    """
    _, _, num_frames, height, width = mask.shape
    height, width = height // GRID * 2, width // GRID * 2
    folded = mask[:, :1, :, : height * 8, : width * 8].reshape(1, num_frames, height, 8, width, 8)
    folded = (folded > 0.5).float().permute(0, 3, 5, 1, 2, 4).flatten(1, 2)  # (1, 64, T, h, w)
    count = (num_frames + 3) // 4
    frames = (torch.arange(count, dtype=torch.float64) + 0.5) * num_frames / count
    return folded[:, :, frames.floor().long().clamp(max=num_frames - 1)]


def vace_context(vae: WanVAE, video: Tensor, mask: Tensor, references: Sequence[Tensor] = ()) -> Tensor:
    """The context of one video: (1, 96, R + F, h, w).

    Args:
        video: (1, 3, T, H, W), T = 4n+1, sides multiples of 16.
        mask: (1, 1, T, H, W); all ones for a control map.
        references: pictures (1, 3, 1, H, W) on the video's canvas (`fit_reference`), in the order they were given.
    """
    kept, made = (vae.encode(part) for part in split_by_mask(video, mask))  # (1, 16, F, h, w)
    context = torch.cat((kept, made, fold_mask(mask).to(kept)), dim=1)
    frames = []
    for reference in references:
        latent = vae.encode(reference)  # (1, 16, 1, h, w)
        frames.append(F.pad(latent, (0, 0, 0, 0, 0, 0, 0, context.shape[1] - latent.shape[1])))
    return torch.cat((*frames, context), dim=2)


def fit_reference(image: numpy.ndarray, height: int, width: int) -> Tensor:
    """A picture (H0, W0, 3) uint8 as large as fits, centred on a white canvas: (1, 3, 1, height, width) in [-1, 1].

    Bilinear without antialiasing, as the released models were fed.
    """
    clip = image_to_video(image)[:, :, 0]  # (1, 3, H0, W0)
    if clip.shape[-2:] == (height, width):
        return clip[:, :, None]
    scale = min(height / clip.shape[-2], width / clip.shape[-1])
    size = (max(1, int(clip.shape[-2] * scale)), max(1, int(clip.shape[-1] * scale)))
    clip = F.interpolate(clip, size=size, mode="bilinear", align_corners=False)
    canvas = torch.ones(1, 3, 1, height, width)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    canvas[:, :, 0, top : top + size[0], left : left + size[1]] = clip
    return canvas


def noise_with_references(
    shape: tuple[int, int, int, int],
    seed: int,
    num_references: int,
    last_first: bool,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Noise of a video of (channels, frames, height, width in pixels) with a latent frame for each reference in front.

    The official VACE code draws all frames in order. Stand-In draws the video's first and the references' last, and
    moves those to the front (`last_first`), so that a seed gives the video's frames the same noise with and without.
    """
    channels, frames, height, width = shape
    noise = initial_noise((channels, frames + 4 * num_references, height, width), seed, device=device)
    return noise.roll(num_references, dims=2) if last_first else noise


# ----------------------------------------------------------------------------------------- frames and their sizes


def cover_frames(frames: numpy.ndarray, height: int, width: int) -> Tensor:
    """(T, H0, W0, C) uint8, scaled until it covers height x width (bicubic, antialiased), centre cut out; uint8."""
    video = torch.from_numpy(numpy.array(frames)).permute(0, 3, 1, 2)  # (T, C, H0, W0)
    scale = max(width / video.shape[3], height / video.shape[2])
    size = (round(scale * video.shape[2]), round(scale * video.shape[3]))
    if size != tuple(video.shape[2:]):
        video = F.interpolate(video, size=size, mode="bicubic", antialias=True)
    top, left = (video.shape[2] - height) // 2, (video.shape[3] - width) // 2
    return video[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1)


def with_known_frames(video: Tensor, mask: Tensor, known: numpy.ndarray) -> tuple[Tensor, Tensor]:
    """A window's clip and mask with frames that exist already: black in the mask, so that the model goes on from them.

    known: (K, H, W, 3) uint8, the first K frames of the window.
    """
    count = len(known)
    video = torch.cat((frames_to_video(known), video[:, :, count:]), dim=2)
    mask = torch.cat((torch.zeros_like(mask[:, :, :count]), mask[:, :, count:]), dim=2)
    return video, mask
