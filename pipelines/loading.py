"""How the networks of one Wan model are read: from their files, or of a tiny model made from a seed."""

import logging

import torch
from diffusers import ModelMixin

from configs import download_command
from models.wan.checkpoint import load_transformer
from models.wan.float8 import use_float8
from models.wan.image_encoder import ImageEncoder, load_image_encoder
from models.wan.text_encoder import TextEncoder, load_text_encoder
from models.wan.transformer import WanTransformer
from models.wan.vae import WanVAE, load_vae
from pipelines import tiny
from pipelines.model_files import ModelFiles
from pipelines.parts import Reading

logger = logging.getLogger("selfsame")


def read_text_encoder(files: ModelFiles, device: torch.device) -> TextEncoder:
    """umT5. On a CPU it stays as its file has it, bfloat16 as released: mapped from disk, where float32 takes 21 GiB.
    Of a random encoder of width 1024 the states differ from float32's by 0.9 % after 4 layers, 2 % after 24.
    """
    if files.are_tiny:
        return tiny.tiny_text_encoder(files.config).to(device)
    path = files.settings.text_encoder_path or files.base_path
    logger.info("reading the text encoder from %s", path)
    on_cpu = device.type == "cpu"
    return load_text_encoder(
        path,
        files.settings.tokenizer_path,
        dtype=None if on_cpu else torch.bfloat16,
        device=None if on_cpu else device,
        hint=download_command(files.base),
    )


def read_image_encoder(files: ModelFiles, device: torch.device) -> ImageEncoder:
    """CLIP's, on the CPU, in the type that suits the device."""
    if files.are_tiny:
        return tiny.tiny_image_encoder(files.config)
    path = files.settings.image_encoder_path or files.base_path
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    return load_image_encoder(path, dtype=dtype, hint=download_command(files.base))


def read_vae(files: ModelFiles, dtype: torch.dtype) -> WanVAE:
    if files.has_seeded_vae:
        return tiny.tiny_vae(files.config).to(dtype)
    path = files.settings.vae_path or files.base_path
    return load_vae(path, dtype=dtype, hint=download_command(files.base)).to(dtype)


def read_transformer(files: ModelFiles, reading: Reading) -> tuple[WanTransformer, dict[str, ModelMixin]]:
    """An expert's transformer, and the layers of the parts that run beside it, by their names."""
    layers: dict[str, ModelMixin] = {}
    if files.with_transformer is not None:
        transformer, layers[files.with_transformer.name] = files.with_transformer.load_both(reading)
    else:
        transformer = _read_alone(files, reading)
    for part in files.parts:
        if part.build is not None and part is not files.with_transformer:
            layers[part.name] = part.load(transformer, reading)
    return transformer, layers


def _read_alone(files: ModelFiles, reading: Reading) -> WanTransformer:
    if files.has_seeded_transformer:
        transformer = tiny.tiny_transformer(files.config, reading.expert).set_compute_dtype(reading.dtype)
        for name, change in reading.changes.items():
            parameter = transformer.get_parameter(name)
            parameter.data = change(parameter.data)
        return use_float8(transformer) if reading.fp8 else transformer
    return load_transformer(
        files.transformer_path(reading.expert),
        **reading.options,
        expect=files.transformer_config,
        changes=reading.changes,
        hint=download_command(files.base),
    ).requires_grad_(False)
