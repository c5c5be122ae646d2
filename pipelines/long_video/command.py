"""From a command to the settings of a long video: which variant, which model, whether all of it fits together."""

import dataclasses
import logging
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import numpy

from configs import load_config, part_path
from errors import UsageError
from pipelines.command import resolve_settings
from pipelines.earlier_run import is_record
from pipelines.flags import given_by, without_words, words_of
from pipelines.long_video.media import (
    count_clips,
    follow_control,
    follow_driver,
    follow_picture,
    next_seed,
    read_picture,
)
from pipelines.long_video.settings import DRIVERS, LongVideoCommand, LongVideoSettings
from pipelines.long_video.variant import (
    FILMS,
    TRAINED_FRAMES,
    VARIANTS,
    Variant,
    has_word,
    variant_config,
    variant_of_file,
)
from pipelines.lora_command import check_lora_settings, lora_defaults
from pipelines.lora_settings import EXPERTS
from pipelines.settings import is_tiny
from pipelines.text_to_video.command import check_first_frame
from pipelines.upstream import conditioning_as_trained, read_svi_command, variant_like
from preprocess.prompts import read_prompt_stream

logger = logging.getLogger("selfsame")

OF_POSE = ("pose_path", "pose_embedder_path")
OF_AUDIO = ("audio_path", "audio_guidance_scale", "multitalk_path", "audio_encoder_path")
# Defaults of a driven variant that the tiny model takes over too.
DRIVEN_DEFAULTS = ("prompt", "fps", "guidance_scale", "audio_guidance_scale")


def resolve_long_video(args: Namespace) -> tuple[LongVideoSettings, dict, numpy.ndarray | None]:
    """Settings, config, and the picture that the video starts from (H, W, 3) uint8; None: a first frame is to be made.

    Raises:
        UsageError: values or combinations that make no sense, a LoRA of another variant.
        InputError: a file that is missing or cannot be used.
        WeightsError: a LoRA that is not there.
    """
    given = read_svi_command(given_by(args))
    words = words_of(LongVideoCommand, given)
    resumed = is_record(given.get("config"))
    if not resumed:
        given = with_config(given)
    adapter_defaults = variant_defaults(given) | lora_defaults(given.get("lora_config"))
    if words.prompt_path is not None:
        if "prompt" in given:
            raise UsageError("--prompt and --prompt_path: give one of them")
        adapter_defaults["prompt"] = read_prompt_stream(words.prompt_path)
    settings, config = resolve_settings(without_words(LongVideoCommand, given), LongVideoSettings, adapter_defaults)
    if words.cfg_scale_audio is not None and settings.driven_by == "audio":
        settings = dataclasses.replace(settings, audio_guidance_scale=words.cfg_scale_audio)
    motion_frames = conditioning_as_trained(given, Variant.of(settings.variant), settings.num_motion_frames)
    settings = dataclasses.replace(settings, num_motion_frames=motion_frames)
    check_long_video(settings, config)
    settings = with_svi_loras(settings, config)
    check_lora_settings(settings, config, given)
    if settings.extend is not None and "fps" in given:
        raise UsageError("--fps with --extend: the video goes on at its own rate; leave it out")
    if settings.extend is not None and "seed" not in given and not resumed:
        settings = dataclasses.replace(settings, seed=(next_seed(settings),))
    picture = None if settings.first_frame else read_picture(settings, config)
    settings = follow_picture(settings, picture, None if resumed else (given.get("height"), given.get("width")))
    settings = follow_driver(settings, rate_is_given=resumed or "fps" in given)
    settings = follow_control(settings)
    settings = count_clips(settings, config)
    if settings.boundary is not None:
        config = config | {"boundary": settings.boundary}
    if settings.first_frame and settings.prompt_prefix and settings.first_frame_prompt is None:
        settings = dataclasses.replace(settings, first_frame_prompt=settings.clips(seed=0)[0].prompt)
    check_first_frame(settings)
    return settings, config, picture


def with_config(given: Mapping[str, object]) -> Mapping[str, object]:
    """What was typed, with the model and the variant, where the user named one of them or neither: the variant that
    SVI's file is for.

    Raises:
        UsageError: the two contradict each other.
    """
    name, variant = given.get("config"), given.get("variant")
    files = given.get("lora_path_high") or given.get("lora_path_low")
    if name is None or "extra_module_root" in given:
        files = files or given.get("lora_path")
    if variant is None and files and (name is None or "svi" not in load_config(name)):
        variant = variant_of_file(Path(files[0]).name) or variant_like(given)
    if name is None:
        real = {"base_path", "lora_path", "lora_path_high", "lora_path_low"} & given.keys()
        name = variant_config(variant or "shot")["name"] if variant or real else "tiny-i2v"
    config = load_config(name)
    if "svi" not in config:
        variant = variant or "shot"
    elif variant is None:
        variant = config["name"].removeprefix("svi-")
    elif variant_config(variant)["svi"] != config["svi"]:
        raise UsageError(f"--variant {variant} and --config {name} contradict each other; give one")
    return {**given, "config": name, "variant": variant}


def variant_defaults(given: Mapping[str, object]) -> dict[str, object]:
    """How the variant wants its model to be sampled; an earlier run's record has it all."""
    if is_record(given.get("config")):
        return {}
    variant, base, wanted = given["variant"], load_config(given["config"]), {}
    driven_by = Variant.of(variant).driven_by
    if "svi" not in base:
        of_tiny = DRIVEN_DEFAULTS if driven_by else ()
        defaults = variant_config(variant)["defaults"]
        wanted |= {name: value for name, value in defaults.items() if "tiny" not in base or name in of_tiny}
    if "audio_path" in given and driven_by == "pose":
        wanted |= {name: variant_config("talk")["defaults"][name] for name in ("fps", "audio_guidance_scale")}
    return wanted


def check_long_video(settings: LongVideoSettings, config: dict) -> None:
    variant, released = settings.svi, variant_config(settings.variant)
    if bool(config.get("experts")) != bool(released.get("experts")):
        raise UsageError(
            f"--config {config['name']} with --variant {variant.name}: that is for "
            f"{'two experts' if released.get('experts') else 'one model'}, as {released['base']['base']['name']}"
        )
    if settings.boundary is not None and not config.get("experts"):
        raise UsageError(f"--boundary: {config['name']} is one model; there are no experts to switch")
    if variant.motion_frames not in (accepted := (released["svi"].get("motion_frames", 0), *variant.motion_frames_too)):
        raise UsageError(
            f"--num_motion_frames {variant.motion_frames}: --variant {variant.name} was trained with "
            f"{' or '.join(map(str, accepted))}"
        )
    shared = variant.chain(TRAINED_FRAMES).overlap
    if settings.extend is not None and variant.drops == "earlier":  # the first clip gives up frames at both ends
        shared *= 2
    if settings.num_frames <= shared:
        least = shared // 4 * 4 + 5 if shared % 4 else shared + 1
        raise UsageError(
            f"--num_frames {settings.num_frames}: clips of {variant.name} share {shared} frames with their neighbours; "
            f"give at least {least}"
        )
    if settings.num_frames > TRAINED_FRAMES:
        logger.warning(
            "--num_frames %d: SVI was trained on %d; longer clips lose colour. For more video give more --num_clips",
            *(settings.num_frames, TRAINED_FRAMES),
        )
    if settings.vae_dtype in ("bf16", "fp16") and not variant.hands_latents:
        logger.warning("--vae_dtype %s: its errors add up from clip to clip; fp32 is the default", settings.vae_dtype)
    if settings.end_image is not None and not variant.end_image:
        raise UsageError(f"--end_image: {variant.name} was not made for one; use --variant 2.0")
    for name in ("ref_image_path", "extend", "max_width"):
        if settings.first_frame is not None and getattr(settings, name) is not None:
            raise UsageError(f"--{name} and --first_frame: the picture is made, at --height and --width; give one")
    if settings.first_frame is None and settings.face_index is not None:
        raise UsageError("--face_index: says whose face of --ip_image --first_frame shows; give that too")
    check_driver(settings, variant)
    check_control(settings, config)


def check_driver(settings: LongVideoSettings, variant: Variant) -> None:
    """What drives the clips is given, and nothing that drives others. A variant that speech or poses drive takes both:
    their layers were made for one model.
    """
    if variant.driven_by is not None and getattr(settings, DRIVERS[variant.driven_by]) is None:
        wanted = {"audio": "a sound file, or a video with sound", "pose": "a video of drawn poses"}[variant.driven_by]
        raise UsageError(f"--variant {variant.name} needs --{DRIVERS[variant.driven_by]}: {wanted}")
    for driver, names in (("audio", OF_AUDIO), ("pose", OF_POSE)):
        given = [name for name in names if getattr(settings, name) is not None]
        is_driven = variant.driven_by == driver or (variant.driven_by is not None and driver in settings.drivers)
        if given and not is_driven:
            example = {"audio": "talk", "pose": "dance"}[driver]
            raise UsageError(
                f"--{given[0]}: --variant {variant.name} is not driven by {driver}; use --variant {example}"
            )
    if "audio" in settings.drivers:
        trained = variant_config("talk")["defaults"]["fps"]
        if settings.fps != trained:
            raise UsageError(
                f"--fps {settings.fps:g} with --audio_path: the audio layers were trained at {trained}; leave it out"
            )
        if settings.extend is not None:
            raise UsageError("--extend with --audio_path: no sound can go on from a video's; leave it out")


def check_control(settings: LongVideoSettings, config: dict) -> None:
    """Whether the base has a branch that reads the control video."""
    if settings.reference_video is None:
        for name in ("vace_path", "vace_scale"):
            if getattr(settings, name) is not None:
                raise UsageError(f"--{name}: needs --reference_video, the control of the clips")
        return
    if config.get("experts"):
        raise UsageError(
            f"--reference_video: {config['name']} has two experts, and VACE was made for one model; use a variant of "
            "Wan2.1 (shot, film, 2.0-wan2.1, …)"
        )
    if settings.vace_path is None and not is_tiny(settings, config):
        raise UsageError(
            "--reference_video: VACE was released for text-to-video models, SVI runs on image-to-video; give a branch "
            "that was trained for it (--vace_path), or control a video without SVI: infer_with_vace.py"
        )


def with_svi_loras(settings: LongVideoSettings, config: dict) -> LongVideoSettings:
    """SVI's own LoRA is the first one of its flag, the released file if none is given; --lora_config may bring a
    distilled one to run beside it. The tiny model does without.

    Raises:
        UsageError: the file is named like another variant's, or another expert's.
    """
    released = variant_config(settings.variant)
    preset = load_config(settings.lora_config) if settings.lora_config else {}
    changes = {}
    for which in EXPERTS[1:] if config.get("experts") else ("",):
        paths, part = getattr(settings, f"lora_path{which}"), f"lora{which}"
        if not paths and not config.get("tiny"):
            paths = (str(part_path(released, part)),)
        if len(paths) == 1 and part in preset.get("files", {}):
            paths = (*paths, str(part_path(preset, part)))
        if paths:
            check_released_name(paths[0], settings.variant, which)
        changes[f"lora_path{which}"] = paths
    return dataclasses.replace(settings, **changes)


def check_released_name(path: str, variant: str, which: str) -> None:
    """Refuse a file whose name says that it is of another variant or expert: it would run, and lose the person."""
    name, flag = Path(path).name, f"--lora_path{which}"
    found = variant_of_file(name)
    if found is None:
        logger.info("%s %s: taken for SVI's own weights, as the first one is", flag, path)
    elif found != variant and variant in VARIANTS and not {found, variant} <= set(FILMS):
        found = "film" if found in FILMS else found
        raise UsageError(f"{flag} {path}: it is named like SVI's LoRA for --variant {found}, not for {variant}")
    other = {"_high": "low", "_low": "high"}.get(which)
    if other and has_word(name, other) and not has_word(name, which[1:]):
        raise UsageError(f"{flag} {path}: it is named like the LoRA of the {other}-noise expert")
