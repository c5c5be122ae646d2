"""ConsisID: prompts and a photo to mp4 files, on CogVideoX as diffusers runs it.

    model = ConsisID(settings, config, processes)
    face = model.prepare_face(output)
    text = model.encode_prompts([*prompts, negative_prompt])
    ConsisIDMaker(model, face, text).make(job)

The denoising loop is diffusers', which keeps no state between steps that could be saved: a run that was stopped starts
its unfinished video again.
"""

import dataclasses
import gc
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from diffusers.hooks import apply_group_offloading
from diffusers.models.transformers.consisid_transformer_3d import LocalFacialExtractor
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from configs import download_command
from errors import UsageError, WeightsError
from models.identity.consis_id import (
    ConsisIDPipeline,
    ConsisIDTransformer,
    load_consis_id,
    make_extractor,
    read_json,
    split_config,
)
from models.wan.checkpoint import assign_tensors, read_tensors
from pipelines.consis_id.face import FaceCondition, antelopv2_path, face_networks, network_files, prepare_face
from pipelines.consis_id.settings import ConsisIDSettings
from pipelines.distributed import Processes
from pipelines.jobs import Job
from pipelines.memory import check_memory, free_bytes, free_cached, offload_groups, stage
from pipelines.needs import Needs, size_of
from pipelines.placement import choose_mode
from pipelines.record import describe_run
from pipelines.wan import DTYPES
from pipelines.weights import WeightsFile, check_weights
from preprocess.keypoints import draw_keypoints
from preprocess.progress_bars import ProgressBars
from preprocess.side_file import write_side_picture
from preprocess.video_writer import VideoWriter

logger = logging.getLogger("selfsame")

diffusers_logging.set_verbosity_error()  # its notes on experimental features are for us, not for users

SCHEDULERS = {kind.__name__: kind for kind in (CogVideoXDPMScheduler, CogVideoXDDIMScheduler)}
# Bytes a pixel of the shown picture while the VAE decodes, in 16 bits: the authors measured 16 GB at 720x480.
DECODE_BYTES = 45_000
T5_VALUES, VAE_VALUES = 4_760_000_000, 216_000_000
# What decides the size of the released transformers (6.16 billion values), where their config.json is not here yet.
RELEASED = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "in_channels": 32,
    "use_rotary_positional_embeddings": True,
    "is_train_face": True,
}


class ConsisID:
    """One release's parts, loaded when first needed and placed by the memory mode.

    Args:
        settings, config: from `resolve_consis_id`.
        processes: from `start_processes`.
    """

    def __init__(self, settings: ConsisIDSettings, config: dict, processes: Processes):
        self.settings, self.config, self.processes = settings, config, processes
        self.device = processes.device
        self.dtype = DTYPES.get(settings.dtype, torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self.base_path = Path(settings.base_path or Path("checkpoints") / config["dest"])
        # Of `auto` this is the guess until `check` decides.
        self.memory = settings.memory if settings.memory != "auto" else "resident"
        self.text_on_device = self.memory not in ("group", "sequential")
        self.hint = download_command(config)
        self._pipeline: ConsisIDPipeline | None = None
        self._extractor: LocalFacialExtractor | None = None

    # ------------------------------------------------------------------------------------------------ before loading

    @property
    def transformer_path(self) -> Path:
        """The folder of the transformer; averaged weights go first, as in the authors' script."""
        averaged = self.base_path / "transformer_ema"
        return averaged if averaged.is_dir() else self.base_path / "transformer"

    def check(self) -> None:
        """Look for what would end the run later, before anything loads.

        Raises:
            WeightsError: files that are not there, with the command that fetches them, or of another model.
            UsageError: a size that the checkpoint cannot make.
            ResourceError: more memory than the device has.
        """
        check_weights([*self.weights(), *network_files(self.settings, self.base_path, self.config["name"])])
        config = read_json(self.transformer_path / "config.json", self.hint)
        self.check_size(config)
        free = free_bytes(self.device)
        chosen = choose_mode(
            self.needs(config),
            *free,
            device=self.device.type,
            memory=self.settings.memory,
            fp8=self.settings.fp8,
            tiled=self.settings.tiled,
        )
        if self.settings.memory == "auto" and self.device.type == "cuda":
            logger.info("--memory auto: %s", chosen.describe(*free))
        self.memory, self.text_on_device = chosen.memory, chosen.text_on_device
        check_memory(self.settings, chosen.device_bytes, self.device)

    def weights(self) -> list[WeightsFile]:
        """All that is read, without the networks of the face."""
        parts = {"transformer": self.transformer_path} | {part: self.base_path / part for part in PARTS}
        readers = {
            "transformer": partial(load_consis_id, self.transformer_path, dtype=None),
            "text_encoder": partial(load_text_encoder, self.base_path / "text_encoder", dtype=None),
            "vae": partial(load_vae, self.base_path / "vae", dtype=None),
        }  # what is not cast stays on the disk
        return [
            WeightsFile(name, "--base_path", path, self.config["name"], read=readers.get(name))
            for name, path in parts.items()
        ]

    def describe(self, prompt: str, seed: int) -> dict:
        """The record of one video, as far as it is known before anything is read."""
        return describe_run(self.settings, prompt, seed, self.config, self.weights()) | {
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def check_size(self, config: dict) -> None:
        """Positions limit what a checkpoint can make."""
        height, width = (8 * config.get(f"sample_{side}", size) for side, size in (("height", 60), ("width", 90)))
        asked = self.settings.height, self.settings.width
        shown = f"--height {asked[0]} --width {asked[1]}"
        if config.get("use_learned_positional_embeddings") and asked != (height, width):
            raise UsageError(f"{shown}: {self.transformer_path} has learnt its positions for {height}x{width} alone")
        if config.get("patch_size_t") and (asked[0] > height or asked[1] > width):
            raise UsageError(f"{shown}: {self.transformer_path} makes at most {height}x{width} (height x width)")

    def needs(self, config: dict) -> Needs:
        """What a run needs, by the transformer's config.json."""
        settings = self.settings
        return estimate_needs(config, settings.height, settings.width, settings.num_frames, self.dtype)

    @property
    def scoring_settings(self) -> ConsisIDSettings:
        """The settings, with the face models that this release may have brought."""
        folder = face_networks(self.settings, self.base_path, self.hint)
        return dataclasses.replace(self.settings, antelopv2_path=antelopv2_path(self.settings, folder))

    # -------------------------------------------------------------------------------------------------------- parts

    def prepare_face(self, output: Path) -> FaceCondition:
        """The photo's face as the model is given it; also written as NAME.face0.png beside `output`."""
        face = prepare_face(self.settings, self.base_path, self.device, self.hint)
        free_cached(self.device)
        write_side_picture(output.with_suffix(".face0.png"), face.picture, self.settings.overwrite)
        return face

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """T5's states (1, 226, 4096) of each distinct prompt, on the CPU. The encoder is freed before returning.

        Every prompt is padded to the transformer's text length, and the padding attended to, as in training.
        """
        length = read_json(self.transformer_path / "config.json", self.hint).get("max_text_seq_length", 226)
        tokenizer = load_tokenizer(self.base_path / "tokenizer", self.hint)
        encoder = load_text_encoder(self.base_path / "text_encoder", self.dtype, self.hint)
        if self.device.type != "cpu" and not self.text_on_device or self.memory in ("group", "sequential"):
            apply_group_offloading(encoder, onload_device=self.device, offload_type="leaf_level")
        else:
            encoder.to(self.device)
        states = {}
        for prompt in dict.fromkeys(prompts):
            whole = tokenizer(prompt, verbose=False).input_ids
            if len(whole) > length:
                lost = tokenizer.decode(whole[length - 1 : -1])
                logger.warning("prompt of %d tokens is cut at %d: ignored from %r on", len(whole), length, lost)
            ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            states[prompt] = encoder(ids.input_ids.to(self.device)).last_hidden_state.to("cpu", self.dtype)
        del encoder
        gc.collect()  # hooks tie modules into cycles
        free_cached(self.device)
        return states

    def pipeline(self) -> ConsisIDPipeline:
        """diffusers' pipeline around the parts that denoise, ready to run on the device."""
        if self._pipeline is None:
            transformer, extractor = load_consis_id(self.transformer_path, dtype=self.dtype, hint=self.hint)
            vae = load_vae(self.base_path / "vae", self.dtype, self.hint)
            if self.settings.fp8:
                to_float8(transformer, self.dtype)  # layer by layer, before the first value goes to the device
            if self.memory in ("group", "sequential"):
                offload_groups(transformer, self.device, self.memory)
            scheduler = make_scheduler(read_json(self.base_path / "scheduler" / "scheduler_config.json", self.hint))
            self._pipeline = ConsisIDPipeline(None, None, vae.to(self.device), transformer, scheduler)
            self._pipeline.set_progress_bar_config(disable=True)
            self._extractor = extractor.to(self.device)
        if self.memory in ("resident", "model"):
            self._pipeline.transformer.to(self.device)
        return self._pipeline

    @torch.no_grad()
    def face_tokens(self, face: FaceCondition) -> Tensor:
        """What the transformer's blocks look for the face in, (1, 32, 2048): it depends on the photo alone."""
        self.pipeline()  # loads the extractor too: they share a file
        id_cond, *hidden = (t.to(self.device, self.dtype) for t in (face.id_cond, *face.id_vit_hidden))
        return self._extractor(id_cond, hidden)

    @contextmanager
    def decoder(self) -> Iterator[AutoencoderKLCogVideoX]:
        """The VAE, with the device to itself as far as the memory mode goes."""
        pipeline = self.pipeline()
        if self.memory == "model":
            pipeline.transformer.to("cpu")
            free_cached(self.device)
        # Not on the way in: a single frame takes little, and comes out exact.
        pipeline.vae.use_tiling = self.settings.tiled
        try:
            with stage("decoding", "try --tiled"):
                yield pipeline.vae
        finally:
            pipeline.vae.use_tiling = False


def estimate_needs(config: dict, height: int, width: int, num_frames: int, dtype: torch.dtype) -> Needs:
    """What a video takes, from shapes: the text encoder, or the transformer with one call, or one decoded chunk.

    Args:
        config: the transformer's config.json, or `RELEASED`.
        height, width, num_frames: of the video.
        dtype: of the weights, where they are not in float8.
    """
    face, rest = split_config(config)
    with init_empty_weights():
        transformer, extractor = ConsisIDTransformer(face, **rest), make_extractor(face)
    size = dtype.itemsize
    dim = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    released = dim >= 1024  # figures of the VAE and of T5 are those of the released widths
    vae = VAE_VALUES * size if released else 0
    stays = vae + size_of(extractor.to(dtype))  # on the device in all modes
    wide = weights_of(transformer.to(dtype), stays)
    narrow = weights_of(to_float8(transformer, dtype), stays)  # on the meta device
    frames = (num_frames - 1) // 4 + 1
    decode = DECODE_BYTES * size // 2 * height * width
    return Needs(
        experts=1,
        expert=wide["model"] - stays,
        expert_fp8=narrow["model"] - stays,
        weights=wide,
        weights_fp8=narrow,
        # Both branches of the guidance at once; of each token its stream, q, k, v, and the wide layer (4 times).
        call=2 * frames * height * width // 256 * 12 * dim * size,
        kept_text=0,
        kept_photos=0,
        text_encoder=T5_VALUES * size if released else 0,
        image_encoder=0,
        vae=stays,
        encode=0,
        encode_past=0,
        decode=decode if released else 0,
        decode_past=0,
        tile=decode // 4 if released else 0,
        tiles_past=0,
    )


def to_float8(transformer: ConsisIDTransformer, dtype: torch.dtype) -> ConsisIDTransformer:
    """Store the weights of its layers in float8, and compute in `dtype`."""
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    return transformer


def weights_of(transformer: ConsisIDTransformer, stays: int) -> dict[str, int]:
    """Memory mode -> bytes on the device while denoising. Under `resident` what stays there anyhow, `Needs.vae`, is
    counted already.
    """
    whole, blocks = size_of(transformer), size_of(transformer.transformer_blocks)
    block = max(map(size_of, transformer.transformer_blocks))
    return {
        "resident": whole,
        "model": whole + stays,
        "group": whole - blocks + 2 * block + stays,
        "sequential": block + stays,
    }


class ConsisIDMaker:
    """Makes jobs one after another with parts loaded once.

    Args:
        model: the parts.
        face: from `ConsisID.prepare_face`.
        text: prompt -> states, of every prompt and the negative prompt (`ConsisID.encode_prompts`).
    """

    def __init__(self, model: ConsisID, face: FaceCondition, text: dict[str, Tensor]):
        self.model, self.face, self.text, self.settings = model, face, text, model.settings
        self.bars = ProgressBars(shown=model.processes.rank == 0)
        self.face_tokens = model.face_tokens(face)  # of all steps of all videos

    def make(self, job: Job) -> Path:
        """Denoise, and decode into the file."""
        started = time.monotonic()
        with VideoWriter(
            job.output, fps=self.settings.fps, quality=self.settings.quality, metadata=self.metadata(job)
        ) as writer:
            latents = self.denoise(job)
            bar = self.bars.work("decoding", self.settings.num_frames, "frame")
            with self.model.decoder() as vae, bar:
                for frames in decode_stream(vae, latents):
                    if not frames.isfinite().all():
                        raise WeightsError(f"the VAE returned NaN or infinity ({frames.dtype}); try --dtype fp32")
                    writer.write(frames)
                    bar.advance(frames.shape[2])
        logger.info("%s: %d frames in %.1f s", job.output, writer.num_frames, time.monotonic() - started)
        return job.output

    def denoise(self, job: Job) -> Tensor:
        """Noise to clean latents (1, C, F, h, w)."""
        settings, device, pipeline = self.settings, self.model.device, self.model.pipeline()
        pictures = [self.face.picture]
        if pipeline.transformer.face.is_kps:
            pictures.append(draw_keypoints(self.face.keypoints, *self.face.picture.shape[:2]))
        self.bars.plan(settings.num_inference_steps)
        progress = self.bars.steps(job.output.name)

        def on_step(pipe: ConsisIDPipeline, step: int, timestep: Tensor, tensors: dict) -> dict:
            if not tensors["latents"].isfinite().all():
                raise WeightsError(
                    f"the model returned NaN or infinity at step {step + 1} of {settings.num_inference_steps} "
                    f"({self.model.dtype}); try --dtype fp32"
                )
            progress.advance()
            return {}

        with progress, stage("denoising", "try a smaller --memory mode, or fewer frames"):
            latents = pipeline(
                image=[Image.fromarray(picture) for picture in pictures],
                height=settings.height,
                width=settings.width,
                num_frames=settings.num_frames,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale[0],
                prompt_embeds=self.text[job.prompt].to(device),
                negative_prompt_embeds=self.text[settings.negative_prompt].to(device),
                generator=torch.Generator().manual_seed(job.seed),
                attention_kwargs={
                    "face_tokens": self.face_tokens,
                    "face_scale": settings.identity_strength * pipeline.transformer.face.local_face_scale,
                },
                output_type="latent",
                callback_on_step_end=on_step,
            ).frames
        frames = (settings.num_frames - 1) // 4 + 1
        return latents[:, -frames:].transpose(1, 2)  # 1.5 pads in front, to pairs of latent frames

    def metadata(self, job: Job) -> dict:
        """What makes this video this video: enough to make it again. `settings` is what --config accepts."""
        return self.model.describe(job.prompt, job.seed) | {
            "faces": {self.settings.ip_image[0]: hashlib.sha256(self.face.picture.tobytes()).hexdigest()}
        }


# ---------------------------------------------------------------------------------------------------------------------
# A release's folders

PARTS = ("scheduler", "text_encoder", "tokenizer", "vae")


def load_text_encoder(folder: Path, dtype: torch.dtype | None, hint: str = "") -> T5EncoderModel:
    """T5-v1.1's encoder.

    Raises:
        WeightsError: missing, unreadable, or another network.
    """
    with init_empty_weights(include_buffers=False):
        encoder = T5EncoderModel(T5Config(**read_json(folder / "config.json", hint)))
    # T5's wide layers overflow in float16; transformers keeps them in float32 too.
    wide = ("wo",) if dtype == torch.float16 else ()
    assign_tensors(encoder, read_tensors(folder, hint=hint), dtype=dtype, keep_float32=wide, source=folder)
    return encoder.eval().requires_grad_(False)


def load_tokenizer(folder: Path, hint: str = "") -> T5Tokenizer:
    """T5's tokenizer.

    Raises:
        WeightsError: missing or unreadable.
    """
    if not any((folder / name).is_file() for name in ("spiece.model", "tokenizer.json")):  # it would come up empty
        raise WeightsError(f"{folder}: no spiece.model there; {hint}")
    try:
        return T5Tokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(f"{folder}: no T5 tokenizer ({reason[:160]}); {hint}") from error


def load_vae(folder: Path, dtype: torch.dtype | None, hint: str = "") -> AutoencoderKLCogVideoX:
    """CogVideoX's VAE.

    Raises:
        WeightsError: missing, unreadable, or another network.
    """
    config = read_json(folder / "config.json", hint)
    with init_empty_weights(include_buffers=False):
        vae = AutoencoderKLCogVideoX.from_config(config)
    assign_tensors(vae, read_tensors(folder, hint=hint), dtype=dtype, source=folder)
    return vae.eval().requires_grad_(False)


def make_scheduler(config: dict) -> CogVideoXDPMScheduler | CogVideoXDDIMScheduler:
    """The scheduler that a scheduler_config.json names.

    Raises:
        WeightsError: one that CogVideoX's pipeline does not run.
    """
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise WeightsError(f"scheduler_config.json: scheduler {name}; known are {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name].from_config(config)


@torch.no_grad()
def decode_stream(vae: AutoencoderKLCogVideoX, latents: Tensor) -> Iterator[Tensor]:
    """Frames as they are decoded, (1, 3, f, H, W) in [-1, 1]: the whole video is never in memory. In tiles it is, since
    each tile is decoded to the end before the next.

    AutoencoderKLCogVideoX decodes in the same chunks, and hands on the same cache of past frames.
    """
    latents = latents / vae.config.scaling_factor  # (1, C, F, h, w)
    if vae.use_tiling:
        yield vae.decode(latents).sample
        return
    cache, step = None, vae.num_latent_frames_batch_size
    first = latents.shape[2] % step + step
    for chunk in (latents[:, :, :first], *latents[:, :, first:].split(step, dim=2)):
        if chunk.shape[2]:
            frames, cache = vae.decoder(chunk, conv_cache=cache)
            yield frames
