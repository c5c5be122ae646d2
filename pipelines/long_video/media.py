"""What is given to a long video decides its size, rate and length: a picture, a video to go on from, sound, poses."""

import dataclasses
import functools
import logging
import math
from pathlib import Path

import numpy

from errors import InputError, UsageError
from pipelines.checks import probe_argument
from pipelines.clip_plan import PROMPT_REPEATS, clips_for
from pipelines.long_video.settings import GRID, LongVideoSettings
from pipelines.settings import PROJECT
from preprocess.audio import AudioTimeline, read_audio
from preprocess.image import read_image
from preprocess.record import read_metadata
from preprocess.video import stream_frames

logger = logging.getLogger("selfsame")

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")


def read_picture(settings: LongVideoSettings, config: dict) -> numpy.ndarray:
    """(H, W, 3) uint8: the picture given, or the first frame of a video; else that of the video to extend."""
    if settings.ref_image_path is not None and Path(settings.ref_image_path).suffix.lower() in VIDEOS:
        probe_argument("--ref_image_path", settings.ref_image_path)
        return next(stream_frames(settings.ref_image_path))
    if settings.ref_image_path is not None:
        return read_image(settings.ref_image_path, "--ref_image_path")
    if settings.extend is not None:
        probe_argument("--extend", settings.extend)
        return next(stream_frames(settings.extend))
    if config.get("tiny"):
        return read_image(PROJECT / "assets" / "face.png")
    raise UsageError(
        "--ref_image_path: give the picture that the video starts from (a photo, or a frame of infer.py's video)"
    )


def follow_picture(
    settings: LongVideoSettings, picture: numpy.ndarray | None, given: tuple[int | None, int | None] | None
) -> LongVideoSettings:
    """Height and width: as given; of the video that is extended; else the picture's shape on the area that the
    variant was trained on, or just the size of that training, if the picture is yet to be made. An earlier run's record
    (`given` is None) holds them.
    """
    if settings.extend is not None:
        return follow_video(settings, given)
    if given is None or all(given):
        return settings
    if any(given):
        raise UsageError("--height and --width: give both, or neither to follow the picture's shape")
    if picture is None:
        return settings
    height, width = picture.shape[:2]
    if settings.max_width is not None:
        size = limit_width(width, height, settings.max_width)
        if not all(size):
            raise InputError(f"the picture of {width}x{height} is smaller than {GRID}x{GRID} under --max_width")
    else:
        size = size_on_area(height, width, settings.height * settings.width)
    if size[0] > size[1]:
        logger.info("the video is upright, %dx%d; SVI was trained on 832x480, other shapes move less", *size[::-1])
    return dataclasses.replace(settings, height=size[0], width=size[1])


def follow_video(settings: LongVideoSettings, given: tuple[int | None, int | None] | None) -> LongVideoSettings:
    info = probe_argument("--extend", settings.extend)
    if given is not None and any(given):
        raise UsageError("--height and --width with --extend: the video goes on at its own size; leave them out")
    if info.height % GRID or info.width % GRID:
        raise InputError(
            f"--extend {settings.extend}: {info.width}x{info.height}; sides of {GRID}n are needed: scale or crop it"
        )
    least = max(2, settings.svi.chain(settings.num_frames).overlap)
    if info.num_frames < least:
        raise InputError(
            f"--extend {settings.extend}: {info.num_frames} frames, at least {least} are needed; give a picture to "
            "--ref_image_path"
        )
    return dataclasses.replace(settings, height=info.height, width=info.width, fps=info.fps)


def next_seed(settings: LongVideoSettings) -> int:
    """A seed that the clips of the video to extend have not had: the same noise again would add its marks up."""
    try:
        clips = read_metadata(settings.extend)["clips"]
        return clips[-1]["seed"] + settings.seed_multiplier
    except (InputError, LookupError, TypeError):  # no record, or another kind of video
        return settings.seed[0]


def size_on_area(height: int, width: int, area: int) -> tuple[int, int]:
    """(height, width) on the grid, nearly of this area, with the shape of a picture."""
    rows = max(1, round(math.sqrt(area * height / width) / GRID))
    return rows * GRID, max(1, area // (rows * GRID**2)) * GRID


def limit_width(width: int, height: int, max_width: int) -> tuple[int, int]:
    """(height, width) by SVI 1's rule (`calculate_dimensions`): the picture's own, at most so wide, on the grid.

    It leaves tall pictures as tall as they are: few frames then move, and each takes long.
    """
    if width > max_width:
        width, height = max_width, int(max_width * (height / width))
    return height // GRID * GRID, width // GRID * GRID


def follow_driver(settings: LongVideoSettings, rate_is_given: bool) -> LongVideoSettings:
    """As many clips as the sound, or without one the poses last, and no frame more; of poses alone also the frame rate,
    where none is given. Poses that end before the video start over.
    """
    if not settings.drivers:
        return settings
    if "audio" in settings.drivers:
        read_speech.cache_clear()  # in a notebook it may hold the speech of a run before
        length = AudioTimeline(len(read_speech(settings.audio_path)), settings.fps).num_frames
        if "pose" in settings.drivers:
            poses = probe_argument("--pose_path", settings.pose_path)
            logger.info("--pose_path: a pose a frame, %d for %d frames of sound", poses.num_frames, length)
    else:
        poses = probe_argument("--pose_path", settings.pose_path)
        length = poses.num_frames
        if not rate_is_given and settings.extend is None:
            settings = dataclasses.replace(settings, fps=poses.fps)
    needed = clips_for(length, settings.svi.chain(settings.num_frames))
    num_clips = settings.num_clips or needed
    if num_clips > needed and "audio" in settings.drivers:
        logger.warning("--num_clips %d: the sound lasts for %d, which are made", num_clips, needed)
        num_clips = needed
    elif num_clips > needed:
        logger.warning("--num_clips %d: the poses last for %d; then they start over", num_clips, needed)
    video_frames = length if num_clips <= needed else None
    return dataclasses.replace(settings, num_clips=num_clips, video_frames=video_frames)


def follow_control(settings: LongVideoSettings) -> LongVideoSettings:
    """As many clips as the control lasts, where neither the user nor sound and poses say how many; a VACE strength.
    Frames are taken one by one, at whatever rate they were.
    """
    if settings.reference_video is None:
        return settings
    scale = 1.0 if settings.vace_scale is None else settings.vace_scale
    settings = dataclasses.replace(settings, vace_scale=scale)
    info = probe_argument("--reference_video", settings.reference_video)
    if info.fps != settings.fps:
        logger.info("--reference_video: of %g frames a second, the video has %g", info.fps, settings.fps)
    needed = clips_for(info.num_frames, settings.svi.chain(settings.num_frames))
    if settings.num_clips is None:
        return dataclasses.replace(settings, num_clips=needed, video_frames=info.num_frames)
    if settings.num_clips > needed:
        logger.warning(
            "--reference_video: lasts for %d of %d clips; the others are made without it", needed, settings.num_clips
        )
    return settings


@functools.lru_cache(maxsize=1)
def read_speech(path: str) -> numpy.ndarray:
    """The speech (N,) at 16 kHz. Kept, for the length of the video and then for what it says, until `cache_clear`."""
    return read_audio(path, argument="--audio_path")


def count_clips(settings: LongVideoSettings, config: dict) -> LongVideoSettings:
    """How many clips, where the user did not say; and what happens when the prompts do not last."""
    prompts = len(settings.prompt) * settings.prompt_repeat_times
    if settings.num_clips is None:
        is_stream = prompts > 1 and not settings.use_first_prompt_only
        settings = dataclasses.replace(settings, num_clips=prompts if is_stream else 3 if config.get("tiny") else 10)
    elif not settings.use_first_prompt_only and prompts < settings.num_clips and len(settings.prompt) > 1:
        then = {
            "last": "the last one goes on",
            "cycle": "they start over",
            "stop": f"the video ends after {prompts}",
        }[settings.prompt_repeat]
        logger.warning(
            "%d clips for %d prompts: %s (--prompt_repeat %s; others: %s)",
            *(settings.num_clips, len(settings.prompt), then, settings.prompt_repeat),
            ", ".join(repeat for repeat in PROMPT_REPEATS if repeat != settings.prompt_repeat),
        )
    return settings
