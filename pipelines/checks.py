"""Checks of settings, of what more than one task has: combinations, sizes, files. Without torch."""

import dataclasses
import itertools
import logging
import math
import os
from collections.abc import Sequence
from typing import TypeVar

from errors import InputError, UsageError, WeightsError
from models.wan.config import WanConfig
from models.wan.tea_cache import COEFFICIENTS, coefficients_of
from pipelines.flags import BASE, BESIDE_BASE, WEIGHTS, described, names_of
from pipelines.networks import family_of, has_identity, shape_of
from pipelines.settings import LikenessSettings, Settings, WanSettings, is_tiny
from pipelines.weights import find_gguf
from preprocess.video import VideoInfo, probe

logger = logging.getLogger("selfsame")

Kind = TypeVar("Kind")  # a dataclass of settings
WanKind = TypeVar("WanKind", bound=WanSettings)
REFERENCE_TOKENS = 32 * 32  # a 512 x 512 photo has so many


def check_settings(settings: WanKind, config: dict) -> WanKind:
    """Combinations, of a Wan model; sizes rounded up to what the model can make, with a message.

    Raises:
        UsageError: naming the flags.
        InputError: a photo that is not there.
    """
    check_likeness(settings)
    if settings.min_face_score is not None and not settings.score_photos:
        raise UsageError(f"--min_face_score {settings.min_face_score:g}: there is no photo to compare with; give one")
    if settings.timesteps is not None and any(b >= a for a, b in itertools.pairwise(settings.timesteps)):
        numbers = " ".join(f"{timestep:g}" for timestep in settings.timesteps[:10])
        raise UsageError(f"--timesteps {numbers}: they have to fall, from noise (1000) to the video; 1000 750 500 250")
    of_a_base = names_of(type(settings), path=BESIDE_BASE)
    unread = [name for name in of_a_base if getattr(settings, name) is not None]
    if unread and is_tiny(settings, config):
        raise UsageError(
            f"--{unread[0]} {getattr(settings, unread[0])[:200]}: {config['name']} is made from a seed and reads no "
            "files; leave it out, or choose a model (--config, --wan_version, or --base_path)"
        )
    if isinstance(settings, Settings):
        check_identity(settings, config)
    if (family := family_of(config)) not in settings.families:
        accepted = ", ".join(settings.families)
        raise UsageError(f"--config {config['name']}: model of family {family}; accepted here are {accepted}")
    check_fp8(settings)
    if settings.step_cache == "teacache" and coefficients_of(config) is None:
        raise UsageError(
            f"--step_cache teacache: fitted for {', '.join(COEFFICIENTS)} of Wan2.1, not for {config['name']}; "
            "use first_block"
        )
    if settings.step_cache != "none" and settings.compile:
        raise UsageError("--step_cache with --compile: a skipped step cannot be compiled in; choose one")

    shape = shape_of(config)
    multiple = 2 * shape.vae_spatial_factor  # a token covers 2 x 2 latent cells
    settings = round_sizes(settings, multiple, frame_step=4)
    check_split(settings, shape)
    return settings


def check_identity(settings: Settings, config: dict) -> None:
    """Whether the model can show the person of the photo, in the steps that are asked for, with as many scales of
    guidance as it has experts.

    Raises:
        UsageError: it cannot.
        InputError: a photo that is not there.
    """
    if settings.identity_start > settings.identity_end:
        raise UsageError(
            f"--identity_start {settings.identity_start:g} comes after --identity_end {settings.identity_end:g}"
        )
    if settings.stand_in_photos and not has_identity(config):
        raise UsageError(
            f"--ip_image: config {config['name']} has no identity weights; Stand-In was released for the 14B models: "
            "use --wan_version 2.1 or 2.2, leave --ip_image out, or make a first frame of it (--first_frame instantid)"
        )
    check_pictures(ip_image=settings.ip_image)
    if len(settings.guidance_scale) > (2 if config.get("experts") else 1):
        raise UsageError(f"--guidance_scale: {len(settings.guidance_scale)} values for one model; give one")


def check_likeness(settings: LikenessSettings) -> None:
    """Whether there is a score for the retries to reach.

    Raises:
        UsageError: there is none.
    """
    if settings.min_face_score is None and settings.max_retries != LikenessSettings.max_retries:
        raise UsageError(f"--max_retries {settings.max_retries}: give --min_face_score, the score to reach, too")


def check_fp8(settings) -> None:
    """Whether what settings of any method say beside it leaves the casting of weights to --fp8.

    Raises:
        UsageError: it does not.
    """
    if settings.fp8 and settings.memory in ("group", "sequential"):
        raise UsageError(f"--fp8 with --memory {settings.memory}: both move weights at each call; choose one")
    if settings.fp8 and getattr(settings, "compile", False):
        raise UsageError("--fp8 with --compile: float8 weights cannot be compiled yet; choose one")


def check_formats(settings: object) -> None:
    """Whether weights that a flag names are in a format that is read at all.

    Raises:
        WeightsError: they are GGUF.
    """
    for name, (_, what) in described(type(settings)).items():
        value = getattr(settings, name) if what.path in (WEIGHTS, BASE, BESIDE_BASE) else None
        for path in value if isinstance(value, tuple) else () if value is None else (value,):
            if found := find_gguf(path):
                raise WeightsError(
                    f"--{name} {path}: GGUF weights ({found}) are not read yet; give safetensors (ComfyUI's fp8 "
                    "files are the smallest), or the released files"
                )


def check_pictures(**pictures: Sequence[str]) -> None:
    """Whether the files of these flags are there; a URL is only tried when it is read.

    Raises:
        InputError: one that is not.
    """
    for name, paths in pictures.items():
        for path in paths:
            if "://" not in path and not os.path.isfile(path):
                raise InputError(f"--{name} {path[:300]}: no such file; give a picture's path or URL")


def round_sizes(settings: Kind, multiple: int, frame_step: int | None) -> Kind:
    """Height and width rounded up to a multiple, and frames to n·frame_step + 1 (None: a picture), with a message."""
    rules = {
        name: (math.ceil(getattr(settings, name) / multiple) * multiple, f"a multiple of {multiple}")
        for name in ("height", "width")
    }
    if frame_step is not None:
        frames = math.ceil((settings.num_frames - 1) / frame_step) * frame_step + 1
        rules["num_frames"] = (frames, f"{frame_step}n+1")
    for name, (value, rule) in rules.items():
        if value != getattr(settings, name):
            logger.warning("--%s %d becomes %d: the model makes %s", name, getattr(settings, name), value, rule)
    return dataclasses.replace(settings, **{name: value for name, (value, _) in rules.items()})


def check_split(settings: WanSettings, shape: WanConfig) -> None:
    """Whether the tokens and heads of a video can be divided over the processes."""
    processes = settings.ulysses_degree * settings.ring_degree
    token = 2 * shape.vae_spatial_factor
    tokens = ((settings.num_frames - 1) // 4 + 1) * (settings.height // token) * (settings.width // token)
    degrees = f"--ulysses_degree {settings.ulysses_degree} x --ring_degree {settings.ring_degree}"
    if tokens % processes:
        raise UsageError(f"{degrees}: the video's {tokens} tokens do not divide by {processes}; change size or frames")
    if REFERENCE_TOKENS * len(settings.stand_in_photos) % processes:
        raise UsageError(
            f"{degrees}: the photo's {REFERENCE_TOKENS} tokens do not divide by {processes}; use 2, 4 or 8"
        )
    if shape.num_heads % settings.ulysses_degree:
        raise UsageError(
            f"--ulysses_degree {settings.ulysses_degree}: the model's {shape.num_heads} heads do not divide by it"
        )


def probe_argument(flag: str, path: str) -> VideoInfo:
    """`probe`, its errors naming the flag."""
    try:
        return probe(path)
    except InputError as error:
        raise InputError(f"{flag}: {error}") from None
