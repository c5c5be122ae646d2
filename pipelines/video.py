"""One video, from noise to its file: functions that each task's `make` puts together.

record = describe(wan, schedule, job)
state = JobState(job.output, progress(wan, schedule, record))
with open_video(wan, job.output, record) as video:                 # None in a process that does not write
    latents = denoise_with_resume(wan, noise, schedule, expert, state, bars, job.output)
    if video is not None:
        video.describe(record | ran_with(wan))
        write_frames(video, decode(wan, latents), bar)
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy
import torch
from torch import Tensor

from errors import WeightsError
from models.wan.schedulers import Schedule, make_solver
from models.wan.vae import Tiling
from pipelines.denoise import PinnedFrames, Step, denoise
from pipelines.experts import MakeExpert, switch_experts
from pipelines.job_state import JobState
from pipelines.jobs import Job
from pipelines.memory import stage
from pipelines.record import progress_of
from pipelines.recovery import recover
from pipelines.stand_in import Identities
from pipelines.wan import Wan
from preprocess.progress_bars import Bar, ProgressBars
from preprocess.side_file import write_side_picture
from preprocess.video_writer import VideoWriter, frames_to_uint8

logger = logging.getLogger("selfsame")

BLANK = 1.0  # standard deviation of 8-bit pixels below which a whole video counts as blank


# ----------------------------------------------------------------------------------------------------------- the file


@contextlib.contextmanager
def open_video(
    wan: Wan, path: Path, record: dict, *, audio_path: Path | str | None = None, audio_start: float = 0.0
) -> Iterator[VideoWriter | None]:
    """The file of a video, which is whole afterwards or not there; another run of the same waits outside. None in a
    process that does not write; all of them go on when it is in place.

    Args:
        record: what made it, as `describe` gives it.
        audio_path: where its sound comes from, and
        audio_start: the seconds into that at which the video begins.
    """
    started = time.monotonic()
    settings, writes = wan.settings, wan.processes.writes
    writer = VideoWriter(
        path,
        fps=settings.fps,
        quality=settings.quality,
        metadata=record,
        audio_path=audio_path,
        audio_start=audio_start,
    )
    with writer if writes else contextlib.nullcontext() as video:
        yield video
    wan.processes.wait()
    if writes:
        logger.info("%s: %d frames in %.1f s", path, writer.num_frames, time.monotonic() - started)


def describe(wan: Wan, schedule: Schedule, job: Job, faces: Mapping[str, str] | None = None) -> dict:
    """What makes this video this video: enough to make it again. `settings` in it is what --config accepts.

    faces: photo -> SHA-256 of the prepared pixels, of those that Stand-In sees.
    """
    sigmas = [round(sigma, 6) for sigma in schedule.sigmas.tolist()]
    return wan.describe(job.prompt, job.seed) | {"faces": dict(faces or {}), "sigmas": sigmas}


def ran_with(wan: Wan) -> dict:
    """What may have been changed on the way, to get through: to be added to the record."""
    return {"ran_with": {"attention_backend": wan.attention_backend, "memory": wan.memory}}


def progress(wan: Wan, schedule: Schedule, record: dict) -> dict:
    """What of a record decides the latents: saved progress counts only under the same."""
    decides = progress_of(record, wan.weights(), wan.encodes_pictures)
    return decides | {"num_steps": schedule.num_steps, "chosen": wan.chosen(record)}


# ---------------------------------------------------------------------------------------------------------- the steps


def denoise_with_resume(
    wan: Wan,
    noise: Tensor,
    schedule: Schedule,
    make_expert: MakeExpert,
    state: JobState,
    bars: ProgressBars,
    output: Path,
    *,
    identities: Identities | None = None,
    condition: Tensor | None = None,
    pinned: PinnedFrames | None = None,
    after_step: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Noise to clean latents (1, C, F, h, w), from where an interrupted run stopped; with less memory after running out
    of it.

    Args:
        noise, schedule, condition, pinned, after_step: as of `denoise`.
        make_expert: as of `switch_experts`.
        state: where finished steps are saved.
        bars: of the run, which show them.
        output: of the video, which names them; a preview goes beside it.
        identities: that `make_expert` takes its identity from, to be dropped after a failure.
    """
    keeps_state = wan.settings.step_cache == "none"  # what a step cache remembers is too large to save each step
    bar = bars.steps(output.name)
    fresh = make_solver(schedule).state_dict()
    while True:
        resume = wan.processes.share(state.load(fresh) if keeps_state else None)
        if resume is not None and resume[0] > bar.done:
            logger.info("%s: going on after step %d of %d", output, resume[0], schedule.num_steps)
        bar.start_at(resume[0] if resume else 0)

        def on_step(step: Step) -> None:
            if keeps_state and wan.processes.writes:
                state.save(step)
            bar.advance()
            if wan.settings.preview and wan.processes.writes:
                preview(wan, output, step)

        try:
            with bar:
                return denoise(
                    noise,
                    schedule,
                    switch_experts(wan, schedule, make_expert),
                    condition=condition,
                    pinned=pinned,
                    after_step=after_step,
                    on_step=on_step,
                    resume=resume,
                )
        except RuntimeError as error:
            recover(wan, error, identities)


def preview(wan: Wan, output: Path, step: Step) -> None:
    """The model's present guess of the middle frame, decoded alone, as NAME.preview.png."""
    middle = step.clean.shape[2] // 2
    with wan.vae() as vae:
        frame = vae.decode(step.clean[:, :, middle : middle + 1])
    write_side_picture(output.with_suffix(".preview.png"), frames_to_uint8(frame)[0], wan.settings.overwrite)


# --------------------------------------------------------------------------------------------------------- the frames


def decode(wan: Wan, latents: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Clean latents (1, C, F, h, w), or their frames one by one, to frames in pieces (1, 3, f, H, W) in [-1, 1]: first
    one frame, then four a latent frame. The whole video is never in memory.

    Raises:
        WeightsError: NaN or infinity among them; written, they would be black.
    """
    options = {
        "tiling": Tiling() if wan.settings.tiled else None,
        "cache_device": "cpu" if wan.memory == "sequential" else None,
    }
    with wan.vae() as vae:
        for frames in vae.decode_stream(latents, **options):
            if not torch.isfinite(frames).all():
                raise WeightsError(f"the VAE returned NaN or infinity ({wan.vae_dtype}); try --vae_dtype fp32")
            yield frames


def write_frames(video: VideoWriter, pieces: Iterable[Tensor | numpy.ndarray], bar: Bar) -> None:
    """Write frames as they are made, in pieces as `decode` gives them or (f, H, W, 3) uint8.

    Raises:
        ResourceError: there is no memory to decode in.
    """
    deviations = []
    with stage("decoding", "try --tiled or --vae_dtype bf16"), bar:
        for frames in pieces:
            pixels = frames_to_uint8(frames)  # (f, H, W, 3)
            deviations.append(float(pixels.std()))
            video.write(pixels)
            bar.advance(len(pixels))
    if max(deviations) < BLANK:
        logger.warning("%s: all frames are one flat colour; try --dtype fp32 or --attention_backend native", video.path)
