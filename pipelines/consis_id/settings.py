"""The settings of a ConsisID run, checked without torch."""

from argparse import Namespace
from dataclasses import dataclass
from typing import ClassVar

from errors import UsageError
from pipelines.checks import check_fp8, check_likeness, check_pictures, round_sizes
from pipelines.command import merge_settings
from pipelines.flags import WEIGHTS, again, setting
from pipelines.settings import (
    Guidance,
    LikenessSettings,
    Machine,
    Photos,
    Prompts,
    StandIn,
    Steps,
    VideoFile,
    VideoSize,
    WanMachine,
    Weights,
)


@dataclass(frozen=True, kw_only=True)
class ConsisIDSettings(Prompts, Photos, VideoSize, Steps, Guidance, Weights, LikenessSettings, VideoFile, Machine):
    """Everything that decides what a run makes. Fields without a default come from the config or from the user."""

    method: ClassVar[str] = "consisid"
    script: ClassVar[str] = "infer.py"
    title: ClassVar[str] = "--method consisid"

    face_encoder_path: str | None = setting(
        "folder of RetinaFace and EVA-CLIP", None, metavar="FOLDER", path=WEIGHTS, shown="BASE_PATH/face_encoder"
    )
    face_parser_path: str | None = again(StandIn, "face_parser_path")
    identity_strength: float = again(StandIn, "identity_strength")
    face_detector: str = setting(
        "whose points align the face: retinaface, as trained", "retinaface", choices=("retinaface", "scrfd")
    )
    face_select: str = setting(
        "one: one face for all networks; upstream: the authors' two rules", "one", choices=("one", "upstream")
    )
    fp8: bool = again(WanMachine, "fp8", default=False, shown="off", left_open=True)


def resolve_consis_id(args: Namespace) -> tuple[ConsisIDSettings, dict]:
    """Settings and config.

    Raises:
        UsageError: a value out of its bounds, or a flag that ConsisID does not have.
        InputError: a photo that is not there.
    """
    settings, config = merge_settings(args, ConsisIDSettings)
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
