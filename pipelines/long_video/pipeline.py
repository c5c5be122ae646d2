"""A long video of one scene or story: clips chained by Stable Video Infinity's rules, made and written one by one.

For each clip of the plan (`clip_plan.py`): the condition from what the clip before hands over, the denoise loop, the
kept frames streamed into the clip's own file (`clip_store.py`). At the end the files are joined as they are encoded.
Memory does not grow with the video, nothing is encoded twice, and an interrupted run goes on where it stopped.

Source: Stable-Video-Infinity `test_svi.py`; branch svi_wan22 `inference_svi_2.0.py`, `inference_svi_2.0_pro.py`.
"""

import collections
import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from models.wan.schedulers import get_schedule
from models.wan.transformer import WanTransformer
from pipelines.clip_plan import Clip
from pipelines.clip_store import ClipStore
from pipelines.conditions import ShownVAE, initial_noise, latent_frames
from pipelines.denoise import Expert
from pipelines.experts import guided_by_text, prompt_of, tea_caches
from pipelines.guidance import branch_prompts
from pipelines.jobs import Job
from pipelines.long_video.clip_conditions import (
    crop_to_shape,
    frames_to_condition,
    latents_to_condition,
    picture_to_frame,
)
from pipelines.long_video.dance import open_poses, pose_plugins
from pipelines.long_video.settings import LongVideoSettings
from pipelines.long_video.talk import BRANCHES, open_speech, speech_guidance, speech_plugins
from pipelines.memory import stage
from pipelines.vace.control import Control, encode_control, read_control_frames
from pipelines.video import decode, denoise_with_resume, describe, open_video, progress, ran_with, write_frames
from pipelines.wan import Wan
from pipelines.windows import Window
from preprocess.image import read_image
from preprocess.progress_bars import Bar, ProgressBars
from preprocess.video import VideoInfo, probe, stream_frames
from preprocess.video_writer import VideoWriter, same_encoding, write_video

logger = logging.getLogger("selfsame")

FINEST = 10  # quality
VAE_ADVICE = "try a smaller size or --vae_dtype bf16"


@dataclass(frozen=True)
class Existing:
    """The video that is extended.

    end: (1, 3, n, H, W) in [-1, 1], its last frames.
    """

    path: Path
    info: VideoInfo
    end: Tensor

    def in_front_of(self, clip: Path, folder: Path) -> Path:
        """The video as a file that can be joined with a clip: itself if this toolkit encoded it, else encoded anew."""
        if same_encoding(self.path, clip):
            return self.path
        logger.warning("--extend %s: of another encoding than ours; its picture is encoded anew, finely", self.path)
        copy = folder / "extended.mp4"
        write_video(copy, (frame[None] for frame in stream_frames(self.path)), fps=self.info.fps, quality=FINEST)
        return copy


def open_existing(settings: LongVideoSettings) -> Existing:
    """Read the end of the video to extend: the frames that the variant hands over, and for latents what the VAE has to
    see before them."""
    variant = settings.svi
    info = probe(settings.extend)
    count = variant.motion_frames
    if variant.hands_latents:
        count = min(settings.num_frames, (info.num_frames - 1) // 4 * 4 + 1)
    end = collections.deque(stream_frames(settings.extend), maxlen=count)
    frames = torch.cat([picture_to_frame(frame, info.height, info.width) for frame in end], dim=2)
    return Existing(Path(settings.extend), info, frames)


class LongVideoMaker:
    """Makes the long video of each job.

    Speech, poses and a control video lead its clips where the settings name them, all at once if they do.

    Args:
        wan: the model.
        text: states of every prompt, with its prefix, and of the negative prompt.
        picture: (H, W, 3) uint8, the first frame, and what later clips are kept close to.
        existing: the video that is extended; None starts from the picture.
    """

    settings: LongVideoSettings

    def __init__(self, wan: Wan, text: dict[str, Tensor], picture: numpy.ndarray, existing: Existing | None = None):
        self.wan, self.text, self.existing, self.settings = wan, text, existing, wan.settings
        self.bars = ProgressBars(shown=wan.processes.rank == 0)
        settings = self.settings
        steps, shift = settings.num_inference_steps, settings.shift
        self.schedule = get_schedule(settings.solver, steps, shift, timesteps=settings.timesteps)
        self.variant = settings.svi
        size = (settings.height, settings.width)
        self.reference = picture_to_frame(crop_to_shape(picture, *size), *size)  # (1, 3, 1, H, W)
        self.end = None
        if settings.end_image is not None:
            self.end = picture_to_frame(crop_to_shape(read_image(settings.end_image, "--end_image"), *size), *size)
        self.picture_hashes = [
            None if frames is None else hashlib.sha256(frames.numpy().tobytes()).hexdigest()
            for frames in (self.reference, self.end, existing and existing.end)
        ]
        self.audio_path, self.audio_start = settings.audio_path, 0.0
        if settings.audio_path is None and existing is not None and existing.info.has_audio:
            self.audio_path, self.audio_start = existing.path, existing.info.start
        self.anchor: Tensor | None = None  # latents of the picture, (1, C, 1, h, w), once for all clips
        self.first_handover: Tensor | None = None  # what the first clip goes on from, of a video that is extended
        if self.variant.hands_latents or existing is not None:
            with wan.vae() as vae, torch.no_grad(), stage("encoding the picture", VAE_ADVICE):
                if self.variant.hands_latents:
                    self.anchor = vae.encode(self.reference).cpu()
                if existing is not None and self.variant.hands_latents:
                    self.first_handover = vae.encode(existing.end)[:, :, -self.variant.motion_latents :].cpu()
                elif existing is not None:
                    self.first_handover = existing.end
        self.speech = open_speech(wan) if settings.audio_path is not None else None
        self.poses = open_poses(wan) if settings.pose_path is not None else None
        self._has_svi = True  # whether SVI's LoRA is in the weights

    # ------------------------------------------------------------------------------------------------- the video

    def make(self, job: Job) -> Path:
        """Make every clip that is not there yet, and join them."""
        wan = self.wan
        self.use_svi(True)
        clips = self.settings.clips(job.seed)
        self.bars.plan(self.schedule.num_steps, len(clips), "clip")
        record = self.metadata(job)
        store = ClipStore(job.output, self.progress(record), clips)
        with open_video(wan, job.output, record, audio_path=self.audio_path, audio_start=self.audio_start) as video:
            done, handover = wan.processes.share(store.load() if video is not None else None)
            if done:
                logger.info("%s: going on after clip %d of %d", job.output, done, len(clips))
            for clip in clips[done:]:
                handover = self.make_clip(job, clip, self.first_handover if clip.index == 0 else handover, store)
            if video is not None:
                video.describe(record | ran_with(wan))
                parts = store.paths
                if self.existing is not None:
                    parts = [self.existing.in_front_of(parts[0], store.folder), *parts]
                video.join(parts)
        if wan.processes.writes:
            store.remove()
        return job.output

    def make_clip(self, job: Job, clip: Clip, handover: Tensor | None, store: ClipStore) -> Tensor:
        """One clip, from what the one before hands over to what the next is handed: frames (1, 3, n, H, W) in [-1, 1],
        or latents (1, C, m, h, w).
        """
        wan, settings, schedule = self.wan, self.settings, self.schedule
        logger.info("%s: clip %d of %d: %s", job.output, clip.index + 1, len(store.clips), clip.prompt[:80])
        self.bars.begin_part(clip.index)
        self.use_svi(clip.index > 0 or not settings.first_clip_without_lora)
        condition, image_features = self.condition_of(handover, is_last=clip is store.clips[-1])
        poses = [] if self.poses is None else pose_plugins(wan, self.poses, clip)
        control = self.control_of(clip)  # (1, 96, F, h, w), or None
        positive, negative = self.text[clip.prompt], self.text[settings.negative_prompt]

        def expert(number: int, transformer: WanTransformer) -> Expert:
            plugins = [*poses]
            if control is not None:
                plugins.append(wan.part("vace").plugin(control, settings.vace_scale))
            if self.speech is None:
                seen = {"image_features": image_features, "plugins": plugins}
                return guided_by_text(wan, schedule, number, transformer, positive, negative, **seen)
            prompts = (prompt_of(wan, states, image_features) for states in (positive, negative))
            return Expert(
                transformer,
                branch_prompts(*prompts),
                speech_guidance(settings),
                [*wan.plugins(), *plugins],
                tea_caches(wan, schedule, BRANCHES),
                speech_plugins(wan, self.speech, clip),
            )

        config = wan.transformer_config
        size = (config.out_dim, settings.num_frames, settings.height, settings.width)
        noise = initial_noise(size, clip.seed, config.vae_spatial_factor, wan.noise_device).to(wan.device)
        state = store.state(clip)
        latents = denoise_with_resume(
            wan, noise, schedule, expert, state, self.bars, job.output, condition=condition
        )  # (1, C, F, h, w)
        wan.release_transformers()
        last = None
        if wan.processes.writes:
            bar = self.bars.work("decoding", len(clip.kept), "frame")
            with VideoWriter(store.path(clip), fps=settings.fps, quality=settings.quality) as video:
                last = write_clip(video, decode(wan, latents), clip.kept, max(self.variant.motion_frames, 1), bar)
        if self.variant.hands_latents:
            handover = latents[:, :, -self.variant.motion_latents :].cpu()
        else:
            handover = wan.processes.share(last)
        if wan.processes.writes:
            store.finish(clip, handover)
        return handover

    def condition_of(self, handover: Tensor | None, is_last: bool) -> tuple[Tensor, Tensor | None]:
        """A clip's y, (1, 4 + C, F, h, w), and the CLIP features of the first handed-over frame for the models that
        take them; both on the device.
        """
        variant, num_frames, device = self.variant, self.settings.num_frames, self.wan.device
        if variant.hands_latents:
            return latents_to_condition(self.anchor, handover, latent_frames(num_frames)).to(device), None
        frames = self.reference if handover is None else handover
        with self.wan.vae() as vae, torch.no_grad(), stage("encoding the condition", VAE_ADVICE):
            condition = frames_to_condition(
                ShownVAE(vae, self.bars, "encoding the condition"),
                frames,
                num_frames,
                reference=self.reference if variant.padding == "reference" else None,
                marks_all=variant.mask == "motion_frames",
                end=self.end if is_last else None,
            ).y.to(device)
        return condition, self.wan.encode_images([frames[:, :, 0]], keep=not is_last)

    def control_of(self, clip: Clip) -> Tensor | None:
        """What of the control video a clip is given, as VACE's branch reads it: the frames of the same moments."""
        settings = self.settings
        if settings.reference_video is None:
            return None
        window = range(clip.start, clip.start + settings.num_frames)
        frames = read_control_frames(settings.reference_video, window, settings.height, settings.width)
        return encode_control(self.wan, self.bars, Control(frames, None, ()), Window(0, settings.num_frames))

    def use_svi(self, wanted: bool) -> None:
        """Run with SVI's LoRA, or without; those beside it stay."""
        if wanted != self._has_svi:
            self.wan.use_loras(self.settings if wanted else self.settings.without_svi())
            self._has_svi = wanted

    # -------------------------------------------------------------------------------------------------- metadata

    def progress(self, record: dict) -> dict:
        """What decides every clip's latents, beside the plan; further clips and other prompts may follow later."""
        without = set(self.settings.of_later_clips)
        without -= set() if self.end is None else {"num_clips"}  # which clip is the last one is seen in its frames
        decides = progress(self.wan, self.schedule, record)
        settings = {name: value for name, value in decides["settings"].items() if name not in without}
        return decides | {"settings": settings, "clips": None}

    def metadata(self, job: Job) -> dict:
        """The video's record, before it is made."""
        clips = self.settings.clips(job.seed)
        lengths = [len(clip.kept) for clip in clips]
        before = [self.existing.info.num_frames] if self.existing is not None else [0]
        starts = numpy.cumsum(before + lengths).tolist()
        driven = {"audio": self.speech and self.speech.sha256, "poses": self.poses and self.poses.sha256}
        return describe(self.wan, self.schedule, job) | {
            **{name: sha256 for name, sha256 in driven.items() if sha256 is not None},
            "pictures": self.picture_hashes,
            "clips": [
                {"start": start, "frames": length, "seed": clip.seed, "prompt": clip.prompt}
                for clip, start, length in zip(clips, starts, lengths, strict=False)
            ],
        }


def write_clip(video: VideoWriter, pieces: Iterable[Tensor], kept: range, count: int, bar: Bar) -> Tensor:
    """Write the frames that a clip keeps; returns its last `count`, (1, 3, count, H, W) float32 as they were decoded.

    pieces: all of its frames, as `decode` gives them.
    """
    last: collections.deque[Tensor] = collections.deque(maxlen=count)

    def kept_frames() -> Iterator[Tensor]:
        passed = 0
        for piece in pieces:  # (1, 3, f, H, W)
            last.extend(piece.cpu().split(1, dim=2))
            new = piece[:, :, max(kept.start - passed, 0) : max(kept.stop - passed, 0)]
            passed += piece.shape[2]
            if new.shape[2]:
                yield new

    write_frames(video, kept_frames(), bar)
    return torch.cat(tuple(last), dim=2)
