"""InstantID and an SDXL base in their released layouts, small and untrained: the networks of a golden case."""

import json
import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
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


# --------------------------------------------------------------------------------------------- SDXL in one file

_IN_A_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def write_single_file(folder: Path, file: Path) -> Path:
    """The SDXL repository `folder` as one file with Stability's names."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    tensors = {f"model.diffusion_model.{unet_name(n)}": t for n, t in pipeline.unet.state_dict().items()}
    for name, tensor in pipeline.vae.state_dict().items():
        renamed = vae_name(name)
        if ".mid.attn_1." in renamed and ".norm." not in renamed and tensor.ndim == 2:
            tensor = tensor[..., None, None]  # a linear layer, there a convolution
        tensors[f"first_stage_model.{renamed}"] = tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        tensors[f"conditioner.embedders.0.transformer.{name}"] = tensor
    second = open_clip_tensors(pipeline.text_encoder_2.state_dict())
    tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
    return file


def unet_name(name: str) -> str:
    for theirs, ours in _OUTSIDE.items():
        if name.startswith(f"{theirs}."):
            return name.replace(theirs, ours, 1)
    for theirs, ours in _IN_A_RESNET.items():
        name = re.sub(rf"(resnets\.\d)\.{theirs}\.", rf"\1.{ours}.", name)
    side, _, rest = name.partition(".")
    if side == "mid_block":
        part, number, rest = rest.split(".", 2)
        return f"middle_block.{2 * int(number) if part == 'resnets' else 1}.{rest}"
    block, part, number, rest = rest.split(".", 3)
    place = 3 * int(block) + int(number) + (side == "down_blocks")
    if part == "downsamplers":
        return f"input_blocks.{3 * int(block) + 3}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        return f"output_blocks.{3 * int(block) + 2}.2.{rest}"
    sides = {"down_blocks": "input_blocks", "up_blocks": "output_blocks"}
    return f"{sides[side]}.{place}.{0 if part == 'resnets' else 1}.{rest}"


def vae_name(name: str) -> str:
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{3 - int(match[1])}", name).replace(".resnets.", ".block.")
    name = re.sub(r"mid_block\.block\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    for theirs, ours in {
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
        "mid_block.attentions.0.to_": "mid.attn_1.",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
    }.items():
        name = name.replace(theirs, ours)
    return name


def open_clip_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIPTextModelWithProjection's tensors under OpenCLIP's names: q, k and v in one, the projection turned."""
    tensors = {"text_projection": state["text_projection.weight"].T}
    stacked: dict[str, list[torch.Tensor]] = {}
    for name, tensor in state.items():
        name = name.removeprefix("text_model.")
        if match := re.match(r"encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(\w+)", name):
            stacked.setdefault(f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}", []).append(name)
            continue
        for theirs, ours in {
            "embeddings.position_embedding.weight": "positional_embedding",
            "embeddings.token_embedding": "token_embedding",
            "final_layer_norm": "ln_final",
            "encoder.layers": "transformer.resblocks",
            "self_attn.out_proj": "attn.out_proj",
            "layer_norm1": "ln_1",
            "layer_norm2": "ln_2",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
        }.items():
            name = name.replace(theirs, ours)
        if name != "text_projection.weight":
            tensors[name] = tensor
    whole = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    for name, parts in stacked.items():
        tensors[name] = torch.cat([whole[p] for p in sorted(parts, key=lambda p: "qkv".index(p.split("attn.")[1][0]))])
    return tensors
