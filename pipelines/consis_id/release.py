"""The folders of a ConsisID release, in diffusers' layout, and how each is read."""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from errors import WeightsError
from models.identity.consis_id import read_json
from models.wan.checkpoint import assign_tensors, read_tensors

SCHEDULERS = {kind.__name__: kind for kind in (CogVideoXDPMScheduler, CogVideoXDDIMScheduler)}
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
