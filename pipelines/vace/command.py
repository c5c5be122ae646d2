"""From a command to the settings of a VACE run: a control video decides the size, length and frame rate of the result.
Without torch.

Source: Wan2.1 `wan/utils/vace_processor.py` (VaceVideoProcessor); Stand-In `infer_with_vace.py`.
"""

import dataclasses
import logging
import math
from argparse import Namespace
from collections.abc import Mapping

import numpy
import psutil

from errors import InputError, ResourceError, UsageError
from pipelines.checks import check_pictures, probe_argument
from pipelines.earlier_run import is_record
from pipelines.flags import given_by, without_words
from pipelines.lora_command import resolve_lora_settings
from pipelines.settings import WanVersion
from pipelines.vace.masks import check_mask_size
from pipelines.vace.settings import BESIDE_IDENTITY, GRID, VaceSettings
from preprocess.output import readable_bytes
from preprocess.video import VideoInfo

logger = logging.getLogger("selfsame")

WINDOWS = ("window_frames", "window_overlap")


def resolve_vace_settings(args: Namespace) -> tuple[VaceSettings, dict]:
    """`resolve_lora_settings`, with the size, frames and rate of the control video.

    Raises:
        UsageError: values or combinations that make no sense.
        InputError: a file that is missing or cannot be used; a mask that does not fit its video.
    """
    given = given_by(args)
    given = without_words(WanVersion, given) | {"config": config_of(given)}
    settings, config = resolve_lora_settings(given, VaceSettings, required=False)
    if config.get("experts"):
        raise UsageError(
            f"--config {config['name']}: VACE was released for Wan2.1; use stand-in-wan2.1 or wan2.1-vace-*"
        )
    if settings.vace_scale is None:
        settings = dataclasses.replace(settings, vace_scale=BESIDE_IDENTITY if settings.stand_in_photos else 1.0)
    for name in WINDOWS:
        if getattr(settings, name) % 4 != 1:
            raise UsageError(f"--{name} {getattr(settings, name)}: accepted are 1, 5, 9, … (4n+1)")
    if settings.window_overlap >= settings.window_frames:
        raise UsageError(
            f"--window_overlap {settings.window_overlap} must be smaller than --window_frames {settings.window_frames}"
        )
    check_pictures(reference_image=settings.reference_image)
    if settings.reference_video is None:
        if settings.reference_mask is not None:
            raise UsageError("--reference_mask needs --reference_video: it says which of its pixels to keep")
        if settings.resample_control:
            raise UsageError("--resample_control needs --reference_video")
        return settings, config
    info = probe_argument("--reference_video", settings.reference_video)
    if settings.reference_mask is not None:
        check_mask_size(settings.reference_mask, info)
    # An earlier run's record holds what its video had, as if given.
    earlier = is_record(given["config"])
    decided = {name for name in ("height", "width", "num_frames", "fps") if earlier or name in given}
    settings = follow_control(settings, info, decided)
    check_fits_memory(settings, info)
    return settings, config


def check_fits_memory(settings: VaceSettings, info: VideoInfo) -> None:
    """The control is kept in memory at the size of the result (twice while it is read), its mask as it is stored.

    Raises:
        ResourceError: there is less memory than that.
    """
    needed = 6 * settings.num_frames * settings.height * settings.width
    if settings.reference_mask is not None:
        needed += 4 * info.num_frames * info.height * info.width
    if needed > (free := psutil.virtual_memory().available):
        raise ResourceError(
            f"--reference_video {settings.reference_video}: {settings.num_frames} frames of "
            f"{settings.width}x{settings.height} take {readable_bytes(needed)} of memory, {readable_bytes(free)} are "
            "free; cut it into parts"
        )


def config_of(given: Mapping[str, object]) -> str:
    """--config, or what stands for it where none was typed.

    Raises:
        UsageError: a version that has no VACE.
    """
    if "config" in given:
        return given["config"]
    if given.get("wan_version") not in (None, "2.1"):
        raise UsageError(f"--wan_version {given['wan_version']}: VACE was released for Wan2.1; use 2.1")
    if not {"wan_version", "vace_path", "base_path", "stand_in_path"} & given.keys():
        return "tiny"
    return "stand-in-wan2.1" if "ip_image" in given else "wan2.1-vace-14B"


def follow_control(settings: VaceSettings, info: VideoInfo, given: set[str]) -> VaceSettings:
    """Size, frames and rate: the control video's, where the user gave no others."""
    if ("height" in given) != ("width" in given):
        raise UsageError("--height and --width with --reference_video: give both, or neither to take the video's size")
    if "height" in given:
        height, width = settings.height, settings.width
    elif settings.resample_control:
        height, width = size_within(info.height, info.width, settings.height * settings.width)
    else:
        height, width = info.height // GRID * GRID, info.width // GRID * GRID
        if not (height and width):
            raise InputError(
                f"--reference_video {settings.reference_video}: {info.width}x{info.height}, at least 16x16 is needed"
            )
        if (height, width) != (info.height, info.width):
            logger.warning(
                "--reference_video of %dx%d: its centre of %dx%d is used (multiples of %d)",
                *(info.width, info.height, width, height, GRID),
            )
    num_frames, fps = settings.num_frames, info.fps
    if settings.resample_control:
        frames, fps = spread_frames(info.num_frames, info.fps, settings.num_frames)
        num_frames = len(frames)
        logger.info("%d of %d control frames, now %.4g a second", num_frames, info.num_frames, fps)
    elif "num_frames" not in given:
        num_frames = (info.num_frames - 1) // 4 * 4 + 1
        if num_frames < info.num_frames:
            logger.warning(
                "--reference_video has %d frames, the first %d are used: the model makes 4n+1",
                *(info.num_frames, num_frames),
            )
    elif num_frames > info.num_frames:
        raise UsageError(
            f"--num_frames {num_frames}: --reference_video has {info.num_frames}; give fewer, or a longer video"
        )
    elif num_frames < info.num_frames - 3:
        logger.warning("the first %d of %d control frames are used, as --num_frames says", num_frames, info.num_frames)
    fps = settings.fps if "fps" in given else fps
    return dataclasses.replace(settings, height=height, width=width, num_frames=num_frames, fps=fps)


def size_within(height: int, width: int, area: int, max_tokens: int | None = None) -> tuple[int, int]:
    """(height, width) on the grid with the aspect of a video, within an area and the video's own.

    max_tokens: of one latent frame, where the number of frames bounds it further.
    """
    tokens = min(area // GRID**2, (height // GRID) * (width // GRID), max_tokens or area)
    rows = max(1, round(math.sqrt(tokens * height / width)))
    return rows * GRID, max(1, tokens // rows) * GRID


def spread_frames(num_frames: int, fps: float, most: int) -> tuple[list[int], float]:
    """Choose 4n+1 frames, at most `most`, spread over a whole clip; and the frame rate they then have.

    Frame i is shown from i/fps to (i+1)/fps, in float32 as upstream has them; times that fall on a border belong to
    the earlier frame.
    """
    starts = numpy.arange(num_frames, dtype=numpy.float32) / numpy.float32(fps)
    ends = numpy.arange(1, num_frames + 1, dtype=numpy.float32) / numpy.float32(fps)
    duration = (starts[-1] + ends[-1]) / 2  # the middle of the last frame
    count = 4 * ((min(num_frames, most) - 1) // 4) + 1
    times = numpy.linspace(0.0, duration, count)[:, None]
    chosen = numpy.argmax((times >= starts) & (times <= ends), axis=1)
    return chosen.tolist(), float(count / duration)
