"""From a command to the settings of a face swap: what its video decides. Without torch."""

import dataclasses
import logging
import math
from argparse import Namespace
from pathlib import Path

import numpy

from configs import load_config
from errors import ResourceError, UsageError
from pipelines.face_swap.settings import FaceSwapSettings
from pipelines.flags import given_by
from pipelines.lora_command import resolve_lora_settings
from pipelines.networks import shape_of
from pipelines.settings import PROJECT
from preprocess.output import readable_bytes
from preprocess.video import VideoInfo, probe
from preprocess.video_writer import write_video

logger = logging.getLogger("selfsame")

DEMO_CLIP = Path("outputs/demo_clip.mp4")
LARGEST_SIDE = 16384


def resolve_face_swap(args: Namespace) -> tuple[FaceSwapSettings, dict, VideoInfo]:
    """Settings, config and measurements of the input video.

    Raises:
        UsageError: values out of bounds, or a size, which the video decides.
        InputError: a video that cannot be read.
        ResourceError: a video that does not fit into memory.
    """
    given = given_by(args)
    for name in ("height", "width"):
        if name in given:
            raise UsageError(f"--{name}: a face swap keeps the input video's; leave it out, or convert the video first")
    if "fps" in given:  # upstream's flag
        logger.warning(
            "--fps %g has no effect: a face swap keeps the input video's rate, and its sound; upstream plays the same "
            "frames at --fps, faster or slower than they were filmed",
            given["fps"],
        )
    settings, config = resolve_lora_settings(given, FaceSwapSettings, required=False)
    if settings.no_composite and settings.force_background_consistency:
        raise UsageError(
            "--no_composite with --force_background_consistency: one writes what the model drew, the other keeps the "
            "input's pixels; choose one"
        )
    if len(settings.ip_image) != 1:
        raise UsageError(f"--ip_image: a face swap takes one photo, {len(settings.ip_image)} were given")
    path = settings.input_video
    if path is None:
        if settings.config != load_config("tiny")["name"]:
            raise UsageError("--input_video: give the video whose face is to be replaced")
        path = str(make_demo_clip(DEMO_CLIP))
    info = probe(path)
    check_fits_memory(info, path)
    multiple = 2 * shape_of(config).vae_spatial_factor
    height, width = (math.ceil(side / multiple) * multiple for side in (info.height, info.width))
    if max(height, width) > LARGEST_SIDE:
        raise UsageError(f"--input_video {path}: {info.width}x{info.height}, at most {LARGEST_SIDE} a side; scale it")
    if (height, width) != (info.height, info.width):
        logger.info(
            "%s: worked on as %dx%d (borders repeated), written as %dx%d", path, width, height, info.width, info.height
        )
    settings = dataclasses.replace(settings, input_video=path, height=height, width=width, fps=info.fps)
    return settings, config, info


def check_fits_memory(info: VideoInfo, path: str) -> None:
    """The whole input is kept in memory, a byte a pixel for masks beside it."""
    import psutil

    needed, free = 4 * info.num_frames * info.height * info.width, psutil.virtual_memory().available
    if needed > free:
        raise ResourceError(
            f"--input_video {path}: {info.num_frames} frames of {info.width}x{info.height} take "
            f"{readable_bytes(needed)} of memory, {readable_bytes(free)} are free; cut the video into pieces"
        )


def make_demo_clip(path: Path, num_frames: int = 14, side: int = 192) -> Path:
    """A slow pan and zoom over the photo in assets/, as a video at 16 fps."""
    import cv2
    from PIL import Image

    photo = numpy.asarray(Image.open(PROJECT / "assets" / "face.png").convert("RGB"))
    frames = []
    for i in range(num_frames):
        part = 250 - 3 * i  # pixels of the photo on a side
        left, top = 100 + 2 * i, 5 + i
        frames.append(cv2.resize(photo[top : top + part, left : left + part], (side, side), cv2.INTER_AREA))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, [numpy.stack(frames)], fps=16)
    return path
