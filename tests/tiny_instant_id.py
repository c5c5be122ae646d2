"""InstantID and an SDXL base in their released layouts, small and untrained: the networks of a golden case."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.prompt_weighting import END, START
from pipelines.tiny import fill_from_seed
from tests.conftest import GOLDENS
from tests.golden_checks import GoldenCase
from tests.golden_checks.instant_id import part

CASE = GOLDENS / "idimage-iid-pipe"
WIDTHS = (8, 16)  # of the text encoders; together the UNet's cross_attention_dim
POOLED = 8


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """One token a letter, with CLIP's own numbers for start and end."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.()[]:!"
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    vocabulary |= {f"{letter}</w>": len(letters) + number for number, letter in enumerate(letters)}
    vocabulary |= {"<|startoftext|>": START, "<|endoftext|>": END}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def text_encoder(kind, width: int, seed: int):
    config = CLIPTextConfig(
        vocab_size=END + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=POOLED,
        bos_token_id=START,
        eos_token_id=END,
    )
    return fill_from_seed(kind(config), seed)


def write_sdxl(folder: Path) -> Path:
    """A StableDiffusionXLPipeline repository."""
    case = GoldenCase.open(CASE)
    unet = UNet2DConditionModel.from_config(case.config["unet"])
    unet.load_state_dict(part(case.weights(), "unet"))
    tokenizer = write_tokenizer(folder / "tokenizer")
    StableDiffusionXLPipeline(
        fill_from_seed(AutoencoderKL.from_config(case.config["vae"]), 1),
        text_encoder(CLIPTextModel, WIDTHS[0], 2),
        text_encoder(CLIPTextModelWithProjection, WIDTHS[1], 3),
        tokenizer,
        tokenizer,
        unet,
        EulerDiscreteScheduler.from_config(case.config["scheduler"]),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def adapter_tensors() -> dict[str, dict[str, torch.Tensor]]:
    """What ip-adapter.bin holds, for ArcFace's 512 values."""
    weights = GoldenCase.open(CASE).weights()
    adapter = {name: part(weights, name) for name in ("image_proj", "ip_adapter")}
    hidden = adapter["image_proj"]["proj_in.weight"].shape[0]
    adapter["image_proj"]["proj_in.weight"] = torch.randn(hidden, 512, generator=torch.Generator().manual_seed(4)) / 20
    return adapter


def write_instant_id(folder: Path) -> Path:
    """The InstantX/InstantID repository."""
    write_controlnet(folder / "ControlNetModel", "controlnet")
    torch.save(adapter_tensors(), folder / "ip-adapter.bin")
    return folder


def write_controlnet(folder: Path, name: str = "controlnet2") -> Path:
    case = GoldenCase.open(CASE)
    net = ControlNetModel.from_config(case.config["controlnet"])
    net.load_state_dict(part(case.weights(), name))
    net.save_pretrained(folder)
    return folder
