"""ConsisID: prompts and a photo to mp4 files, on CogVideoX as diffusers runs it.

    model = ConsisID(settings, config, processes)
    face = model.prepare_face(output)
    text = model.encode_prompts([*prompts, negative_prompt])
    ConsisIDMaker(model, face, text).make(job)

The denoising loop is diffusers', which keeps no state between steps that could be saved: a run that was stopped starts
its unfinished video again.
"""

import hashlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from PIL import Image
from torch import Tensor

from errors import WeightsError
from models.identity.consis_id import ConsisIDPipeline
from pipelines.consis_id.face import FaceCondition
from pipelines.consis_id.model import ConsisID
from pipelines.jobs import Job
from pipelines.memory import stage
from preprocess.keypoints import draw_keypoints
from preprocess.progress_bars import ProgressBars
from preprocess.video_writer import VideoWriter

logger = logging.getLogger("selfsame")


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
        self.face_tokens = model.face_tokens(face)  # the same for all steps of all videos

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
