"""A training clip of a talking person from its pictures, masks and sound, as StableAvatar cuts it. No files, no draws.

Source: StableAvatar `wan/dataset/talking_video_dataset_fantasy.py` (LargeScaleTalkingFantasyVideos).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from PIL import Image
from torch import Tensor

from errors import InputError
from models.audio_encoder import normalize_samples
from preprocess.audio import training_clip_samples

# What a clip's path says, in the order it is looked for.
PROMPTS = {
    "singing": "The protagonist is singing",
    "speech": "The protagonist is talking",
    "dancing": "The protagonist is simultaneously dancing and singing",
}


@dataclass(frozen=True)
class AvatarClip:
    """What the encoders are given of one clip of T frames.

    frames:     (T, 3, H, W) in [-1, 1].
    masked:     the same with all frames but the first at 0.
    unknown:    (T, 1, H, W) uint8, 1 where `masked` has nothing.
    face, lip:  (1, T, H, W) in 0 to 1.
    samples:    (1, n), the sound of its time, normalised for wav2vec2.
    """

    frames: Tensor
    masked: Tensor
    unknown: Tensor
    face: Tensor
    lip: Tensor
    samples: Tensor

    @property
    def reference(self) -> Tensor:
        """(3, H, W) in [-1, 1]: the clip's first frame. (Upstream draws another one and drops it.)"""
        return self.frames[0]

    @property
    def clip_pixels(self) -> Tensor:
        """(H, W, 3) in 0 to 255: the reference for CLIP."""
        return (self.reference.permute(1, 2, 0) * 0.5 + 0.5) * 255


def clip_indices(num_images: int, start: int, num_frames: int) -> list[int]:
    """Which pictures the clip's frames are; a video that is too short is shown more slowly."""
    length = min(num_images, num_frames)
    return numpy.linspace(start, start + length - 1, num_frames, dtype=int).tolist()


def cut_clip(
    images: Sequence[numpy.ndarray],
    face_masks: Sequence[numpy.ndarray | None],
    lip_masks: Sequence[numpy.ndarray | None],
    audio: numpy.ndarray,
    *,
    start: int,
    num_frames: int,
    fps: float,
    width: int,
    height: int,
) -> AvatarClip:
    """The clip that begins at a picture.

    Args:
        images: of the whole video, (H0, W0, 3) uint8 each; only those of the clip are read.
        face_masks, lip_masks: (H0, W0) uint8, 0 to 255; None where a frame has none: all of it counts.
        audio: the whole video's sound at 16 kHz, mono.
        start: first picture.
        num_frames: T.
        fps: of the pictures.
        width, height: that everything is resized to, whatever its shape.
    """
    indices = clip_indices(len(images), start, num_frames)
    frames = torch.stack([resized(images[i], width, height) / 127.5 - 1 for i in indices]).permute(0, 3, 1, 2)

    def masks(given: Sequence[numpy.ndarray | None]) -> Tensor:
        all_of_it = torch.ones(height, width)
        rows = [all_of_it if given[i] is None else resized(given[i], width, height) / 255 for i in indices]
        return torch.stack(rows)[None]  # (1, T, H, W)

    unknown = torch.ones(num_frames, 1, height, width, dtype=torch.uint8)
    unknown[0] = 0
    first, end = training_clip_samples(start, min(len(images), num_frames), fps)
    return AvatarClip(
        frames=frames,
        masked=frames * (1 - unknown),
        unknown=unknown,
        face=masks(face_masks),
        lip=masks(lip_masks),
        samples=torch.from_numpy(normalize_samples(audio[first:end]))[None],
    )


def resized(picture: numpy.ndarray, width: int, height: int) -> Tensor:
    """A picture or mask of 8-bit values, by Pillow's bicubic filter -> (H, W, 3) or (H, W) float32, 0 to 255."""
    image = Image.fromarray(numpy.asarray(picture, dtype=numpy.uint8)).resize((width, height))
    return torch.from_numpy(numpy.array(image)).float()


def prompt_of_path(path: str) -> str:
    """The prompt that a clip's folder names.

    Raises:
        InputError: it names none.
    """
    for word, prompt in PROMPTS.items():
        if word in path:
            return prompt
    raise InputError(f"{path}: the path of a clip must hold one of {', '.join(PROMPTS)}, which gives its prompt")
