"""The photo's face onto a video: paste it roughly, noise the result, denoise it with the identity, put it back.

Video to video with Stand-In (its pipelines/wan_video_face_swap.py). What upstream does is kept as functions of the same
numbers (`sampled_mask`, `keep_background`); what the pipeline does by default is better where upstream's leaves marks:

* Only the stretches that show the face are generated (`plan_segments`); every other frame passes through untouched.
* A latent frame stands for four frames, so its mask holds the face of all four; upstream samples one of them, and a
  moving face leaves its outline behind.
* Stretches longer than one clip are denoised in overlapping windows of one sample (`plan_windows`): no seams in time.
* Windows never span a cut: the model would blend one shot into the next.
* The face is put into the input's own pixels at the end, its colours matched, unless `no_composite` asks for what the
  model drew. With `force_background_consistency` the background is also held while denoising.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from errors import InputError, UsageError
from models.wan.schedulers import Schedule, add_noise, get_schedule
from models.wan.transformer import WanTransformer
from models.wan.vae import Tiling
from pipelines.conditions import initial_noise, latent_frames
from pipelines.denoise import Expert
from pipelines.experts import guided_by_text
from pipelines.face_swap.settings import FaceSwapSettings
from pipelines.job_state import JobState
from pipelines.jobs import Job
from pipelines.stand_in import Identities
from pipelines.text_to_video.pipeline import cut_face
from pipelines.video import decode, denoise_with_resume, describe, open_video, progress, ran_with, write_frames
from pipelines.wan import Wan
from pipelines.windows import plan_windows
from preprocess.face import BiSeNetParser, FaceImage, load_parser
from preprocess.face_detection import Face, load_detector
from preprocess.face_paste import (
    composite,
    fill_gaps,
    find_cuts,
    follow_face,
    pad_to_multiple,
    paste_face,
    soften,
    source_keypoints,
)
from preprocess.image import read_image
from preprocess.progress_bars import ProgressBars
from preprocess.side_file import write_side_picture
from preprocess.video import VideoInfo, read_frames
from preprocess.video_writer import frames_to_uint8

logger = logging.getLogger("selfsame")

# ---------------------------------------------------------------------------------------------------------------------
# Latents and masks


def frames_to_video(frames: numpy.ndarray) -> Tensor:
    """(F, H, W, 3) uint8 -> (1, 3, F, H, W) in [-1, 1] float32."""
    return (torch.from_numpy(numpy.array(frames)).float() * (2 / 255) - 1).permute(3, 0, 1, 2)[None]


def sampled_mask(masks: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Upstream's mask of the latents: one frame a latent frame, one pixel a cell, on the scale -1 to 1.

    Args:
        masks: (F, H, W) uint8.
        size: latent frames, rows and columns.

    Returns:
        (1, 1, *size) float32; upstream's hard mask is where it exceeds 0.5.
    """
    return F.interpolate(masks[None, None].float() * (2 / 255) - 1, size=tuple(size), mode="nearest-exact")


def keep_background(sample: Tensor, clean: Tensor, noise: Tensor, mask: Tensor, sigma: float) -> Tensor:
    """Outside the mask the input video, noised to `sigma`, where the sample is after the step."""
    return (1 - mask) * add_noise(clean, noise, sigma) + mask * sample


def face_mask(masks: Tensor, cell: int) -> Tensor:
    """Cells in which any pixel of any frame of the group shows the face: (F', H, W) uint8 -> (1, 1, F', h, w) of 0, 1.

    Args:
        masks: one for each latent frame, already the maximum over its frames (`frame_groups`).
        cell: pixels of a latent cell on a side.
    """
    return F.max_pool2d((masks > 0).float(), cell)[None, None]


# ---------------------------------------------------------------------------------------------------------------------
# Plans


@dataclass(frozen=True)
class Segment:
    """Frames start to stop of the input, of one shot, all with the face; first_latent: where they are in the sample."""

    start: int
    stop: int
    first_latent: int

    @property
    def latents(self) -> slice:
        """4n+1 frames make n+1 latent frames; the last frame is repeated until the number is right."""
        return slice(self.first_latent, self.first_latent + self.num_latents)

    @property
    def num_latents(self) -> int:
        return latent_frames(self.stop - self.start + -(self.stop - self.start - 1) % 4)


def plan_segments(has_face: Sequence[bool], cuts: Sequence[int] = ()) -> list[Segment]:
    """The stretches of a video that show the face, each within one shot. What lies between them passes through.

    cuts: the frames with which a new shot begins.
    """
    segments: list[Segment] = []
    start = None
    for i, shown in enumerate([*has_face, False]):
        if start is not None and (not shown or i in cuts):
            segments.append(Segment(start, i, segments[-1].latents.stop if segments else 0))
            start = None
        if shown and start is None:
            start = i
    return segments


def frame_groups(count: int) -> list[range]:
    """The frames each latent frame stands for: {0}, {1..4}, {5..8}, …; the last may be short."""
    return [range(1), *(range(i, min(i + 4, count)) for i in range(1, count, 4))]


def swap_schedule(settings: FaceSwapSettings) -> Schedule:
    """The sampling of the part of the noise range that `denoising_strength` leaves.

    Euler runs all its steps over the shorter range, as upstream; tables of the other solvers and a distilled model's
    own steps lose their first ones.

    Raises:
        UsageError: no step is left.
    """
    strength, steps = settings.denoising_strength, settings.num_inference_steps
    options = {"strength": strength} if settings.solver == "euler" and settings.timesteps is None else {}
    if settings.timesteps is not None:
        options = {"start_index": sum(t > 1000 * strength for t in settings.timesteps)}
    elif settings.solver != "euler":
        options = {"start_index": steps - max(round(steps * strength), 1)}
    try:
        return get_schedule(settings.solver, steps, settings.shift, timesteps=settings.timesteps, **options)
    except ValueError as error:
        raise UsageError(f"--denoising_strength {strength:g} lies below all --timesteps; raise it") from error


@dataclass(frozen=True)
class WindowedExpert:
    """An expert that sees a long sample through windows; where they overlap their velocities are mixed."""

    expert: Expert
    windows: list[slice]

    def velocity(self, sample: Tensor, timestep: Tensor, step: int, num_steps: int, condition=None) -> Tensor:
        assert condition is None
        total, weights = torch.zeros_like(sample), torch.zeros_like(sample[:1, :1, :, :1, :1])
        for window in self.windows:
            part = sample[:, :, window]
            velocity = self.expert.velocity(part.contiguous(), timestep, step, num_steps)
            length = part.shape[2]
            ramp = torch.arange(1, length + 1, device=sample.device)
            weight = torch.minimum(ramp, ramp.flip(0)).to(sample.dtype)[None, None, :, None, None]  # 1 2 3 … 3 2 1
            total[:, :, window] += weight * velocity
            weights[:, :, window] += weight
        return total / weights


# ---------------------------------------------------------------------------------------------------------------------
# The video


class SwapVideo:
    """The input video with a face to put on it.

    Args:
        frames: (F, H, W, 3) uint8.
        faces: of each frame the face to replace, or None.
        cuts: the frames with which a new shot begins.
        face: the photo's.
        source: its five points, or None.
        parser: for box mode.
        multiple: of pixels that the model's sides must be.
    """

    def __init__(
        self, frames, faces: list[Face | None], cuts: Sequence[int], face: FaceImage, source, parser, multiple: int
    ):
        self.frames, self.faces, self.face, self.source = frames, faces, face, source
        self.parser, self.multiple = parser, multiple
        self.segments = plan_segments([face is not None for face in faces], cuts)

    def pasted(self, segment: Segment) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
        """By groups of a segment: the frames with the face pasted (f, H', W', 3), padded to the model's sides and, at
        the end, to a whole group; and what of them may change (H', W') uint8, one soft mask for the group.
        """
        for group in frame_groups(segment.stop - segment.start):
            indices = [segment.start + i for i in group]
            pairs = [
                paste_face(self.frames[i], self.faces[i], self.face.rgba, self.source, self.parser) for i in indices
            ]
            frames = [pad_to_multiple(frame, self.multiple) for frame, _ in pairs]
            if group.start > 0:
                frames += [frames[-1]] * (4 - len(frames))
            mask = soften(numpy.max([mask for _, mask in pairs], axis=0))
            yield numpy.stack(frames), pad_to_multiple(mask[..., None], self.multiple)[..., 0]


def open_swap_video(settings: FaceSwapSettings, info: VideoInfo, multiple: int, output: Path | None) -> SwapVideo:
    """Read the photo and the video and find the faces. The photo's face goes to NAME.face0.png beside `output`.

    Raises:
        InputError: the photo or the video cannot be read, or shows no face.
        UsageError: there is no such face.
    """
    photo = settings.ip_image[0]
    picture = read_image(photo, "--ip_image")
    detector, parser = load_detector(settings.antelopv2_path), load_parser(settings.face_parser_path)
    face = cut_face(settings, photo, picture, detector, parser)
    if output is not None:
        write_side_picture(output.with_suffix(".face0.png"), face.rgb, settings.overwrite)

    name = settings.input_video
    frames = read_frames(name)  # (F, H, W, 3)
    detections = []
    with ProgressBars(shown=output is not None).work("finding faces", len(frames), "frame") as bar:
        for frame in frames:
            detections.append(detector(frame))
            bar.advance()
    cuts = find_cuts(frames)
    if cuts:
        logger.info("%s: new shots begin at frames %s", name, ", ".join(map(str, cuts)))
    faces = fill_gaps(follow_face(detections, settings.target_face_index, cuts), cuts)
    shown = sum(face is not None for face in faces)
    if not shown:
        raise InputError(
            f"--input_video {name}: no face found in its {len(frames)} frames ({info.width}x{info.height}); give a "
            "video with a near frontal face of at least some 40 pixels"
        )
    if (most := max(map(len, detections))) > 1 and settings.target_face_index is None:
        logger.warning(
            "%s shows up to %d faces at once; the largest is replaced; choose with --target_face_index", name, most
        )
    logger.info("%s: the face is in %d of %d frames; the others pass through", name, shown, len(frames))
    if isinstance(parser, BiSeNetParser):  # on frames upstream feeds it what it was trained on
        parser = load_parser(settings.face_parser_path, "imagenet")
    return SwapVideo(frames, faces, cuts, face, source_keypoints(face.rgba, detector), parser, multiple)


def encode_pasted(wan: Wan, video: SwapVideo, bars: ProgressBars) -> tuple[Tensor, list[numpy.ndarray]]:
    """The video with the face pasted: clean latents (1, C, all segments, h, w) on the CPU, and for each latent frame
    what of it may change, (H', W') uint8.
    """
    masks: list[numpy.ndarray] = []
    clean = []

    def clips(segment: Segment) -> Iterator[Tensor]:
        for frames, mask in video.pasted(segment):
            masks.append(mask)
            yield frames_to_video(frames)

    tiling = Tiling() if wan.settings.tiled else None
    count = sum(segment.stop - segment.start for segment in video.segments)
    with wan.vae() as vae, bars.work("encoding the video", count, "frame") as bar:
        for segment in video.segments:
            for latents in vae.encode_stream(clips(segment), tiling=tiling):
                clean.append(latents.cpu())
                bar.advance(min(4 * latents.shape[2], count - bar.done))
    return torch.cat(clean, dim=2), masks


class FaceSwapMaker:
    """Makes the swapped video of each job.

    Args:
        wan: the model.
        text: prompt -> states, of every prompt and the negative prompt.
        video: from `open_swap_video`.
        info: of the input file.
    """

    def __init__(self, wan: Wan, text: dict[str, Tensor], video: SwapVideo, info: VideoInfo):
        self.wan, self.text, self.video, self.settings = wan, text, video, wan.settings
        self.bars = ProgressBars(shown=wan.processes.rank == 0)
        self.identities = Identities(wan, [video.face.rgb])
        self.schedule = swap_schedule(self.settings)
        self.audio_path, self.audio_start = self.settings.input_video if info.has_audio else None, info.start
        self.windows = plan_views(video.segments, latent_frames(self.settings.num_frames))
        if len(self.windows) > 1 and self.settings.step_cache != "none":
            raise UsageError(
                f"--step_cache {self.settings.step_cache}: this video takes {len(self.windows)} windows, a step cache "
                "follows one; leave it out, or cut the video"
            )
        with open(self.settings.input_video, "rb") as file:
            self.video_hash = hashlib.file_digest(file, "sha256").hexdigest()
        self.clean, self.masks = encode_pasted(wan, video, self.bars)
        cell = wan.transformer_config.vae_spatial_factor
        self.face_mask = face_mask(torch.from_numpy(numpy.stack(self.masks)), cell)  # (1, 1, all segments, h, w)

    def make(self, job: Job) -> Path:
        """Denoise the pasted video from the strength on, decode, put the face into the input's frames."""
        wan, settings, schedule = self.wan, self.settings, self.schedule
        self.bars.plan(schedule.num_steps)
        record = self.metadata(job)
        state = JobState(job.output, progress(wan, schedule, record))
        noise = noise_like(self.clean, job.seed, wan.transformer_config.vae_spatial_factor, wan.noise_device)
        noised = add_noise(self.clean, noise, schedule.sigmas[0].item())  # (1, C, all segments, h, w)
        texts = self.text[job.prompt], self.text[settings.negative_prompt]

        def expert(number: int, transformer: WanTransformer) -> Expert | WindowedExpert:
            one = guided_by_text(wan, schedule, number, transformer, *texts, identities=self.identities)
            return one if len(self.windows) == 1 else WindowedExpert(one, self.windows)

        def background(step: int, sample: Tensor) -> Tensor:
            clean, drawn, mask = (kept.to(sample) for kept in (self.clean, noise, self.face_mask))
            return keep_background(sample, clean, drawn, mask, schedule.sigmas[step + 1].item())

        with open_video(wan, job.output, record, audio_path=self.audio_path, audio_start=self.audio_start) as video:
            latents = denoise_with_resume(
                wan,
                noised.to(wan.device),
                schedule,
                expert,
                state,
                self.bars,
                job.output,
                identities=self.identities,
                after_step=background if settings.force_background_consistency else None,
            )
            wan.release_transformers()
            if video is not None:
                video.describe(record | ran_with(wan))
                frames = swapped_frames(wan, self.video, latents, self.masks)
                write_frames(video, frames, self.bars.work("decoding", len(self.video.frames), "frame"))
        state.remove()
        return job.output

    def metadata(self, job: Job) -> dict:
        """The video's record, before it is made."""
        faces = dict(zip(self.settings.stand_in_photos, self.identities.hashes, strict=True))
        segments = [[segment.start, segment.stop] for segment in self.video.segments]
        swapped = {"input_video_sha256": self.video_hash, "segments": segments}
        return describe(self.wan, self.schedule, job, faces) | swapped


def plan_views(segments: Sequence[Segment], length: int) -> list[slice]:
    """The windows, of at most `length` latent frames, in which the model sees the sample of all segments."""
    overlap = min(length // 4 + 1, length - 1)
    return [
        window.span
        for segment in segments
        for window in plan_windows(segment.num_latents, length, overlap, start=segment.first_latent)
    ]


def noise_like(clean: Tensor, seed: int, cell: int, device: torch.device | str) -> Tensor:
    """Noise for latents (1, C, F, h, w), as their seed gives it to a video of that size."""
    _, channels, count, height, width = clean.shape
    return initial_noise((channels, 4 * count - 3, height * cell, width * cell), seed, cell, device)


def swapped_frames(
    wan: Wan, video: SwapVideo, latents: Tensor, masks: Sequence[numpy.ndarray]
) -> Iterator[numpy.ndarray]:
    """Every frame of the input, in pieces (f, H, W, 3) uint8: generated where the face is, else as it was.

    Args:
        latents: (1, C, all segments, h, w).
        masks: of each latent frame, from `encode_pasted`.
    """
    done = 0
    for segment in video.segments:
        yield from (video.frames[i : i + 1] for i in range(done, segment.start))
        done = segment.start
        # The first frame, then groups of four.
        for number, piece in enumerate(decode(wan, latents[:, :, segment.latents])):
            # What padding added is cut off, in time and on the sides.
            originals = video.frames[done : min(done + piece.shape[2], segment.stop)]
            height, width = originals.shape[1:3]
            generated = frames_to_uint8(piece)[: len(originals), :height, :width]
            mask = masks[segment.first_latent + number][:height, :width]
            if not wan.settings.no_composite:
                generated = numpy.stack([composite(*pair, mask) for pair in zip(originals, generated, strict=True)])
            yield generated
            done += len(originals)
    yield from (video.frames[i : i + 1] for i in range(done, len(video.frames)))
