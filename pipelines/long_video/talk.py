"""Clips that are driven by speech (SVI-Talk): what a whole video hears, and what a clip's forward passes hear of it.

Source: Stable-Video-Infinity `test_svi_talk.py`, `diffsynth/pipelines/svi_video_talk.py`.
"""

import hashlib
from dataclasses import dataclass

from torch import Tensor

from models.wan.slots import Plugin
from pipelines.clip_plan import Clip
from pipelines.denoise import NEGATIVE, POSITIVE, Guidance
from pipelines.guidance import UNCONDITIONAL, three_branch
from pipelines.long_video.media import read_speech
from pipelines.long_video.parts import encode_speech
from pipelines.long_video.settings import LongVideoSettings
from pipelines.wan import Wan
from preprocess.audio import AudioTimeline

BRANCHES = (POSITIVE, NEGATIVE, UNCONDITIONAL)  # what the guidance asks for


@dataclass(frozen=True)
class Speech:
    """What a whole video hears.

    states: (F, 12, 768), wav2vec2's hidden states, one entry a video frame.
    sha256: of the samples.
    """

    states: Tensor
    sha256: str


def open_speech(wan: Wan) -> Speech:
    """Read and encode the sound of the settings."""
    samples = read_speech(wan.settings.audio_path)
    read_speech.cache_clear()
    num_frames = AudioTimeline(len(samples), wan.settings.fps).num_frames
    return Speech(encode_speech(wan, samples, num_frames), hashlib.sha256(samples.tobytes()).hexdigest())


def speech_guidance(settings: LongVideoSettings) -> Guidance:
    """In place of two branches three: one by the text, one by the speech."""
    return three_branch(settings.guidance_scale[0], settings.audio_guidance_scale)


def speech_plugins(wan: Wan, speech: Speech, clip: Clip) -> dict[str, list[Plugin]]:
    """What each guidance branch hears during a clip; the unconditional one hears silence."""
    heard = wan.part("multitalk").speech(speech.states, clip.start, wan.settings.num_frames)
    return {POSITIVE: [heard], NEGATIVE: [heard], UNCONDITIONAL: [heard.silent()]}
