"""SVI-Talk: clips that are driven by speech. The model with its audio layers, and the maker that lets clips hear them.

Source: Stable-Video-Infinity `test_svi_talk.py`, `diffsynth/pipelines/svi_video_talk.py`.
"""

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy
import torch
from torch import Tensor

from configs import load_config, part_path
from models.audio_encoder import load_audio_encoder
from models.multitalk import MultiTalk, load_multitalk
from models.wan.transformer import WanTransformer
from pipelines import tiny
from pipelines.denoise import NEGATIVE, POSITIVE, Expert
from pipelines.guidance import UNCONDITIONAL, branch_prompts, three_branch
from pipelines.jobs import Job
from pipelines.long_video.pipeline import Existing, LongVideoMaker
from pipelines.long_video.settings import read_speech
from pipelines.wan import Wan
from pipelines.weights import WeightsFile
from preprocess.audio import SAMPLE_RATE, AudioTimeline, normalize_loudness

LAYERS, AUDIO_ENCODER = "multitalk", "chinese-wav2vec2-base"  # their configs


class TalkWan(Wan):
    """A Wan image-to-video model with MultiTalk's audio layers."""

    @property
    def multitalk_path(self) -> Path | None:
        """None: the tiny model's."""
        return self._given_or_released(self.settings.multitalk_path, LAYERS, "multitalk")

    @property
    def audio_encoder_path(self) -> Path | None:
        return self._given_or_released(self.settings.audio_encoder_path, AUDIO_ENCODER, "audio_encoder")

    def _given_or_released(self, given: str | None, config: str, part: str) -> Path | None:
        if given is not None:
            return Path(given)
        return None if self.is_tiny else part_path(load_config(config), part)

    def weights(self) -> list[WeightsFile]:
        files = super().weights()
        if (path := self.multitalk_path) is not None:
            files.append(WeightsFile("MultiTalk", "--multitalk_path", path, LAYERS, read=self._check_multitalk))
        if (path := self.audio_encoder_path) is not None:
            read = partial(load_audio_encoder, path, device="meta")
            files.append(WeightsFile("wav2vec2", "--audio_encoder_path", path, AUDIO_ENCODER, read=read))
        return files

    def _check_multitalk(self) -> None:
        load_multitalk(self.multitalk_path, self._meta_transformer(), device="meta")

    def model_beside(self) -> MultiTalk:
        shape = self.transformer_config
        widths = self.config["multitalk"] if self.multitalk_path is None else {}
        with torch.device("meta"):
            return MultiTalk(shape.dim, shape.num_heads, shape.num_layers, **widths)

    def encode_speech(self, samples: numpy.ndarray, num_frames: int) -> Tensor:
        """The speech (N,) at 16 kHz as hidden states (F, 12, 768), one entry a video frame: bfloat16 on the CPU, as the
        released layers are given them, 26 MiB a minute. The encoder is freed before returning.
        """
        if self.audio_encoder_path is None:
            encoder = tiny.tiny_audio_encoder(self.config)
        else:
            encoder = load_audio_encoder(self.audio_encoder_path, hint=self.hint(load_config(AUDIO_ENCODER)))
        samples = normalize_loudness(samples, SAMPLE_RATE)  # to that of the training data
        states = encoder.to(self.device).hidden_states(samples, num_frames).to("cpu", torch.bfloat16)
        del encoder
        self._free()
        return states

    def layers(self) -> MultiTalk:
        """The audio layers of the transformer that `transformer` returned last."""
        return self.beside()

    def _read_transformer(self, expert: int, device: torch.device | None) -> WanTransformer:
        transformer = super()._read_transformer(expert, device)
        if self.multitalk_path is None:
            self._beside = tiny.tiny_multitalk(self.config).set_compute_dtype(self.dtype)
        else:
            hint = self.hint(load_config(LAYERS))
            self._beside = load_multitalk(
                self.multitalk_path,
                transformer,
                dtype=self.dtype,
                device=device,
                fp8=bool(self.settings.fp8),
                hint=hint,
            )
        self._place(self._beside)
        return transformer


class TalkMaker(LongVideoMaker):
    """Makes long videos of a person who says what is to be heard. Arguments as of `LongVideoMaker`."""

    wan: TalkWan
    branches = (POSITIVE, NEGATIVE, UNCONDITIONAL)

    def __init__(self, wan: TalkWan, text: dict[str, Tensor], picture: numpy.ndarray, existing: Existing | None = None):
        super().__init__(wan, text, picture, existing)
        self.audio_path = self.settings.audio_path
        samples = read_speech(self.audio_path)
        read_speech.cache_clear()
        self.audio_hash = hashlib.sha256(samples.tobytes()).hexdigest()
        self.speech = wan.encode_speech(samples, AudioTimeline(len(samples), self.settings.fps).num_frames)

    def expert(self, job: Job, index: int, transformer: WanTransformer) -> Expert:
        """In place of two branches three: the unconditional one hears silence."""
        expert, settings = super().expert(job, index, transformer), self.settings
        heard = self.wan.layers().speech(self.speech, self.clip.start, settings.num_frames)
        return replace(
            expert,
            prompts=branch_prompts(expert.prompts[POSITIVE], expert.prompts[NEGATIVE]),
            guidance=three_branch(settings.guidance_scale[0], settings.audio_guidance_scale),
            branch_plugins={POSITIVE: [heard], NEGATIVE: [heard], UNCONDITIONAL: [heard.silent()]},
        )

    def metadata(self, job: Job) -> dict:
        return super().metadata(job) | {"audio": self.audio_hash}  # sha256 of the samples
