"""The settings of a talking avatar, and the sound they are for: checked without torch."""

import dataclasses
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy

from errors import UsageError
from pipelines.lora_settings import LoraSettings, resolve_lora_settings
from pipelines.settings import PROJECT, check_pictures, check_values
from preprocess.audio import AudioTimeline, read_audio
from preprocess.output import safe_name

# upstream's memory modes -> --memory and --fp8
GPU_MEMORY_MODES = {
    "model_full_load": ("resident", None),
    "Normal": ("resident", None),  # the same, in upstream's web page
    "model_cpu_offload": ("model", None),
    "model_cpu_offload_and_qfloat8": ("model", True),
    "sequential_cpu_offload": ("sequential", None),
}
SOLVERS = ("euler-flow", "euler")
CHOICES = {
    "overlapping_weight_scheme": ("uniform", "log"),
    "last_window": ("full", "legacy"),
    "audio_alignment": ("released", "exact"),
}
BOUNDS = {
    "sample_text_guide_scale": (0, 100),
    "sample_audio_guide_scale": (0, 100),
    "audio_native_guidance": (0, 100),
    "color_correction": (0, 1),
    "num_skip_start_steps": (1, 1000),
}
DEMONSTRATION = {"reference_image": f"{PROJECT}/assets/face.png", "audio": f"{PROJECT}/assets/speech.wav"}
# Fields of text-to-video that a talking avatar has no use for; they stay out of the record beside the video.
NOT_USED = (
    *("ip_image", "stand_in_path", "face_parser_path", "allow_no_face", "no_face_crop", "identity_strength"),
    *("identity_start", "identity_end", "guidance_scale"),
    *("lora_path_high", "lora_scale_high", "lora_path_low", "lora_scale_low"),
)


@dataclass(frozen=True)
class AvatarSettings(LoraSettings):
    """`num_frames` is the length of one window (upstream's clip_sample_n_frames); the video is as long as the sound."""

    families: ClassVar[tuple[str, ...]] = ("i2v", "fun")
    real_model: ClassVar[str] = (
        "python download_models.py --only stableavatar-1.3B, then add --config stableavatar-1.3B"
    )

    reference_image: str | None = None  # None: the photo in assets/, for the tiny model only
    audio: str | None = None  # None: the speech in assets/, likewise
    transformer_path: str | None = None
    pretrained_wav2vec_path: str | None = None
    sample_text_guide_scale: float = 5.0
    sample_audio_guide_scale: float = 4.0
    audio_native_guidance: tuple[float, ...] | None = None  # weights of the audio and of the latent-audio pair
    overlap_window_length: int | None = None  # latent frames; None: 10, or half a window where that is less
    overlapping_weight_scheme: str = "uniform"
    last_window: str = "full"
    audio_alignment: str = "released"
    color_correction: float = 0.0
    num_skip_start_steps: int = 5
    teacache_offload: bool = False
    fsdp_dit: bool = False

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
    args = Namespace(**vars(args))  # they are completed below, and may be used again
    if args.identity is not None:
        raise UsageError(
            f"--identity {args.identity[0]}: Stand-In's features are for text-to-video models; here the person is the "
            "one of --reference_image"
        )
    if args.guidance_scale is not None:
        raise UsageError("--guidance_scale: here are two, --sample_text_guide_scale and --sample_audio_guide_scale")
    translate_upstream(args)
    if args.config is None:
        args.config = "stableavatar-1.3B" if args.base_path or args.transformer_path else "tiny-avatar"
    settings, config = resolve_lora_settings(args, AvatarSettings, required=False)
    settings = with_demonstration(settings, config)
    check_avatar(settings, args)
    if settings.fsdp_dit:
        settings = dataclasses.replace(settings, memory="resident")
    samples = read_audio(settings.audio)
    AudioTimeline(len(samples), settings.fps)  # less than a frame is refused
    return settings, config, samples


def translate_upstream(args: Namespace) -> None:
    """Upstream's flags for what other scripts of the toolkit call otherwise."""
    if args.GPU_memory_mode is not None:
        if args.GPU_memory_mode not in GPU_MEMORY_MODES:
            accepted = ", ".join(GPU_MEMORY_MODES)
            raise UsageError(f"--GPU_memory_mode {args.GPU_memory_mode}: accepted are {accepted}")
        if args.memory is not None or args.fp8 is not None:
            raise UsageError("--GPU_memory_mode is another name for --memory and --fp8; give the one or the other")
        args.memory, args.fp8 = GPU_MEMORY_MODES[args.GPU_memory_mode]
    if args.enable_teacache:
        if args.step_cache not in (None, "teacache"):
            raise UsageError(f"--enable_teacache and --step_cache {args.step_cache} contradict each other; give one")
        args.step_cache = "teacache"
    if args.output_dir is not None:
        if args.output is not None:
            raise UsageError("--output_dir and --output: give one; --output_dir names the video after its photo")
        photo = args.reference_image or DEMONSTRATION["reference_image"]
        args.output = str(Path(args.output_dir) / f"{safe_name(Path(photo).stem)}.mp4")


def with_demonstration(settings: AvatarSettings, config: dict) -> AvatarSettings:
    """The tiny model has a photo and a speech to show itself with; others are told."""
    missing = [name for name in DEMONSTRATION if getattr(settings, name) is None]
    if missing and not config.get("tiny"):
        raise UsageError(f"--{missing[0]}: give " + ("the person's photo" if missing[0] != "audio" else "what is said"))
    return dataclasses.replace(settings, **{name: DEMONSTRATION[name] for name in missing})


def check_avatar(settings: AvatarSettings, args: Namespace) -> None:
    """Bounds, choices and combinations of what only a talking avatar has.

    Raises:
        UsageError, InputError.
    """
    check_values(settings, BOUNDS, CHOICES)
    if settings.solver not in SOLVERS:
        raise UsageError(
            f"--solver {settings.solver}: accepted are {', '.join(SOLVERS)}; windows are fused after each step, which "
            "solvers with a history cannot take"
        )
    if settings.audio_native_guidance is not None and len(settings.audio_native_guidance) != 2:
        raise UsageError("--audio_native_guidance: two weights, of the audio and of the latent-audio pair; 2 2 to try")
    if settings.audio_native_guidance is not None and args.sample_audio_guide_scale is not None:
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
            if getattr(args, name) is not None:
                raise UsageError(f"--{name}: only with --step_cache teacache")
    if settings.fsdp_dit and settings.ulysses_degree * settings.ring_degree == 1:
        raise UsageError("--fsdp_dit shards the weights over the processes of --ulysses_degree or --ring_degree")
    if settings.fsdp_dit and (settings.memory not in ("auto", "model", "resident") or settings.fp8 or settings.compile):
        raise UsageError("--fsdp_dit keeps the weights on the devices as they are: no --memory, --fp8 or --compile")
    check_pictures(reference_image=(settings.reference_image,))
