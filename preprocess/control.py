"""A video (or pictures) -> the control video, and where the task has one the mask, that VACE is given.

    python -m preprocess.control pose --video dance.mp4 --output pose.mp4
    python -m preprocess.control depth --video street.mp4 --output depth.mp4 --depth_path FOLDER
    python -m preprocess.control outpainting --video tall.mp4 --output wide.mp4 --direction left right
    python -m preprocess.control inpainting_mask --video street.mp4 --mask car.png --maskaug_mode bbox --output made.mp4
    python -m preprocess.control frameref --image first.png --image2 last.png --output between.mp4
    python -m preprocess.control composition --video made.mp4 --mask made.mask.mp4 --video2 depth.mp4 \\
        --compose repaint control --output both.mp4

Then: python infer_with_vace.py --reference_video wide.mp4 --reference_mask wide.mask.mp4 --prompt "…"

Masks: WHITE is what the model makes, BLACK is kept; what is made is grey in the video. Frame rate, size and length are
those of --video. What each task computes is in preprocess/control_maps.py, pose.py, depth.py and scribble.py.

tasks and their arguments ([optional]):
"""

import argparse
import logging
import math
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from errors import InputError, ResourceError, UsageError, WeightsError, exit_codes
from preprocess import control_maps
from preprocess.control_maps import KEPT, MADE, MASK_SHAPES, SIDES
from preprocess.video import probe, read_frames

# Frames (F, H, W, 3) uint8, masks (F, H, W) uint8 or None, frames per second.
ControlVideo = tuple[numpy.ndarray, numpy.ndarray | None, float]

logger = logging.getLogger("selfsame")

DEPTH_PATH = "checkpoints/Depth-Anything-V2-Large-hf"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
BLANK = ("height", "width", "num_frames", "fps")  # what says how large a control from nothing is
MASKAUG = ("maskaug_mode", "maskaug_ratio", "maskaug_seed")


@dataclass(frozen=True)
class Task:
    about: str
    needs: tuple[str, ...] = ("video",)
    takes: tuple[str, ...] = ()
    has_mask: bool = False


TASKS = {
    "gray": Task("luminance"),
    "flow": Task("movement as colour (OpenCV's optical flow)"),
    "pose": Task("skeletons and faces on black (DWPose)", takes=("detector_path", "pose_path")),
    "pose_body": Task("skeletons alone", takes=("detector_path", "pose_path")),
    "depth": Task("near white, far black (Depth Anything)", takes=("depth_path", "per_frame", "device")),
    "scribble": Task("line drawing", takes=("scribble_path", "device")),
    "layout_bbox": Task("a box that moves from the first --bbox to the second", ("bbox",), ("video", "color", *BLANK)),
    "layout_mask": Task("outlines of a mask", ("video", "mask"), ("color", *MASKAUG)),
    "frameref": Task("--image first and/or --image2 last, the rest made", (), ("image", "image2", *BLANK), True),
    "clipref": Task("--video first and/or --video2 last, the rest made", (), ("video", "video2", "num_frames"), True),
    "extract": Task("first, last or both ends kept, the rest made", ("video", "mode"), ("keep",), True),
    "outpainting": Task("a border added and made", takes=("direction", "expand_ratio"), has_mask=True),
    "outpainting_inner": Task("the border made anew, same size", takes=("direction", "expand_ratio"), has_mask=True),
    "inpainting_mask": Task("what the mask covers is made", ("video", "mask"), MASKAUG, True),
    "inpainting_bbox": Task("what is in the --bbox is made", ("video", "bbox"), has_mask=True),
    "composition": Task("two control videos in one", ("video", "video2", "compose"), ("mask", "mask2"), True),
    "maskaug": Task("a coarser mask, as --output", ("mask", "maskaug_mode"), ("maskaug_ratio", "maskaug_seed")),
}
EVERY_TASK = ("task", "output", "overwrite")


def make_control(args: Namespace) -> ControlVideo:
    """What one command asks for.

    Args:
        args: of `parse_arguments`.

    Returns:
        (frames, masks, fps): (F, H, W, 3) uint8; (F, H, W) uint8 or None; frames per second.
    """
    task = args.task
    if task == "layout_bbox":
        return _layout(args)
    if task == "frameref":
        return _frameref(args)
    if task == "clipref":
        return _clipref(args)
    if task == "maskaug":
        mask, fps = read_mask(args.mask, "--mask")
        return numpy.repeat(_reshape(mask, args)[..., None], 3, axis=-1), None, fps
    if task in ("pose", "pose_body", "depth", "scribble"):
        return _with_model(task, args)

    frames, fps = read_clip(args.video, "--video")
    num_frames, height, width = frames.shape[:3]
    if task == "gray":
        return control_maps.gray_map(frames), None, fps
    if task == "flow":
        return control_maps.flow_map(frames), None, fps
    if task == "layout_mask":
        mask, _ = read_mask(args.mask, "--mask", frames.shape)
        return control_maps.layout_contours(_reshape(mask, args), args.color or (0, 0, 0)), None, fps
    if task == "extract":
        keep = args.keep or 1
        first = list(range(min(keep, num_frames))) if args.mode != "last" else []
        last = list(range(max(num_frames - keep, 0), num_frames)) if args.mode != "first" else []
        return *control_maps.keep_frames(frames, first + last), fps
    if task.startswith("outpainting"):
        border = control_maps.outpaint if task == "outpainting" else control_maps.outpaint_inner
        sides, ratio = args.direction or SIDES, 0.25 if args.expand_ratio is None else args.expand_ratio
        check_memory(num_frames, height * (1 + 2 * ratio), width * (1 + 2 * ratio), "--expand_ratio")
        return *border(frames, sides, ratio), fps
    if task == "inpainting_mask":
        mask, _ = read_mask(args.mask, "--mask", frames.shape)
        return *control_maps.inpaint_mask(frames, _reshape(mask, args)), fps
    if task == "inpainting_bbox":
        if len(args.bbox) != 1:
            raise UsageError(f"--bbox: {task} takes one box, not {len(args.bbox)}")
        video, masks = control_maps.inpaint_box(frames, args.bbox[0])
        if not masks.any():
            raise UsageError(f"--bbox {args.bbox[0]} holds no pixel of the {width}x{height} video")
        return video, masks, fps
    assert task == "composition", task
    other, other_fps = read_clip(args.video2, "--video2")
    if abs(fps - other_fps) > 0.01:
        logger.warning("--video2 has %g frames per second, --video %g: played at the latter", other_fps, fps)
    if len(frames) != len(other):
        logger.warning("--video has %d frames, --video2 %d: the shorter ends it", len(frames), len(other))
    masks = [
        _mask_of(kind, path, argument, clip.shape)
        for kind, path, argument, clip in zip(
            args.compose, (args.mask, args.mask2), ("--mask", "--mask2"), (frames, other), strict=True
        )
    ]
    first, second = args.compose
    return *control_maps.compose((first, frames, masks[0]), (second, other, masks[1])), fps


def _with_model(task: str, args: Namespace) -> ControlVideo:
    """Checked in this order: weights on disk, the video, then the weights are loaded."""
    if task.startswith("pose"):
        detector_path = weights_path("person_detector", args.detector_path, "--detector_path")
        pose_path = weights_path("pose", args.pose_path, "--pose_path")
        frames, fps = read_clip(args.video, "--video")
        from preprocess.pose import PoseDrawer

        draw = PoseDrawer(detector_path, pose_path, face=task == "pose")
    elif task == "scribble":
        path = weights_path("scribble", args.scribble_path, "--scribble_path")
        frames, fps = read_clip(args.video, "--video")
        from preprocess.scribble import ScribbleDrawer

        draw = ScribbleDrawer(path, resolve_device(args.device))
    else:
        folder = Path(args.depth_path or DEPTH_PATH)
        if not (folder / "config.json").is_file():
            from configs import download_command, load_config

            raise WeightsError(
                f"--depth_path {str(folder)!r}: no Depth Anything model there. Give its folder in transformers' "
                f"layout, or {download_command(load_config('depth-anything-v2-large'))}"
            )
        frames, fps = read_clip(args.video, "--video")
        from preprocess.depth import depth_map, load_depth_model

        model = load_depth_model(folder, resolve_device(args.device))
        return depth_map(frames, model, per_frame=bool(args.per_frame)), None, fps
    return numpy.stack([draw(frame) for frame in _progress(frames, task)]), None, fps


def _layout(args: Namespace) -> ControlVideo:
    if len(args.bbox) != 2:
        raise UsageError(f"--bbox: layout_bbox takes two boxes, start and end, not {len(args.bbox)}")
    if args.video is not None:
        if given := [f"--{name}" for name in BLANK if getattr(args, name) is not None]:
            raise UsageError(f"{', '.join(given)}: size, length and frame rate are those of --video; give either")
        info = probe(args.video)
        num_frames, height, width, fps = info.num_frames, info.height, info.width, info.fps
    else:
        num_frames, fps = args.num_frames or 81, args.fps or 16
        height, width = args.height or 480, args.width or 832
        _warn_of_length(num_frames)
    check_memory(num_frames, height, width, "--num_frames")
    return control_maps.layout_boxes(*args.bbox, num_frames, height, width, args.color or (0, 0, 0)), None, fps


def _frameref(args: Namespace) -> ControlVideo:
    from preprocess.image import read_image

    if args.image is None and args.image2 is None:
        raise UsageError("frameref needs --image (the first frame), --image2 (the last), or both")
    pictures = [
        None if path is None else read_image(path, argument)
        for path, argument in ((args.image, "--image"), (args.image2, "--image2"))
    ]
    height, width = next(picture for picture in pictures if picture is not None).shape[:2]
    height, width = args.height or height, args.width or width
    num_frames = args.num_frames or 81
    num_made = num_frames - sum(picture is not None for picture in pictures)
    if num_made < 1:
        raise UsageError(f"--num_frames {num_frames} leaves no frame to be made")
    _warn_of_length(num_frames)
    check_memory(num_frames, height, width, "--image")
    for i, picture in enumerate(pictures):
        if picture is not None and picture.shape[:2] != (height, width):
            logger.info("picture %d of %dx%d is centred on white, %dx%d", i + 1, *picture.shape[1::-1], width, height)
            pictures[i] = control_maps.fit_on_white(picture, height, width)
    before, after = (None if picture is None else picture[None] for picture in pictures)
    return *control_maps.extend_frames(before, num_made, after), args.fps or 16


def _clipref(args: Namespace) -> ControlVideo:
    if args.video is None and args.video2 is None:
        raise UsageError("clipref needs --video (the beginning), --video2 (the end), or both")
    before, fps = (None, None) if args.video is None else read_clip(args.video, "--video")
    after, after_fps = (None, None) if args.video2 is None else read_clip(args.video2, "--video2")
    if fps is not None and after_fps is not None and abs(fps - after_fps) > 0.01:
        logger.warning("--video2 has %g frames per second, --video %g: played at the latter", after_fps, fps)
    given = sum(len(clip) for clip in (before, after) if clip is not None)
    num_frames = args.num_frames or 81
    if num_frames <= given:
        raise UsageError(f"--num_frames {num_frames} leaves no frame to be made, the clips have {given}; give more")
    _warn_of_length(num_frames)
    height, width = (after if before is None else before).shape[1:3]
    check_memory(num_frames, height, width, "--num_frames")
    return *control_maps.extend_frames(before, num_frames - given, after), fps or after_fps


def _warn_of_length(num_frames: int) -> None:
    if num_frames % 4 != 1:
        fits = control_maps.next_wan_length(num_frames)
        logger.warning("%d frames; Wan takes 4n+1 and would leave the last out: %d would fit", num_frames, fits)


def _reshape(mask: numpy.ndarray, args: Namespace) -> numpy.ndarray:
    """By the --maskaug_ flags."""
    if args.maskaug_mode is None:
        if args.maskaug_ratio is not None or args.maskaug_seed is not None:
            raise UsageError("--maskaug_ratio and --maskaug_seed need --maskaug_mode")
        return mask
    grows = args.maskaug_mode.endswith("_expand")
    if not grows and (args.maskaug_ratio is not None or args.maskaug_seed is not None):
        raise UsageError(f"--maskaug_mode {args.maskaug_mode} does not grow: no --maskaug_ratio or --maskaug_seed")
    reach = (1, 1, 1, 1) if args.maskaug_seed is None else numpy.random.default_rng(args.maskaug_seed).random(4)
    ratio = 0.3 if args.maskaug_ratio is None else args.maskaug_ratio
    return control_maps.reshape_mask(mask, args.maskaug_mode, expand_ratio=ratio, reach=reach)


def _mask_of(kind: str, path: str | None, argument: str, shape: tuple[int, ...]) -> numpy.ndarray | None:
    """The mask of one video of a composition; a control video has none, all of it is made."""
    if path is not None:
        return read_mask(path, argument, shape)[0]
    if control_maps.composition_kind(kind) != "control":
        raise UsageError(f"--compose {kind} needs {argument}, the mask that came with its video")
    return numpy.full(shape[:3], MADE, numpy.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_clip(path: str | Path, argument: str) -> tuple[numpy.ndarray, float]:
    """((F, H, W, 3) uint8 RGB, frames per second) of a video that fits into memory."""
    if str(path).lower().endswith(PICTURES):
        raise InputError(f"{argument} {path} is a picture; give a video (for pictures there is the task frameref)")
    info = probe(path)
    check_memory(info.num_frames, info.height, info.width, argument)
    return read_frames(path), info.fps


def read_mask(path: str | Path, argument: str, shape: tuple[int, ...] | None = None) -> tuple[numpy.ndarray, float]:
    """((F, H, W) uint8 of 0 and 255, frames per second) of a mask video, or of a picture for all frames.

    Args:
        shape: (F, H, W, …) of the video it belongs to; of that aspect it is scaled. None takes the mask as it is.

    Raises:
        InputError: colours, or another aspect or length than the video.
    """
    import cv2

    from preprocess.image import read_image

    if str(path).lower().endswith(PICTURES) or str(path).lower().startswith(("http://", "https://")):
        frames, fps = read_image(path, argument)[None], 16
    else:
        frames, fps = read_clip(path, argument)
    sample = frames[:: max(1, len(frames) // 8)].astype(numpy.int16)
    colored = float((sample.max(axis=-1) - sample.min(axis=-1) > 48).mean())
    if colored > 0.001:  # video codecs leave a little colour at edges
        raise InputError(
            f"{argument} {path}: {colored:.1%} of its pixels are coloured; a mask is black (kept) and white (made)"
        )
    between = float(((sample > 64) & (sample < 192)).mean())
    if between > 0.05:
        logger.warning("%s: %.0f%% of it is neither black nor white; cut at half", argument, 100 * between)
    mask = control_maps.binary_mask(frames[..., 0])
    if not mask.any():
        logger.warning("%s is black throughout: nothing is made. White is what the model makes", argument)
    if shape is None:
        return mask, fps

    num_frames, height, width = shape[:3]
    if mask.shape[1:] != (height, width):
        scale_x, scale_y = width / mask.shape[2], height / mask.shape[1]
        if not math.isclose(scale_x, scale_y, rel_tol=0.02):
            raise InputError(
                f"{argument} {path} is {mask.shape[2]}x{mask.shape[1]}, its video {width}x{height}: of another shape; "
                "make the mask for this video"
            )
        logger.info("%s of %dx%d scaled to %dx%d", argument, *mask.shape[:0:-1], width, height)
        mask = numpy.stack([cv2.resize(plane, (width, height), interpolation=cv2.INTER_NEAREST) for plane in mask])
    if len(mask) not in (1, num_frames):
        raise InputError(
            f"{argument} {path} has {len(mask)} frames, its video {num_frames}; "
            "give one mask frame for each, or a picture for all of them"
        )
    return numpy.broadcast_to(mask, (num_frames, height, width)), fps


def check_memory(num_frames: int, height: float, width: float, argument: str) -> None:
    """Frames are held decoded, and about three times over.

    Raises:
        ResourceError: there is less memory than that.
    """
    import psutil

    needed = 3 * num_frames * height * width * 3
    available = psutil.virtual_memory().available
    if needed > available:
        raise ResourceError(
            f"{argument}: {num_frames} frames of {width:.0f}x{height:.0f} need about {needed / 2**30:.1f} GiB of "
            f"memory, {available / 2**30:.1f} GiB are free; cut the video into clips, or make it smaller"
        )


def weights_path(part: str, given: str | None, argument: str) -> Path:
    """Where the weights of a part of configs/vace-annotators.yaml are.

    Raises:
        WeightsError: not there; with the command that fetches them.
    """
    from configs import download_command, load_config, part_path

    config = load_config("vace-annotators")
    path = Path(given) if given is not None else part_path(config, part)
    if not path.is_file():
        raise WeightsError(
            f"{argument} {str(path)!r}: no such file; {download_command(config)} (the hub's {config['repo']}, "
            f"{config['files'][part]}), or name the file with {argument}"
        )
    return path


def resolve_device(name: str) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: not here ({str(error).splitlines()[0][:100]}); give cpu") from error
    return name


def _progress(frames: Iterable[numpy.ndarray], task: str) -> Iterable[numpy.ndarray]:
    from tqdm import tqdm

    return tqdm(frames, desc=task, unit="frame", disable=None)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.control",
        description=__doc__ + _describe_tasks(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=TASKS, metavar="TASK", help="one of the above")
    parser.add_argument("--output", required=True, help="mp4 to write; a mask goes beside it, as NAME.mask.mp4")
    parser.add_argument("--mask_output", metavar="FILE", help="another place for the mask")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    parser.add_argument("--video", help="what the control is made of")
    parser.add_argument("--video2", metavar="VIDEO", help="clipref: the end; composition: the second video")
    parser.add_argument("--image", metavar="PICTURE", help="the first frame")
    parser.add_argument("--image2", metavar="PICTURE", help="the last frame")
    parser.add_argument("--mask", metavar="FILE", help="video, or a picture for all frames: white is made, black kept")
    parser.add_argument("--mask2", metavar="FILE", help="of --video2")
    parser.add_argument(
        "--bbox", nargs="+", action="extend", type=_box, metavar="X1,Y1,X2,Y2", help="left,top,right,bottom in pixels"
    )
    parser.add_argument("--color", type=_color, metavar="R,G,B", help="of lines (0,0,0)")
    parser.add_argument("--mode", choices=("first", "last", "firstlast"), help="which end is kept")
    parser.add_argument("--keep", type=_whole, metavar="N", help="how many frames of each end are kept (1)")
    parser.add_argument(
        "--direction", nargs="+", action="extend", choices=SIDES, metavar="SIDE", help=f"of {', '.join(SIDES)} (all)"
    )
    parser.add_argument("--expand_ratio", type=float, help="width of a border, of the picture's (0.25)")
    parser.add_argument("--maskaug_mode", choices=MASK_SHAPES, help=f"coarser mask: {', '.join(MASK_SHAPES)}")
    parser.add_argument("--maskaug_ratio", type=float, help="how far it grows, of its size (0.3)")
    parser.add_argument("--maskaug_seed", type=int, metavar="N", help="grow by random shares of that (evenly)")
    parser.add_argument("--compose", nargs=2, metavar="KIND", help="what the two videos are: repaint, extension, "
                        "control, or the task each was made by")  # fmt: skip
    parser.add_argument("--num_frames", type=_whole, help="length of the output (81)")
    parser.add_argument("--height", type=_whole, help="without a video (the picture's, or 480)")
    parser.add_argument("--width", type=_whole, help="without a video (the picture's, or 832)")
    parser.add_argument("--fps", type=float, help="without a video (16)")
    parser.add_argument("--per_frame", action="store_true", default=None, help="each frame its own scale (flickers)")
    parser.add_argument("--detector_path", metavar="FILE", help="yolox_l.onnx")
    parser.add_argument("--pose_path", metavar="FILE", help="dw-ll_ucoco_384.onnx")
    parser.add_argument("--scribble_path", metavar="FILE", help="netG_A_latest.pth")
    parser.add_argument("--depth_path", metavar="FOLDER", help=f"Depth Anything for transformers ({DEPTH_PATH})")
    parser.add_argument("--device", help="cpu, cuda, mps (cuda where there is one); pose: as onnxruntime was built")
    args = parser.parse_args(argv)

    task = TASKS[args.task]
    takes = {*EVERY_TASK, *task.needs, *task.takes, *(("mask_output",) if task.has_mask else ())}
    if missing := [f"--{name}" for name in task.needs if getattr(args, name) is None]:
        parser.error(f"{args.task} needs {', '.join(missing)}")
    if foreign := [f"--{name}" for name, value in vars(args).items() if value is not None and name not in takes]:
        parser.error(f"{args.task} has no use for {', '.join(foreign)}")
    return args


def _describe_tasks() -> str:
    lines = []
    for name, task in TASKS.items():
        flags = [f"--{flag}" for flag in task.needs] + [f"[--{flag}]" for flag in task.takes]
        lines += [f"  {name:18} {task.about}{'; with a mask' if task.has_mask else ''}", f"{'':21}{' '.join(flags)}"]
    return "\n".join(lines)


def _box(text: str) -> tuple[int, ...]:
    try:
        box = tuple(float(v) for v in text.split(","))
    except ValueError:
        box = ()
    if len(box) != 4 or not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3]:
        raise argparse.ArgumentTypeError(f"{text!r} is no box; give left,top,right,bottom such as 10,20,200,300")
    if max(map(abs, box)) > 100_000:
        raise argparse.ArgumentTypeError(f"{text!r}: at most 100000 pixels")
    return box


def _color(text: str) -> tuple[int, ...]:
    try:
        color = tuple(int(v) for v in text.split(","))
    except ValueError:
        color = ()
    if len(color) != 3 or not all(0 <= v <= 255 for v in color):
        raise argparse.ArgumentTypeError(f"{text!r} is no colour; give red,green,blue such as 255,128,0")
    return color


def _whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r}; give a whole number from 1 to 1000000")
    return value


def main(args: Namespace) -> None:
    from preprocess.output import resolve_output
    from preprocess.video_writer import write_video

    output = resolve_output(args.output, overwrite=args.overwrite)
    mask_output = None
    if TASKS[args.task].has_mask:
        mask_output = args.mask_output or str(Path(args.output).with_suffix(".mask.mp4"))
        mask_output = resolve_output(mask_output, overwrite=args.overwrite)
        if mask_output == output:
            raise UsageError(f"--mask_output {args.mask_output} is --output as well; give two names")

    frames, masks, fps = make_control(args)
    given = {name: value for name, value in vars(args).items() if value is not None and name != "overwrite"}
    settings = {"fps": fps, "quality": 10, "metadata": {"made_by": "preprocess.control", **given}}
    if masks is not None:  # the mask first: where the control video is, all is
        write_video(mask_output, (numpy.repeat(plane[None, ..., None], 3, axis=-1) for plane in masks), **settings)
        made = float((masks != KEPT).mean())
        if made == 0:
            logger.warning("%s: the mask is black throughout, nothing is left to be made", mask_output.name)
        logger.info("%s: the mask, %.0f%% is white and will be made", mask_output.name, 100 * made)
    write_video(output, (frame[None] for frame in frames), **settings)
    logger.info("%s: %d frames of %dx%d, %g per second", output.name, *frames.shape[:1], *frames.shape[2:0:-1], fps)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    with exit_codes():
        main(parse_arguments())
