"""StableAvatar's audio adapter as a part beside the transformer, which its released files hold too; and the encoder of
the sound, which is gone before the transformer loads.
"""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy
import torch
from torch import Tensor

from configs import download_command, load_config, part_path
from errors import ResourceError
from models.audio_adapter import AudioAdapter, load_audio_avatar
from models.audio_encoder import AudioEncoder, load_audio_encoder
from models.wan.config import WanConfig
from models.wan.transformer import WanTransformer
from pipelines import tiny
from pipelines.audio_avatar.settings import AvatarSettings
from pipelines.networks import shape_of
from pipelines.parts import Part, Reading
from pipelines.settings import is_tiny
from pipelines.wan import Wan
from pipelines.weights import WeightsFile
from preprocess.audio import cut_samples, num_features
from preprocess.output import allocate, readable_bytes
from preprocess.progress_bars import ProgressBars

AUDIO_ENCODER = "wav2vec2-base-960h"  # its config


def audio_adapter_part(settings: AvatarSettings, config: dict) -> Part:
    """The adapter and its transformer, from --transformer_path or the released file for this size."""
    if is_tiny(settings, config) and settings.transformer_path is None:
        return Part("audio_adapter", (), partial(_load_tiny, config), adapter_of)
    path = transformer_path(settings, config)
    load_both = partial(load_audio_avatar, path, expect=shape_of(config))
    read = partial(load_both, device="meta")
    files = [WeightsFile("transformer", "--transformer_path", path, config["name"], read=read)]
    if not is_tiny(settings, config):
        encoder = audio_encoder_path(settings)
        read = partial(load_audio_encoder, encoder, device="meta")
        files.append(WeightsFile("wav2vec2", "--pretrained_wav2vec_path", encoder, AUDIO_ENCODER, read=read))

    def read_both(reading: Reading) -> tuple[WanTransformer, AudioAdapter]:
        return load_both(**reading.options, changes=reading.changes, hint=download_command(config))

    return Part("audio_adapter", files, build=adapter_of, load_both=read_both)


def transformer_path(settings: AvatarSettings, config: dict) -> Path:
    """StableAvatar's file: the whole transformer and the adapter, one trained on squares and one on rectangles."""
    if settings.transformer_path is not None:
        return Path(settings.transformer_path)
    return part_path(config, "square" if settings.width == settings.height else "rectangle")


def audio_encoder_path(settings: AvatarSettings) -> Path:
    return Path(settings.pretrained_wav2vec_path or part_path(load_config(AUDIO_ENCODER), "audio_encoder"))


def adapter_of(shape: WanConfig) -> AudioAdapter:
    """An adapter for a transformer of this shape."""
    return AudioAdapter(dim=shape.dim, num_layers=shape.num_layers)


def _load_tiny(config: dict, transformer: WanTransformer, reading: Reading) -> AudioAdapter:
    transformer.rounds_time_embedding = True
    return tiny.tiny_audio_adapter(config).set_compute_dtype(reading.dtype)


def encode_sounds(wan: Wan, samples: numpy.ndarray, ranges: Sequence[tuple[int, int]], folder: Path) -> list[Tensor]:
    """wav2vec2 features (1, L, D) of parts of a sound, each by itself; on the disk, an hour's take 0.7 GB. The encoder
    is freed before returning.

    Args:
        samples: (N,) at 16 kHz.
        ranges: (first, end) of each part; beyond the sound there is silence.
        folder: where there is room for a file without a name.

    Raises:
        ResourceError: there is none.
    """
    encoder = _load_audio_encoder(wan).to(wan.device)
    lengths = [num_features(end - first) for first, end in ranges]
    starts = numpy.cumsum([0, *lengths])
    size = 4 * int(starts[-1]) * encoder.width
    with tempfile.TemporaryFile(dir=folder) as file:  # its place is kept by the mapping
        try:
            allocate(file.fileno(), size)
        except OSError as error:
            raise ResourceError(
                f"{folder}: {error.strerror} ({readable_bytes(size)} of sound features); make room there"
            ) from error
        features = torch.from_numpy(numpy.memmap(file, numpy.float32, "w+", 0, (int(starts[-1]), encoder.width)))
    parts = features.split(lengths)
    with ProgressBars(wan.processes.rank == 0).work("encoding the sound", len(parts), "window") as bar:
        for (first, end), part in zip(ranges, parts, strict=True):
            part.copy_(encoder.last_hidden_state(cut_samples(samples, first, end))[0])
            bar.advance()
    del encoder
    wan.free()
    return [part[None] for part in parts]


def _load_audio_encoder(wan: Wan) -> AudioEncoder:
    if is_tiny(wan.settings, wan.config):
        return tiny.tiny_audio_encoder(wan.config)
    return load_audio_encoder(audio_encoder_path(wan.settings), hint=download_command(load_config(AUDIO_ENCODER)))
