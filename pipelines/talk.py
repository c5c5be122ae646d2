"""SVI-Talk: the soundtrack of a chain of clips, and what each guidance branch of a clip hears."""

from pathlib import Path

import numpy
import torch
from torch import Tensor

from models.audio_encoder import AudioEncoder
from models.multitalk import MultiTalk
from models.wan.transformer import Plugin
from pipelines.audio_guidance import UNCONDITIONAL
from pipelines.denoise import NEGATIVE, POSITIVE
from preprocess.audio import SAMPLE_RATE, AudioTimeline, normalize_loudness, read_audio

FPS = 25  # of the videos that the audio layers were trained on


def read_speech(path: str | Path) -> tuple[numpy.ndarray, int]:
    """The samples of a sound file (N,) at the loudness of the training data, and how many video frames they last.

    Raises:
        InputError: no such file, no sound in it, or less than one frame.
    """
    samples = normalize_loudness(read_audio(path, argument="--audio_path"), SAMPLE_RATE)
    return samples, AudioTimeline(len(samples), FPS).num_frames


def embed_speech(encoder: AudioEncoder, samples: numpy.ndarray, num_frames: int) -> Tensor:
    """(F, layers, D) bfloat16 on the CPU, as upstream hands it to the model: 11 MiB for each minute and layer."""
    return encoder.hidden_states(samples, num_frames).to("cpu", torch.bfloat16)


def heard_in_branches(layers: MultiTalk, states: Tensor, start: int, num_frames: int) -> dict[str, list[Plugin]]:
    """`Expert.branch_plugins` of the clip whose first frame is frame `start` of the soundtrack."""
    heard = layers.speech(states, start, num_frames)
    return {POSITIVE: [heard], NEGATIVE: [heard], UNCONDITIONAL: [heard.silent()]}
