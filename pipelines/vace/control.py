"""What controls a video: frames and masks as users have them, and the context that the branch reads of them."""

import hashlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from pipelines import tiny
from pipelines.conditions import ShownVAE
from pipelines.memory import stage
from pipelines.vace.command import spread_frames
from pipelines.vace.context import cover_frames, frames_to_video, mask_to_video, vace_context, with_known_frames
from pipelines.vace.masks import read_mask
from pipelines.vace.settings import VaceSettings
from pipelines.wan import Wan
from pipelines.windows import Window
from preprocess.image import read_image
from preprocess.progress_bars import ProgressBars
from preprocess.video import probe, stream_frames

logger = logging.getLogger("selfsame")


@dataclass(frozen=True)
class Control:
    """What the user gave, at the size and length of the result.

    frames: (T, H, W, 3) uint8, or None: nothing is given, everything is made.
    mask: (T, H, W) uint8, 255 = make, 0 = keep; None: make everything.
    references: pictures (H0, W0, 3) uint8 of any size, in order.
    """

    frames: numpy.ndarray | None
    mask: numpy.ndarray | None
    references: Sequence[numpy.ndarray]

    def hashes(self) -> dict:
        """What identifies the pixels, for the metadata."""

        def sha256(pixels: numpy.ndarray | None) -> str | None:
            return None if pixels is None else hashlib.sha256(numpy.ascontiguousarray(pixels).tobytes()).hexdigest()

        return {"video": sha256(self.frames), "mask": sha256(self.mask), "images": [sha256(r) for r in self.references]}


def read_control(settings: VaceSettings, demonstrate: bool = False) -> Control:
    """Read what the settings name. `demonstrate`: where they name nothing, a control video made on the fly.

    Raises:
        InputError: a file that cannot be decoded, or a coloured mask.
    """
    references = [read_image(picture, "--reference_image") for picture in settings.reference_image]
    if settings.reference_video is None:
        if not (demonstrate and not references):
            return Control(None, None, references)
        logger.info("no --reference_video: the control video of this demonstration is made from assets/face.png")
        return Control(
            tiny.demonstration_control(settings.num_frames, settings.height, settings.width), None, references
        )
    info, size = probe(settings.reference_video), (settings.height, settings.width)
    mask = None if settings.reference_mask is None else read_mask(settings.reference_mask, info.num_frames)
    chosen = list(range(settings.num_frames))
    if settings.resample_control:
        chosen, _ = spread_frames(info.num_frames, info.fps, settings.num_frames)
    frames = read_control_frames(settings.reference_video, chosen, *size)
    if mask is not None:
        mask = cover_frames(mask[chosen][..., None], *size)[..., 0].numpy()
    return Control(frames, mask, references)


def read_control_frames(path: str, chosen: Sequence[int], height: int, width: int) -> numpy.ndarray:
    """Chosen frames of a control video at a size, (len(chosen), H, W, 3) uint8, in their order; those that lie beyond
    its end are left out.

    One by one: the video may be much larger, and longer, than what is made of it.
    """
    wanted, stream = set(chosen), itertools.islice(stream_frames(path), chosen[-1] + 1)
    frames = [cover_frames(frame[None], height, width).numpy() for i, frame in enumerate(stream) if i in wanted]
    return numpy.concatenate(frames) if frames else numpy.zeros((0, height, width, 3), numpy.uint8)


def encode_control(
    wan: Wan,
    bars: ProgressBars,
    control: Control,
    window: Window,
    known: Tensor | None = None,
    pictures: Sequence[Tensor] = (),
) -> Tensor:
    """The control context of one window, (1, 96, R + F, h, w). Beyond its end the control says nothing.

    Args:
        known: (K, H, W, 3) uint8, the window's first frames, where they exist already.
        pictures: the R reference pictures, as `fit_reference` makes them.
    """
    size = (window.length, wan.settings.height, wan.settings.width)
    video, made = torch.zeros(1, 3, *size), torch.ones(1, 1, *size)
    if control.frames is not None and len(frames := control.frames[window.span]):
        video[:, :, : len(frames)] = frames_to_video(frames)
    if control.mask is not None and len(mask := control.mask[window.span]):
        made[:, :, : len(mask)] = mask_to_video(mask)
    if known is not None:
        video, made = with_known_frames(video, made, known.numpy())
    device, label = wan.device, "encoding the control video"
    with torch.no_grad(), wan.vae() as vae, stage(label, "try a smaller size or --vae_dtype bf16"):
        shown = ShownVAE(vae, bars, label)
        return vace_context(shown, video.to(device), made.to(device), [p.to(device) for p in pictures])
