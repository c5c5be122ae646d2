"""From a command to the settings of a ConsisID run. Without torch."""

from argparse import Namespace

from errors import UsageError
from pipelines.checks import check_fp8, check_likeness, check_pictures, round_sizes
from pipelines.command import merge_settings
from pipelines.consis_id.settings import ConsisIDSettings


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
