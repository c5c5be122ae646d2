"""Control videos and masks as users have them, before torch: their sizes and lengths, and the settings of a VACE run.

A control video decides the size, length and frame rate of the result. Masks: white is made, black is kept.
Source: Wan2.1 `wan/utils/vace_processor.py` (VaceVideoProcessor); Stand-In `infer_with_vace.py`.
"""

import dataclasses
import logging
import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy
import psutil

from errors import InputError, ResourceError, UsageError
from pipelines.checks import check_pictures
from pipelines.earlier_run import is_record
from pipelines.flags import BASE, MEDIA, again, given_by, setting
from pipelines.lora_settings import LoraSettings, resolve_lora_settings
from pipelines.settings import Photos
from preprocess.image import read_image
from preprocess.output import readable_bytes
from preprocess.video import VideoInfo, probe, read_frames

logger = logging.getLogger("selfsame")

GRID = 16  # pixels of a token's side
BESIDE_IDENTITY = 0.8  # the default of --vace_scale where there are photos, as in Stand-In's infer_with_vace.py
WINDOWS = ("window_frames", "window_overlap")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class VaceSettings(LoraSettings):
    """What a VACE run adds to `LoraSettings`. Photos of a person are optional here."""

    script: ClassVar[str] = "infer_with_vace.py"
    title: ClassVar[str] = "control"

    ip_image: tuple[str, ...] = again(Photos, "ip_image", default=())
    vace_path: str | None = setting(
        "VACE weights, file or folder; alone or with their base (else --base_path)",
        None,
        metavar="PATH",
        path=BASE,
        shown="the config's, in checkpoints/",
    )
    reference_video: str | None = setting(
        "control: pose, depth, sketch, or a video to paint in", None, metavar="VIDEO", path=MEDIA
    )
    reference_mask: str | None = setting(
        "video or picture; white is made, black is kept", None, metavar="FILE", path=MEDIA
    )
    reference_image: tuple[str, ...] = setting("things to show, in this order", (), metavar="PICTURE", path=MEDIA)
    vace_scale: float | None = setting(
        "of the control: 1 as trained, 0 none", None, low=0, high=10, shown=f"1; with --ip_image {BESIDE_IDENTITY:g}"
    )
    resample_control: bool = setting(
        "spread --num_frames frames over the whole control video, at most as large as the model's size", False
    )
    # The released models were trained on 81 frames.
    window_frames: int = setting("longer videos are made in windows of this length", 81, low=1, high=4093)
    window_overlap: int = setting("frames that a window goes on from", 9, low=1, high=4093)


# ---------------------------------------------------------------------------------------------------------- settings


def resolve_vace_settings(args: Namespace) -> tuple[VaceSettings, dict]:
    """`resolve_lora_settings`, with the size, frames and rate of the control video.

    Raises:
        UsageError: values or combinations that make no sense.
        InputError: a file that is missing or cannot be used; a mask that does not fit its video.
    """
    given = given_by(args)
    given = {name: value for name, value in given.items() if name != "wan_version"} | {"config": config_of(given)}
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


def probe_argument(flag: str, path: str) -> VideoInfo:
    """`probe`, its errors naming the flag."""
    try:
        return probe(path)
    except InputError as error:
        raise InputError(f"{flag}: {error}") from None


# ------------------------------------------------------------------------------------------------------------- masks


def is_picture(path: str) -> bool:
    return path.lower().endswith(PICTURES)


def check_mask_size(path: str, control: VideoInfo) -> None:
    """A mask has its control video's size and length; one picture serves all frames.

    Raises:
        InputError: with both sizes.
    """
    if is_picture(path):
        height, width = read_image(path, "--reference_mask").shape[:2]
        num_frames = control.num_frames
    else:
        info = probe_argument("--reference_mask", path)
        height, width, num_frames = info.height, info.width, info.num_frames
    if (height, width) != (control.height, control.width):
        raise InputError(
            f"--reference_mask {path} is {width}x{height}, --reference_video is {control.width}x{control.height}; "
            "make the mask as large as the video"
        )
    if num_frames != control.num_frames:
        raise InputError(
            f"--reference_mask {path} has {num_frames} frames, --reference_video has {control.num_frames}; "
            "give one mask frame for each, or a picture for all of them"
        )


def read_mask(path: str, num_frames: int) -> numpy.ndarray:
    """(T, H, W) uint8 of a mask video, or of a picture for all frames. 255 = make, 0 = keep.

    Raises:
        InputError: colours: a mask is black and white.
    """
    frames = read_image(path, "--reference_mask")[None] if is_picture(path) else read_frames(path)  # (T, H, W, 3)
    frames = numpy.broadcast_to(frames, (num_frames, *frames.shape[1:])) if len(frames) == 1 else frames
    spread = frames[:: max(1, num_frames // 8)].astype(numpy.int16)
    coloured = float((spread.max(axis=-1) - spread.min(axis=-1) > 48).mean())
    if coloured > 0.001:  # video codecs leave a little colour at edges
        raise InputError(
            f"--reference_mask {path}: {coloured:.1%} of its pixels are coloured; a mask is black (kept) and white "
            "(made): turn the picture or video into greyscale, white where the model is to paint"
        )
    mask = numpy.ascontiguousarray(frames[..., 0])
    made = float((mask > 127).mean())
    between = float(((mask > 64) & (mask < 192)).mean())
    if between > 0.05:
        logger.warning("--reference_mask: %.0f%% of it is neither black nor white; cut at half", 100 * between)
    if made == 0:
        logger.warning("--reference_mask is black throughout: everything is kept. White is what the model makes")
    else:
        logger.info("--reference_mask: %.0f%% is white and will be made, the rest is kept", 100 * made)
    return mask


# -------------------------------------------------------------------------------------------------- sizes and frames


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
