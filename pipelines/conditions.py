"""What a run starts from and is conditioned on: noise, and the tensors of image-to-video models.

Pictures are (H, W, 3) uint8. Latents are normalised, (1, C, F, h, w). Source: Wan2.1 `wan/image2video.py`,
`first_last_frame2video.py`; Wan2.2 `textimage2video.py` and `utils/utils.py` (best_output_size).
"""

import math
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.wan.vae import WanVAE
from pipelines.denoise import PinnedFrames
from preprocess.progress_bars import ProgressBars


def latent_frames(num_frames: int) -> int:
    """Latent frames of a clip of 4n+1 frames: the first alone, then one for every four."""
    return (num_frames - 1) // 4 + 1


def initial_noise(
    shape: tuple[int, int, int, int], seed: int, spatial_factor: int = 8, device: torch.device | str = "cpu"
) -> Tensor:
    """Noise of a video of (channels, frames, height, width in pixels): (1, C, F, h, w) float32, on the CPU.

    device: where it is drawn. The CPU's generator makes a seed mean the same on every machine; Wan's and VACE's own
        code draws all of it at once on the GPU.
    """
    channels, frames, height, width = shape
    size = (1, channels, latent_frames(frames), height // spatial_factor, width // spatial_factor)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(size, generator=generator, device=device, dtype=torch.float32).cpu()


def image_to_video(image: Tensor | numpy.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> a clip of one frame (1, 3, 1, H, W) in [-1, 1] float32."""
    pixels = torch.as_tensor(numpy.array(image)).float() / 255.0  # a copy: decoded frames are read-only
    return (pixels * 2 - 1).permute(2, 0, 1)[None, :, None]


def latent_size(image_height: int, image_width: int, max_area: int) -> tuple[int, int]:
    """Height and width of the latents of an image-to-video clip: the image's aspect within max_area pixels."""
    aspect = image_height / image_width
    height = round(math.sqrt(max_area * aspect) // 8 // 2 * 2)
    width = round(math.sqrt(max_area / aspect) // 8 // 2 * 2)
    return height, width


@dataclass(frozen=True)
class ImageCondition:
    """The concatenated channels of an image-to-video model: y = 4 mask channels and the condition latents."""

    y: Tensor  # (1, 4 + C, F, h, w)
    clip: Tensor  # (1, 3, T, H, W), what the VAE saw


def frames_condition(vae: WanVAE, num_frames: int, size: tuple[int, int], images: dict[int, Tensor]) -> ImageCondition:
    """Condition on pictures at given frames; all other frames are mid-grey in the clip and 0 in the mask.

    Args:
        vae: of the model.
        num_frames: 4n+1.
        size: latent (height, width).
        images: frame index -> picture (1, 3, H0, W0) in [-1, 1], resized here to the clip's size.
    """
    height, width = size[0] * 8, size[1] * 8
    clip = torch.zeros(1, 3, num_frames, height, width)
    known = torch.zeros(num_frames)
    for index, image in images.items():
        # Bicubic without antialiasing, in float32 on the CPU, as the released models were fed.
        clip[0, :, index] = F.interpolate(image.float().cpu(), size=(height, width), mode="bicubic")[0]
        known[index] = 1
    latents = vae.encode(clip)
    return ImageCondition(torch.cat((fold_mask(known, latents), latents), dim=1), clip)


def fold_mask(known: Tensor, latents: Tensor) -> Tensor:
    """Which frames are known, (T,) of 0 and 1 -> the mask channels of their latents (1, C, F, h, w): (1, 4, F, h, w).

    Channel c of latent frame f flags pixel frame 4f + c - 3; the first frame stands for all four of latent frame 0.
    """
    folded = torch.cat((known[:1].repeat(4), known[1:])).view(-1, 4).T  # (4, F)
    return folded[None, :, :, None, None].expand(-1, -1, -1, *latents.shape[-2:]).to(latents)


def image_to_video_condition(vae: WanVAE, image: numpy.ndarray, num_frames: int, max_area: int) -> ImageCondition:
    """y of the I2V models for a first frame (H, W, 3) uint8."""
    size = latent_size(*image.shape[:2], max_area)
    return frames_condition(vae, num_frames, size, {0: image_to_video(image)[:, :, 0]})


def first_last_frame_condition(
    vae: WanVAE, first: numpy.ndarray, last: numpy.ndarray, num_frames: int, max_area: int
) -> ImageCondition:
    """y of the FLF2V model. The size follows the first picture; upstream only crops the last, we resize it."""
    size = latent_size(*first.shape[:2], max_area)
    images = {0: image_to_video(first)[:, :, 0], num_frames - 1: image_to_video(last)[:, :, 0]}
    return frames_condition(vae, num_frames, size, images)


def best_output_size(width: int, height: int, multiple: int, area: int) -> tuple[int, int]:
    """(width, height) on the grid with nearly the given area; of the two ways to round, the closer in aspect."""
    ratio = width / height
    exact_width, exact_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    width1 = int(exact_width // multiple * multiple)
    height1 = int(area / width1 // multiple * multiple)
    height2 = int(exact_height // multiple * multiple)
    width2 = int(area / height2 // multiple * multiple)
    distance1 = max(ratio / (width1 / height1), width1 / height1 / ratio)
    distance2 = max(ratio / (width2 / height2), width2 / height2 / ratio)
    return (width1, height1) if distance1 < distance2 else (width2, height2)


def cover_resize(image: numpy.ndarray, width: int, height: int) -> numpy.ndarray:
    """Scale (LANCZOS) until the picture covers width x height, then cut the centre out."""
    picture = Image.fromarray(numpy.asarray(image, dtype=numpy.uint8))
    scale = max(width / picture.width, height / picture.height)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.LANCZOS)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return numpy.asarray(picture.crop((left, top, left + width, top + height)))


def pinned_first_frame(vae: WanVAE, image: numpy.ndarray, max_area: int) -> tuple[PinnedFrames, Tensor]:
    """TI2V's way from image to video: the photo's own latent is frame 0 throughout.

    Returns:
        the pinned latent frame, and the clip (1, 3, 1, H, W) that was encoded (its size is the video's).
    """
    multiple = 2 * vae.spatial_factor
    width, height = best_output_size(image.shape[1], image.shape[0], multiple, max_area)
    clip = image_to_video(cover_resize(image, width, height))
    return PinnedFrames(vae.encode(clip)), clip


class ShownVAE:
    """A VAE whose `encode` has a bar; all else is the VAE's own."""

    def __init__(self, vae: WanVAE, bars: ProgressBars, label: str):
        self._vae, self._bars, self._label = vae, bars, label

    def __getattr__(self, name: str):
        return getattr(self._vae, name)

    def encode(self, video: Tensor, **options) -> Tensor:
        """As `WanVAE.encode`."""
        parts = []
        with self._bars.work(self._label, video.shape[2], "frame") as bar:
            for latents in self._vae.encode_stream(video, **options):
                parts.append(latents)
                bar.advance(min(1 if len(parts) == 1 else 4 * latents.shape[2], video.shape[2] - bar.done))
        return torch.cat(parts, dim=2)
