"""The frozen networks whose outputs are encoded once and kept: how each is loaded, and what tells one from another."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from configs import download_command, load_config, part_path
from models.audio_encoder import load_audio_encoder
from models.wan import image_encoder, text_encoder, vae
from models.wan.checkpoint import part_of_release
from models.wan.text_encoder import load_text_encoder
from pipelines import tiny
from pipelines.networks import shape_of
from pipelines.record import digest_of, hash_of_weights
from pipelines.weights import found_or
from training.config import Model

AUDIO_ENCODER = "wav2vec2-base-960h"  # its config


@dataclass(frozen=True)
class Encoder:
    """A network that is loaded when it is needed and gone afterwards.

    Args:
        identity: changes with the weights and with the type they compute in.
        load: gives the network on its device.
        weights: where it is read from; None of a tiny one.
        hint: the command that fetches it.
    """

    identity: str
    load: Callable[[], nn.Module]
    weights: Path | None = None
    hint: str = ""


def encoders_of(model: Model, device: torch.device) -> dict[str, Encoder]:
    """The encoders of a base model, by name: vae, text, audio, and image where it has one. Nothing is loaded yet."""
    config = load_config(model.config)
    if config.get("tiny") and model.base_path is None:
        return tiny_encoders(config, device)
    base = config
    while "transformer" not in base.get("files", {}) and base.get("base"):
        base = base["base"]
    folder = Path(model.base_path or Path("checkpoints") / base.get("dest", ""))
    on_cpu = device.type == "cpu"

    def encoder(path: Path, load: Callable[..., nn.Module], dtype: torch.dtype | None, config: dict) -> Encoder:
        identity = f"{hash_of_weights(path) if path.exists() else 'missing'} {dtype}"
        hint = download_command(config)
        return Encoder(identity, lambda: load(path, dtype=dtype, hint=hint).to(device), path, hint)

    def place(given: str | None, of_release: tuple[str, str]) -> Path:
        return Path(given) if given else found_or(folder, part_of_release, folder, *of_release)

    # The VAE in float32 as in inference; umT5 on a CPU as its file has it, where float32 takes 21 GiB.
    text_dtype, image_dtype = None if on_cpu else torch.bfloat16, torch.float32 if on_cpu else torch.float16
    audio = load_config(AUDIO_ENCODER)
    audio_path = Path(model.pretrained_wav2vec_path or part_path(audio, "audio_encoder"))
    load_text = partial(load_text_encoder, tokenizer_path=model.tokenizer_path)
    found = {
        "vae": encoder(place(model.vae_path, vae.PLACE), vae.load_vae, torch.float32, base),
        "text": encoder(place(model.text_encoder_path, text_encoder.PLACE), load_text, text_dtype, base),
        "audio": encoder(audio_path, load_float32_audio, torch.float32, audio),
    }
    if shape_of(config).image_dim is not None:
        path = place(model.image_encoder_path, image_encoder.PLACE)
        found["image"] = encoder(path, image_encoder.load_image_encoder, image_dtype, base)
    return found


def load_float32_audio(path: Path, dtype: torch.dtype, hint: str) -> nn.Module:
    """wav2vec2, which is always float32."""
    return load_audio_encoder(path, hint=hint)


def tiny_encoders(config: dict, device: torch.device) -> dict[str, Encoder]:
    """Those of a tiny model, made from its seed."""
    makers = {"vae": tiny.tiny_vae, "text": tiny.tiny_text_encoder}
    sections = {"vae": "vae", "text": "text_encoder", "image": "image_encoder", "audio": "audio_encoder"}
    if "image_encoder" in config and shape_of(config).image_dim is not None:
        makers["image"] = tiny.tiny_image_encoder
    if "audio_encoder" in config:
        makers["audio"] = tiny.tiny_audio_encoder
    return {
        name: Encoder(
            f"tiny {name} {digest_of([config['seed'], config[sections[name]]])}",
            lambda make=make: make(config).to(device),
        )
        for name, make in makers.items()
    }
