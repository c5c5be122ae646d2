"""wav2vec2: speech samples -> features, as the talking systems use it (StableAvatar; MultiTalk's layers in SVI-Talk).

    encoder = load_audio_encoder("checkpoints/wav2vec2-base-960h")
    features = encoder.last_hidden_state(samples)                    # (1, L, 768), 50 a second
    features = encoder.hidden_states(samples, num_frames)            # (F, 12, 768), one a video frame

The network is transformers'; here are the released layouts, the normalisation of the samples, and the two read-outs.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2Model

from errors import WeightsError
from models.wan.checkpoint import assign_tensors, read_tensors

# What releases hold beside the encoder: the heads of training. `masked_spec_embed` hides spans in training.
_HEADS = ("lm_head.", "quantizer.", "project_hid.", "project_q.", "masked_spec_embed")
_RENAMED = {"conv.weight_g": "conv.parametrizations.weight.original0",
            "conv.weight_v": "conv.parametrizations.weight.original1"}  # fmt: skip

SECTION = 100 * 16000  # samples of one forward pass of `hidden_states`: beyond, memory would grow with the length
CONTEXT = 5 * 16000  # samples that a section sees beyond its two ends


class AudioEncoder(nn.Module):
    """wav2vec2 (base) in float32.

    Args:
        normalize: whether samples are brought to mean 0 and variance 1, which all released files ask for.
    """

    def __init__(self, model: Wav2Vec2Model, normalize: bool = True):
        super().__init__()
        self.model = model
        self.normalize = normalize

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def num_layers(self) -> int:
        return self.model.config.num_hidden_layers

    def input_values(self, samples: np.ndarray) -> Tensor:
        """(N,) samples at 16 kHz -> (1, N), what the network is given."""
        samples = np.array(samples, np.float32)
        if self.normalize:
            samples = normalize_samples(samples)
        return torch.from_numpy(samples)[None].to(self.model.device)

    @torch.no_grad()
    def last_hidden_state(self, samples: np.ndarray) -> Tensor:
        """(N,) samples at 16 kHz -> (1, L, D) float32: one feature every 320 samples (`num_features`).

        The samples are normalised by themselves: StableAvatar gives each window on its own.
        """
        return self.model(self.input_values(samples)).last_hidden_state

    @torch.no_grad()
    def hidden_states(self, samples: np.ndarray, num_frames: int) -> Tensor:
        """(N,) samples at 16 kHz -> (F, layers, D) float32: the output of every layer, F frames over the whole sound.

        The convolutions' features are interpolated to the video's frames before the layers see them, as MultiTalk does
        (src/audio_analysis/wav2vec2.py). Sound of more than 100 s goes through in sections with 5 s of context.
        """
        values = self.input_values(samples)
        if values.shape[1] <= SECTION:
            return self._layers(values, num_frames)
        sections = []
        per_frame = values.shape[1] / num_frames
        step, context = int(SECTION / per_frame), int(CONTEXT / per_frame)
        for first in range(0, num_frames, step):
            start, end = max(first - context, 0), min(first + step + context, num_frames)
            piece = values[:, int(start * per_frame) : int(end * per_frame)]
            sections.append(self._layers(piece, end - start)[first - start : first - start + step])
        return torch.cat(sections)

    def _layers(self, values: Tensor, num_frames: int) -> Tensor:
        features = self.model.feature_extractor(values)  # (1, channels, L)
        features = F.interpolate(features, size=num_frames, mode="linear", align_corners=True)
        hidden, _ = self.model.feature_projection(features.transpose(1, 2))  # (1, F, D)
        encoder = self.model.encoder
        hidden = encoder.layer_norm(hidden + encoder.pos_conv_embed(hidden))
        states = []
        for layer in encoder.layers:
            hidden = layer(hidden)
            states.append(hidden[0])
        return torch.stack(states, dim=1)  # (F, layers, D)


def normalize_samples(samples: np.ndarray) -> np.ndarray:
    """Samples (N,) at mean 0 and variance 1, as the released encoders want them."""
    samples = np.asarray(samples, np.float32)
    return (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)


def audio_encoder_from_tensors(
    tensors: Mapping[str, Tensor],
    config: Mapping,
    *,
    normalize: bool = True,
    device: torch.device | str | None = None,
    source: str | Path = "state dict",
) -> AudioEncoder:
    """Build the encoder around a state dict of transformers, of the bare model or of one with a head.

    Args:
        config: fields of `Wav2Vec2Config`.

    Raises:
        WeightsError: not the weights of a wav2vec2 encoder of that shape; `source` names them.
    """
    network = Wav2Vec2Config(**{**config, "mask_time_prob": 0.0, "mask_feature_prob": 0.0})
    if network.do_stable_layer_norm or network.add_adapter:
        raise WeightsError(f"{source}: the talking systems use wav2vec2 base; this is another variant")
    prefixed = any(name.startswith("wav2vec2.") for name in tensors)
    found = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix("wav2vec2.")
        if (prefixed and inner == name or inner == "masked_spec_embed") and inner.startswith(_HEADS):
            continue
        for old, new in _RENAMED.items():
            inner = inner.replace(old, new)
        found[inner] = tensor
    with torch.device("meta"):
        model = Wav2Vec2Model(network)
    assign_tensors(model, found, dtype=torch.float32, device=device, source=source)
    return AudioEncoder(model, normalize).eval().requires_grad_(False)


def load_audio_encoder(path: str | Path, *, device: torch.device | str | None = None, hint: str = "") -> AudioEncoder:
    """Read wav2vec2 from a local folder in transformers' layout; nothing is fetched.

    Args:
        path: the folder of config.json, model.safetensors or pytorch_model.bin, and preprocessor_config.json.
        hint: what to do about missing files, such as the download command; ends the message.

    Raises:
        WeightsError: missing, unreadable, or not wav2vec2 base.
    """
    folder = Path(path)
    config = _read_json(folder / "config.json", hint)
    if config.get("model_type") != "wav2vec2":
        raise WeightsError(f"{folder}: config.json is of a {config.get('model_type')} model, not wav2vec2")
    normalize = True
    if (folder / "preprocessor_config.json").is_file():
        normalize = _read_json(folder / "preprocessor_config.json", hint).get("do_normalize", True)
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    weights = next((file for file in files if file.is_file()), files[0])  # some releases have both, and equal
    tensors = read_tensors(weights, hint=hint)
    return audio_encoder_from_tensors(tensors, config, normalize=normalize, device=device, source=weights)


def _read_json(file: Path, hint: str) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{file}: {error.strerror}{hint and f'; {hint}'}") from error
    except ValueError as error:
        raise WeightsError(f"{file}: not JSON ({error}){hint and f'; {hint}'}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file}: not a configuration{hint and f'; {hint}'}")
    return content
