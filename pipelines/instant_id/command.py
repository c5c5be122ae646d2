"""From a command to the settings of an InstantID run. Without torch."""

from argparse import Namespace

from configs import load_config
from errors import UsageError
from pipelines.checks import check_likeness, check_pictures, round_sizes
from pipelines.command import merge_settings
from pipelines.flags import given_by
from pipelines.instant_id.settings import MULTIPLE, InstantIdSettings


def resolve_instant_id(args: Namespace) -> tuple[InstantIdSettings, dict]:
    """The merged and checked settings, and their config.

    Raises:
        UsageError: values or combinations that make no sense.
        InputError: a picture that is not there.
    """
    given = given_by(args)
    adapter_defaults = load_config("lcm-lora-sdxl")["defaults"] if "lcm" in given else None
    settings, config = merge_settings(given, InstantIdSettings, adapter_defaults)
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
