"""The settings of a talking avatar, and the sound they are for: checked without torch."""

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy

from errors import UsageError
from pipelines.checks import check_pictures
from pipelines.flags import BASE, BESIDE_BASE, FILE, MEDIA, NOTHING, again, described, given_by, setting
from pipelines.lora_settings import Loras, resolve_lora_settings
from pipelines.settings import PROJECT, Face, Prompts, Sampling, VideoSize, WanSettings, Weights
from preprocess.audio import AudioTimeline, read_audio
from preprocess.output import safe_name

# upstream's memory modes -> --memory and --fp8
GPU_MEMORY_MODES = {
    "model_full_load": {"memory": "resident"},
    "Normal": {"memory": "resident"},  # the same, in upstream's web page
    "model_cpu_offload": {"memory": "model"},
    "model_cpu_offload_and_qfloat8": {"memory": "model", "fp8": True},
    "sequential_cpu_offload": {"memory": "sequential"},
}
SOLVERS = ("euler-flow", "euler")
DEMONSTRATION = {"reference_image": f"{PROJECT}/assets/face.png", "audio": f"{PROJECT}/assets/speech.wav"}
GUIDANCE = {"low": 0, "high": 100, "metavar": "S"}


@dataclass(frozen=True, kw_only=True)
class AvatarSettings(Loras, WanSettings):
    """`num_frames` is the length of one window; the video is as long as the sound. Second names are upstream's."""

    script: ClassVar[str] = "infer_audio_avatar.py"
    title: ClassVar[str] = "talking avatar"
    families: ClassVar[tuple[str, ...]] = ("i2v", "fun")
    real_model: ClassVar[str] = (
        "python download_models.py --only stableavatar-1.3B, then add --config stableavatar-1.3B"
    )

    reference_image: str | None = setting(
        "photo: path or URL",
        None,
        names=("--validation_reference_path",),
        metavar="PHOTO",
        path=MEDIA,
        shown="that in assets/, of the tiny model",
    )
    audio: str | None = setting(
        "audio file, or a video's sound track",
        None,
        names=("--validation_driven_audio_path",),
        metavar="FILE",
        path=MEDIA,
        shown="the speech in assets/, of the tiny model",
    )
    prompt: tuple[str, ...] = again(Prompts, "prompt", names=("--validation_prompts",))
    sample_text_guide_scale: float = setting("how close to the prompt", 5.0, **GUIDANCE)
    sample_audio_guide_scale: float = setting("… and to the sound", 4.0, **GUIDANCE)
    audio_native_guidance: tuple[float, float] | None = setting(
        "experimental, in place of the audio scale: weights of the audio and of the latent-audio pair, 2 2 to try. "
        "Costs a branch each",
        None,
        low=0,
        high=100,
        metavar=("AUDIO", "PAIR"),
    )
    num_frames: int = again(
        VideoSize, "num_frames", help="of a window, 4n+1; 81 as trained", names=("--clip_sample_n_frames",)
    )
    num_inference_steps: int = again(Sampling, "num_inference_steps", names=("--sample_steps",))
    overlap_window_length: int | None = setting(
        "latent frames that windows share", None, low=1, high=1023, shown="10, or half a window where that is less"
    )
    overlapping_weight_scheme: str = setting("how they fade into each other", "uniform", choices=("uniform", "log"))
    last_window: str = setting(
        "legacy: cut short, and its sound stretched, as upstream", "full", choices=("full", "legacy")
    )
    audio_alignment: str = setting(
        "exact: a window hears just the frames it shows", "released", choices=("released", "exact")
    )
    color_correction: float = setting(
        "towards the photo's colours: 0 to 1", 0.0, low=0, high=1, metavar="S", decides=FILE
    )
    base_path: str | None = again(Weights, "base_path", names=("--pretrained_model_name_or_path",))
    transformer_path: str | None = setting(
        "StableAvatar's .pt", None, metavar="FILE", path=BASE, shown="square or rectangle, by the size"
    )
    pretrained_wav2vec_path: str | None = setting(
        "folder of wav2vec2-base-960h", None, metavar="FOLDER", path=BESIDE_BASE, shown="the config's, in checkpoints/"
    )
    step_cache_threshold: float = again(Sampling, "step_cache_threshold", names=("--teacache_threshold",))
    num_skip_start_steps: int = setting("steps that teacache always computes", 5, low=1, high=1000)
    teacache_offload: bool = setting("keep its residuals in RAM", False, decides=NOTHING)
    fsdp_dit: bool = setting("shard the weights over the processes", False)
    face_index: int | None = again(Face, "face_index", help="whose likeness is measured, from the left")

    @property
    def score_photos(self) -> tuple[str, ...]:
        """Whom the video is compared with: the person in the picture."""
        return (self.reference_image or DEMONSTRATION["reference_image"],)

    @property
    def window(self) -> int:
        """Latent frames of a window."""
        return (self.num_frames - 1) // 4 + 1

    @property
    def overlap(self) -> int:
        return min(10, self.window // 2) if self.overlap_window_length is None else self.overlap_window_length


def resolve_avatar(args: Namespace) -> tuple[AvatarSettings, dict, numpy.ndarray]:
    """Settings, config, and the sound: mono samples at 16 kHz, (N,) float32.

    Raises:
        UsageError: values out of bounds, or a combination that makes no sense.
        InputError: a sound or a picture that cannot be used.
    """
    given = translated(given_by(args))
    if "config" not in given:
        real = {"base_path", "transformer_path"} & given.keys()
        given |= {"config": "stableavatar-1.3B" if real else "tiny-avatar"}
    settings, config = resolve_lora_settings(given, AvatarSettings, required=False)
    settings = with_demonstration(settings, config)
    check_avatar(settings, given)
    if settings.fsdp_dit:
        settings = dataclasses.replace(settings, memory="resident")
    samples = read_audio(settings.audio)
    AudioTimeline(len(samples), settings.fps)  # less than a frame is refused
    return settings, config, samples


@dataclass(frozen=True, kw_only=True)
class AvatarCommand:
    """What upstream calls otherwise, and flags of other tasks that mean nothing here: none is a setting."""

    script: ClassVar[str] = "infer_audio_avatar.py"
    title: ClassVar[str] = "upstream's names"

    GPU_memory_mode: str | None = setting("--memory and --fp8", None, choices=tuple(GPU_MEMORY_MODES))
    enable_teacache: bool = setting("--step_cache teacache", False)
    output_dir: str | None = setting("write there, under the photo's name", None, metavar="FOLDER")
    identity: tuple[str, ...] = setting(
        "not here: Stand-In is for text-to-video models", (), names=("--ip_image",), metavar="PHOTO"
    )
    guidance_scale: tuple[float, ...] = setting(
        "not here: there are --sample_text_guide_scale and --sample_audio_guide_scale", (), low=0, high=100
    )


def translated(given: Mapping[str, object]) -> dict[str, object]:
    """What was typed, with the toolkit's words for upstream's.

    Raises:
        UsageError: flags that mean nothing here, or that contradict each other.
    """
    if "identity" in given:
        raise UsageError(
            f"--identity {given['identity'][0]}: Stand-In's features are for text-to-video models; here the person is "
            "the one of --reference_image"
        )
    if "guidance_scale" in given:
        raise UsageError("--guidance_scale: here are two, --sample_text_guide_scale and --sample_audio_guide_scale")
    said = {}
    if (mode := given.get("GPU_memory_mode")) is not None:
        if mode not in GPU_MEMORY_MODES:
            raise UsageError(f"--GPU_memory_mode {mode}: accepted are {', '.join(GPU_MEMORY_MODES)}")
        if "memory" in given or "fp8" in given:
            raise UsageError("--GPU_memory_mode is another name for --memory and --fp8; give the one or the other")
        said |= GPU_MEMORY_MODES[mode]
    if "enable_teacache" in given:
        if given.get("step_cache", "teacache") != "teacache":
            raise UsageError(
                f"--enable_teacache and --step_cache {given['step_cache']} contradict each other; give one"
            )
        said["step_cache"] = "teacache"
    if "output_dir" in given:
        if "output" in given:
            raise UsageError("--output_dir and --output: give one; --output_dir names the video after its photo")
        photo = given.get("reference_image", DEMONSTRATION["reference_image"])
        said["output"] = str(Path(given["output_dir"]) / f"{safe_name(Path(photo).stem)}.mp4")
    return {name: value for name, value in given.items() if name not in described(AvatarCommand)} | said


def with_demonstration(settings: AvatarSettings, config: dict) -> AvatarSettings:
    """The tiny model has a photo and a speech to show itself with; others are told."""
    missing = [name for name in DEMONSTRATION if getattr(settings, name) is None]
    if missing and not config.get("tiny"):
        raise UsageError(f"--{missing[0]}: give " + ("the person's photo" if missing[0] != "audio" else "what is said"))
    return dataclasses.replace(settings, **{name: DEMONSTRATION[name] for name in missing})


def check_avatar(settings: AvatarSettings, given: Mapping[str, object]) -> None:
    """Combinations of what only a talking avatar has.

    Raises:
        UsageError, InputError.
    """
    if settings.solver not in SOLVERS:
        raise UsageError(
            f"--solver {settings.solver}: accepted are {', '.join(SOLVERS)}; windows are fused after each step, which "
            "solvers with a history cannot take"
        )
    if settings.audio_native_guidance is not None and len(settings.audio_native_guidance) != 2:
        raise UsageError("--audio_native_guidance: two weights, of the audio and of the latent-audio pair; 2 2 to try")
    if settings.audio_native_guidance is not None and "sample_audio_guide_scale" in given:
        raise UsageError("--sample_audio_guide_scale: --audio_native_guidance takes its place; give one")
    if settings.window < 2:
        raise UsageError(f"--clip_sample_n_frames {settings.num_frames}: accepted are 5 or more, 81 as trained")
    if not 1 <= settings.overlap < settings.window:
        raise UsageError(
            f"--overlap_window_length {settings.overlap}: accepted are 1 to {settings.window - 1}, less than the "
            f"{settings.window} latent frames of a window (--clip_sample_n_frames {settings.num_frames})"
        )
    if settings.step_cache != "teacache":
        for name in ("num_skip_start_steps", "teacache_offload"):
            if name in given:
                raise UsageError(f"--{name}: only with --step_cache teacache")
    if settings.fsdp_dit and settings.ulysses_degree * settings.ring_degree == 1:
        raise UsageError("--fsdp_dit shards the weights over the processes of --ulysses_degree or --ring_degree")
    if settings.fsdp_dit and (settings.memory not in ("auto", "model", "resident") or settings.fp8 or settings.compile):
        raise UsageError("--fsdp_dit keeps the weights on the devices as they are: no --memory, --fp8 or --compile")
    check_pictures(reference_image=(settings.reference_image,))
