"""Depth of a clip as grey, near white and far black: Depth Anything from a local folder, in transformers.

    model = load_depth_model("Depth-Anything-V2-Large-hf")
    video = depth_map(frames, model)                     # (F, H, W, 3) uint8 -> the same shape

The whole clip shares one scale: VACE scales each frame by itself (`per_frame=True`), and the background flickers
whenever something near comes or goes. Tested with a tiny random model; the released weights were not run here.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from errors import InputError, WeightsError

if TYPE_CHECKING:
    from transformers import DepthAnythingForDepthEstimation

SHORT_SIDE = 518  # what the model was trained at; sides become multiples of its patch
MEAN = numpy.array([0.485, 0.456, 0.406], numpy.float32)
STD = numpy.array([0.229, 0.224, 0.225], numpy.float32)


def load_depth_model(folder: str | Path, device: str = "cpu") -> "DepthAnythingForDepthEstimation":
    """Depth Anything (1 or 2) in transformers' layout: config.json and model.safetensors. Nothing is downloaded.

    Raises:
        WeightsError: not there, damaged, or another model.
    """
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            from configs import download_command, load_config

            raise WeightsError(
                f"depth model {str(folder)!r}: {name} is missing. Give the folder of a Depth Anything model in "
                f"transformers' layout, or {download_command(load_config('depth-anything-v2-large'))}"
            )
    try:
        config = DepthAnythingConfig.from_pretrained(folder, local_files_only=True)
        if config.depth_estimation_type != "relative":
            raise WeightsError(f"depth model {str(folder)!r} measures metres; control needs a relative depth model")
        model, report = DepthAnythingForDepthEstimation.from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except WeightsError:
        raise
    except Exception as error:  # safetensors and transformers raise anything on a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise WeightsError(f"depth model {str(folder)!r} cannot be loaded: {reason}; fetch it again") from error
    if missing := sorted(report["missing_keys"]):
        raise WeightsError(f"depth model {str(folder)!r} lacks {len(missing)} tensors, {missing[0]} first")
    return model.eval().requires_grad_(False).to(device)


def depth_map(
    frames: numpy.ndarray,
    model: "DepthAnythingForDepthEstimation",
    *,
    short_side: int = SHORT_SIDE,
    per_frame: bool = False,
) -> numpy.ndarray:
    """(F, H, W, 3) uint8 RGB -> grey of that shape, 255 the nearest of the clip (or of each frame), 0 the farthest.

    Raises:
        InputError: the model sees nothing, which is NaN or the same depth everywhere.
    """
    import cv2
    from tqdm import tqdm

    bar = tqdm(frames, desc="depth", unit="frame", disable=None)
    inverse = numpy.stack([_inverse_depth(frame, model, short_side) for frame in bar])  # (F, h, w)
    axes = (1, 2) if per_frame else None
    nearest, farthest = inverse.max(axis=axes, keepdims=True), inverse.min(axis=axes, keepdims=True)
    if not numpy.isfinite(inverse).all() or not (nearest > farthest).all():
        raise InputError("the depth model sees no depth in the video; is it a picture of one colour?")
    height, width = frames.shape[1:3]
    video = numpy.empty_like(frames)
    for i, plane in enumerate((inverse - farthest) / (nearest - farthest)):
        plane = cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR)
        video[i] = (plane * 255).clip(0, 255).astype(numpy.uint8)[..., None]
    return video


def _inverse_depth(frame: numpy.ndarray, model: "DepthAnythingForDepthEstimation", short_side: int) -> numpy.ndarray:
    """One frame -> (h, w) float32 at the model's own size."""
    import cv2
    import torch

    patch = model.config.patch_size
    scale = short_side / min(frame.shape[:2])
    height, width = (max(round(side * scale / patch), 1) * patch for side in frame.shape[:2])
    small = cv2.resize(frame.astype(numpy.float32) / 255, (width, height), interpolation=cv2.INTER_CUBIC)
    pixels = torch.from_numpy(((small - MEAN) / STD).transpose(2, 0, 1)[None]).to(model.device, model.dtype)
    with torch.inference_mode():
        return model(pixel_values=pixels).predicted_depth[0].float().cpu().numpy()
