"""Text-to-video under VACE control, of any length by windows."""

import collections
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from models.wan.schedulers import get_schedule
from models.wan.transformer import WanTransformer
from pipelines.clip_plan import Clip
from pipelines.clip_store import ClipStore
from pipelines.denoise import Expert
from pipelines.experts import guided_by_text
from pipelines.job_state import JobState
from pipelines.jobs import Job
from pipelines.stand_in import Identities
from pipelines.vace.context import (
    fit_reference,
    noise_with_references,
)
from pipelines.vace.control import Control, encode_control
from pipelines.video import decode, denoise_with_resume, describe, open_video, progress, ran_with, write_frames
from pipelines.wan import Wan
from pipelines.windows import Window, plan_windows
from preprocess.progress_bars import Bar, ProgressBars
from preprocess.video_writer import VideoWriter, frames_to_uint8

logger = logging.getLogger("selfsame")


class VaceMaker:
    """Makes jobs under one control. Videos longer than a window go on from the frames made last.

    Args:
        wan: the model.
        text: prompt -> states, of every prompt and the negative prompt.
        faces: of photos, as `prepare_faces` gives them; may be empty.
        control: from `read_control`.
    """

    def __init__(self, wan: Wan, text: dict[str, Tensor], faces: Sequence[numpy.ndarray], control: Control):
        self.wan, self.text, self.control, self.settings = wan, text, control, wan.settings
        self.bars = ProgressBars(shown=wan.processes.rank == 0)
        self.identities = Identities(wan, faces)
        settings = self.settings
        steps, shift = settings.num_inference_steps, settings.shift
        self.schedule = get_schedule(settings.solver, steps, shift, timesteps=settings.timesteps)
        self.windows = plan_windows(settings.num_frames, settings.window_frames, settings.window_overlap)
        self.pictures = [fit_reference(picture, settings.height, settings.width) for picture in control.references]

    def make(self, job: Job) -> Path:
        """A video of one window goes into its file as it is decoded. Of several, each finished one's frames are kept in
        a file of its own until the video is whole; they are joined as they are encoded.
        """
        wan, windows = self.wan, self.windows
        self.bars.plan(self.schedule.num_steps, len(windows), "window")
        record = self.metadata(job)
        identity = progress(wan, self.schedule, record)
        if len(windows) == 1:
            state = JobState(job.output, identity)
            with open_video(wan, job.output, record) as video:
                latents = self.denoise_window(job, windows[0], job.seed, None, state)
                if video is not None:
                    video.describe(record | ran_with(wan))
                    write_frames(video, decode(wan, latents), self.decoding(windows[0]))
            state.remove()
            return job.output

        clips = [
            # Every window has noise of its own: the same would repeat.
            Clip(number, job.seed + number, job.prompt, window.start, (), None, range(window.overlap, window.length))
            for number, window in enumerate(windows)
        ]
        store = ClipStore(job.output, identity, clips)
        with open_video(wan, job.output, record) as video:
            done, known = wan.processes.share(store.load() if video is not None else None)
            if done:
                logger.info("%s: going on after window %d of %d", job.output, done, len(clips))
            for clip in clips[done:]:
                known = self.make_window(job, clip, known, store)
            if video is not None:
                video.describe(record | ran_with(wan))
                video.join(store.paths)
        if wan.processes.writes:
            store.remove()
        return job.output

    def make_window(self, job: Job, clip: Clip, known: Tensor | None, store: ClipStore) -> Tensor:
        """One window, from the frames that exist of it to those that exist of the next, (K, H, W, 3) uint8."""
        wan, number = self.wan, clip.index
        window = self.windows[number]
        logger.info("%s: window %d of %d", job.output, number + 1, len(self.windows))
        self.bars.begin_part(number)
        latents = self.denoise_window(job, window, clip.seed, known, store.state(clip))
        if wan.processes.writes:
            following = self.windows[number + 1].overlap if number + 1 < len(self.windows) else 0
            with VideoWriter(store.path(clip), fps=self.settings.fps, quality=self.settings.quality) as video:
                known = write_window(video, decode(wan, latents), known, following, self.decoding(window))
            store.finish(clip, known)
        return wan.processes.share(known)

    def denoise_window(self, job: Job, window: Window, seed: int, known: Tensor | None, state: JobState) -> Tensor:
        """Clean latents of a window, without those of the reference pictures."""
        wan, settings, schedule = self.wan, self.settings, self.schedule
        context = encode_control(wan, self.bars, self.control, window, known, self.pictures)  # (1, 96, R + F, h, w)
        size = (wan.transformer_config.out_dim, window.length, settings.height, settings.width)
        # Stand-In's own code and the official one order the same noise differently; each is as released.
        with_identity = bool(self.identities.references)
        noise = noise_with_references(size, seed, len(self.pictures), with_identity, wan.noise_device)
        texts = self.text[job.prompt], self.text[settings.negative_prompt]

        def expert(number: int, transformer: WanTransformer) -> Expert:
            plugins = [wan.part("vace").plugin(context, settings.vace_scale)]
            return guided_by_text(
                wan, schedule, number, transformer, *texts, plugins=plugins, identities=self.identities
            )

        latents = denoise_with_resume(
            wan, noise.to(wan.device), schedule, expert, state, self.bars, job.output, identities=self.identities
        )  # (1, C, R + F, h, w)
        wan.release_transformers()
        return latents[:, :, len(self.pictures) :]

    def decoding(self, window: Window) -> Bar:
        return self.bars.work("decoding", window.length - window.overlap, "frame")

    def metadata(self, job: Job) -> dict:
        """The video's record, before it is made."""
        faces = dict(zip(self.settings.stand_in_photos, self.identities.hashes, strict=True))
        control = {"control": self.control.hashes(), "windows": len(self.windows)}
        return describe(self.wan, self.schedule, job, faces) | control


def write_window(video: VideoWriter, pieces: Iterable[Tensor], known: Tensor | None, count: int, bar: Bar) -> Tensor:
    """Write the frames of a window that are new; returns its last `count`, (count, H, W, 3) uint8: the known ones as
    they were written, not as they are decoded again.

    Args:
        pieces: all of its frames, as `decode` gives them.
        known: (K, H, W, 3) uint8, the window's first frames, which are written already; or None.
    """
    last = collections.deque([] if known is None else list(known.numpy()), maxlen=count)
    skipped = 0 if known is None else len(known)

    def new_frames() -> Iterator[numpy.ndarray]:
        passed = 0
        for frames in map(frames_to_uint8, pieces):  # (f, H, W, 3)
            new = frames[max(skipped - passed, 0) :]
            passed += len(frames)
            last.extend(new)
            if len(new):
                yield new

    write_frames(video, new_frames(), bar)
    return torch.from_numpy(numpy.array(last, numpy.uint8))
