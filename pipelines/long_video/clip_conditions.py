"""What a clip of a long video is given of the one before and of the user's picture: the condition y of SVI's variants.

y = [mask (4) | latents (16)] goes beside the noisy latents into an image-to-video model. Its layout is a contract with
the LoRA: the same weights under another padding run, and lose the person.

    padding     what the VAE sees after the handed-over frames                      variants
    reference   the user's picture in every frame that is left                     Shot, Talk, Dance, 2.0
    grey        nothing (0, mid-grey), as in plain Wan                              Film, Tom
    latents     no frames: latents of the picture, of the clip before, zeros        2.0 Pro

Source: Stable-Video-Infinity `diffsynth/pipelines/svi_video.py` (encode_images_adaptive), `wan_video_svi.py` and
`wan_video_svi_pro.py` (WanVideoUnit_ImageEmbedderVAE).
"""

import numpy
import torch
from PIL import Image
from torch import Tensor

from models.wan.vae import WanVAE
from pipelines.conditions import ImageCondition, fold_mask


def crop_to_shape(picture: numpy.ndarray, height: int, width: int) -> numpy.ndarray:
    """The centre of a picture (H0, W0, 3) that has the shape of height x width; upstream stretches it."""
    rows, columns = picture.shape[:2]
    kept_rows = min(rows, max(1, round(columns * height / width)))
    kept_columns = min(columns, max(1, round(rows * width / height)))
    top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
    return picture[top : top + kept_rows, left : left + kept_columns]


def picture_to_frame(picture: numpy.ndarray, height: int, width: int) -> Tensor:
    """A picture (H0, W0, 3) uint8, stretched to the size (bicubic) -> (1, 3, 1, H, W) in [-1, 1]."""
    image = Image.fromarray(numpy.asarray(picture, dtype=numpy.uint8)).resize((width, height))
    return (torch.from_numpy(numpy.array(image)).float() * (2 / 255) - 1).permute(2, 0, 1)[None, :, None]


def frames_to_condition(
    vae: WanVAE,
    frames: Tensor,
    num_frames: int,
    *,
    reference: Tensor | None = None,
    reference_frames: int = -1,
    marks_all: bool = False,
    end: Tensor | None = None,
) -> ImageCondition:
    """y of a clip that goes on from frames.

    Args:
        vae: of the model; in float32, or errors add up over the clips.
        frames: (1, 3, n, H, W) in [-1, 1], the handed-over frames in time order.
        num_frames: of the clip, 4n+1.
        reference: (1, 3, 1, H, W), the user's picture, shown after them; None: mid-grey.
        reference_frames: how often it is shown before the grey begins; -1: to the end.
        marks_all: mark all handed-over frames in the mask. The released models know the first one marked, alone.
        end: (1, 3, 1, H, W), the clip's last frame; then nothing but grey lies between.
    """
    given = frames.shape[2]
    clip = torch.zeros(1, 3, num_frames, *frames.shape[-2:])
    clip[:, :, :given] = frames
    if reference is not None and end is None:
        stop = num_frames if reference_frames < 0 else min(given + reference_frames, num_frames)
        clip[:, :, given:stop] = reference
    known = torch.zeros(num_frames)
    known[: given if marks_all else 1] = 1
    if end is not None:
        clip[:, :, -1:] = end
        known[-1] = 1
    latents = vae.encode(clip)
    return ImageCondition(torch.cat((fold_mask(known, latents), latents), dim=1), clip)


def latents_to_condition(anchor: Tensor, previous: Tensor | None, num_latents: int) -> Tensor:
    """y of a clip of SVI 2.0 Pro, which is handed latents as they are: [anchor, last of the clip before, zeros].

    The zeros are zeros of normalised latents, not the encoding of a grey frame.

    Args:
        anchor: (1, C, 1, h, w), the user's picture, encoded alone.
        previous: (1, C, m, h, w), the last latents of the clip before; None in the first clip.
        num_latents: latent frames of the clip.
    """
    latents = anchor.new_zeros(1, anchor.shape[1], num_latents, *anchor.shape[-2:])
    latents[:, :, :1] = anchor
    if previous is not None:
        assert 0 < previous.shape[2] < num_latents
        latents[:, :, 1 : 1 + previous.shape[2]] = previous
    known = torch.zeros(4 * num_latents - 3)
    known[0] = 1
    return torch.cat((fold_mask(known, latents), latents), dim=1)
