"""A tiny untrained model of the same classes as the released ones, made from a seed.

It makes every script and test run on a CPU in seconds. Its videos are noise, and it says so.
"""

import logging
from pathlib import Path

import numpy
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from errors import UsageError
from models.audio_adapter import AudioAdapter
from models.audio_encoder import AudioEncoder
from models.identity.stand_in import StandIn
from models.multitalk import MultiTalk
from models.pose_embedder import PoseEmbedder
from models.vace import VaceBranch
from models.wan.config import WanConfig
from models.wan.image_encoder import ImageEncoder
from models.wan.text_encoder import TextEncoder, load_tokenizer
from models.wan.transformer import WanTransformer
from models.wan.vae import WanVAE
from preprocess.image import read_image

logger = logging.getLogger("selfsame")

PROJECT = Path(__file__).parent.parent


def announce(real_model: str) -> None:
    """Say what the tiny model is; and keep torch to one thread, as its layers are smaller than what threads cost."""
    torch.set_num_threads(1)
    logger.warning(
        "the tiny model is UNTRAINED: it shows that everything runs, its video is noise. For the real one: %s",
        real_model,
    )


def fill_from_seed(module: nn.Module, seed: int) -> nn.Module:
    """Random parameters that keep activations of order one; independent of construction order and torch's init."""
    for index, (name, parameter) in enumerate(sorted(module.named_parameters())):
        generator = torch.Generator("cpu").manual_seed(seed * 100_003 + index)
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or "gamma" in name or "modulation" in name:
            parameter.data = (0.0 if "modulation" in name or name.endswith("bias") else 1.0) + 0.1 * noise
        elif parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.02 * noise
    return module.eval().requires_grad_(False)


def section_of(config: dict, name: str) -> dict:
    """What a config says of one part. Raises UsageError: nothing."""
    if name not in config:
        raise UsageError(f"config {config['name']}: has no {name}, which is needed here; see configs/tiny*.yaml")
    return config[name]


def tiny_transformer(config: dict, expert: int = 0) -> WanTransformer:
    transformer = WanTransformer(**WanConfig(**config["transformer"]).as_dict())
    return fill_from_seed(transformer, config["seed"] + 10 + expert)


def tiny_vae(config: dict) -> WanVAE:
    try:
        model = AutoencoderKLWan(**config["vae"])
    except (TypeError, ValueError, LookupError, NameError, RuntimeError, ArithmeticError) as error:
        raise UsageError(f"config {config['name']}: vae: no network can be made of this ({error})") from error
    return WanVAE(fill_from_seed(model, config["seed"] + 1)).eval()


def tiny_text_encoder(config: dict) -> TextEncoder:
    tokenizer = load_tokenizer(PROJECT / config["tokenizer"])
    model = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **config["text_encoder"])
    )
    return TextEncoder(fill_from_seed(model, config["seed"] + 2).encoder, tokenizer)


def tiny_image_encoder(config: dict) -> ImageEncoder:
    model = CLIPVisionModel(CLIPVisionConfig(hidden_act="gelu", **config["image_encoder"]))
    return ImageEncoder(fill_from_seed(model, config["seed"] + 3)).eval()


def tiny_audio_encoder(config: dict) -> AudioEncoder:
    model = Wav2Vec2Model(Wav2Vec2Config(mask_time_prob=0.0, **section_of(config, "audio_encoder")))
    return AudioEncoder(fill_from_seed(model, config["seed"] + 4)).eval()


def tiny_stand_in_tensors(config: dict, expert: int = 0) -> dict[str, Tensor]:
    """Under the released names."""
    shape, rank = config["transformer"], config["stand_in"]["rank"]
    generator = torch.Generator("cpu").manual_seed(config["seed"] + 20 + expert)
    return {
        f"blocks.{i}.self_attn.{p}_loras.{name}.weight": torch.randn(size, generator=generator) / size[1] ** 0.5
        for i in range(shape["num_layers"])
        for p in "qkv"
        for name, size in (("down", (rank, shape["dim"])), ("up", (shape["dim"], rank)))
    }


def tiny_stand_in(config: dict, transformer: WanTransformer, expert: int = 0) -> StandIn:
    return StandIn.from_tensors(tiny_stand_in_tensors(config, expert), transformer, source="the tiny model")


def tiny_vace(config: dict) -> VaceBranch:
    shape = WanConfig(**config["transformer"])
    same = {name: getattr(shape, name) for name in ("dim", "ffn_dim", "num_heads", "num_layers", "eps", "patch_size")}
    return fill_from_seed(VaceBranch(**same, **section_of(config, "vace")), config["seed"] + 30)


def tiny_audio_adapter(config: dict) -> AudioAdapter:
    shape = WanConfig(**config["transformer"])
    same = {name: getattr(shape, name) for name in ("dim", "num_layers", "eps")}
    width = section_of(config, "audio_encoder")["hidden_size"]
    return fill_from_seed(AudioAdapter(**same, audio_dim=width), config["seed"] + 40)


def tiny_multitalk(config: dict) -> MultiTalk:
    shape = WanConfig(**config["transformer"])
    same = {name: getattr(shape, name) for name in ("dim", "num_heads", "num_layers", "eps")}
    return fill_from_seed(MultiTalk(**same, **section_of(config, "multitalk")), config["seed"] + 40)


def tiny_pose_embedder(config: dict) -> PoseEmbedder:
    return fill_from_seed(PoseEmbedder(config["transformer"]["dim"]), config["seed"] + 41)


def demonstration_control(num_frames: int, height: int, width: int) -> numpy.ndarray:
    """A control video to try things with: the face of assets/ passing by. (T, H, W, 3) uint8."""
    face = read_image(PROJECT / "assets" / "face.png")
    rows = numpy.linspace(0, face.shape[0] - 1, height).astype(int)
    columns = numpy.linspace(0, face.shape[1] - 1, width).astype(int)
    face = face[rows][:, columns]
    return numpy.stack([numpy.roll(face, 4 * frame, axis=1) for frame in range(num_frames)])
