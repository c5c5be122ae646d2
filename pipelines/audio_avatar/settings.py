"""The settings of a talking avatar."""

from dataclasses import dataclass
from typing import ClassVar

from pipelines.flags import BASE, BESIDE_BASE, FILE, MEDIA, NOTHING, again, setting
from pipelines.lora_settings import Loras
from pipelines.settings import PROJECT, Face, Prompts, Sampling, VideoSize, WanSettings, Weights

# upstream's memory modes -> --memory and --fp8
GPU_MEMORY_MODES = {
    "model_full_load": {"memory": "resident"},
    "Normal": {"memory": "resident"},  # the same, in upstream's web page
    "model_cpu_offload": {"memory": "model"},
    "model_cpu_offload_and_qfloat8": {"memory": "model", "fp8": True},
    "sequential_cpu_offload": {"memory": "sequential"},
}
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
