"""SVI-Talk: clips that are driven by speech. The maker that lets clips hear it.

Source: Stable-Video-Infinity `test_svi_talk.py`, `diffsynth/pipelines/svi_video_talk.py`.
"""

import hashlib
from dataclasses import replace

import numpy
from torch import Tensor

from models.wan.transformer import WanTransformer
from pipelines.denoise import NEGATIVE, POSITIVE, Expert
from pipelines.guidance import UNCONDITIONAL, branch_prompts, three_branch
from pipelines.jobs import Job
from pipelines.long_video.parts import encode_speech
from pipelines.long_video.pipeline import Existing, LongVideoMaker
from pipelines.long_video.settings import read_speech
from pipelines.wan import Wan
from preprocess.audio import AudioTimeline


class TalkMaker(LongVideoMaker):
    """Makes long videos of a person who says what is to be heard. Arguments as of `LongVideoMaker`."""

    branches = (POSITIVE, NEGATIVE, UNCONDITIONAL)

    def __init__(self, wan: Wan, text: dict[str, Tensor], picture: numpy.ndarray, existing: Existing | None = None):
        super().__init__(wan, text, picture, existing)
        self.audio_path = self.settings.audio_path
        samples = read_speech(self.audio_path)
        read_speech.cache_clear()
        self.audio_hash = hashlib.sha256(samples.tobytes()).hexdigest()
        self.speech = encode_speech(wan, samples, AudioTimeline(len(samples), self.settings.fps).num_frames)

    def expert(self, job: Job, index: int, transformer: WanTransformer) -> Expert:
        """In place of two branches three: the unconditional one hears silence."""
        expert, settings = super().expert(job, index, transformer), self.settings
        heard = self.wan.part("multitalk").speech(self.speech, self.clip.start, settings.num_frames)
        return replace(
            expert,
            prompts=branch_prompts(expert.prompts[POSITIVE], expert.prompts[NEGATIVE]),
            guidance=three_branch(settings.guidance_scale[0], settings.audio_guidance_scale),
            branch_plugins={POSITIVE: [heard], NEGATIVE: [heard], UNCONDITIONAL: [heard.silent()]},
        )

    def metadata(self, job: Job) -> dict:
        return super().metadata(job) | {"audio": self.audio_hash}  # sha256 of the samples
