"""A talking video of any length from a photo and a sound (StableAvatar), by windows.

Source: StableAvatar (arXiv 2508.08248), `wan_inference_long_pipeline.py`.
"""

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import psutil
import torch
from torch import Tensor

from errors import ResourceError, WeightsError
from models.wan.schedulers import get_schedule, make_solver
from models.wan.tea_cache import COEFFICIENTS, TeaCache
from pipelines.audio_avatar.color_match import match_colors
from pipelines.audio_avatar.part import encode_sounds
from pipelines.audio_avatar.settings import AvatarSettings
from pipelines.audio_avatar.state import AvatarState
from pipelines.audio_avatar.windows import fuse, latent_length, sound_of
from pipelines.conditions import ShownVAE, cover_resize, frames_condition, image_to_video
from pipelines.denoise import Expert, Guidance, NonFiniteLatentsError, Step
from pipelines.experts import begin_step_cache, end_step_cache, prompt_of
from pipelines.guidance import audio_native, branch_plugins, branch_prompts, three_branch
from pipelines.jobs import Job
from pipelines.memory import stage
from pipelines.recovery import recover
from pipelines.video import decode, describe, open_video, preview, progress, ran_with, write_frames
from pipelines.wan import Wan
from pipelines.windows import plan_windows
from preprocess.audio import SAMPLE_RATE, AudioTimeline
from preprocess.face_detection import CascadeDetector, load_detector, recognizer_is_there
from preprocess.image import read_image
from preprocess.output import readable_bytes
from preprocess.progress_bars import ProgressBars, StepBar

logger = logging.getLogger("selfsame")

SEEN_SIZE = 512  # pixels of the shorter side in which a face is looked for, however small the video is


def read_reference(settings: AvatarSettings) -> numpy.ndarray:
    """The person's photo at the video's size, (H, W, 3) uint8; upstream squashes it, here its centre is cut out."""
    photo = read_image(settings.reference_image, "--reference_image")
    height, width = photo.shape[:2]
    kept = min(width, height * settings.width / settings.height) * min(height, width * settings.height / settings.width)
    if kept < 0.9 * width * height:
        logger.warning(
            "--reference_image %s: %dx%d, of which the centre is used (%d %%) for a video of %dx%d; cut the photo or "
            "give --width and --height",
            *(settings.reference_image, width, height, 100 * kept / (width * height), settings.width, settings.height),
        )
    enlarged = max(1, SEEN_SIZE / min(settings.width, settings.height))
    shown = cover_resize(photo, round(enlarged * settings.width), round(enlarged * settings.height))
    has_models = recognizer_is_there(settings.antelopv2_path)
    detector = load_detector(settings.antelopv2_path) if has_models else CascadeDetector()
    if not detector(shown):
        logger.warning(
            "--reference_image %s: no face is found in what the video shows of it; nobody may talk there. Give a near "
            "frontal photo with the face near its middle, or go on if it is a drawing",
            settings.reference_image,
        )
    return cover_resize(photo, settings.width, settings.height)


class AvatarMaker:
    """Makes jobs from one photo and one sound, each prompt and seed its own video.

    Args:
        wan: the model.
        text: prompt -> states, of every prompt and the negative prompt.
        reference: from `read_reference`.
        samples: the sound, (N,) float32 at 16 kHz.
        folder: of the output, for what is too large for the memory.
    """

    def __init__(
        self,
        wan: Wan,
        text: dict[str, Tensor],
        reference: numpy.ndarray,
        samples: numpy.ndarray,
        folder: Path = Path(),
    ):
        self.wan, self.text, self.settings = wan, text, wan.settings
        self.bars = ProgressBars(shown=wan.processes.rank == 0)
        settings = self.settings
        steps, shift = settings.num_inference_steps, settings.shift
        self.schedule = get_schedule(settings.solver, steps, shift, timesteps=settings.timesteps)
        self.timeline = AudioTimeline(len(samples), settings.fps)
        self.num_latents = latent_length(self.timeline.num_latent_frames, settings.window)
        self.windows = plan_windows(
            self.num_latents, settings.window, settings.overlap, cut_last=settings.last_window == "legacy"
        )
        self.check_step_cache()
        self.hashes = {
            "reference_image": hashlib.sha256(reference.tobytes()).hexdigest(),
            "audio": hashlib.sha256(samples.tobytes()).hexdigest(),
        }
        picture = image_to_video(reference)  # (1, 3, 1, H, W)
        self.colors = picture[0, :, 0]
        self.image_features = wan.encode_images([picture[:, :, 0]])
        spatial = wan.transformer_config.vae_spatial_factor
        self.grid = (settings.height // spatial, settings.width // spatial)
        with wan.vae() as vae, stage("encoding the photo", "try a smaller size or --vae_dtype bf16"):
            # Every window is told that it begins with the photo; their overlaps make them one video.
            shown = ShownVAE(vae, self.bars, "encoding the photo")
            self.condition = frames_condition(shown, settings.num_frames, self.grid, {0: picture[:, :, 0]}).y
        choices = (settings.last_window, settings.audio_alignment)
        ranges = [sound_of(window, self.timeline, self.num_latents, *choices) for window in self.windows]
        self.features = encode_sounds(wan, samples, ranges, folder)

    def check_step_cache(self) -> None:
        """What a step cache remembers of every window and branch grows with the video.

        Raises:
            ResourceError: it does not fit.
        """
        settings, device = self.settings, self.wan.device
        if settings.step_cache == "none":
            return
        tokens = settings.window * (settings.height // 16) * (settings.width // 16)
        residuals = 3 * len(self.windows) * (1 if settings.step_cache == "teacache" else 2)
        needed = residuals * tokens * self.wan.transformer_config.dim * 4
        on_device = device.type == "cuda" and not settings.teacache_offload
        free = torch.cuda.mem_get_info(device)[0] if on_device else psutil.virtual_memory().available
        if needed > free:
            raise ResourceError(
                f"--step_cache {settings.step_cache}: remembers {readable_bytes(needed)} for {len(self.windows)} "
                f"windows, {readable_bytes(free)} are free; try --teacache_offload, or do without a step cache"
            )

    # ------------------------------------------------------------------------------------------------ one video

    def make(self, job: Job) -> Path:
        """Denoise all windows step by step, decode into the file, and remove the saved progress."""
        wan = self.wan
        record = self.metadata(job)
        shape = (self.num_latents, wan.transformer_config.out_dim, *self.grid)
        state = AvatarState(job.output, progress(wan, self.schedule, record), shape, wan.processes)
        with open_video(wan, job.output, record, audio_path=self.settings.audio) as video:
            latents = self.denoise(job, state)  # (F, C, h, w)
            wan.release_transformers()
            if video is not None:
                video.describe(record | ran_with(wan))
                write_frames(video, self.frames(latents), self.bars.work("decoding", self.timeline.num_frames, "frame"))
        state.remove()
        return job.output

    def noise(self, job: Job) -> Iterator[Tensor]:
        """Latent frame by latent frame, so that no length is too long, and a longer sound begins with the same."""
        generator = torch.Generator("cpu").manual_seed(job.seed)
        for _ in range(self.num_latents):
            yield torch.randn(self.wan.transformer_config.out_dim, *self.grid, generator=generator)

    def upstream_noise(self, job: Job) -> Iterator[Tensor]:
        """As StableAvatar's own code draws it: on its device and all at once."""
        shape = (self.wan.transformer_config.out_dim, self.num_latents, *self.grid)
        drawn = AudioTimeline(self.timeline.num_samples, self.timeline.fps, legacy=True).num_latent_frames
        return upstream_noise(shape, drawn, job.seed, self.wan.noise_device)

    def denoise(self, job: Job, state: AvatarState) -> Tensor:
        """Clean latents (F, C, h, w), on the disk; from where an interrupted run stopped."""
        keeps_state = self.settings.step_cache == "none"  # what a step cache remembers is too large to save
        steps = self.schedule.num_steps
        self.bars.plan(steps * len(self.windows))
        bar = self.bars.steps(job.output.name, unit="window")
        while True:
            noise = self.noise(job) if self.wan.noise_device.type == "cpu" else self.upstream_noise(job)
            first = state.open(noise, keeps_state)
            bar.start_at(first * len(self.windows))
            if first > 0:
                logger.info("%s: going on after step %d of %d", job.output, first, steps)
            try:
                with bar:
                    self.run_steps(job, state, first, bar)
                return state.latents
            except RuntimeError as error:
                if self.wan.processes.by_windows and isinstance(error, NonFiniteLatentsError):
                    raise WeightsError(f"{error}; try --attention_backend native or --dtype fp32") from error
                recover(self.wan, error)

    def run_steps(self, job: Job, state: AvatarState, first: int, bar: StepBar) -> None:
        """A function of its own, so that a step that fails leaves nothing that holds the model."""
        steps = self.schedule.num_steps
        ranges = itertools.groupby(range(first, steps), key=lambda step: self.wan.loras.work_at(step, steps))
        for with_loras, in_range in ranges:
            velocity = self.velocity(job, with_loras)
            for step in in_range:
                self.step(job, state, step, velocity, bar)

    @torch.no_grad()
    def step(self, job: Job, state: AvatarState, step: int, velocity: Callable, bar: StepBar) -> None:
        """One denoising step of the whole video: windows by themselves, then together.

        All start from the same latents, so their order does not matter: processes share them out, and what an
        interrupted run has done of the step is kept.
        """
        processes, solver, windows = self.wan.processes, make_solver(self.schedule), self.windows
        finished = state.finished_windows(step, len(windows))
        todo = [number for number in range(len(windows)) if number not in finished]
        owners = {number: i % processes.count if processes.by_windows else 0 for i, number in enumerate(todo)}
        bar.start_at(step * len(windows) + len(finished))

        for number in todo:
            mine = owners[number] == processes.rank
            if mine or processes.context_parallel:
                window = windows[number]
                sample = as_video(state.latents[window.start : window.stop]).to(self.wan.device)  # (1, C, f, h, w)
                guided = velocity(step, number, sample)
                if not torch.isfinite(guided).all():
                    raise NonFiniteLatentsError(
                        f"the model returned NaN or infinity at step {step + 1} of {self.schedule.num_steps}"
                    )
                sample = solver.step(guided, step, sample)
                if mine:
                    state.save_window(step, number, sample)
                bar.advance()

        def results() -> Iterator[Tensor]:
            for number, window in enumerate(windows):
                owner = owners.get(number, 0)
                if owner == processes.rank:
                    sample = state.load_window(step, number)
                else:
                    sample = torch.empty(1, state.shape[1], window.length, *self.grid)
                yield processes.broadcast(sample, owner)

        before = state.latents
        fuse(as_video(state.begin(step)), windows, results(), self.settings.overlapping_weight_scheme, blend=step > 0)
        state.commit()
        bar.advance_to((step + 1) * len(windows))
        if self.settings.preview and processes.writes:
            preview(self.wan, job.output, self.guess(step, before, state.latents))

    def guess(self, step: int, before: Tensor, after: Tensor) -> Step:
        """The clean middle frame as one step sees it: on the line through what it started from and what it made."""
        middle = self.timeline.num_latent_frames // 2
        sigma, following = self.schedule.sigmas[step : step + 2].tolist()
        x, y = (as_video(latents[middle : middle + 1]) for latents in (before, after))
        return Step(step, y, x + (y - x) * sigma / (sigma - following), {})

    def frames(self, latents: Tensor) -> Iterator[Tensor]:
        """Latents (F, C, h, w) to frames as long as the sound, in pieces (1, 3, f, H, W), in the photo's colours."""
        shown = (as_video(latents[i : i + 1]) for i in range(self.timeline.num_latent_frames))
        left = self.timeline.num_frames
        for frames in decode(self.wan, shown):  # (1, 3, f, H, W)
            frames = frames[:, :, :left]
            left -= frames.shape[2]
            if frames.shape[2]:
                yield match_colors(frames, self.colors, self.settings.color_correction)

    # ------------------------------------------------------------------------------------------- what a step needs

    def velocity(self, job: Job, with_loras: bool) -> Callable[[int, int, Tensor], Tensor]:
        """(step, window's number, sample (1, C, f, h, w)) -> the guided velocity. Holds what lasts over the steps."""
        wan, settings, device = self.wan, self.settings, self.wan.device
        transformer = wan.transformer(0, with_loras)
        adapter = wan.part("audio_adapter")
        end_step_cache(transformer)  # it remembers the video before
        begin_step_cache(transformer, settings)
        positive, negative = (
            prompt_of(wan, self.text[prompt], self.image_features) for prompt in (job.prompt, settings.negative_prompt)
        )
        prompts = branch_prompts(positive, negative)
        guidance, plugins = self.guidance(), wan.plugins()
        condition = self.condition.to(device)  # (1, 4 + C, f, h, w)
        caches = [self.window_caches(prompts) for _ in self.windows]
        window_tokens = settings.window * (self.grid[0] // 2) * (self.grid[1] // 2)

        def guided(step: int, number: int, sample: Tensor) -> Tensor:
            length = sample.shape[2]
            expert = Expert(
                transformer,
                prompts,
                guidance,
                plugins,
                step_caches=caches[number],
                branch_plugins=branch_plugins(adapter, self.features[number].to(device), settings.num_frames),
                # Only the legacy last window is shorter than the sound it is given.
                attended_length=window_tokens if length < settings.window else None,
                cache_name=str(number),
            )
            timestep = self.schedule.timesteps[step].float().expand(1)
            return expert.velocity(sample, timestep, step, self.schedule.num_steps, condition[:, :, :length])

        return guided

    def guidance(self) -> Guidance:
        settings = self.settings
        if settings.audio_native_guidance is None:
            return three_branch(settings.sample_text_guide_scale, settings.sample_audio_guide_scale)
        return audio_native(*settings.audio_native_guidance, settings.sample_text_guide_scale - 1)

    def window_caches(self, branches) -> dict[str, TeaCache]:
        """A cache of its own for every window and branch: another window's residual would be another picture's."""
        settings = self.settings
        if settings.step_cache != "teacache":
            return {}
        coefficients = COEFFICIENTS[self.wan.config.get("variant", "fun-inp-1.3B")]
        threshold, first_steps = settings.step_cache_threshold, settings.num_skip_start_steps
        return {
            branch: TeaCache(
                self.schedule.num_steps, threshold, coefficients, first_steps, offload=settings.teacache_offload
            )
            for branch in branches
        }

    def metadata(self, job: Job) -> dict:
        """The video's record, before it is made."""
        made_of = describe(self.wan, self.schedule, job)
        del made_of["faces"]
        seconds = round(self.timeline.num_samples / SAMPLE_RATE, 3)
        return made_of | self.hashes | {"seconds": seconds, "windows": len(self.windows)}


def upstream_noise(
    shape: tuple[int, int, int, int], drawn: int, seed: int, device: torch.device | str
) -> Iterator[Tensor]:
    """The latent frames (C, h, w) of a video's noise as StableAvatar's `prepare_latents` draws it: bfloat16, of the
    whole video at once. float32 on the CPU.

    Args:
        shape: (C, F, h, w) of what is wanted.
        drawn: the latent frames that upstream makes of the sound. Its videos end up to three frames before it, and it
            makes none shorter than a window: what it lacks is drawn afterwards.
    """
    channels, count, *grid = shape
    generator = torch.Generator(device).manual_seed(seed)
    drawn = min(drawn, count)
    for frames in (drawn, count - drawn):
        noise = torch.randn(1, channels, frames, *grid, generator=generator, device=device, dtype=torch.bfloat16)
        for frame in noise[0].transpose(0, 1):
            yield frame.cpu().float()


def as_video(latents: Tensor) -> Tensor:
    """(F, C, h, w), as on the disk, -> (1, C, F, h, w), a view of the same values."""
    return latents.transpose(0, 1)[None]
