"""What drives clips beside prompts, as parts beside the transformer: MultiTalk's audio layers, SVI-Dance's pose
embedder; and the encoder of speech, which is gone before the transformer loads.
"""

from functools import partial
from pathlib import Path

import numpy
import torch
from torch import Tensor

from configs import download_command, load_config, part_path
from models.audio_encoder import load_audio_encoder
from models.multitalk import MultiTalk, load_multitalk
from models.pose_embedder import KEY, PoseEmbedder, load_pose_embedder
from models.wan.config import WanConfig
from models.wan.transformer import WanTransformer
from pipelines import tiny
from pipelines.long_video.settings import LongVideoSettings
from pipelines.networks import shape_of
from pipelines.parts import Part, Reading, meta_transformer
from pipelines.settings import is_tiny
from pipelines.vace.part import vace_branch_part
from pipelines.wan import Wan
from pipelines.weights import WeightsFile
from preprocess.audio import SAMPLE_RATE, normalize_loudness

LAYERS, AUDIO_ENCODER, DANCE = "multitalk", "chinese-wav2vec2-base", "svi-dance"  # their configs


def driving_parts(settings: LongVideoSettings, config: dict) -> list[Part]:
    """The parts of what leads a video's clips: of speech, of poses, of a control video, or of all."""
    parts = {"audio": multitalk_part, "pose": pose_embedder_part}
    control = [] if settings.reference_video is None else [vace_branch_part(settings, config)]
    return [*(parts[driver](settings, config) for driver in settings.drivers), *control]


# ------------------------------------------------------------------------------------------------------------- speech


def multitalk_part(settings: LongVideoSettings, config: dict) -> Part:
    """The audio layers, from --multitalk_path or the released file."""
    path = _given_or_released(settings, config, settings.multitalk_path, LAYERS, "multitalk")
    encoder = audio_encoder_path(settings, config)
    files = []
    if path is not None:
        files.append(WeightsFile("MultiTalk", "--multitalk_path", path, LAYERS, read=partial(_check, path, config)))
    if encoder is not None:
        read = partial(load_audio_encoder, encoder, device="meta")
        files.append(WeightsFile("wav2vec2", "--audio_encoder_path", encoder, AUDIO_ENCODER, read=read))

    def build(shape: WanConfig) -> MultiTalk:
        widths = config["multitalk"] if path is None else {}
        return MultiTalk(shape.dim, shape.num_heads, shape.num_layers, **widths)

    def load(transformer: WanTransformer, reading: Reading) -> MultiTalk:
        if path is None:
            return tiny.tiny_multitalk(config).set_compute_dtype(reading.dtype)
        return load_multitalk(path, transformer, **reading.options, hint=download_command(load_config(LAYERS)))

    return Part("multitalk", files, load, build)


def audio_encoder_path(settings: LongVideoSettings, config: dict) -> Path | None:
    """None: the tiny model's."""
    return _given_or_released(settings, config, settings.audio_encoder_path, AUDIO_ENCODER, "audio_encoder")


def _given_or_released(
    settings: LongVideoSettings, config: dict, given: str | None, release: str, part: str
) -> Path | None:
    if given is not None:
        return Path(given)
    return None if is_tiny(settings, config) else part_path(load_config(release), part)


def _check(path: Path, config: dict) -> None:
    load_multitalk(path, meta_transformer(shape_of(config)), device="meta")


def encode_speech(wan: Wan, samples: numpy.ndarray, num_frames: int) -> Tensor:
    """The speech (N,) at 16 kHz as hidden states (F, 12, 768), one entry a video frame: bfloat16 on the CPU, as the
    released layers are given them, 26 MiB a minute. The encoder is freed before returning.
    """
    path = audio_encoder_path(wan.settings, wan.config)
    if path is None:
        encoder = tiny.tiny_audio_encoder(wan.config)
    else:
        encoder = load_audio_encoder(path, hint=download_command(load_config(AUDIO_ENCODER)))
    samples = normalize_loudness(samples, SAMPLE_RATE)  # to that of the training data
    states = encoder.to(wan.device).hidden_states(samples, num_frames).to("cpu", torch.bfloat16)
    del encoder
    wan.free()
    return states


# -------------------------------------------------------------------------------------------------------------- poses


def pose_embedder_part(settings: LongVideoSettings, config: dict) -> Part:
    """The embedder, which lies in the file of SVI-Dance's LoRA: the first LoRA of that variant; of another one a file
    of its own. It runs once a clip, before it.
    """
    is_in_lora = settings.driven_by == "pose" and settings.lora_path and settings.pose_embedder_path is None
    path = settings.lora_path[0] if is_in_lora else settings.pose_embedder_path
    if path is None:
        if is_tiny(settings, config):
            return Part("pose_embedder", (), lambda transformer, reading: tiny.tiny_pose_embedder(config))
        path = part_path(load_config(DANCE), "lora")
    dim = shape_of(config).dim
    name, flag = ("LoRA", "--lora_path") if is_in_lora else ("pose embedder", "--pose_embedder_path")
    release = settings.lora_release(path) if is_in_lora else DANCE
    files = [WeightsFile(name, flag, Path(path), release, read=partial(load_pose_embedder, path, dim))]

    def load(transformer: WanTransformer | None, reading: Reading) -> PoseEmbedder:
        return load_pose_embedder(path, dim)

    return Part("pose_embedder", files, load, key_in_lora=KEY if is_in_lora else None)
