"""Windows over the latents of a long talking video: what each one hears, and how neighbours are fused. No model here.

A window is f latent frames, what the network makes at one time; neighbours share o of them. In every denoising step
each window starts from the same latents, and what it returns is faded into the windows before it.

Source: StableAvatar (arXiv 2508.08248, dynamic weighted sliding-window strategy), `wan_inference_long_pipeline.py`.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pipelines.windows import Window
from preprocess.audio import AudioTimeline


def latent_length(num_latents: int, window: int) -> int:
    """Latent frames to denoise: one window at least. What a short sound does not need of it is not shown."""
    return max(num_latents, window)


def sound_of(
    window: Window, timeline: AudioTimeline, num_latents: int, last_window: str, alignment: str
) -> tuple[int, int]:
    """(first, end) of the samples that a window hears; where they lie beyond the sound there is silence.

    Args:
        last_window: "legacy" gives the last window all that is left, be it more or less.
        alignment: "released" gives each window the sound of 4 frames a latent frame, "exact" that of the frames it
            shows by itself, three less. The network spreads either over the window, so that the released sound runs
            ahead by up to three frames.
    """
    first, end = timeline.window_samples(window.start, window.stop, exact=alignment == "exact")
    if last_window == "legacy" and window.stop == num_latents:
        end = timeline.num_samples
    return first, end


def blend_weights(scheme: str, length: int) -> Tensor:
    """Weight of the newer window over the frames it shares with the older ones, 0 to 1: (length,)."""
    if length == 1:
        return torch.ones(1)
    weights = torch.linspace(0, 1, length)
    return torch.log1p(weights * (math.e - 1)) if scheme == "log" else weights


def fuse(target: Tensor, windows: Sequence[Window], samples: Iterable[Tensor], scheme: str, blend: bool) -> None:
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
