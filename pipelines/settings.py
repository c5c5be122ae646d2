"""The settings that tasks share, in groups; a task's own class is composed of them (`pipelines/*/settings.py`).

Every value has one home: what depends on the model is in configs/, the rest is a default here.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipelines.flags import (
    BASE,
    BESIDE_BASE,
    CONFIG,
    FILE,
    MEDIA,
    NOTHING,
    ONE_RUN,
    WEIGHTS,
    again,
    names_of,
    setting,
)
from pipelines.trained import trained_on

PROJECT = Path(__file__).parent.parent
LARGEST_SEED = 2**63 - 1
MOST_FACES = 10_000
WAN_VERSIONS = ("2.1", "2.2")
# The identity methods of infer.py -> the config each takes by itself; Stand-In's depends on other flags. A config names
# its method (`method:`), so that a config, or the JSON of an earlier run, is enough.
METHODS = {"standin": None, "instantid": "instantid", "consisid": "consisid"}


@dataclass(frozen=True, kw_only=True)
class Prompts:
    title: ClassVar[str] = "what to make"
    prompts_are_clips: ClassVar[bool] = False  # of one video, not a video each

    prompt: tuple[str, ...] = setting("one or several, in any language; @FILE: one a line", text=True, needed=True)
    negative_prompt: str = setting("what is not to be seen", text=True)


@dataclass(frozen=True, kw_only=True)
class Photos:
    title: ClassVar[str] = "what to make"

    ip_image: tuple[str, ...] = setting(
        "photo (path or URL) of each person", metavar="PHOTO", may_be_empty=True, path=MEDIA
    )

    @property
    def score_photos(self) -> tuple[str, ...]:
        """Whom the output is compared with."""
        return self.ip_image


@dataclass(frozen=True, kw_only=True)
class Output:
    title: ClassVar[str] = "what to make"

    output: str | None = setting(
        "where; with several prompts or seeds their numbers are added",
        None,
        metavar="FILE",
        shown="outputs/output.mp4, or the next free number",
        decides=ONE_RUN,
    )
    overwrite: bool = setting("replace an existing output", False, decides=ONE_RUN)


@dataclass(frozen=True, kw_only=True)
class VideoFile(Output):
    title: ClassVar[str] = "what to make"

    quality: float = setting("of the file: 1 to 10", 9, low=1, high=10, decides=FILE)


@dataclass(frozen=True, kw_only=True)
class VideoSize:
    """Positions of the released models end at 1024 tokens per axis."""

    title: ClassVar[str] = "what to make"

    height: int = setting("in pixels", low=16, high=16384)
    width: int = setting("in pixels", low=16, high=16384)
    num_frames: int = setting("how many, 4n+1", low=1, high=4093)
    fps: float = setting("frames a second", low=1, high=240)


@dataclass(frozen=True, kw_only=True)
class Steps:
    title: ClassVar[str] = "how to sample"

    seed: tuple[int, ...] = setting("one or several", (0,), low=0, high=LARGEST_SEED)
    num_inference_steps: int = setting("from noise to the result", low=1, high=1000)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    title: ClassVar[str] = "how to sample"

    guidance_scale: tuple[float, ...] = setting(
        "how close to the prompt; 1: off. Wan2.2: high- and low-noise expert", low=0, high=100
    )


@dataclass(frozen=True, kw_only=True)
class Sampling(Steps):
    """Of flow-matching models."""

    title: ClassVar[str] = "how to sample"

    shift: float = setting("towards steps of more noise", low=0.01, high=100)
    solver: str = setting("of the sampling equation", choices=("euler", "euler-flow", "unipc", "dpm++"))
    timesteps: tuple[float, ...] | None = setting(
        "a distilled model's own, before the shift", None, low=1, high=1000, shown="as the solver spaces them"
    )
    step_cache: str = setting(
        "skip steps that change little (lossy)", "none", choices=("none", "teacache", "first_block")
    )
    step_cache_threshold: float = setting("larger skips more", 0.1, low=0, high=10)
    preview: bool = setting("write NAME.preview.png after each step", False, decides=ONE_RUN)


@dataclass(frozen=True, kw_only=True)
class Face:
    """Whose face, and the networks that find it."""

    title: ClassVar[str] = "identity"

    face_index: int | None = setting("which face, from the left", None, low=0, high=MOST_FACES, shown="the largest")
    antelopv2_path: str | None = setting(
        "folder of the face detector", None, metavar="FOLDER", path=WEIGHTS, shown="checkpoints/antelopev2"
    )


@dataclass(frozen=True, kw_only=True)
class LikenessSettings(Face):
    """What `pipelines.scoring` wants to know."""

    title: ClassVar[str] = "likeness"

    min_face_score: float | None = setting(
        "ArcFace cosine to the photo; below it, try the next seed",
        None,
        low=-1,
        high=1,
        shown="measure only",
        decides=FILE,
    )
    max_retries: int = setting("further seeds to try, then the best is kept", 3, low=0, high=100, decides=FILE)

    @property
    def score_photos(self) -> tuple[str, ...]:
        """Whom the output is compared with."""
        return ()


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """The person of a photo, by Stand-In's weights."""

    title: ClassVar[str] = "identity"

    identity_strength: float = setting("of the identity's weights: 1 as trained, 0 without them", 1.0, low=0, high=10)
    identity_start: float = setting("share of the steps before the identity sets in", 0.0, low=0, high=1)
    identity_end: float = setting("share of the steps after which it ends", 1.0, low=0, high=1)
    allow_no_face: bool = setting("use the whole photo without one", False)
    no_face_crop: bool = setting("whole photo; for subjects that are not human", False)
    stand_in_path: str | None = setting(
        "Stand-In's file, or the folder it is in",
        None,
        metavar="PATH",
        path=WEIGHTS,
        shown="the config's, in checkpoints/",
    )
    face_parser_path: str | None = setting(
        "parsing_bisenet.pth", None, metavar="FILE", path=WEIGHTS, shown="checkpoints/face-parsing"
    )


@dataclass(frozen=True, kw_only=True)
class Weights:
    title: ClassVar[str] = "weights"

    config: str = setting(
        "name or file of configs/, or the JSON or video of an earlier run",
        metavar="NAME",
        path=CONFIG,
        shown="a tiny model, or what other flags ask for",
    )
    base_path: str | None = setting(
        "the model's folder (original or Diffusers layout), or transformer file",
        None,
        metavar="PATH",
        path=BASE,
        shown="the config's, in checkpoints/",
    )


@dataclass(frozen=True, kw_only=True)
class Method:
    """A word of a command that is no setting."""

    title: ClassVar[str] = "what to make"
    script: ClassVar[str] = "infer.py"

    method: str | None = setting("how the person is kept", None, choices=tuple(METHODS), shown="standin")


@dataclass(frozen=True, kw_only=True)
class WanVersion:
    """A word of a command that is no setting."""

    title: ClassVar[str] = "weights"
    script: ClassVar[str] = "infer.py"

    wan_version: str | None = setting(
        "short for --config stand-in-wan2.1 or stand-in-wan2.2", None, choices=WAN_VERSIONS
    )


@dataclass(frozen=True, kw_only=True)
class WanWeights(Weights):
    title: ClassVar[str] = "weights"

    vae_path: str | None = setting("Wan's VAE", None, metavar="PATH", path=WEIGHTS, shown="the base's")
    text_encoder_path: str | None = setting(
        "umT5: folder or file, ComfyUI's included", None, metavar="PATH", path=BESIDE_BASE, shown="the base's"
    )
    tokenizer_path: str | None = setting(
        "umT5's: folder, tokenizer.json or spiece.model", None, metavar="PATH", path=BESIDE_BASE, shown="the base's"
    )
    image_encoder_path: str | None = setting(
        "CLIP, of image-to-video models", None, metavar="PATH", path=BESIDE_BASE, shown="the base's"
    )


@dataclass(frozen=True, kw_only=True)
class Machine:
    title: ClassVar[str] = "machine"

    device: str = setting("auto, cpu, cuda, cuda:N, mps", "auto", metavar="DEVICE", decides=NOTHING)
    dtype: str = setting("of the network that denoises", "auto", choices=("auto", "bf16", "fp16", "fp32"))
    memory: str = setting(
        "auto: the fastest that fits; then faster to smaller",
        "auto",
        choices=("auto", "resident", "model", "group", "sequential"),
        decides=NOTHING,
    )
    tiled: bool = setting("decode in tiles", False, decides=FILE, left_open=True)


@dataclass(frozen=True, kw_only=True)
class WanMachine(Machine):
    title: ClassVar[str] = "machine"

    tiled: bool | None = again(Machine, "tiled", default=None, shown="where --memory auto finds no other way")
    vae_dtype: str = setting("of the VAE; auto: fp32", "auto", choices=("auto", "bf16", "fp16", "fp32"), decides=FILE)
    noise_device: str = setting(
        "cpu: a seed means the same everywhere; cuda: as Wan's, VACE's and StableAvatar's own code draws it",
        "cpu",
        choices=("cpu", "cuda"),
    )
    attention_backend: str = setting(
        "auto: native, for SVI 2 flash; or of diffusers: native, flash, sage, …", "auto", metavar="NAME"
    )
    fp8: bool | None = setting(
        "store the blocks' weights in float8", None, shown="where --memory auto finds no other way", left_open=True
    )
    compile: bool = setting("compile the blocks", False)
    ulysses_degree: int = setting("split one video over processes by heads", 1, low=1, high=1024)
    ring_degree: int = setting("… by ring attention", 1, low=1, high=1024)


@dataclass(frozen=True, kw_only=True)
class WanSettings(Prompts, VideoSize, VideoFile, Sampling, LikenessSettings, WanWeights, WanMachine):
    """Everything that decides what a Wan model makes of a prompt. Fields without a default come from the config or from
    the user.
    """

    method: ClassVar[str] = "standin"  # as infer.py names it
    families: ClassVar[tuple[str, ...]] = ("t2v", "ti2v")  # kinds of models.wan.config.VARIANTS that the script drives
    wants_flash: ClassVar[bool] = False  # whether the model's authors ask for flash attention
    # How to get from the tiny model to a real one.
    real_model: ClassVar[str] = "python download_models.py --wan_version 2.1, then add --wan_version 2.1"

    @property
    def stand_in_photos(self) -> tuple[str, ...]:
        """The photos that Stand-In is given."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Settings(Photos, Guidance, StandIn, WanSettings):
    """Videos of the person in a photo, by Stand-In; or of nobody."""

    @property
    def stand_in_photos(self) -> tuple[str, ...]:
        return self.ip_image


def is_tiny(settings: WanSettings, config: dict) -> bool:
    """Whether the model is the config's own, made from a seed: no files of another base are named. One that was trained
    on the tiny model is of it, and goes with what is made from its seed.
    """
    paths = [getattr(settings, name) for name in names_of(type(settings), path=BASE)]
    return bool(config.get("tiny")) and all(path is None or trained_on(path) == config["name"] for path in paths)


def recorded(settings: object) -> dict:
    """What the record of a run has of its settings: all, but for those in which a task goes beyond its `plain` class
    and that are at their default. So the record of a run without them fits every script.
    """
    plain = getattr(settings, "plain", type(settings))
    shared = {field.name for field in dataclasses.fields(plain)}
    own = {field.name: field.default for field in dataclasses.fields(settings) if field.name not in shared}
    return {
        name: value for name, value in dataclasses.asdict(settings).items() if name not in own or value != own[name]
    }
