"""From a command to the settings of a video that starts from text or from a picture. Without torch."""

import dataclasses
import math
from argparse import Namespace
from collections.abc import Mapping

from configs import load_config
from errors import UsageError
from pipelines.checks import check_pictures
from pipelines.command import resolve_settings
from pipelines.flags import described, given_by, without_words
from pipelines.instant_id.command import check_instant_id
from pipelines.instant_id.settings import MULTIPLE, InstantIdSettings
from pipelines.lora_command import resolve_lora_settings
from pipelines.networks import family_of
from pipelines.settings import WanVersion
from pipelines.text_to_video.settings import FirstFrameSettings, ImageToVideoSettings, PictureLoraSettings

PICTURE_AREA = 1024 * 1024  # SDXL makes pictures of this area best
PICTURE_AREAS = (0.8 * 2**20, 1.1 * 2**20)  # what is near enough to it
# --wan_version -> what --image and --first_frame take by themselves
PICTURE_CONFIGS = {None: "tiny-i2v", "2.1": "wan2.1-i2v-14B-480P", "2.2": "wan2.2-i2v-A14B"}


def check_first_frame(settings: FirstFrameSettings) -> None:
    """Whether the first frame that is asked for can be made.

    Raises:
        UsageError: a first frame without a photo, or flags that only a first frame uses.
        InputError: a photo that is not there.
    """
    if settings.first_frame is None:
        for name, (field, _) in described(FirstFrameSettings).items():
            if getattr(settings, name) != field.default:
                raise UsageError(f"--{name}: used only with --first_frame instantid (or --method instantid)")
        return
    picture_settings(settings)


def picture_settings(settings: FirstFrameSettings) -> InstantIdSettings:
    """The InstantID run that makes the first frame.

    Raises:
        UsageError, InputError: `check_instant_id`.
    """
    height, width = picture_size(settings.height, settings.width)
    shared = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(InstantIdSettings)
        if hasattr(settings, field.name)
    }
    values = shared | {
        "prompt": (settings.first_frame_prompt or settings.prompt[0],),
        "seed": (settings.first_frame_seed,),
        "config": settings.first_frame,
        "height": height,
        "width": width,
        "output": None,
        "overwrite": True,
    }
    defaults = load_config(settings.first_frame)["defaults"]  # the video's own are another model's
    values |= defaults | {"guidance_scale": (defaults["guidance_scale"],)}
    return check_instant_id(InstantIdSettings(**values))


def picture_size(height: int, width: int) -> tuple[int, int]:
    """Height and width for SDXL with nearly the video's aspect: about a megapixel, multiples of 64."""

    def misfit(size: tuple[int, int]) -> tuple[float, int]:
        aspect = math.log(size[0] / size[1]) - math.log(height / width)
        return round(abs(aspect), 6), abs(size[0] * size[1] - PICTURE_AREA)

    sides = range(512, 2049, MULTIPLE)
    sizes = [(h, w) for h in sides for w in sides if PICTURE_AREAS[0] <= h * w <= PICTURE_AREAS[1]]
    return min(sizes, key=misfit)


def resolve_image_to_video(args: Namespace) -> tuple[ImageToVideoSettings, dict]:
    """`resolve_settings`, for models that start from text, from a picture, or from either.

    Raises:
        UsageError: also for pictures the model does not take, or lacks.
        InputError: a picture that is not there.
    """
    settings, config = resolve_settings(with_picture_config(given_by(args)), ImageToVideoSettings)
    check_start(settings, config)
    return settings, config


def resolve_picture_loras(args: Namespace) -> tuple[PictureLoraSettings, dict]:
    """The same with LoRAs. Raises: also as `resolve_lora_settings`."""
    settings, config = resolve_lora_settings(with_picture_config(given_by(args)), PictureLoraSettings)
    check_start(settings, config)
    return settings, config


def check_start(settings: ImageToVideoSettings, config: dict) -> None:
    """Whether the model starts from what it is given.

    Raises:
        UsageError, InputError: as `resolve_image_to_video`.
    """
    check_first_frame(settings)
    if settings.first_frame is not None and len(settings.prompt) > 1 and settings.first_frame_prompt is None:
        raise UsageError("--first_frame with several prompts: give --first_frame_prompt, the scene that they share")
    pictures = {name: getattr(settings, name) for name in ("image", "last_image")}
    check_pictures(**{name: (path,) for name, path in pictures.items() if path is not None})
    family, name = family_of(config), config["name"]
    if settings.image and settings.first_frame:
        raise UsageError("--image and --first_frame: one picture to start from is enough; give one of them")
    start = "--image" if settings.image else "--first_frame" if settings.first_frame else None
    if family == "t2v" and (start or settings.last_image):
        raise UsageError(
            f"{start or '--last_image'}: {name} starts from text; for a picture use --config wan2.1-i2v-14B-480P, "
            "wan2.2-i2v-A14B, wan2.2-ti2v-5B or wan2.1-fun-1.3B-inp"
        )
    if family not in ("t2v", "ti2v") and start is None:
        raise UsageError(
            f"--config {name}: starts from a picture; give --image, or --first_frame instantid with --ip_image"
        )
    if family == "flf2v" and settings.last_image is None:
        raise UsageError(f"--config {name}: runs from one picture to another; give --last_image too")
    if family != "flf2v" and settings.last_image is not None:
        raise UsageError(f"--last_image: {name} takes none; use --config wan2.1-flf2v-14B-720P")


def with_picture_config(given: Mapping[str, object]) -> Mapping[str, object]:
    """What was typed, with the config that a picture to start from takes by itself."""
    if "config" in given or not {"image", "last_image", "first_frame"} & given.keys():
        return given
    version = given.get("wan_version", "2.1" if "base_path" in given else None)
    if version not in PICTURE_CONFIGS:
        return given
    return without_words(WanVersion, given) | {"config": PICTURE_CONFIGS[version]}
