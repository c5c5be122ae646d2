"""The settings of an InstantID run: checked without torch."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from configs import load_config
from errors import UsageError
from pipelines.checks import check_likeness, check_pictures, round_sizes
from pipelines.command import merge_settings
from pipelines.flags import MEDIA, WEIGHTS, again, given_by, setting
from pipelines.settings import Guidance, LikenessSettings, Machine, Output, Photos, Prompts, Steps, VideoSize, Weights

MULTIPLE = 64  # of the picture's sides, which IdentityNet and the region mask see at 1/8, 1/16 and 1/32
FACE_HEIGHT, FACE_CENTRE, FACE_ROLL = 0.35, (0.5, 0.38), 0.0  # a medium shot


@dataclass(frozen=True, kw_only=True)
class InstantId:
    """How InstantID puts a face into a picture."""

    title: ClassVar[str] = "InstantID (pictures, and first frames of videos)"

    sdxl_path: str | None = setting(
        "any SDXL model: Diffusers folder or single file",
        None,
        metavar="PATH",
        path=WEIGHTS,
        shown="checkpoints/ of sdxl-base-1.0",
    )
    instantid_path: str | None = setting(
        "folder with ControlNetModel/ and ip-adapter.bin",
        None,
        metavar="FOLDER",
        path=WEIGHTS,
        shown="checkpoints/ of instantid",
    )
    ip_adapter_scale: float = setting("of the face tokens; lower if over-saturated", 0.8, low=0, high=2)
    controlnet_conditioning_scale: float = setting("of IdentityNet; with the other, more likeness", 0.8, low=0, high=2)
    control_guidance_end: float = setting("share of the steps with IdentityNet", 1.0, low=0, high=1)
    pose_image: str | None = setting(
        "put the face where the one in this picture is",
        None,
        metavar="FILE",
        path=MEDIA,
        shown="where it is in the photo, or as the three below say",
    )
    face_height: float | None = setting(
        "of the face, as a share of the picture's height", None, low=0.02, high=1.5, shown=f"{FACE_HEIGHT:g}"
    )
    face_centre: tuple[float, float] | None = setting(
        "of the face, as shares",
        None,
        low=-0.5,
        high=1.5,
        metavar=("X", "Y"),
        shown=" ".join(f"{share:g}" for share in FACE_CENTRE),
    )
    face_roll: float | None = setting(
        "tilt of the head in degrees, clockwise", None, low=-180, high=180, shown=f"{FACE_ROLL:g}"
    )
    region_mask: bool = setting("act on the face only: for prompts with a scene", False)


@dataclass(frozen=True, kw_only=True)
class InstantIdSettings(InstantId, Prompts, Photos, Steps, Guidance, LikenessSettings, Output, Machine):
    """Everything that decides which pictures a run makes. Fields without a default come from the config or the user."""

    method: ClassVar[str] = "instantid"
    script: ClassVar[str] = "infer.py"
    title: ClassVar[str] = "--method instantid"

    config: str = again(Weights, "config", shown="instantid")
    height: int | None = again(VideoSize, "height", default=None, low=256, high=2048, shown="the photo's shape")
    width: int | None = again(VideoSize, "width", default=None, low=256, high=2048, shown="the photo's shape")
    controlnet: tuple[str, ...] = setting("further ControlNets", (), metavar="FOLDER", path=WEIGHTS)
    control_image: tuple[str, ...] = setting("their pictures", (), metavar="FILE", path=MEDIA)
    control_scale: tuple[float, ...] = setting("one for all, or each", (1.0,), low=0, high=2)
    lcm: bool = setting("few steps, by a LoRA: 5, guidance 1.5", False)
    lcm_lora_path: str | None = setting(
        "LCM's LoRA", None, metavar="FILE", path=WEIGHTS, shown="checkpoints/ of lcm-lora-sdxl"
    )
    prompt_weighting: bool = setting("understand (word), [word] and (word:1.4)", False)

    @property
    def framed(self) -> bool:
        """Whether the face is put where the settings say, instead of staying where it is in the photo."""
        chosen = (self.height, self.face_height, self.face_centre, self.face_roll)
        return self.pose_image is None and any(value is not None for value in chosen)


def resolve_instant_id(args: Namespace) -> tuple[InstantIdSettings, dict]:
    """The merged and checked settings, and their config.

    Raises:
        UsageError: values or combinations that make no sense.
        InputError: a picture that is not there.
    """
    given = given_by(args)
    brought = load_config("lcm-lora-sdxl")["defaults"] if "lcm" in given else None
    settings, config = merge_settings(given, InstantIdSettings, brought)
    return check_instant_id(settings), config


def check_instant_id(settings: InstantIdSettings) -> InstantIdSettings:
    """Combinations; sizes rounded to what the model makes, with a message."""
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
