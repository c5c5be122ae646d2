"""Identity-preserving text-to-video: prompts and photos to mp4 files, one job a prompt and seed."""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy
import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor

from errors import ResourceError, WeightsError
from models.identity.stand_in import Identity, StandIn
from models.wan.schedulers import expert_index, get_schedule, make_solver
from models.wan.tea_cache import TeaCache, coefficients_of
from models.wan.transformer import Plugin, Prompt, WanTransformer
from models.wan.vae import Tiling
from pipelines.conditions import image_to_clip, initial_noise
from pipelines.denoise import NEGATIVE, POSITIVE, Expert, NonFiniteLatentsError, Step, denoise, two_branch
from pipelines.job_state import JobState
from pipelines.jobs import Job
from pipelines.memory import is_out_of_memory, stage
from pipelines.placement import next_mode
from pipelines.record import progress_of
from pipelines.settings import Settings
from pipelines.stand_in import within_steps
from pipelines.wan import Wan
from preprocess.face import FaceImage, load_parser, prepare_face
from preprocess.face_detection import load_detector
from preprocess.image import read_image
from preprocess.progress_bars import ProgressBars
from preprocess.side_file import write_side_picture
from preprocess.video_writer import VideoWriter, frames_to_uint8

logger = logging.getLogger("selfsame")

BLANK = 1.0  # standard deviation of 8-bit pixels below which a whole clip counts as blank


def cut_face(settings: Settings, photo: str, picture: numpy.ndarray, detector, parser) -> FaceImage:
    """The face of one person's photo, as the settings say."""
    return prepare_face(
        picture,
        detector,
        parser,
        face_index=settings.face_index,
        allow_no_face=settings.allow_no_face,
        crop=not settings.no_face_crop,
        name=photo,
    )


def prepare_faces(settings: Settings, output: Path | None = None) -> list[numpy.ndarray]:
    """Each person's photo -> (512, 512, 3) uint8, the face on white; also written as NAME.faceN.png beside `output`.

    Raises:
        InputError: a photo that cannot be read, or without a face.
    """
    faces = []
    pictures = [read_image(photo, "--ip_image") for photo in settings.stand_in_photos]
    detector = parser = None  # read after the photos: what is said of them when they are absent is no error's beginning
    if settings.stand_in_photos and not settings.no_face_crop:
        detector, parser = load_detector(settings.antelopv2_path), load_parser(settings.face_parser_path)
    for number, (photo, picture) in enumerate(zip(settings.stand_in_photos, pictures, strict=True)):
        face = cut_face(settings, photo, picture, detector, parser).rgb
        if output is not None:
            write_side_picture(output.with_suffix(f".face{number}.png"), face, settings.overwrite)
        faces.append(face)
    return faces


class VideoMaker:
    """Makes jobs one after another with parts loaded once.

    Args:
        wan: the model.
        text: prompt -> states, of every prompt and the negative prompt (`Wan.encode_prompts`).
        faces: photos as `prepare_faces` gives them; empty for plain text-to-video.
    """

    audio_path: Path | str | None = None  # where the sound comes from, in the modes that have any
    audio_start: float = 0.0  # seconds into it at which the video begins
    branches: tuple[str, ...] = (POSITIVE, NEGATIVE)  # of the guidance
    image_features: Tensor | None = None  # of CLIP, in the models that look at a picture
    noise_device = torch.device("cpu")  # where noise is drawn

    def __init__(self, wan: Wan, text: dict[str, Tensor], faces: Sequence[numpy.ndarray]):
        self.wan, self.text, self.settings = wan, text, wan.settings
        self.bars = ProgressBars(shown=wan.processes.rank == 0)
        self.noise_device = wan.noise_device
        self.face_hashes = [hashlib.sha256(face.tobytes()).hexdigest() for face in faces]
        self.references: list[Tensor] = []  # latents (1, C, 1, 64, 64); never tiled, as in training
        if faces:
            with wan.vae() as vae:
                self.references = [vae.encode(image_to_clip(face).to(wan.device)) for face in faces]
        self.schedule = get_schedule(
            self.settings.solver,
            self.settings.num_inference_steps,
            self.settings.shift,
            timesteps=self.settings.timesteps,
        )
        self._identities: dict[int, Identity] = {}
        self._with_loras = True  # the state they were computed in
        self._adapters: dict[int, StandIn] = {}

    # ------------------------------------------------------------------------------------------------ one video

    def make(self, job: Job) -> Path:
        """Denoise, decode into the file, and remove the saved progress. Another run of the same job waits outside."""
        started = time.monotonic()
        self.bars.plan(self.schedule.num_steps)
        metadata = self.metadata(job)
        state = self.open_state(job, metadata)
        writes = self.wan.processes.writes
        writer = VideoWriter(
            job.output,
            fps=self.settings.fps,
            quality=self.settings.quality,
            metadata=metadata,
            audio_path=self.audio_path,
            audio_start=self.audio_start,
        )
        with writer if writes else contextlib.nullcontext():
            latents = self.denoise(job, state)
            self.wan.release_transformers()
            if writes:
                # Both may have been changed on the way, to get through.
                ran_with = {"attention_backend": self.wan.attention_backend, "memory": self.wan.memory}
                writer.describe(metadata | {"ran_with": ran_with})
                self.decode(latents, writer)
        self.wan.processes.wait()
        state.remove()
        if writes:
            logger.info("%s: %d frames in %.1f s", job.output, writer.num_frames, time.monotonic() - started)
        return job.output

    def open_state(self, job: Job, metadata: dict) -> JobState:
        """Where the progress of a video is kept."""
        return JobState(job.output, self.progress(metadata))

    def denoise(self, job: Job, state: JobState) -> Tensor:
        """Noise to clean latents, from where an interrupted run stopped; with less memory after running out of it."""
        noise = self.start(job)
        keeps_state = self.settings.step_cache == "none"  # what a step cache remembers is too large to save each step
        progress = self.bars.steps(job.output.name)
        fresh = make_solver(self.schedule).state_dict()
        while True:
            resume = self.wan.processes.share(state.load(fresh) if keeps_state else None)
            if resume is not None and resume[0] > progress.done:
                logger.info("%s: going on after step %d of %d", job.output, resume[0], self.schedule.num_steps)
            progress.start_at(resume[0] if resume else 0)

            def on_step(step: Step) -> None:
                if keeps_state and self.wan.processes.writes:
                    state.save(step)
                progress.advance()
                if self.settings.preview and self.wan.processes.writes:
                    self.preview(job, step)

            try:
                with progress:
                    return denoise(
                        noise,
                        self.schedule,
                        self.experts(job),
                        **self.conditions(),
                        after_step=self.after_step,
                        on_step=on_step,
                        resume=resume,
                    )
            except RuntimeError as error:
                self.mend(error)

    def mend(self, error: RuntimeError) -> None:
        """Change what can be changed after a failed step, so that the loop can go on; else raise."""
        wan = self.wan
        if isinstance(error, NonFiniteLatentsError):
            if wan.attention_backend == "native":
                raise WeightsError(f"{error} (attention native, {wan.dtype}); try --dtype fp32") from error
            logger.warning("%s with attention backend %s; going on with native", error, wan.attention_backend)
            wan.use_attention_backend("native")
            self._identities.clear()
        elif is_out_of_memory(error):
            mode = next_mode(wan.memory)
            if mode is None or wan.processes.together:
                raise ResourceError(
                    f"out of memory while denoising with --memory {wan.memory}; try fewer frames or a smaller size"
                ) from error
            logger.warning("out of memory while denoising with --memory %s; going on with %s", wan.memory, mode)
            self._identities.clear()
            wan.use_memory_mode(mode)
        else:
            raise error

    def decode(self, latents: Tensor, writer: VideoWriter) -> None:
        """Stream the frames into the file; the whole video is never in memory."""
        deviations = []
        bar = self.bars.work("decoding", self.num_decoded(latents), "frame")
        with self.wan.vae() as vae, stage("decoding", "try --tiled or --vae_dtype bf16"), bar:
            for frames in self.frames(vae, latents):
                pixels = frames_to_uint8(frames)  # (f, H, W, 3)
                deviations.append(float(pixels.std()))
                writer.write(pixels)
                bar.advance(len(pixels))
        if max(deviations) < BLANK:
            logger.warning(
                "%s: all frames are one flat colour; try --dtype fp32 or --attention_backend native", writer.path
            )

    def num_decoded(self, latents: Tensor) -> int:
        """How many frames `frames` gives."""
        return 4 * latents.shape[2] - 3

    def frames(self, vae, latents: Tensor) -> Iterator[Tensor]:
        """The frames in pieces, (1, 3, f, H, W) in [-1, 1].

        Raises:
            WeightsError: NaN or infinity among them; written, they would be black.
        """
        options = {
            "tiling": Tiling() if self.settings.tiled else None,
            "cache_device": "cpu" if self.wan.memory == "sequential" else None,
        }
        for frames in vae.decode_stream(latents, **options):
            if not torch.isfinite(frames).all():
                raise WeightsError(f"the VAE returned NaN or infinity ({self.wan.vae_dtype}); try --vae_dtype fp32")
            yield frames

    def preview(self, job: Job, step: Step) -> None:
        """The model's present guess of the middle frame, decoded alone, as NAME.preview.png."""
        middle = step.clean.shape[2] // 2
        with self.wan.vae() as vae:
            frame = vae.decode(step.clean[:, :, middle : middle + 1])
        write_side_picture(job.output.with_suffix(".preview.png"), frames_to_uint8(frame)[0], self.settings.overwrite)

    # ------------------------------------------------------------------------------------------- what a step needs

    def start(self, job: Job) -> Tensor:
        """What the first step starts from: noise here; a noised video where one is given."""
        config = self.wan.transformer_config
        size = (config.out_dim, self.settings.num_frames, self.settings.height, self.settings.width)
        return initial_noise(size, job.seed, config.vae_spatial_factor, self.noise_device).to(self.wan.device)

    def conditions(self) -> dict:
        """What `denoise` is given of pictures (`condition`, `pinned`): nothing here."""
        return {}

    def after_step(self, step: int, sample: Tensor) -> Tensor:
        """What is done to the sample after each step: nothing here; a background is put back where one is kept."""
        return sample

    def plugins(self, index: int, transformer: WanTransformer) -> list[Plugin]:
        """What takes part in every forward pass of this expert, beside the identity: control, in its mode."""
        return self.wan.plugins()

    def experts(self, job: Job) -> Callable[[int], Expert]:
        """step -> the expert of that step, made at its first step: weights are switched once a video.

        Where live LoRAs set in or end, all that was computed with the weights before is made anew.
        """
        boundary = self.wan.config.get("boundary")
        current: dict[int, Expert] = {}

        def expert_at(step: int) -> Expert:
            index = expert_index(self.schedule.timesteps[step], boundary)
            with_loras = self.wan.with_loras(step, self.schedule.num_steps)
            if with_loras != self._with_loras:
                self._with_loras = with_loras
                self._identities.clear()
                current.clear()
            if index not in current:
                current.clear()
                transformer = self.wan.transformer(index, with_loras)
                if transformer.is_cache_enabled:  # of the video before; the identity's pass is not one of its steps
                    transformer.disable_cache()
                current[index] = self.expert(job, index, transformer)
                if self.settings.step_cache == "first_block":
                    transformer.enable_cache(FirstBlockCacheConfig(threshold=self.settings.step_cache_threshold))
            return current[index]

        return expert_at

    def expert(self, job: Job, index: int, transformer: WanTransformer) -> Expert:
        """A transformer with what takes part in its forward passes: prompts, guidance, plug-ins."""
        scales = self.settings.guidance_scale
        return Expert(
            transformer,
            {POSITIVE: self.prompt(job.prompt), NEGATIVE: self.prompt(self.settings.negative_prompt)},
            two_branch(scales[min(index, len(scales) - 1)]),
            self.plugins(index, transformer),
            self.tea_caches(),
            plugins_at=within_steps(self.identity(index, transformer)),
        )

    def prompt(self, text: str) -> Prompt:
        """The states of a prompt, and of the picture, for one guidance branch."""
        image = None if self.image_features is None else self.image_features.to(self.wan.device)
        return Prompt([self.text[text].to(self.wan.device)], image, keep_keys_values=self.keeps_keys)

    @property
    def keeps_keys(self) -> bool:
        """Text keys and values of all blocks take 0.8 GB for 14B: not worth it where memory is the concern."""
        return self.wan.memory != "sequential"

    def identity(self, index: int, transformer: WanTransformer) -> Identity | None:
        """Keys and values of the photos for this expert, computed at the first video and kept for the next."""
        if not self.references:
            return None
        if index not in self._identities:
            if index not in self._adapters:
                stand_in = self.wan.read_part("stand_in", transformer, index)
                self._adapters[index] = stand_in.scaled(self.settings.identity_strength)
            token = 2 * self.wan.transformer_config.vae_spatial_factor
            grid = (self.settings.height // token, self.settings.width // token)
            steps = (self.settings.identity_start, self.settings.identity_end)
            with torch.no_grad():
                identity = self._adapters[index].encode(transformer, self.references, grid, steps)
            if self.wan.processes.context_parallel:
                identity = identity.shard(self.wan.processes.rank, self.wan.processes.count)
            if self.wan.num_experts > 1 and self.wan.memory != "resident":
                self._identities.clear()  # 800 MiB a photo: the other expert's are not needed now
            self._identities[index] = identity
        return self._identities[index]

    def tea_caches(self) -> dict[str, TeaCache]:
        if self.settings.step_cache != "teacache":
            return {}
        coefficients = coefficients_of(self.wan.config)
        return {
            branch: TeaCache(self.schedule.num_steps, self.settings.step_cache_threshold, coefficients)
            for branch in self.branches
        }

    # ------------------------------------------------------------------------------------------------- metadata

    def metadata(self, job: Job) -> dict:
        """What makes this video this video: enough to make it again. `settings` is what --config accepts."""
        return self.wan.describe(job.prompt, job.seed) | {
            "faces": dict(
                zip(self.settings.stand_in_photos, self.face_hashes, strict=True)
            ),  # sha256 of the prepared pixels
            "sigmas": [round(sigma, 6) for sigma in self.schedule.sigmas.tolist()],
        }

    def progress(self, metadata: dict) -> dict:
        """What of the metadata decides the latents: saved progress counts only under the same."""
        progress = progress_of(metadata, self.wan.weights(), self.wan.encodes_pictures)
        return progress | {"num_steps": self.schedule.num_steps, "chosen": self.wan.chosen(metadata)}
