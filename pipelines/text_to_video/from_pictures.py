"""Image-to-video: the picture as further channels and CLIP features (Wan2.1), as channels only (Wan2.2 A14B), from one
picture to another (FLF2V), or as a first frame that is held (TI2V).
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy
from torch import Tensor

from pipelines.checks import check_split
from pipelines.conditions import ShownVAE, best_output_size, cover_resize, frames_condition, image_to_video, latent_size
from pipelines.denoise import PinnedFrames
from pipelines.distributed import Processes
from pipelines.instant_id.first_frame import first_frame_files, make_first_frame
from pipelines.networks import family_of, shape_of
from pipelines.text_to_video.settings import ImageToVideoSettings
from pipelines.wan import Wan
from preprocess.image import read_image
from preprocess.progress_bars import ProgressBars

logger = logging.getLogger("selfsame")


def open_pictures(
    settings: ImageToVideoSettings, config: dict, processes: Processes, output: Path
) -> tuple[list[numpy.ndarray], ImageToVideoSettings]:
    """The pictures that the video starts from and ends at, (H, W, 3) uint8, and the settings at the video's real size.
    No pictures: text-to-video. A first frame is made here, and SDXL is gone again before Wan loads.

    Args:
        output: of the first video, to put a first frame beside it.

    Raises:
        InputError: a picture that cannot be read, or a photo without a face.
        WeightsError: a first frame's weights are missing.
    """
    if settings.first_frame is not None:
        Wan(settings, config, processes).check_files(first_frame_files(settings))  # before the minutes that SDXL takes
        frame = make_first_frame(settings, output) if processes.writes else None
        pictures = [processes.share(frame)]
    else:
        pictures = [read_image(settings.image, "--image")] if settings.image else []
    if settings.last_image is not None:
        pictures.append(read_image(settings.last_image, "--last_image"))
    if not pictures:
        return [], settings
    height, width = video_size(pictures[0], settings.height, settings.width, config)
    if (height, width) != (settings.height, settings.width):
        logger.info("the video is %dx%d: the picture's shape, and about as many pixels as asked for", width, height)
    settings = replace(settings, height=height, width=width)
    check_split(settings, shape_of(config))
    return pictures, settings


def video_size(picture: numpy.ndarray, height: int, width: int, config: dict) -> tuple[int, int]:
    """Height and width in the picture's shape, of about height x width pixels. A picture of just that shape keeps
    them; upstream's rounding would make 464 of some 480.
    """
    if picture.shape[0] * width == picture.shape[1] * height:
        return height, width
    if family_of(config) == "ti2v":
        multiple = 2 * shape_of(config).vae_spatial_factor
        best_width, best_height = best_output_size(picture.shape[1], picture.shape[0], multiple, height * width)
        return best_height, best_width
    rows, columns = latent_size(*picture.shape[:2], height * width)
    return 8 * rows, 8 * columns


@dataclass(frozen=True)
class StartPictures:
    """What a model is given of the pictures that its videos start from; of none, nothing.

    image_features: of CLIP, (1, pictures · 257, 1280) on the device.
    condition: the channels beside the noise, (1, 4 + C, F, h, w) on the device.
    pinned: or the first latent frame, which is held.
    record: SHA-256 of their pixels.
    """

    image_features: Tensor | None = None
    condition: Tensor | None = None
    pinned: PinnedFrames | None = None
    record: Mapping[str, list[str]] = field(default_factory=dict)


NO_PICTURES = StartPictures()


def start_from(wan: Wan, pictures: Sequence[numpy.ndarray], bars: ProgressBars) -> StartPictures:
    """Encode the first picture, or the first and the last, (H, W, 3) uint8, as the model was trained to see them."""
    height, width = wan.settings.height, wan.settings.width
    record = {"pictures": [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures]}
    if len(pictures) > 1 and pictures[1].shape[0] * width != pictures[1].shape[1] * height:
        pictures = [pictures[0], cover_resize(pictures[1], width, height)]  # cut, not squeezed
    clips = [image_to_video(picture)[:, :, 0] for picture in pictures]  # (1, 3, H, W) in [-1, 1]
    features = wan.encode_images(clips)
    features = None if features is None else features.to(wan.device)
    with wan.vae() as vae:
        if wan.transformer_config.in_dim == wan.transformer_config.out_dim:
            pinned = PinnedFrames(vae.encode(image_to_video(cover_resize(pictures[0], width, height))))
            return StartPictures(features, pinned=pinned, record=record)
        frames = dict(zip((0, wan.settings.num_frames - 1), clips, strict=False))
        size = (height // vae.spatial_factor, width // vae.spatial_factor)
        shown = ShownVAE(vae, bars, "encoding the picture")
        condition = frames_condition(shown, wan.settings.num_frames, size, frames).y.to(wan.device)
    return StartPictures(features, condition, record=record)
