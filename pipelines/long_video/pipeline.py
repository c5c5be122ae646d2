"""A long video of one scene or story: clips chained by Stable Video Infinity's rules, made and written one by one.

For each clip of the plan (`clip_plan.py`): the condition from what the clip before hands over, the denoise loop, the
kept frames streamed into the clip's own file (`clip_store.py`). At the end the files are joined as they are encoded.
Memory does not grow with the video, nothing is encoded twice, and an interrupted run goes on where it stopped.

Source: Stable-Video-Infinity `test_svi.py`; branch svi_wan22 `inference_svi_2.0.py`, `inference_svi_2.0_pro.py`.
"""

import collections
import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from models.pose_embedder import PoseTokens
from models.wan.slots import Plugin
from models.wan.transformer import WanTransformer
from pipelines.clip_plan import Clip
from pipelines.clip_store import ClipStore
from pipelines.conditions import ShownVAE, latent_frames
from pipelines.denoise import Expert
from pipelines.jobs import Job
from pipelines.long_video.clip_conditions import (
    crop_to_shape,
    frames_to_condition,
    latents_to_condition,
    picture_to_frame,
)
from pipelines.long_video.dance import embed_poses, open_poses
from pipelines.long_video.settings import LongVideoSettings
from pipelines.long_video.talk import BRANCHES, hear, open_speech
from pipelines.memory import stage
from pipelines.text_to_video.pipeline import VideoMaker
from pipelines.wan import Wan
from preprocess.image import read_image
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


class LongVideoMaker(VideoMaker):
    """Makes the long video of each job.

    Speech and poses drive its clips where the settings name them, both at once if they do.

    Args:
        wan: the model.
        text: states of every prompt, with its prefix, and of the negative prompt.
        picture: (H, W, 3) uint8, the first frame, and what later clips are kept close to.
        existing: the video that is extended; None starts from the picture.
    """

    settings: LongVideoSettings

    def __init__(self, wan: Wan, text: dict[str, Tensor], picture: numpy.ndarray, existing: Existing | None = None):
        super().__init__(wan, text, faces=[])
        settings = self.settings
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
        self.existing = existing
        if existing is not None and existing.info.has_audio:
            self.audio_path, self.audio_start = existing.path, existing.info.start
        self.first_handed: Tensor | None = None  # what the first clip goes on from, of a video that is extended
        if self.variant.hands_latents or existing is not None:
            with wan.vae() as vae, torch.no_grad(), stage("encoding the picture", VAE_ADVICE):
                if self.variant.hands_latents:
                    self.anchor = vae.encode(self.reference).cpu()  # (1, C, 1, h, w), once for all clips
                if existing is not None and self.variant.hands_latents:
                    self.first_handed = vae.encode(existing.end)[:, :, -self.variant.motion_latents :].cpu()
                elif existing is not None:
                    self.first_handed = existing.end
        self.speech = open_speech(wan) if settings.audio_path is not None else None
        self.poses = open_poses(wan) if settings.pose_path is not None else None
        if self.speech is not None:
            self.audio_path, self.branches = settings.audio_path, BRANCHES
        self._has_svi = True  # whether SVI's LoRA is in the weights
        # Of the clip that is being made:
        self.clip: Clip | None = None
        self._pose: PoseTokens | None = None
        self._condition: Tensor | None = None  # y, (1, 4 + C, F, h, w)
        self._last: Tensor | None = None  # its last frames, (1, 3, n, H, W)

    # ------------------------------------------------------------------------------------------------- the video

    def make(self, job: Job) -> Path:
        """Make every clip that is not there yet, and join them."""
        started = time.monotonic()
        settings, processes = self.settings, self.wan.processes
        self.use_svi(True)
        clips = settings.clips(job.seed)
        self.bars.plan(self.schedule.num_steps, len(clips), "clip")
        metadata = self.metadata(job)
        store = ClipStore(job.output, self.progress(metadata), clips)
        writer = VideoWriter(
            job.output,
            fps=settings.fps,
            quality=settings.quality,
            metadata=metadata,
            audio_path=self.audio_path,
            audio_start=self.audio_start,
        )
        with writer if processes.writes else contextlib.nullcontext():
            done, handed = processes.share(store.load() if processes.writes else None)
            if done:
                logger.info("%s: going on after clip %d of %d", job.output, done, len(clips))
            for clip in clips[done:]:
                handed = self.make_clip(job, clip, self.first_handed if clip.index == 0 else handed, store)
            if processes.writes:
                ran_with = {"attention_backend": self.wan.attention_backend, "memory": self.wan.memory}
                writer.describe(metadata | {"ran_with": ran_with})
                videos = store.paths
                if self.existing is not None:
                    videos = [self.existing.in_front_of(videos[0], store.folder), *videos]
                writer.join(videos)
        processes.wait()
        if processes.writes:
            store.remove()
            logger.info("%s: %d frames in %.1f s", job.output, writer.num_frames, time.monotonic() - started)
        return job.output

    def make_clip(self, job: Job, clip: Clip, handed: Tensor | None, store: ClipStore) -> Tensor:
        """One clip, from what the one before hands over to what the next is handed."""
        logger.info("%s: clip %d of %d: %s", job.output, clip.index + 1, len(store.clips), clip.prompt[:80])
        self.clip = clip
        self.bars.begin_part(clip.index)
        self.use_svi(clip.index > 0 or not self.settings.first_clip_without_lora)
        self.prepare_condition(clip, handed, is_last=clip is store.clips[-1])
        self._pose = embed_poses(self.wan, self.poses, clip) if self.poses is not None else None
        latents = self.denoise(Job(clip.prompt, clip.seed, job.output), store.state(clip))
        self.wan.release_transformers()
        if self.wan.processes.writes:
            with VideoWriter(store.path(clip), fps=self.settings.fps, quality=self.settings.quality) as writer:
                self.decode(latents, writer)
        if self.variant.hands_latents:
            handed = latents[:, :, -self.variant.motion_latents :].cpu()
        else:
            handed = self.wan.processes.share(self._last)
        if self.wan.processes.writes:
            store.finish(clip, handed)
        return handed

    def prepare_condition(self, clip: Clip, handed: Tensor | None, is_last: bool) -> None:
        """y, and the CLIP features of the first handed-over frame for the models that take them."""
        variant, num_frames, device = self.variant, self.settings.num_frames, self.wan.device
        if variant.hands_latents:
            self._condition = latents_to_condition(self.anchor, handed, latent_frames(num_frames)).to(device)
            return
        frames = self.reference if handed is None else handed
        with self.wan.vae() as vae, torch.no_grad(), stage("encoding the condition", VAE_ADVICE):
            self._condition = frames_to_condition(
                ShownVAE(vae, self.bars, "encoding the condition"),
                frames,
                num_frames,
                reference=self.reference if variant.padding == "reference" else None,
                marks_all=variant.mask == "motion_frames",
                end=self.end if is_last else None,
            ).y.to(device)
        self.image_features = self.wan.encode_images([frames[:, :, 0]], keep=not is_last)

    def conditions(self) -> dict:
        return {"condition": self._condition}

    def plugins(self, index: int, transformer: WanTransformer) -> list[Plugin]:
        return [*super().plugins(index, transformer), *([] if self._pose is None else [self._pose])]

    def expert(self, job: Job, index: int, transformer: WanTransformer) -> Expert:
        expert = super().expert(job, index, transformer)
        return expert if self.speech is None else hear(self.wan, self.speech, self.clip, expert)

    def num_decoded(self, latents: Tensor) -> int:
        return len(self.clip.kept)

    def frames(self, vae, latents: Tensor) -> Iterator[Tensor]:
        """The frames that the clip keeps; its last ones are put by for the next clip, in float32."""
        done, last, kept = 0, [], self.clip.kept
        for piece in super().frames(vae, latents):  # (1, 3, f, H, W)
            last = [*last, *piece.cpu().split(1, dim=2)][-max(self.variant.motion_frames, 1) :]
            new = piece[:, :, max(kept.start - done, 0) : max(kept.stop - done, 0)]
            done += piece.shape[2]
            if new.shape[2]:
                yield new
        self._last = torch.cat(last, dim=2)

    def use_svi(self, wanted: bool) -> None:
        """Run with SVI's LoRA, or without; those beside it stay."""
        if wanted != self._has_svi:
            self.wan.use_loras(self.settings if wanted else self.settings.without_svi())
            self._has_svi = wanted

    # -------------------------------------------------------------------------------------------------- metadata

    def progress(self, metadata: dict) -> dict:
        """What decides every clip's latents, beside the plan; further clips and other prompts may follow later."""
        without = set(self.settings.of_later_clips)
        without -= set() if self.end is None else {"num_clips"}  # which clip is the last one is seen in its frames
        progress = super().progress(metadata)
        settings = {name: value for name, value in progress["settings"].items() if name not in without}
        return progress | {"settings": settings, "clips": None}

    def metadata(self, job: Job) -> dict:
        metadata = super().metadata(job)
        clips = self.settings.clips(job.seed)
        lengths = [len(clip.kept) for clip in clips]
        before = [self.existing.info.num_frames] if self.existing is not None else [0]
        starts = numpy.cumsum(before + lengths).tolist()
        driven = {"audio": self.speech and self.speech.sha256, "poses": self.poses and self.poses.sha256}
        return metadata | {
            **{name: sha256 for name, sha256 in driven.items() if sha256 is not None},
            "pictures": self.picture_hashes,
            "clips": [
                {"start": start, "frames": length, "seed": clip.seed, "prompt": clip.prompt}
                for clip, start, length in zip(clips, starts, lengths, strict=False)
            ],
        }
