"""What is kept of the training videos: latents, text, pictures and sound, as a forward pass takes them.

Everything is of one view and without a batch axis. A recipe that needs something else adds an `Encoding` of its own.
"""

import hashlib
from collections.abc import Mapping

import numpy
import torch
from torch import Tensor

from configs import load_config
from models.audio_encoder import AudioEncoder
from models.vace import CONTEXT_CHANNELS
from models.wan.image_encoder import ImageEncoder
from models.wan.text_encoder import MAX_TOKENS, TextEncoder, clean_prompt
from models.wan.vae import WanVAE
from pipelines.conditions import latent_frames
from pipelines.long_video.clip_conditions import frames_to_condition, latents_to_condition
from pipelines.networks import shape_of
from pipelines.vace.context import fit_reference, frames_to_video, mask_to_video, vace_context
from preprocess.image import read_image
from training.cache import Encoding
from training.clips import View, find_faces, read_control, read_faces, read_frames, read_sound, with_next
from training.config import Config
from training.layouts import find_references

FACE = 512  # pixels of a side


def pixels(frames: numpy.ndarray) -> Tensor:
    """(T, H, W, 3) uint8 -> (1, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(numpy.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def of_view(view: View) -> list:
    """What decides the pixels of a view."""
    return [view.sample.facts.content, view.start, view.box, view.bucket]


def of_sound(view: View) -> list:
    """What decides the sound of a view."""
    facts = view.sample.facts
    return [facts.content, facts.beside, view.start, view.bucket.frames, facts.fps]


def latent_numbers(view: View, channels: int, factor: int) -> int:
    """Numbers in the latents of a view, z · f · h · w."""
    bucket = view.bucket
    return channels * latent_frames(bucket.frames) * (bucket.height // factor) * (bucket.width // factor)


def encodings_of(config: Config, dtype: torch.dtype = torch.bfloat16) -> list[Encoding]:
    """What a run's forward passes take: latents and text, what an image-to-video model sees, the sound where it talks,
    the person's face where there is one, what controls the video. The VAE itself takes frames.
    """
    if config.vae is not None:
        return []
    base = load_config(config.model.config)
    shape = shape_of(base)
    size = {"channels": shape.out_dim, "factor": shape.vae_spatial_factor, "dtype": dtype}
    found = [latents(**size), text(shape.text_dim, dtype)]
    if config.error_recycling is not None:
        found += svi_conditions(config, **size)
    elif shape.in_dim > shape.out_dim:
        found.append(first_frame(**size))
    if shape.image_dim is not None:
        found.append(image_features(shape.image_dim, dtype))
    if config.avatar is not None:
        found.append(sound(dtype))
    if config.error_recycling is not None and config.error_recycling.variant == "talk":
        found.append(sound_layers(dtype))
    if config.stand_in is not None:
        found.append(faces(**size))
    if config.vace is not None:
        found.append(control(config.vace.references, **size))
    return found


def whole_clip(view: View) -> Tensor:
    """(1, 3, T, H, W) in [-1, 1]: all frames of the view."""
    return pixels(read_frames(view))


def latents(channels: int = 16, factor: int = 8, dtype: torch.dtype = torch.bfloat16) -> Encoding:
    """mean and std (z, f, h, w) of the video's latents: Wan and SVI train on the mean, StableAvatar on draws."""

    def encode(vae: WanVAE, clip: Tensor) -> Mapping[str, Tensor]:
        mean, std = vae.posterior(clip)
        return {"mean": mean[0], "std": std[0]}

    def numbers(view: View) -> int:
        return 2 * latent_numbers(view, channels, factor)

    return Encoding("latents", "vae", of_view, numbers, whole_clip, encode, dtype)


def first_frame(channels: int = 16, factor: int = 8, dtype: torch.dtype = torch.bfloat16) -> Encoding:
    """latents (z, f, h, w) of the first frame followed by gray: an image-to-video model's condition."""

    def read(view: View) -> Tensor:
        clip = whole_clip(view)
        clip[:, :, 1:] = 0
        return clip

    def encode(vae: WanVAE, clip: Tensor) -> Mapping[str, Tensor]:
        return {"latents": vae.encode(clip)[0]}

    def numbers(view: View) -> int:
        return latent_numbers(view, channels, factor)

    return Encoding("first_frame", "vae", of_view, numbers, read, encode, dtype)


def faces(channels: int = 16, factor: int = 8, dtype: torch.dtype = torch.bfloat16) -> Encoding:
    """latents (K, z, 1, h, w) of the pictures of the person's face, in the order of `find_faces`."""

    def read(view: View) -> list[Tensor]:
        return [pixels(face[None]) for face in read_faces(view.sample)]

    def encode(vae: WanVAE, pictures: list[Tensor]) -> Mapping[str, Tensor]:
        return {"latents": torch.cat([vae.encode(picture) for picture in pictures])}

    def numbers(view: View) -> int:
        return len(find_faces(view.sample.listed.faces)) * channels * (FACE // factor) ** 2

    def of_faces(view: View) -> list:
        return [view.sample.facts.content, view.sample.facts.beside]

    return Encoding("faces", "vae", of_faces, numbers, read, encode, dtype)


def control(references: int = 0, channels: int = 16, factor: int = 8, dtype: torch.dtype = torch.bfloat16) -> Encoding:
    """context (96, R + F, h, w) of VACE: kept and made latents and the folded mask, after R reference pictures."""

    def read(view: View) -> tuple[Tensor, Tensor, list[Tensor]]:
        frames, masks = read_control(view)
        pictures = [
            fit_reference(read_image(file, "reference"), view.bucket.height, view.bucket.width)
            for file in find_references(view.sample.listed.references)[:references]
        ]
        return frames_to_video(frames), mask_to_video(masks), pictures

    def encode(vae: WanVAE, what: tuple[Tensor, Tensor, list[Tensor]]) -> Mapping[str, Tensor]:
        return {"context": vace_context(vae, *what)[0]}

    def numbers(view: View) -> int:
        frames = latent_frames(view.bucket.frames)
        return latent_numbers(view, CONTEXT_CHANNELS, factor) * (frames + references) // frames

    def decides(view: View) -> list:
        return [*of_view(view), view.sample.facts.beside, references]

    return Encoding("control", "vae", decides, numbers, read, encode, dtype)


def svi_conditions(config: Config, **size: object) -> list[Encoding]:
    """What SVI's variants are told of the clip before: y with one motion frame, and with all of them where the variant
    has more.
    """
    if config.error_recycling.variant == "pro":
        return [picture_alone(**size), next_clip(load_config("svi-2.0-pro")["svi"]["motion_latents"], **size)]
    svi = load_config(f"svi-{config.error_recycling.variant}")["svi"]
    found = [svi_condition("condition", 1, svi["padding"], svi["mask"], **size)]
    if svi["motion_frames"] > 1:
        found.append(svi_condition("condition_motion", svi["motion_frames"], svi["padding"], svi["mask"], **size))
    return found


def svi_condition(
    kind: str,
    motion_frames: int,
    padding: str,
    mask: str,
    channels: int = 16,
    factor: int = 8,
    dtype: torch.dtype = torch.bfloat16,
) -> Encoding:
    """y (4 + z, f, h, w) of a clip that goes on from its own first frames; where the variant pads with the user's
    picture, that is any frame of the clip (SVI's `train_svi.py`).
    """

    def read(view: View) -> tuple[Tensor, Tensor | None]:
        clip, chosen = whole_clip(view), reference_frame(view)
        return clip, clip[:, :, chosen : chosen + 1] if padding == "reference" else None

    def encode(vae: WanVAE, what: tuple[Tensor, Tensor | None]) -> Mapping[str, Tensor]:
        clip, reference = what
        condition = frames_to_condition(
            vae, clip[:, :, :motion_frames], clip.shape[2], reference=reference, marks_all=mask == "motion_frames"
        )
        return {"y": condition.y[0]}

    def decides(view: View) -> list:
        return [*of_view(view), motion_frames, padding, mask, reference_frame(view) if padding == "reference" else -1]

    def numbers(view: View) -> int:
        return latent_numbers(view, channels + 4, factor)

    return Encoding(kind, "vae", decides, numbers, read, encode, dtype)


def picture_alone(channels: int = 16, factor: int = 8, dtype: torch.dtype = torch.bfloat16) -> Encoding:
    """y (4 + z, f, h, w) of SVI 2.0 Pro's first clip, which is given its first frame and nothing else."""

    def read(view: View) -> tuple[Tensor, int]:
        return pixels(read_frames(view)[:1]), latent_frames(view.bucket.frames)

    def encode(vae: WanVAE, what: tuple[Tensor, int]) -> Mapping[str, Tensor]:
        picture, frames = what
        return {"y": latents_to_condition(vae.encode(picture), None, frames)[0]}

    def numbers(view: View) -> int:
        return latent_numbers(view, channels + 4, factor)

    return Encoding("condition", "vae", lambda view: [*of_view(view), "pro"], numbers, read, encode, dtype)


def next_clip(
    motion_latents: int, channels: int = 16, factor: int = 8, dtype: torch.dtype = torch.bfloat16
) -> Encoding:
    """SVI 2.0 Pro's next clip: y (4 + z, f, h, w), and the latents (z, f, h, w) to be made. They are the picture's, the
    last of the clip before, and those of the frames that follow, as one encoding of both clips has them, so that they
    meet where the clips do. The picture is the first frame of the clip before, or any of it.
    """

    def read(view: View) -> tuple[Tensor, Tensor, int]:
        both = whole_clip(with_next(view))
        chosen = anchor_frame(view)
        return both, both[:, :, chosen : chosen + 1], latent_frames(view.bucket.frames)

    def encode(vae: WanVAE, what: tuple[Tensor, Tensor, int]) -> Mapping[str, Tensor]:
        both, picture, frames = what
        latents, anchor = vae.encode(both), vae.encode(picture)
        end = latents[:, :, frames - motion_latents : frames]
        condition = latents_to_condition(anchor, end, frames)
        return {"y": condition[0], "mean": torch.cat((anchor, end, latents[:, :, frames:]), dim=2)[0]}

    def decides(view: View) -> list:
        return [*of_view(view), motion_latents, anchor_frame(view)]

    def numbers(view: View) -> int:
        return latent_numbers(view, 2 * channels + 4, factor)

    return Encoding("next_clip", "vae", decides, numbers, read, encode, dtype)


def anchor_frame(view: View) -> int:
    """The first frame of the view in half of all cases, else any of it; always the same of a view."""
    number = hashlib.sha256(f"{view.sample.facts.content}/{view.start}/anchor".encode()).digest()[0]
    return 0 if number % 2 else reference_frame(view)


def reference_frame(view: View) -> int:
    """Which frame of the view stands for the user's picture: any, but always the same."""
    number = hashlib.sha256(f"{view.sample.facts.content}/{view.start}/reference".encode()).digest()[:8]
    return int.from_bytes(number, "little") % view.bucket.frames


def image_features(width: int = 1280, dtype: torch.dtype = torch.bfloat16) -> Encoding:
    """features (257, D) of CLIP of the first frame."""

    def read(view: View) -> Tensor:
        return pixels(read_frames(view)[:1])[:, :, 0]

    def encode(encoder: ImageEncoder, picture: Tensor) -> Mapping[str, Tensor]:
        return {"features": encoder(picture)[0]}

    return Encoding("image_features", "image", of_view, lambda view: 257 * width, read, encode, dtype)


def text(width: int = 4096, dtype: torch.dtype = torch.bfloat16) -> Encoding:
    """states (n, D) of the caption: the real rows alone, the transformer pads them itself."""

    def read(view: View) -> str:
        return view.sample.listed.caption

    def encode(encoder: TextEncoder, caption: str) -> Mapping[str, Tensor]:
        return {"states": encoder.encode_prompts([caption])[0]}

    def numbers(view: View) -> int:
        return width * min(len(view.sample.listed.caption) // 3 + 2, MAX_TOKENS)  # a token has four letters or so

    def decides(view: View) -> str:  # what the encoder makes of it first
        return clean_prompt(view.sample.listed.caption)

    return Encoding("text", "text", decides, numbers, read, encode, dtype)


def sound(dtype: torch.dtype = torch.bfloat16) -> Encoding:
    """features (L, D), 50 a second, of the window's sound, each window normalised by itself as in StableAvatar."""

    def encode(encoder: AudioEncoder, samples: numpy.ndarray) -> Mapping[str, Tensor]:
        return {"features": encoder.last_hidden_state(samples)[0]}

    def numbers(view: View) -> int:
        return 768 * int(51 * view.bucket.frames / view.sample.facts.fps)

    return Encoding("sound", "audio", of_sound, numbers, read_sound, encode, dtype)


def sound_layers(dtype: torch.dtype = torch.bfloat16) -> Encoding:
    """features (F, layers, D): every layer's output for each frame of the window, as MultiTalk's layers take them."""

    def read(view: View) -> tuple[numpy.ndarray, int]:
        return read_sound(view), view.bucket.frames

    def encode(encoder: AudioEncoder, what: tuple[numpy.ndarray, int]) -> Mapping[str, Tensor]:
        return {"features": encoder.hidden_states(*what)}

    return Encoding("sound_layers", "audio", of_sound, lambda view: 12 * 768 * view.bucket.frames, read, encode, dtype)
