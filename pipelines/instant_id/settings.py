"""The settings of an InstantID run: checked without torch."""

import dataclasses
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from configs import load_config
from errors import UsageError
from pipelines.settings import (
    BOUNDS,
    CHOICES,
    LikenessSettings,
    check_likeness,
    check_pictures,
    check_values,
    merge_settings,
    round_sizes,
)

MULTIPLE = 64  # of the picture's sides, which IdentityNet and the region mask see at 1/8, 1/16 and 1/32
FACE_HEIGHT, FACE_CENTRE, FACE_ROLL = 0.35, (0.5, 0.38), 0.0  # a medium shot
OWN_BOUNDS = BOUNDS | {
    "height": (256, 2048),
    "width": (256, 2048),
    "ip_adapter_scale": (0, 2),
    "controlnet_conditioning_scale": (0, 2),
    "control_guidance_end": (0, 1),
    "control_scale": (0, 2),
    "face_height": (0.02, 1.5),
    "face_centre": (-0.5, 1.5),
    "face_roll": (-180, 180),
}


@dataclass(frozen=True, kw_only=True)
class InstantIdSettings(LikenessSettings):
    """Everything that decides which pictures a run makes. Fields without a default come from the config or the user."""

    prompt: tuple[str, ...]
    ip_image: tuple[str, ...]  # one photo
    negative_prompt: str
    num_inference_steps: int
    guidance_scale: tuple[float, ...]  # one value
    config: str
    sdxl_path: str | None = None  # a Diffusers folder or a single file
    instantid_path: str | None = None
    antelopv2_path: str | None = None
    height: int | None = None  # both None: the photo's own shape
    width: int | None = None
    seed: tuple[int, ...] = (0,)
    face_index: int | None = None
    ip_adapter_scale: float = 0.8
    controlnet_conditioning_scale: float = 0.8  # of IdentityNet
    control_guidance_end: float = 1.0  # of IdentityNet
    pose_image: str | None = None  # whose face says where the face goes; None: the photo's, or the three below
    face_height: float | None = None
    face_centre: tuple[float, ...] | None = None
    face_roll: float | None = None
    region_mask: bool = False
    controlnet: tuple[str, ...] = ()
    control_image: tuple[str, ...] = ()
    control_scale: tuple[float, ...] = (1.0,)
    lcm: bool = False
    lcm_lora_path: str | None = None
    prompt_weighting: bool = False
    output: str | None = None
    overwrite: bool = False
    tiled: bool = False
    device: str = "auto"
    dtype: str = "auto"
    memory: str = "auto"

    @property
    def framed(self) -> bool:
        """Whether the face is put where the settings say, instead of staying where it is in the photo."""
        chosen = (self.height, self.face_height, self.face_centre, self.face_roll)
        return self.pose_image is None and any(value is not None for value in chosen)

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


def resolve_instant_id(args: Namespace) -> tuple[InstantIdSettings, dict]:
    """The merged and checked settings, and their config.

    Raises:
        UsageError: values or combinations that make no sense.
        InputError: a picture that is not there.
    """
    brought = load_config("lcm-lora-sdxl")["defaults"] if args.lcm else None
    settings, config = merge_settings(args, InstantIdSettings, brought)
    return check_instant_id(settings), config


def check_instant_id(settings: InstantIdSettings) -> InstantIdSettings:
    """Bounds, choices and combinations; sizes rounded to what the model makes, with a message."""
    check_values(settings, OWN_BOUNDS, CHOICES)
    check_likeness(settings)
    if len(settings.ip_image) != 1:
        raise UsageError(f"--ip_image: InstantID takes one photo of one person, {len(settings.ip_image)} were given")
    if len(settings.guidance_scale) != 1:
        raise UsageError(f"--guidance_scale: {len(settings.guidance_scale)} values for one model; give one")
    if (settings.height is None) != (settings.width is None):
        raise UsageError("--height and --width: give both, or none to keep the photo's shape")
    if settings.face_centre is not None and len(settings.face_centre) != 2:
        raise UsageError(f"--face_centre: {len(settings.face_centre)} values; give two, across and down (0.5 0.38)")
    placement = (settings.face_height, settings.face_centre, settings.face_roll)
    if settings.pose_image is not None and any(value is not None for value in placement):
        raise UsageError(
            "--pose_image says where the face goes; leave out --face_height, --face_centre and --face_roll"
        )
    if len(settings.controlnet) != len(settings.control_image):
        raise UsageError(
            f"--control_image: {len(settings.control_image)} pictures for {len(settings.controlnet)} --controlnet; "
            "give one each"
        )
    if len(settings.control_scale) not in (1, len(settings.controlnet)):
        raise UsageError(
            f"--control_scale: {len(settings.control_scale)} values for {len(settings.controlnet)} --controlnet; "
            "give one, or one each"
        )
    if settings.lcm_lora_path is not None and not settings.lcm:
        raise UsageError("--lcm_lora_path: used only with --lcm")
    pose = (settings.pose_image,) if settings.pose_image is not None else ()
    check_pictures(ip_image=settings.ip_image, pose_image=pose, control_image=settings.control_image)
    if settings.height is None:
        return settings
    return round_sizes(settings, MULTIPLE, frame_step=None)


def instantid_folder(settings: InstantIdSettings, config: dict) -> Path:
    return Path(settings.instantid_path or Path("checkpoints") / config["dest"])


def sdxl_path(settings: InstantIdSettings, config: dict) -> Path:
    return Path(settings.sdxl_path or Path("checkpoints") / (config["base"] or config)["dest"])
