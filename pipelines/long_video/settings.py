"""The settings of a long video: which of SVI's variants, its prompts, its picture and size."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from pipelines.clip_plan import PROMPT_REPEATS, Clip, plan_clips, prompts_of_clips
from pipelines.flags import BESIDE_BASE, CONFIG, MEDIA, NOTHING, WEIGHTS, again, names_of, setting
from pipelines.long_video.variant import TRAINED_FRAMES, Variant, variant_config
from pipelines.lora_settings import EXPERTS, Loras, LoraSettings
from pipelines.settings import Face, Guidance, Photos, Prompts, Sampling, VideoSize
from pipelines.text_to_video.settings import FirstFrameSettings
from pipelines.upstream import SviCommand
from pipelines.vace.settings import VaceControl

GRID = 16  # pixels of a token's side
MOST_CLIPS = 10_000
DRIVERS = {"audio": "audio_path", "pose": "pose_path"}  # what drives a variant, and its flag


@dataclass(frozen=True, kw_only=True)
class LongVideoSettings(VaceControl, FirstFrameSettings, LoraSettings):
    """`num_frames` is the length of one clip; the video's follows from the clips."""

    families: ClassVar[tuple[str, ...]] = ("i2v",)
    prompts_are_clips: ClassVar[bool] = True  # one video has them all
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
    prompt: tuple[str, ...] = again(Prompts, "prompt", later_clips=True)
    num_clips: int | None = setting(
        "how many",
        None,
        low=1,
        high=MOST_CLIPS,
        shown="one a prompt, 10 for one; as long as sound or poses last",
        later_clips=True,
    )
    prompt_repeat: str = setting("when the prompts do not last", "last", choices=PROMPT_REPEATS, later_clips=True)
    prompt_repeat_times: int = setting("clips for each prompt", 1, low=1, high=MOST_CLIPS, later_clips=True)
    use_first_prompt_only: bool = setting("for all clips", False, later_clips=True)
    prompt_prefix: str | None = setting(
        "put in front of every prompt", None, metavar="TEXT", text=True, later_clips=True
    )
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
    vace_path: str | None = again(
        VaceControl,
        "vace_path",
        help="file or folder of a VACE branch for the model",
        path=BESIDE_BASE,
        shown="none is released for image-to-video",
    )
    vace_scale: float | None = again(VaceControl, "vace_scale", shown="1")
    remove_pose: bool = setting("dance: poses say how long it is, and lead nothing", False)
    video_frames: int | None = setting(
        "where the video ends",
        None,
        low=1,
        high=4093 * MOST_CLIPS,
        is_flag=False,
        later_clips=True,
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
    def of_later_clips(self) -> tuple[str, ...]:
        """What may change while the clips that are finished still count."""
        return names_of(type(self), later_clips=True)

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
