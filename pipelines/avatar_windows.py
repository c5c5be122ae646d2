"""Windows over the latents of a long talking video: where each one lies, and how neighbours are fused. No model here.

A window is f latent frames, what the network makes at one time; neighbours share o of them. In every denoising step
each window starts from the same latents, and what it returns is faded into the windows before it.

Source: StableAvatar (arXiv 2508.08248, dynamic weighted sliding-window strategy), `wan_inference_long_pipeline.py`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import UsageError

WEIGHT_SCHEMES = ("uniform", "log")
LAST_WINDOWS = ("full", "legacy")


@dataclass(frozen=True)
class AvatarWindow:
    """Latent frames `start` up to `stop`; the first `overlap` of them belong to earlier windows too."""

    start: int
    stop: int
    overlap: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def count_frames(num_samples: int, sample_rate: int, fps: float) -> int:
    """Frames of the video of a sound: the last one covers what is left of the sound, so that none of it is lost."""
    return max(1, math.ceil(num_samples * _exact(fps) / sample_rate))


def latent_length(num_frames: int, window: int) -> int:
    """Latent frames to denoise for so many frames, one window at least; what is beyond the last frame is not shown."""
    return max(math.ceil((num_frames - 1) / 4) + 1, window)


def plan_windows(num_latents: int, window: int, overlap: int, last_window: str = "full") -> list[AvatarWindow]:
    """Cover the video.

    Args:
        num_latents: latent frames of the video, `window` at least.
        window: latent frames of a window.
        overlap: latent frames that neighbours share.
        last_window: "full" moves the last window back until it has its whole length, so that its overlap grows.
            "legacy" ends it where the video ends, as upstream: the network then stretches a whole window's sound over
            what is left, and mouths move too slowly.

    Raises:
        UsageError: an overlap that leaves nothing to advance by.
    """
    if not 1 <= overlap < window:
        raise UsageError(
            f"--overlap_window_length {overlap}: accepted are 1 to {window - 1} latent frames, less than the {window} "
            f"of a window of {4 * window - 3} frames (--clip_sample_n_frames)"
        )
    assert num_latents >= window, "a video shorter than a window is made as one window and cut"
    windows = [AvatarWindow(0, window, 0)]
    while (end := windows[-1].stop) < num_latents:
        start = end - overlap
        stop = min(start + window, num_latents)
        if last_window == "full":
            start = stop - window
        windows.append(AvatarWindow(start, stop, end - start))
    return windows


def blend_weights(scheme: str, length: int) -> Tensor:
    """Weight of the newer window over the frames it shares with the older ones, 0 to 1: (length,)."""
    if length == 1:
        return torch.ones(1)
    weights = torch.linspace(0, 1, length)
    return torch.log1p(weights * (math.e - 1)) if scheme == "log" else weights


def fuse(target: Tensor, windows: Sequence[AvatarWindow], samples: Iterable[Tensor], scheme: str, blend: bool) -> None:
    """Put the windows' results together: one step's latents, written into `target`.

    Args:
        target: (1, C, F, h, w), written in full; what it held before is not used.
        samples: each window's (1, C, f, h, w) after the solver's step, in the windows' order.
        blend: fade each window in over its overlap; in the first step the later window simply wins (released
            behaviour: at pure noise there is nothing to continue).
    """
    for window, sample in zip(windows, samples, strict=True):
        sample = sample.to(target)
        if blend and window.overlap:
            shared = target[:, :, window.start : window.start + window.overlap]
            weight = blend_weights(scheme, window.overlap).view(1, 1, -1, 1, 1)
            faded = weight * sample[:, :, : window.overlap] + (1 - weight) * shared
            sample = torch.cat((faded, sample[:, :, window.overlap :]), dim=2)
        target[:, :, window.start : window.stop] = sample
