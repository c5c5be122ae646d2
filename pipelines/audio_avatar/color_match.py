"""Colours of a reference picture for the frames of a video: long videos drift.

Source: Reinhard et al. 2001, Color Transfer between Images; StableAvatar `wan/utils/color_correction.py`.
"""

import warnings

import numpy
import torch
from skimage.color import lab2rgb, rgb2lab
from torch import Tensor

FLAT = 1e-4  # spread of a channel (0 to 100) that is rounding


def match_colors(frames: Tensor, reference: Tensor, strength: float = 1.0) -> Tensor:
    """Give each frame the reference's mean and spread in the channels of CIE Lab.

    Args:
        frames: (1, 3, F, H, W) in [-1, 1].
        reference: (3, H, W) in [-1, 1].
        strength: 0 leaves the frames as they are, 1 replaces their colours, between them they are mixed.
    """
    if strength == 0:
        return frames
    wanted = to_lab(reference)
    matched = []
    for frame in frames[0].unbind(1):  # (3, H, W)
        lab = to_lab(frame)
        mean, spread = lab.mean((0, 1)), lab.std((0, 1))
        flat = spread < FLAT
        gain = numpy.where(flat, 1, wanted.std((0, 1)) / numpy.where(flat, 1, spread))  # a flat channel is only moved
        with warnings.catch_warnings(action="ignore"):  # that some colours are outside RGB: they are clipped
            rgb = lab2rgb((lab - mean) * gain + wanted.mean((0, 1))).clip(0, 1)
        matched.append(torch.from_numpy(rgb).permute(2, 0, 1) * 2 - 1)
    matched = torch.stack(matched, dim=1)[None].to(frames)
    return (1 - strength) * frames.clamp(-1, 1) + strength * matched


def to_lab(picture: Tensor) -> numpy.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) in CIE Lab, float64."""
    return rgb2lab((picture.cpu().double() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy())
