"""Masks of a control video, as users have them: white is made, black is kept. Without torch."""

import logging

import numpy

from errors import InputError
from pipelines.checks import probe_argument
from preprocess.image import read_image
from preprocess.video import VideoInfo, read_frames

logger = logging.getLogger("selfsame")

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


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
    colored = float((spread.max(axis=-1) - spread.min(axis=-1) > 48).mean())
    if colored > 0.001:  # video codecs leave a little colour at edges
        raise InputError(
            f"--reference_mask {path}: {colored:.1%} of its pixels are coloured; a mask is black (kept) and white "
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
