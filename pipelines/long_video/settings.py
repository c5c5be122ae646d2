"""The settings of a long video: which of SVI's variants, its prompts, its picture and size. Checked without torch."""

import dataclasses
import functools
import logging
import math
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy

from configs import load_config, part_path
from errors import InputError, UsageError
from pipelines.clip_plan import (
    PROMPT_REPEATS,
    Chain,
    Clip,
    clips_for,
    overlap_of_latents,
    plan_clips,
    prompts_of_clips,
)
from pipelines.command import resolve_settings
from pipelines.earlier_run import is_record
from pipelines.flags import CONFIG, MEDIA, NOTHING, WEIGHTS, again, check_bounds, described, given_by, setting
from pipelines.lora_settings import EXPERTS, Loras, LoraSettings, brought_defaults, check_lora_settings
from pipelines.settings import PROJECT, Face, Guidance, Photos, Sampling, VideoSize
from pipelines.text_to_video.settings import FirstFrameSettings, check_first_frame
from pipelines.upstream import SviCommand, conditioning_as_trained, read_svi_command, variant_like
from pipelines.vace.settings import probe_argument
from preprocess.audio import AudioTimeline, read_audio
from preprocess.image import read_image
from preprocess.prompts import read_prompt_stream
from preprocess.record import read_metadata
from preprocess.video import stream_frames

logger = logging.getLogger("selfsame")

FILMS = ("film", "film-original", "film-transitions")  # three trainings of one variant
VARIANTS = ("shot", *FILMS, "tom", "talk", "dance", "2.0-wan2.1", "2.0", "2.0-pro")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
TRAINED_FRAMES = 81  # of a clip
GRID = 16  # pixels of a token's side
MOST_CLIPS = 10_000
DRIVERS = {"audio": "audio_path", "pose": "pose_path"}  # what drives a variant, and its flag
OF_POSE = ("pose_path", "pose_embedder_path")
OF_AUDIO = ("audio_path", "audio_guidance_scale", "multitalk_path", "audio_encoder_path")
# Defaults of a driven variant that the tiny model takes over too.
DRIVEN_DEFAULTS = ("prompt", "fps", "guidance_scale", "audio_guidance_scale")


@dataclass(frozen=True)
class Variant:
    """What one of SVI's LoRAs was trained with: the `svi` of its config.

    padding: what the VAE sees after the handed-over frames: "reference", "grey"; or "latents" instead of frames.
    mask: what is marked as given, the "first_frame" or all "motion_frames".
    drops: which clip gives up the frames that two show, see `Chain`.
    driven_by: "audio" or "pose", beside the prompts.
    motion_frames_too: other numbers of handed-over frames that the LoRA works with.
    flash_attention: its authors ask for it.
    """

    name: str
    padding: str
    mask: str
    drops: str
    motion_frames: int = 0
    motion_latents: int = 0
    end_image: bool = False
    driven_by: str | None = None
    motion_frames_too: tuple[int, ...] = ()
    flash_attention: bool = False

    @classmethod
    @functools.cache
    def of(cls, name: str) -> "Variant":
        """Raises UsageError: no such variant, or a config that is not one of SVI's."""
        config = variant_config(name)
        return cls(name=name, **config["svi"])

    @property
    def hands_latents(self) -> bool:
        return self.padding == "latents"

    def chain(self, frames: int) -> Chain:
        overlap = overlap_of_latents(self.motion_latents) if self.hands_latents else self.motion_frames
        return Chain(frames, self.motion_frames, overlap, self.drops, self.motion_latents)


def variant_config(name: str) -> dict:
    """The config of a variant's LoRA, by its name or as a YAML file of one's own."""
    if not name.endswith((".yaml", ".yml")) and name not in VARIANTS:
        raise UsageError(f"--variant {name}: accepted are {', '.join(VARIANTS)}, or a .yaml like configs/svi-shot.yaml")
    config = load_config(name if name not in VARIANTS else f"svi-{name}")
    if "svi" not in config:
        raise UsageError(f"--variant {name}: has no `svi`, which says how its clips are conditioned")
    return config


@dataclass(frozen=True, kw_only=True)
class LongVideoSettings(FirstFrameSettings, LoraSettings):
    """`num_frames` is the length of one clip; the video's follows from the clips."""

    families: ClassVar[tuple[str, ...]] = ("i2v",)
    prompts_are_clips: ClassVar[bool] = True  # of one video
    of_later_clips: ClassVar[tuple[str, ...]] = (  # what may change while the clips that are finished still count
        *("prompt", "prompt_prefix", "prompt_repeat", "prompt_repeat_times", "use_first_prompt_only"),
        *("video_frames", "num_clips"),
    )

    script: ClassVar[str] = "infer_long_video.py"
    title: ClassVar[str] = "long video"

    variant: str = setting("one of the above, or a .yaml like configs/svi-*.yaml", "shot", metavar="NAME", path=CONFIG)
    ref_image_path: str | None = setting(
        "first frame and anchor; of a video its first frame",
        None,
        names=("--image_path",),
        metavar="PICTURE",
        path=MEDIA,
        shown="a --first_frame, that of --extend, or of the tiny model the photo in assets/",
    )
    num_clips: int | None = setting(
        "how many",
        None,
        low=1,
        high=MOST_CLIPS,
        shown="one a prompt, 10 for one; as long as sound or poses last",
    )
    prompt_repeat: str = setting("when the prompts do not last", "last", choices=PROMPT_REPEATS)
    prompt_repeat_times: int = setting("clips for each prompt", 1, low=1, high=MOST_CLIPS)
    use_first_prompt_only: bool = setting("for all clips", False)
    prompt_prefix: str | None = setting("put in front of every prompt", None, metavar="TEXT", text=True)
    seed_multiplier: int = setting(
        "clip k is made from --seed + k times this", 42, low=1, high=2**31, names=("--seed_times",)
    )
    num_motion_frames: int | None = setting(
        "handed to the next clip", None, low=0, high=TRAINED_FRAMES, shown="the variant's: 1; film, 2.0-wan2.1: 5"
    )
    max_width: int | None = setting(
        "the picture's own size, at most so wide, as SVI 1 has it",
        None,
        low=GRID,
        high=16384,
        shown="the area of --height and --width",
    )
    boundary: float | None = setting(
        "of Wan2.2's experts: low-noise below it", None, low=0, high=1, shown="the config's"
    )
    first_clip_without_lora: bool = setting("make clip 0 by the base, which moves more", False)
    extend: str | None = setting("go on from this video; its frames and sound stay", None, metavar="VIDEO", path=MEDIA)
    end_image: str | None = setting("the last clip ends on it (--variant 2.0)", None, metavar="PICTURE", path=MEDIA)
    no_drift_report: bool = setting("do not measure the clips at the end", False, decides=NOTHING)
    audio_path: str | None = setting("talk: the speech, of an audio or video file", None, metavar="SOUND", path=MEDIA)
    audio_encoder_path: str | None = setting(
        "talk: folder of chinese-wav2vec2-base", None, metavar="FOLDER", path=WEIGHTS, shown="the variant's"
    )
    multitalk_path: str | None = setting(
        "talk: MultiTalk's audio layers, multitalk.safetensors",
        None,
        metavar="FILE",
        path=WEIGHTS,
        shown="the variant's",
    )
    audio_guidance_scale: float | None = setting(
        "talk: how closely it follows the speech", None, low=0, high=100, shown="the variant's: 5"
    )
    pose_path: str | None = setting(
        "dance: poses, drawn by python -m preprocess.control pose", None, metavar="VIDEO", path=MEDIA
    )
    pose_embedder_path: str | None = setting(
        "its poses beside speech: svi-dance.safetensors",
        None,
        metavar="FILE",
        path=WEIGHTS,
        shown="in the LoRA's file, or the released one",
    )
    remove_pose: bool = setting("dance: poses say how long it is, and lead nothing", False)
    video_frames: int | None = setting(
        "where the video ends",
        None,
        low=1,
        high=4093 * MOST_CLIPS,
        is_flag=False,
    )
    num_frames: int = again(VideoSize, "num_frames", help="of a clip, 4n+1", names=("--frames_per_clip",))
    num_inference_steps: int = again(Sampling, "num_inference_steps", names=("--num_steps",))
    guidance_scale: tuple[float, ...] = again(Guidance, "guidance_scale", names=("--cfg_scale", "--cfg_scale_text"))
    lora_scale: tuple[float, ...] = again(Loras, "lora_scale", names=("--lora_alpha",))
    ip_image: tuple[str, ...] = again(Photos, "ip_image", default=(), help="of the person (path or URL)")
    face_index: int | None = again(Face, "face_index", help="which face of --ip_image, from the left")

    @property
    def real_model(self) -> str:
        released = variant_config(self.variant)
        names = f"{released['base']['base']['name']} {released['name']}"
        return f"python download_models.py --only {names}, then add --variant {self.variant}"

    @property
    def clip_rules(self) -> dict:
        """What the variant's config says of its clips, for the record."""
        return variant_config(self.variant)["svi"]

    @property
    def svi(self) -> Variant:
        """The variant, with the handed-over frames that were asked for."""
        variant = Variant.of(self.variant)
        frames = variant.motion_frames if self.num_motion_frames is None else self.num_motion_frames
        return dataclasses.replace(variant, motion_frames=frames)

    @property
    def lora_releases(self) -> tuple[str, ...]:
        return (variant_config(self.variant)["name"], *super().lora_releases)

    @property
    def wants_flash(self) -> bool:
        return self.svi.flash_attention

    @property
    def driven_by(self) -> str | None:
        """What the variant's LoRA was trained with beside prompts."""
        return self.svi.driven_by

    @property
    def drivers(self) -> tuple[str, ...]:
        """What drives the clips beside prompts: nothing, the sound, the poses, or both."""
        return tuple(driver for driver, name in DRIVERS.items() if getattr(self, name) is not None)

    def without_svi(self) -> "LongVideoSettings":
        """Without SVI's own LoRA, the first one of its flag (`with_svi_loras`)."""
        changes = {}
        for which in EXPERTS[1:] if self.lora_path_high or self.lora_path_low else ("",):
            paths, scales = getattr(self, f"lora_path{which}"), getattr(self, f"lora_scale{which}")
            changes |= {f"lora_path{which}": paths[1:], f"lora_scale{which}": scales[1:] or scales}
        return dataclasses.replace(self, **changes)

    def clips(self, seed: int) -> list[Clip]:
        """The plan of the video."""
        prompts = prompts_of_clips(
            self.prompt,
            self.num_clips,
            times=self.prompt_repeat_times,
            first_only=self.use_first_prompt_only,
            prefix=self.prompt_prefix,
            repeat=self.prompt_repeat,
        )
        return plan_clips(
            self.svi.chain(self.num_frames),
            prompts,
            seed=seed,
            seed_multiplier=self.seed_multiplier,
            num_frames=self.video_frames,
            extends=self.extend is not None,
        )


@dataclass(frozen=True, kw_only=True)
class LongVideoCommand(SviCommand):
    """What a command says that is no setting."""

    script: ClassVar[str] = "infer_long_video.py"
    title: ClassVar[str] = "long video"

    prompt_path: str | None = setting('prompts one a line, or prompts = ["…", "…"]', None, metavar="FILE")
    data_root: str | None = setting("a video of each folder in it: its picture, its prompt.txt", None, metavar="FOLDER")
    output_root: str | None = setting("write there, under the picture's name", None, metavar="FOLDER")


def resolve_long_video(args: Namespace) -> tuple[LongVideoSettings, dict, numpy.ndarray | None]:
    """Settings, config, and the picture that the video starts from (H, W, 3) uint8; None: a first frame is to be made.

    Raises:
        UsageError: values or combinations that make no sense, a LoRA of another variant.
        InputError: a file that is missing or cannot be used.
        WeightsError: a LoRA that is not there.
    """
    given = read_svi_command(given_by(args))
    resumed = is_record(given.get("config"))
    if not resumed:
        given = with_config(given)
    brought = brought_by(given) | brought_defaults(given.get("lora_config"))
    if "prompt_path" in given:
        if "prompt" in given:
            raise UsageError("--prompt and --prompt_path: give one of them")
        brought["prompt"] = read_prompt_stream(given["prompt_path"])
    own = {name: value for name, value in given.items() if name not in described(LongVideoCommand)}
    settings, config = resolve_settings(own, LongVideoSettings, brought)
    if "cfg_scale_audio" in given and settings.driven_by == "audio":
        settings = dataclasses.replace(settings, audio_guidance_scale=given["cfg_scale_audio"])
        check_bounds(settings)
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


def brought_by(given: Mapping[str, object]) -> dict[str, object]:
    """How the variant wants its model to be sampled; an earlier run's record has it all."""
    if is_record(given.get("config")):
        return {}
    variant, base, brought = given["variant"], load_config(given["config"]), {}
    driven_by = Variant.of(variant).driven_by
    if "svi" not in base:
        of_tiny = DRIVEN_DEFAULTS if driven_by else ()
        defaults = variant_config(variant)["defaults"]
        brought |= {name: value for name, value in defaults.items() if "tiny" not in base or name in of_tiny}
    if "audio_path" in given and driven_by == "pose":
        brought |= {name: variant_config("talk")["defaults"][name] for name in ("fps", "audio_guidance_scale")}
    return brought


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


# -------------------------------------------------------------------------------------------------------------- LoRAs


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


def variant_of_file(name: str) -> str | None:
    """The variant that a file of SVI's releases, or of their conversions, is for; None where the name does not tell."""
    if not has_word(name, "svi"):
        return None
    if has_word(name, "film"):
        return "film-transitions" if has_word(name, "transitions") else "film" if has_word(name, "opt") else FILMS[1]
    for variant in ("shot", "tom", "talk", "dance"):
        if has_word(name, variant):
            return variant
    if not re.search(r"(?<![a-z])v?2\.0|(?<![a-z])v2(?!\d)", name, re.IGNORECASE):
        return None
    if has_word(name, "pro"):
        return "2.0-pro"
    return "2.0-wan2.1" if re.search(r"wan_?2[._]?1", name, re.IGNORECASE) else "2.0"


def has_word(name: str, word: str) -> bool:
    return re.search(rf"(?<![a-z]){word}(?![a-z])", name, re.IGNORECASE) is not None


# ---------------------------------------------------------------------------------------------------- picture and size


def read_picture(settings: LongVideoSettings, config: dict) -> numpy.ndarray:
    """(H, W, 3) uint8: the picture given, or the first frame of a video; else that of the video to extend."""
    if settings.ref_image_path is not None and Path(settings.ref_image_path).suffix.lower() in VIDEOS:
        probe_argument("--ref_image_path", settings.ref_image_path)
        return next(stream_frames(settings.ref_image_path))
    if settings.ref_image_path is not None:
        return read_image(settings.ref_image_path, "--ref_image_path")
    if settings.extend is not None:
        probe_argument("--extend", settings.extend)
        return next(stream_frames(settings.extend))
    if config.get("tiny"):
        return read_image(PROJECT / "assets" / "face.png")
    raise UsageError(
        "--ref_image_path: give the picture that the video starts from (a photo, or a frame of infer.py's video)"
    )


def follow_picture(
    settings: LongVideoSettings, picture: numpy.ndarray | None, given: tuple[int | None, int | None] | None
) -> LongVideoSettings:
    """Height and width: as given; of the video that is extended; else the picture's shape on the area that the
    variant was trained on, or just the size of that training, if the picture is yet to be made. An earlier run's record
    (`given` is None) holds them.
    """
    if settings.extend is not None:
        return follow_video(settings, given)
    if given is None or all(given):
        return settings
    if any(given):
        raise UsageError("--height and --width: give both, or neither to follow the picture's shape")
    if picture is None:
        return settings
    height, width = picture.shape[:2]
    if settings.max_width is not None:
        size = limit_width(width, height, settings.max_width)
        if not all(size):
            raise InputError(f"the picture of {width}x{height} is smaller than {GRID}x{GRID} under --max_width")
    else:
        size = size_on_area(height, width, settings.height * settings.width)
    if size[0] > size[1]:
        logger.info("the video is upright, %dx%d; SVI was trained on 832x480, other shapes move less", *size[::-1])
    return dataclasses.replace(settings, height=size[0], width=size[1])


def follow_video(settings: LongVideoSettings, given: tuple[int | None, int | None] | None) -> LongVideoSettings:
    info = probe_argument("--extend", settings.extend)
    if given is not None and any(given):
        raise UsageError("--height and --width with --extend: the video goes on at its own size; leave them out")
    if info.height % GRID or info.width % GRID:
        raise InputError(
            f"--extend {settings.extend}: {info.width}x{info.height}; sides of {GRID}n are needed: scale or crop it"
        )
    least = max(2, settings.svi.chain(settings.num_frames).overlap)
    if info.num_frames < least:
        raise InputError(
            f"--extend {settings.extend}: {info.num_frames} frames, at least {least} are needed; give a picture to "
            "--ref_image_path"
        )
    return dataclasses.replace(settings, height=info.height, width=info.width, fps=info.fps)


def next_seed(settings: LongVideoSettings) -> int:
    """A seed that the clips of the video to extend have not had: the same noise again would add its marks up."""
    try:
        clips = read_metadata(settings.extend)["clips"]
        return clips[-1]["seed"] + settings.seed_multiplier
    except (InputError, LookupError, TypeError):  # no record, or another kind of video
        return settings.seed[0]


def size_on_area(height: int, width: int, area: int) -> tuple[int, int]:
    """(height, width) on the grid, nearly of this area, with the shape of a picture."""
    rows = max(1, round(math.sqrt(area * height / width) / GRID))
    return rows * GRID, max(1, area // (rows * GRID**2)) * GRID


def limit_width(width: int, height: int, max_width: int) -> tuple[int, int]:
    """(height, width) by SVI 1's rule (`calculate_dimensions`): the picture's own, at most so wide, on the grid.

    It leaves tall pictures as tall as they are: few frames then move, and each takes long.
    """
    if width > max_width:
        width, height = max_width, int(max_width * (height / width))
    return height // GRID * GRID, width // GRID * GRID


def follow_driver(settings: LongVideoSettings, rate_is_given: bool) -> LongVideoSettings:
    """As many clips as the sound, or without one the poses last, and no frame more; of poses alone also the frame rate,
    where none is given. Poses that end before the video start over.
    """
    if not settings.drivers:
        return settings
    if "audio" in settings.drivers:
        read_speech.cache_clear()  # of a run before, in a notebook
        length = AudioTimeline(len(read_speech(settings.audio_path)), settings.fps).num_frames
        if "pose" in settings.drivers:
            poses = probe_argument("--pose_path", settings.pose_path)
            logger.info("--pose_path: a pose a frame, %d for %d frames of sound", poses.num_frames, length)
    else:
        poses = probe_argument("--pose_path", settings.pose_path)
        length = poses.num_frames
        if not rate_is_given and settings.extend is None:
            settings = dataclasses.replace(settings, fps=poses.fps)
    needed = clips_for(length, settings.svi.chain(settings.num_frames))
    num_clips = settings.num_clips or needed
    if num_clips > needed and "audio" in settings.drivers:
        logger.warning("--num_clips %d: the sound lasts for %d, which are made", num_clips, needed)
        num_clips = needed
    elif num_clips > needed:
        logger.warning("--num_clips %d: the poses last for %d; then they start over", num_clips, needed)
    video_frames = length if num_clips <= needed else None
    return dataclasses.replace(settings, num_clips=num_clips, video_frames=video_frames)


@functools.lru_cache(maxsize=1)
def read_speech(path: str) -> numpy.ndarray:
    """The speech (N,) at 16 kHz. Kept, for the length of the video and then for what it says, until `cache_clear`."""
    return read_audio(path, argument="--audio_path")


def count_clips(settings: LongVideoSettings, config: dict) -> LongVideoSettings:
    """How many clips, where the user did not say; and what happens when the prompts do not last."""
    prompts = len(settings.prompt) * settings.prompt_repeat_times
    if settings.num_clips is None:
        is_stream = prompts > 1 and not settings.use_first_prompt_only
        settings = dataclasses.replace(settings, num_clips=prompts if is_stream else 3 if config.get("tiny") else 10)
    elif not settings.use_first_prompt_only and prompts < settings.num_clips and len(settings.prompt) > 1:
        then = {
            "last": "the last one goes on",
            "cycle": "they start over",
            "stop": f"the video ends after {prompts}",
        }[settings.prompt_repeat]
        logger.warning(
            "%d clips for %d prompts: %s (--prompt_repeat %s; others: %s)",
            *(settings.num_clips, len(settings.prompt), then, settings.prompt_repeat),
            ", ".join(repeat for repeat in PROMPT_REPEATS if repeat != settings.prompt_repeat),
        )
    return settings
