"""The settings of a run: flags over an earlier run's JSON over the config over general defaults, checked before torch.

Every value has one home: what depends on the model is in configs/, the rest is a default of `Settings`.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from configs import load_config
from configs.values import describe, is_possible_text, nearest, short, typed
from errors import InputError, UsageError, UserError, WeightsError
from models.wan.config import WanConfig
from models.wan.tea_cache import COEFFICIENTS, coefficients_of
from pipelines.flags import check_bounds, setting
from pipelines.networks import check_networks, shape_of
from pipelines.record import OF_ONE_RUN
from pipelines.weights import find_gguf
from preprocess.prompts import check_prompt, read_prompts
from preprocess.record import LARGEST_RECORD

logger = logging.getLogger("selfsame")

CHOICES = {
    "solver": ("euler", "euler-flow", "unipc", "dpm++"),
    "dtype": ("auto", "bf16", "fp16", "fp32"),
    "vae_dtype": ("auto", "bf16", "fp16", "fp32"),
    "noise_device": ("cpu", "cuda"),
    "memory": ("auto", "resident", "model", "group", "sequential"),
    "step_cache": ("none", "teacache", "first_block"),
}
WAN_VERSIONS = ("2.1", "2.2")
# The identity methods of infer.py -> the config each takes by itself; Stand-In's depends on other flags. A config names
# its method (`method:`), so that a config, or the JSON of an earlier run, is enough.
METHODS = {"standin": None, "instantid": "instantid", "consisid": "consisid"}
# name -> smallest and largest accepted value. Positions of the released models end at 1024 tokens per axis.
BOUNDS = {
    "height": (16, 16384),
    "width": (16, 16384),
    "num_frames": (1, 4093),
    "num_inference_steps": (1, 1000),
    "fps": (1, 240),
    "quality": (1, 10),
    "shift": (0.01, 100),
    "guidance_scale": (0, 100),
    "seed": (0, 2**63 - 1),
    "first_frame_seed": (0, 2**63 - 1),
    "face_index": (0, 10_000),
    "step_cache_threshold": (0, 10),
    "identity_strength": (0, 10),
    "identity_start": (0, 1),
    "identity_end": (0, 1),
    "ulysses_degree": (1, 1024),
    "ring_degree": (1, 1024),
    "timesteps": (1, 1000),
}
Kind = TypeVar("Kind")  # a dataclass of settings
PROJECT = Path(__file__).parent.parent
RECORDS = (".json", ".mp4", ".png")  # where an earlier run's record is: beside what it made, and in it
# A setting that a script alone has -> the script: whose record it is.
WHOSE = {
    "num_clips": "infer_long_video.py",
    "sample_audio_guide_scale": "infer_audio_avatar.py",
    "denoising_strength": "infer_face_swap.py",
    "vace_scale": "infer_with_vace.py",
    "lora_scale": "infer_with_lora.py",  # after the long video and the avatar, which take LoRAs too
    **dict.fromkeys(("image", "first_frame", "ip_adapter_scale", "face_encoder_path"), "infer.py"),
}
# What makes the tiny model one of files, and the files that it then reads too.
BASES = ("base_path", "transformer_path", "vace_path")
OF_A_BASE = (
    *("vae_path", "text_encoder_path", "tokenizer_path", "image_encoder_path", "stand_in_path"),
    "pretrained_wav2vec_path",
)
TEXTS = ("prompt", "negative_prompt", "first_frame_prompt", "prompt_prefix")
MAY_BE_EMPTY = ("ip_image",)  # beside the lists that are empty by default


@dataclass(frozen=True, kw_only=True)
class LikenessSettings:
    """What `pipelines.scoring` wants to know, for settings that have an `antelopv2_path` and a `face_index` too."""

    min_face_score: float | None = setting(
        "ArcFace cosine to the photo; below it, try the next seed", None, low=-1, high=1, shown="measure only"
    )
    max_retries: int = setting("further seeds to try, then the best is kept", 3, low=0, high=100)


@dataclass(frozen=True)
class Settings(LikenessSettings):
    """Everything that decides what a run makes. Fields without a default come from the config or from the user."""

    families: ClassVar[tuple[str, ...]] = ("t2v", "ti2v")  # of models.wan.config.VARIANTS, that the script can drive
    wants_flash: ClassVar[bool] = False  # whether the model's authors ask for flash attention
    # How to get from the tiny model to a real one.
    real_model: ClassVar[str] = "python download_models.py --wan_version 2.1, then add --wan_version 2.1"

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
    guidance_scale: tuple[float, ...]  # one value, or one for the high- and one for the low-noise expert
    shift: float
    solver: str
    # which weights
    config: str
    base_path: str | None = None
    vae_path: str | None = None
    text_encoder_path: str | None = None
    tokenizer_path: str | None = None
    image_encoder_path: str | None = None
    stand_in_path: str | None = None
    antelopv2_path: str | None = None
    face_parser_path: str | None = None

    seed: tuple[int, ...] = (0,)
    timesteps: tuple[float, ...] | None = None
    step_cache: str = "none"
    step_cache_threshold: float = 0.1
    identity_strength: float = 1.0
    identity_start: float = 0.0
    identity_end: float = 1.0
    face_index: int | None = None
    allow_no_face: bool = False
    no_face_crop: bool = False
    # where and on what
    output: str | None = None  # None: outputs/output.mp4, or the next free number
    overwrite: bool = False
    quality: float = 9
    preview: bool = False
    tiled: bool | None = None  # None: where --memory auto finds no other way
    device: str = "auto"
    dtype: str = "auto"
    vae_dtype: str = "auto"
    noise_device: str = "cpu"  # "cuda": as Wan's, VACE's and StableAvatar's own code draws it
    attention_backend: str = "auto"
    memory: str = "auto"
    fp8: bool | None = None  # None: where --memory auto finds no other way
    compile: bool = False
    ulysses_degree: int = 1
    ring_degree: int = 1

    @property
    def stand_in_photos(self) -> tuple[str, ...]:
        """The photos that Stand-In is given."""
        return self.ip_image

    @property
    def score_photos(self) -> tuple[str, ...]:
        """Whom the output is compared with."""
        return self.ip_image

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


def resolve_settings(
    args: Namespace, kind: type[Settings] = Settings, brought: Mapping[str, object] | None = None
) -> tuple[Settings, dict]:
    """Merge the sources of a Wan model's settings and check them.

    Args:
        args: parsed flags; None means not given.
        kind: a script's own settings, `Settings` with further fields.
        brought: defaults that come with an adapter the user chose: over everything but flags.

    Returns:
        the settings, and the config they rest on (`configs.load_config`).

    Raises:
        UsageError: a value out of its bounds, an unknown config, a combination that makes no sense.
        InputError: a JSON that is not one of ours.
    """
    settings, config = merge_settings(args, kind, brought)
    return check_settings(settings, config), config


def merge_settings(args: Namespace, kind: type[Kind], brought: Mapping[str, object] | None = None) -> tuple[Kind, dict]:
    """The merging half of `resolve_settings`, for settings of any method (a dataclass, not only `Settings`). Where
    `args` has a `method`, its flags are those of all methods, and one that `kind` does not have is refused.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    if "prompt" in given:
        given["prompt"] = read_prompts(given["prompt"])
    wan_version = given.pop("wan_version", None)
    if wan_version not in (None, *WAN_VERSIONS):
        raise UsageError(f"--wan_version {wan_version}: accepted are {', '.join(WAN_VERSIONS)}")
    record = given["config"] if is_record(given.get("config")) else None
    earlier = read_run_json(record, kind) if record else {}
    method = given.pop("method", None)
    config_name = earlier.pop("config", None) or given.get("config") or METHODS.get(method)
    config_name = config_name or _default_config(given, wan_version)
    if wan_version is not None and config_name != f"stand-in-wan{wan_version}":
        raise UsageError(f"--wan_version {wan_version} and --config {config_name} contradict each other; give one")
    config = load_config(config_name)
    if config.get("lora"):
        raise UsageError(f"--config {config_name}: says how a LoRA is sampled, not which model; use --lora_config")
    if not any(key in config for key in ("variant", "transformer", "method")):
        raise UsageError(f"--config {config_name}: a part of other models, none that makes something by itself")
    if "method" in config and "method" not in vars(args):
        raise UsageError(f"--config {config_name}: not a Wan model; run it by: python infer.py --config {config_name}")
    if "method" not in config:
        check_networks(config)

    fields = {field.name for field in dataclasses.fields(kind)}
    if "method" in vars(args) and (strange := [name for name in given if name not in fields]):
        raise UsageError(f"--{strange[0]}: --method {method_of(args)} has no such setting; leave it out")
    values = {key: value for key, value in config["defaults"].items() if key in fields}
    if photo := values.pop("ip_image", None):
        values["ip_image"] = str(PROJECT / photo) if has_identity(config) else ()
    values |= earlier
    values |= brought or {}
    if isinstance(guidance := values.get("guidance_scale"), dict):
        values["guidance_scale"] = (guidance["high"], guidance["low"])
    values |= {key: value for key, value in given.items() if key in fields}
    values["config"] = config_name
    if not has_identity(config):
        values.setdefault("ip_image", ())
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    missing = [f"--{name}" for name in required if name not in values]
    if missing:
        raise UsageError(f"config {config_name} leaves open: {', '.join(missing)}; give them")
    values = check_types({name: value for name, value in values.items() if name in fields}, kind, "--")
    for name in TEXTS:
        for text in values[name] if isinstance(values.get(name), tuple) else (values.get(name),):
            if text is not None and (name, name in given) != ("prompt", True):  # those of --prompt are checked by now
                check_prompt(text, f"--{name}", may_be_empty=name != "prompt")
    settings = kind(**values)
    check_bounds(settings)
    check_formats(settings)
    return settings, config


def check_types(values: Mapping[str, object], kind: type, where: str, error: type[UserError] = UsageError) -> dict:
    """Values for the fields of a dataclass of settings, held against its annotations; lists become tuples.

    Args:
        where: what stands before the name of a field in messages.
        error: what is raised.

    Raises:
        UserError: of that kind: a value of another type, or an empty list where something is needed.
    """
    checked = {}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in values.items():
        field = fields[name]
        try:
            checked[name] = typed(value, field.type)
        except TypeError:
            raise error(f"{where}{name} is {short(value)}, expected {describe(field.type)}") from None
        if checked[name] == () and field.default != () and name not in MAY_BE_EMPTY:
            raise error(f"{where}{name} is an empty list; give one value at least, or leave it out")
    return checked


def method_of(args: Namespace) -> str:
    """The identity method of a run: what --method says, or the method of the config.

    Raises:
        UsageError: an unknown method or config, or the two contradict each other.
        InputError: a JSON that is not one of ours.
    """
    if args.method not in (None, *METHODS):
        raise UsageError(f"--method {args.method}: accepted are {', '.join(METHODS)}")
    if args.config is None:
        return args.method or "standin"
    config_name = read_run_settings(args.config).get("config") if is_record(args.config) else args.config
    method = load_config(config_name).get("method", "standin")
    if method not in METHODS:
        raise UsageError(f"--config {args.config}: method is {method[:60]!r}, known are {', '.join(METHODS)}")
    if args.method not in (None, method):
        raise UsageError(f"--method {args.method} and --config {args.config} ({method}) contradict each other")
    return method


def family_of(config: dict) -> str:
    """What a config's model starts from: "t2v", "i2v", "flf2v", "fun" (image-to-video of VideoX-Fun), "ti2v"."""
    if "variant" in config:
        return config["variant"].split("-")[0]
    shape = shape_of(config)
    if shape.image_tokens is not None:
        return "flf2v"
    if shape.in_dim != shape.out_dim:
        return "i2v"
    return "ti2v" if shape.vae_spatial_factor == 16 else "t2v"


def is_tiny(settings: Settings, config: dict) -> bool:
    """Whether the model is the config's own, made from a seed: no files of another base are named."""
    return bool(config.get("tiny")) and all(getattr(settings, name, None) is None for name in BASES)


def has_identity(config: dict) -> bool:
    """Whether the config comes with Stand-In weights; there are none for models that start from a picture."""
    is_there = "stand_in" in config or "stand_in" in config.get("files", {})
    return is_there and family_of(config) == "t2v"


def _default_config(given: dict, wan_version: str | None) -> str:
    if wan_version is not None:
        return f"stand-in-wan{wan_version}"
    return "stand-in-wan2.1" if "base_path" in given or "stand_in_path" in given else "tiny"


def is_record(config: str | None) -> bool:
    """Whether a --config is an earlier run's record: the JSON that it wrote, or the video or picture that holds it."""
    return config is not None and Path(config).suffix.lower() in RECORDS


def read_run_json(path: str, kind: type[Settings] = Settings) -> dict:
    """The settings in an earlier run's record, as `kind` has them.

    Raises:
        UsageError: there is no such file.
        InputError: it is no record, one of another script, or one with values that this script never writes.
    """
    settings = read_run_settings(path)
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(settings) - known):
        if script := next((script for name, script in WHOSE.items() if name in unknown), None):
            raise InputError(f"--config {path}: made by {script}; run: python {script} --config {path}")
        hint = nearest(unknown[0][:60], known)
        names = ", ".join(name[:60] for name in unknown[:5]) + (f" and {len(unknown) - 5} more" * (len(unknown) > 5))
        raise InputError(f"--config {path}: unknown settings {names}{hint}")
    settings = {key: value for key, value in settings.items() if key not in OF_ONE_RUN}
    return check_types(settings, kind, f"--config {path}: ", InputError)


def read_run_settings(path: str) -> dict:
    """All settings in the record of an earlier run, their types not checked, but for that of `config`.

    Raises:
        UsageError, InputError: there is no such file, or it is no record.
    """
    from preprocess.record import read_metadata, read_picture_metadata, sidecar_path

    if not os.path.isfile(path):
        raise UsageError(f"--config {path}: no such file")
    suffix = Path(path).suffix.lower()
    try:
        if suffix in (".mp4", ".png"):
            record = read_metadata(path) if suffix == ".mp4" else read_picture_metadata(Path(path))
            beside = str(sidecar_path(Path(path)))  # names the folders of files, which the record inside leaves out
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                if (full := json.loads(Path(beside).read_text(encoding="utf-8")))["content"] == record["content"]:
                    record = full
        elif os.path.getsize(path) > LARGEST_RECORD:
            raise ValueError(f"larger than {LARGEST_RECORD >> 20} MiB")
        else:
            record = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        settings = record.get("settings") if isinstance(record, dict) else None
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
        if not (isinstance(config := settings.get("config"), str) and is_possible_text(config) and config):
            raise ValueError(f"its config is {short(config)}, expected a name")
        if is_record(config):
            raise ValueError(f"its config is {short(config)}, a record again")
    except RecursionError:
        raise InputError(f"--config {path}: not the record of an earlier run (nested too deeply)") from None
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: not the record of an earlier run ({error})") from error
    return settings


def check_values(settings: object, bounds: Mapping[str, tuple], choices: Mapping[str, tuple]) -> None:
    """Whether each named field that `settings` has is within its bounds, or one of its choices; None is not given.

    Raises:
        UsageError: naming the flag, its value and what is accepted.
    """
    for name, (low, high) in bounds.items():
        value = getattr(settings, name, None)
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            if not (isinstance(number, int | float) and low <= number <= high):  # as NaN is not, nor infinity
                raise UsageError(f"--{name} {short(number)}: accepted are {low:g} to {high:g}")
    for name, accepted in choices.items():
        value = getattr(settings, name, accepted[0])
        if value not in accepted:
            raise UsageError(f"--{name} {value[:60]}: accepted are {', '.join(accepted)}{nearest(value, accepted)}")


def check_likeness(settings: LikenessSettings) -> None:
    """Whether there is a score for the retries to reach.

    Raises:
        UsageError: there is none.
    """
    if settings.min_face_score is None and settings.max_retries != LikenessSettings.max_retries:
        raise UsageError(f"--max_retries {settings.max_retries}: give --min_face_score, the score to reach, too")


def check_fp8(settings) -> None:
    """Whether what settings of any method say beside it leaves the casting of weights to --fp8.

    Raises:
        UsageError: it does not.
    """
    if settings.fp8 and settings.memory in ("group", "sequential"):
        raise UsageError(f"--fp8 with --memory {settings.memory}: both move weights at each call; choose one")
    if settings.fp8 and getattr(settings, "compile", False):
        raise UsageError("--fp8 with --compile: float8 weights cannot be compiled yet; choose one")


def check_formats(settings: object) -> None:
    """Whether weights that a flag names are in a format that is read at all.

    Raises:
        WeightsError: they are GGUF.
    """
    for field in dataclasses.fields(settings):
        if not field.name.endswith(("_path", "_path_high", "_path_low")) and field.name != "controlnet":
            continue
        value = getattr(settings, field.name)
        for path in value if isinstance(value, tuple) else () if value is None else (value,):
            if found := find_gguf(path):
                raise WeightsError(
                    f"--{field.name} {path}: GGUF weights ({found}) are not read yet; give safetensors (ComfyUI's fp8 "
                    "files are the smallest), or the released files"
                )


def check_pictures(**pictures: Sequence[str]) -> None:
    """Whether the files of these flags are there; a URL is only tried when it is read.

    Raises:
        InputError: one that is not.
    """
    for name, paths in pictures.items():
        for path in paths:
            if "://" not in path and not os.path.isfile(path):
                raise InputError(f"--{name} {path[:300]}: no such file; give a picture's path or URL")


def check_settings(settings: Settings, config: dict) -> Settings:
    """Bounds, choices and combinations; sizes rounded up to what the model can make, with a message."""
    check_values(settings, BOUNDS, CHOICES)
    check_likeness(settings)
    if settings.min_face_score is not None and not settings.score_photos:
        raise UsageError(f"--min_face_score {settings.min_face_score:g}: there is no photo to compare with; give one")
    if settings.timesteps is not None and any(b >= a for a, b in itertools.pairwise(settings.timesteps)):
        numbers = " ".join(f"{timestep:g}" for timestep in settings.timesteps[:10])
        raise UsageError(f"--timesteps {numbers}: they have to fall, from noise (1000) to the video; 1000 750 500 250")
    unread = [name for name in OF_A_BASE if getattr(settings, name, None) is not None]
    if unread and is_tiny(settings, config):
        raise UsageError(
            f"--{unread[0]} {getattr(settings, unread[0])[:200]}: {config['name']} is made from a seed and reads no "
            "files; leave it out, or choose a model (--config, --wan_version, or --base_path)"
        )
    if settings.identity_start > settings.identity_end:
        raise UsageError(
            f"--identity_start {settings.identity_start:g} comes after --identity_end {settings.identity_end:g}"
        )
    if settings.stand_in_photos and not has_identity(config):
        raise UsageError(
            f"--ip_image: config {config['name']} has no identity weights; Stand-In was released for the 14B models: "
            "use --wan_version 2.1 or 2.2, leave --ip_image out, or make a first frame of it (--first_frame instantid)"
        )
    check_pictures(ip_image=settings.ip_image)
    if len(settings.guidance_scale) > (2 if config.get("experts") else 1):
        raise UsageError(f"--guidance_scale: {len(settings.guidance_scale)} values for one model; give one")
    if (family := family_of(config)) not in settings.families:
        accepted = ", ".join(settings.families)
        raise UsageError(f"--config {config['name']}: model of family {family}; accepted here are {accepted}")
    check_fp8(settings)
    if settings.step_cache == "teacache" and coefficients_of(config) is None:
        raise UsageError(
            f"--step_cache teacache: fitted for {', '.join(COEFFICIENTS)} of Wan2.1, not for {config['name']}; "
            "use first_block"
        )
    if settings.step_cache != "none" and settings.compile:
        raise UsageError("--step_cache with --compile: a skipped step cannot be compiled in; choose one")

    shape = shape_of(config)
    multiple = 2 * shape.vae_spatial_factor  # a token covers 2 x 2 latent cells
    settings = round_sizes(settings, multiple, frame_step=4)
    check_split(settings, shape)
    return settings


def round_sizes(settings: Kind, multiple: int, frame_step: int | None) -> Kind:
    """Height and width rounded up to a multiple, and frames to n·frame_step + 1 (None: a picture), with a message."""
    rules = {
        name: (math.ceil(getattr(settings, name) / multiple) * multiple, f"a multiple of {multiple}")
        for name in ("height", "width")
    }
    if frame_step is not None:
        frames = math.ceil((settings.num_frames - 1) / frame_step) * frame_step + 1
        rules["num_frames"] = (frames, f"{frame_step}n+1")
    for name, (value, rule) in rules.items():
        if value != getattr(settings, name):
            logger.warning("--%s %d becomes %d: the model makes %s", name, getattr(settings, name), value, rule)
    return dataclasses.replace(settings, **{name: value for name, (value, _) in rules.items()})


REFERENCE_TOKENS = 32 * 32  # of a 512 x 512 photo


def check_split(settings: Settings, shape: WanConfig) -> None:
    """Whether the tokens and heads of a video can be divided over the processes."""
    processes = settings.ulysses_degree * settings.ring_degree
    token = 2 * shape.vae_spatial_factor
    tokens = ((settings.num_frames - 1) // 4 + 1) * (settings.height // token) * (settings.width // token)
    degrees = f"--ulysses_degree {settings.ulysses_degree} x --ring_degree {settings.ring_degree}"
    if tokens % processes:
        raise UsageError(f"{degrees}: the video's {tokens} tokens do not divide by {processes}; change size or frames")
    if REFERENCE_TOKENS * len(settings.stand_in_photos) % processes:
        raise UsageError(
            f"{degrees}: the photo's {REFERENCE_TOKENS} tokens do not divide by {processes}; use 2, 4 or 8"
        )
    if shape.num_heads % settings.ulysses_degree:
        raise UsageError(
            f"--ulysses_degree {settings.ulysses_degree}: the model's {shape.num_heads} heads do not divide by it"
        )
