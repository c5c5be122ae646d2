"""The settings of an InstantID run."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipelines.flags import MEDIA, WEIGHTS, again, setting
from pipelines.settings import Guidance, LikenessSettings, Machine, Output, Photos, Prompts, Steps, VideoSize, Weights

MULTIPLE = 64  # sides are multiples of it: IdentityNet and the region mask see them at 1/8, 1/16 and 1/32
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


def instantid_folder(settings: InstantIdSettings, config: dict) -> Path:
    return Path(settings.instantid_path or Path("checkpoints") / config["dest"])


def sdxl_path(settings: InstantIdSettings, config: dict) -> Path:
    return Path(settings.sdxl_path or Path("checkpoints") / (config["base"] or config)["dest"])
