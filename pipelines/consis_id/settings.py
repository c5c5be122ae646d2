"""The settings of a ConsisID run, checked without torch."""

import dataclasses
from argparse import Namespace
from dataclasses import dataclass

from errors import UsageError
from pipelines.settings import (
    BOUNDS,
    CHOICES,
    LikenessSettings,
    check_fp8,
    check_likeness,
    check_pictures,
    check_values,
    merge_settings,
    round_sizes,
)

FACE_DETECTORS = ("retinaface", "scrfd")
FACE_SELECTS = ("one", "upstream")


@dataclass(frozen=True)
class ConsisIDSettings(LikenessSettings):
    """Everything that decides what a run makes. Fields without a default come from the config or from the user."""

    # what
    prompt: tuple[str, ...]
    ip_image: tuple[str, ...]
    negative_prompt: str
    height: int
    width: int
    num_frames: int
    fps: float
    # how
    num_inference_steps: int
    guidance_scale: tuple[float, ...]
    # which weights
    config: str
    base_path: str | None = None
    face_encoder_path: str | None = None
    antelopv2_path: str | None = None
    face_parser_path: str | None = None

    seed: tuple[int, ...] = (0,)
    identity_strength: float = 1.0
    face_index: int | None = None
    face_detector: str = "retinaface"
    face_select: str = "one"
    # where and on what
    output: str | None = None  # None: outputs/output.mp4, or the next free number
    overwrite: bool = False
    quality: float = 9
    tiled: bool = False
    device: str = "auto"
    dtype: str = "auto"
    memory: str = "auto"
    fp8: bool = False

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


def resolve_consis_id(args: Namespace) -> tuple[ConsisIDSettings, dict]:
    """Settings and config.

    Raises:
        UsageError: a value out of its bounds, or a flag that ConsisID does not have.
        InputError: a photo that is not there.
    """
    settings, config = merge_settings(args, ConsisIDSettings)
    check_values(settings, BOUNDS, CHOICES | {"face_detector": FACE_DETECTORS, "face_select": FACE_SELECTS})
    check_likeness(settings)
    if len(settings.ip_image) != 1:
        raise UsageError(f"--ip_image: ConsisID takes the photo of one person, {len(settings.ip_image)} were given")
    if len(settings.guidance_scale) != 1:
        raise UsageError(f"--guidance_scale: {len(settings.guidance_scale)} values for one model; give one")
    if settings.face_select == "upstream" and (settings.face_index is not None or settings.face_detector == "scrfd"):
        raise UsageError(
            "--face_select upstream takes the largest face for one network and RetinaFace's most central for the "
            "other: leave out --face_index and --face_detector"
        )
    check_fp8(settings)
    check_pictures(ip_image=settings.ip_image)
    # A token covers 2 x 2 latent cells of 8 pixels. The VAE makes one frame of the first latent frame only where an odd
    # number of them comes in.
    return round_sizes(settings, multiple=16, frame_step=8), config
