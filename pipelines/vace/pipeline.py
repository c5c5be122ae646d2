"""Text-to-video under VACE control: the model with its branch, and the maker of videos of any length, by windows."""

import contextlib
import hashlib
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from models.wan.transformer import Plugin, WanTransformer
from pipelines import tiny
from pipelines.clip_plan import Clip
from pipelines.clip_store import ClipStore
from pipelines.conditions import ShownVAE
from pipelines.job_state import JobState
from pipelines.jobs import Job
from pipelines.memory import stage
from pipelines.text_to_video.pipeline import VideoMaker
from pipelines.vace.command import spread_frames
from pipelines.vace.context import (
    cover_resize,
    fit_reference,
    frames_to_clip,
    mask_to_clip,
    noise_with_references,
    vace_context,
    with_known_frames,
)
from pipelines.vace.masks import read_mask
from pipelines.vace.settings import VaceSettings
from pipelines.wan import Wan
from pipelines.windows import Window, plan_windows
from preprocess.image import read_image
from preprocess.video import probe, stream_frames
from preprocess.video_writer import VideoWriter

logger = logging.getLogger("selfsame")


@dataclass(frozen=True)
class Control:
    """What the user gave, at the size and length of the result.

    frames: (T, H, W, 3) uint8, or None: nothing is given, everything is made.
    mask: (T, H, W) uint8, 255 = make, 0 = keep; None: make everything.
    references: pictures (H0, W0, 3) uint8 of any size, in order.
    """

    frames: numpy.ndarray | None
    mask: numpy.ndarray | None
    references: Sequence[numpy.ndarray]

    def hashes(self) -> dict:
        """What identifies the pixels, for the metadata."""

        def sha256(pixels: numpy.ndarray | None) -> str | None:
            return None if pixels is None else hashlib.sha256(numpy.ascontiguousarray(pixels).tobytes()).hexdigest()

        return {"video": sha256(self.frames), "mask": sha256(self.mask), "images": [sha256(r) for r in self.references]}


def read_control(settings: VaceSettings, demonstrate: bool = False) -> Control:
    """Read what the settings name. `demonstrate`: where they name nothing, a control video made on the fly.

    Raises:
        InputError: a file that cannot be decoded, or a coloured mask.
    """
    references = [read_image(picture, "--reference_image") for picture in settings.reference_image]
    if settings.reference_video is None:
        if not (demonstrate and not references):
            return Control(None, None, references)
        logger.info("no --reference_video: the control video of this demonstration is made from assets/face.png")
        return Control(
            tiny.demonstration_control(settings.num_frames, settings.height, settings.width), None, references
        )
    info, size = probe(settings.reference_video), (settings.height, settings.width)
    mask = None if settings.reference_mask is None else read_mask(settings.reference_mask, info.num_frames)
    chosen = list(range(settings.num_frames))
    if settings.resample_control:
        chosen, _ = spread_frames(info.num_frames, info.fps, settings.num_frames)
    # One by one: the video may be much larger, and longer, than what is made of it.
    stream = itertools.islice(stream_frames(settings.reference_video), chosen[-1] + 1)
    wanted = set(chosen)
    frames = numpy.concatenate([cover_resize(f[None], *size).numpy() for i, f in enumerate(stream) if i in wanted])
    if mask is not None:
        mask = cover_resize(mask[chosen][..., None], *size)[..., 0].numpy()
    return Control(frames, mask, references)


class VaceMaker(VideoMaker):
    """Makes jobs under one control. Videos longer than a window go on from the frames made last.

    Args:
        wan, text, faces: as for `VideoMaker`; faces may be empty.
        control: from `read_control`.
    """

    def __init__(self, wan: Wan, text: dict[str, Tensor], faces: Sequence[numpy.ndarray], control: Control):
        super().__init__(wan, text, faces)
        self.control = control
        settings = self.settings
        self.windows = plan_windows(settings.num_frames, settings.window_frames, settings.window_overlap)
        self.pictures = [fit_reference(picture, settings.height, settings.width) for picture in control.references]
        # Of the window that is being made:
        self._window, self._context = self.windows[0], None
        self._known: Tensor | None = None  # its first frames, which exist, (K, H, W, 3) uint8

    def make(self, job: Job) -> Path:
        """As `VideoMaker.make`. Of several windows each finished one's frames are kept in a file of its own until the
        video is whole; they are joined as they are encoded.
        """
        if len(self.windows) == 1:
            return super().make(job)
        started = time.monotonic()
        self.bars.plan(self.schedule.num_steps, len(self.windows), "window")
        metadata = self.metadata(job)
        clips = [
            # Every window has noise of its own: the same would repeat.
            Clip(number, job.seed + number, job.prompt, window.start, (), None, range(window.overlap, window.length))
            for number, window in enumerate(self.windows)
        ]
        store, processes = ClipStore(job.output, self.progress(metadata), clips), self.wan.processes
        writer = VideoWriter(job.output, fps=self.settings.fps, quality=self.settings.quality, metadata=metadata)
        with writer if processes.writes else contextlib.nullcontext():
            done, known = processes.share(store.load() if processes.writes else None)
            if done:
                logger.info("%s: going on after window %d of %d", job.output, done, len(clips))
            for clip in clips[done:]:
                known = self.make_window(job, clip, known, store)
            if processes.writes:
                ran_with = {"attention_backend": self.wan.attention_backend, "memory": self.wan.memory}
                writer.describe(metadata | {"ran_with": ran_with})
                writer.join(store.paths)
        processes.wait()
        if processes.writes:
            store.remove()
            logger.info("%s: %d frames in %.1f s", job.output, writer.num_frames, time.monotonic() - started)
        return job.output

    def make_window(self, job: Job, clip: Clip, known: Tensor | None, store: ClipStore) -> Tensor:
        """One window, from the frames that exist of it to those that exist of the next (K, H, W, 3) uint8."""
        number, processes = clip.index, self.wan.processes
        logger.info("%s: window %d of %d", job.output, number + 1, len(self.windows))
        self.bars.begin_part(number)
        self._window, self._known = self.windows[number], known
        latents = self.denoise(Job(job.prompt, clip.seed, job.output), store.state(clip))
        self.wan.release_transformers()
        if processes.writes:
            following = self.windows[number + 1].overlap if number + 1 < len(self.windows) else 0
            with VideoWriter(store.path(clip), fps=self.settings.fps, quality=self.settings.quality) as writer:
                made = WindowWriter(writer, known, following)
                self.decode(latents, made)
            known = made.last
            store.finish(clip, known)
        return processes.share(known)

    def denoise(self, job: Job, state: JobState) -> Tensor:
        """Clean latents without those of the reference pictures."""
        self._context = self.encode(self._window, self._known)
        return super().denoise(job, state)[:, :, len(self.pictures) :]

    def encode(self, window: Window, known: Tensor | None) -> Tensor:
        """The control context of one window, (1, 96, R + F, h, w)."""
        size = (window.length, self.settings.height, self.settings.width)
        frames, mask = self.control.frames, self.control.mask
        span = slice(window.start, window.stop)
        video = torch.zeros(1, 3, *size) if frames is None else frames_to_clip(frames[span])
        made = torch.ones(1, 1, *size) if mask is None else mask_to_clip(mask[span])
        if known is not None:
            video, made = with_known_frames(video, made, known.numpy())
        device = self.wan.device
        with (
            torch.no_grad(),
            self.wan.vae() as vae,
            stage("encoding the control video", "try a smaller size or --vae_dtype bf16"),
        ):
            shown = ShownVAE(vae, self.bars, "encoding the control video")
            return vace_context(shown, video.to(device), made.to(device), [p.to(device) for p in self.pictures])

    def start(self, job: Job) -> Tensor:
        """Noise with a latent frame for each reference picture."""
        settings = self.settings
        size = (self.wan.transformer_config.out_dim, self._window.length, settings.height, settings.width)
        # Stand-In's own code and the official one order the same noise differently; each is as released.
        with_identity = bool(self.references)
        noise = noise_with_references(size, job.seed, len(self.pictures), with_identity, self.noise_device)
        return noise.to(self.wan.device)

    def plugins(self, index: int, transformer: WanTransformer) -> list[Plugin]:
        control = self.wan.part("vace").plugin(self._context, self.settings.vace_scale)
        return [*super().plugins(index, transformer), control]

    def metadata(self, job: Job) -> dict:
        return super().metadata(job) | {"control": self.control.hashes(), "windows": len(self.windows)}


class WindowWriter:
    """Writes the frames of a window that are new, and remembers the last ones.

    Args:
        writer: of the new frames.
        known: (K, H, W, 3) uint8, the window's first frames, which are written already; or None.
        count: how many to remember; the known ones as they were written, not as they are decoded again.
    """

    def __init__(self, writer: VideoWriter, known: Tensor | None, count: int):
        self.writer, self.path, self.count = writer, writer.path, count
        self._last = [] if known is None else list(known.numpy())
        self._skip = len(self._last)

    def write(self, frames: numpy.ndarray) -> None:
        new = frames[self._skip :]
        self._skip -= len(frames) - len(new)
        if len(new):
            self.writer.write(new)
            self._last = [*self._last, *new]
            self._last = self._last[len(self._last) - min(len(self._last), self.count) :]

    @property
    def last(self) -> Tensor:
        """(count, H, W, 3) uint8"""
        return torch.from_numpy(numpy.array(self._last, numpy.uint8))
