"""The image encoder of Wan2.1 image-to-video: photo -> CLIP features, (257, 1280).

The network is the vision tower of transformers' CLIP; this file loads the original file
(`models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`, whose text half is not used) or a Diffusers folder into it.
The features are the output of the last block but one, so the last block is not even built.

Source: Wan2.1 `wan/modules/clip.py`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from errors import WeightsError
from models.wan.checkpoint import assign_tensors, part_of_release, read_tensors

PLACE = ("image_encoder", "models_clip*")  # its name in a Diffusers repository, and in an original one
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_DIM = 80  # ViT-H/14 has 16 heads for a width of 1280; a checkpoint holds no trace of the number of heads

# Original name -> transformers' name, in whole path components; blocks are `transformer.N` -> `encoder.layers.N`.
_OUTSIDE_BLOCKS = {
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "pre_norm.weight": "pre_layrnorm.weight",
    "pre_norm.bias": "pre_layrnorm.bias",
    "post_norm.weight": "post_layernorm.weight",
    "post_norm.bias": "post_layernorm.bias",
}
_INSIDE_BLOCKS = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


def clip_pixels(images: torch.Tensor, size: int = 224) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> normalised pixel values (B, 3, size, size), float32.

    The picture is squashed to a square, whatever its shape, bicubic and without antialiasing: the transformer was
    trained on features made this way.
    """
    pixels = F.interpolate(images.float(), (size, size), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels * 0.5 + 0.5 - mean) / std


class ImageEncoder(nn.Module):
    """CLIP's vision tower, without its last block."""

    def __init__(self, model: CLIPVisionModel):
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> features (B, 1 + patches, D): the class token, then the patches by row.

        Released: 257 tokens of 1280. The result is of the model's dtype, on its device.
        """
        weight = self.model.embeddings.patch_embedding.weight
        pixels = clip_pixels(images.to(weight.device), self.model.config.image_size)
        return self.model(pixel_values=pixels.to(weight.dtype)).last_hidden_state


def transformers_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP state dict in any released layout -> the vision tower with the names of transformers' CLIPVisionModel."""
    visual = {key: tensor for key, tensor in tensors.items() if "visual" in key.split(".")[:2]}
    if not visual:  # a Diffusers folder: transformers' names, in older releases under `vision_model.`
        names = {key.removeprefix("vision_model."): tensor for key, tensor in tensors.items()}
        unused = ("visual_projection.weight", "embeddings.position_ids")
        return {key: tensor for key, tensor in names.items() if key not in unused}
    converted = {}
    for key, tensor in visual.items():
        key = key.partition("visual.")[2]  # `visual.`, or `model.visual.` (DiffSynth-Studio)
        match key.split("."):
            case ["transformer", index, "attn", "to_qkv", last]:
                for name, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                    converted[f"encoder.layers.{index}.self_attn.{name}.{last}"] = part
            case ["transformer", index, *names, last]:
                name = ".".join(names)
                converted[f"encoder.layers.{index}.{_INSIDE_BLOCKS.get(name, name)}.{last}"] = tensor
            case ["cls_embedding" | "pos_embedding"]:
                converted[_OUTSIDE_BLOCKS[key]] = tensor.flatten() if key == "cls_embedding" else tensor[0]
            case ["head"]:
                pass  # projects to the space shared with text
            case _:
                converted[_OUTSIDE_BLOCKS.get(key, key)] = tensor
    return converted


def detect_vision_config(shapes: Mapping[str, tuple[int, ...]], num_heads: int | None = None) -> CLIPVisionConfig:
    """Read the configuration of the whole tower off a state dict with transformers' names.

    Args:
        num_heads: needed only when the head width is not 80 (tiny test models).

    Raises:
        KeyError: a tensor that every CLIP vision tower has is missing.
    """
    hidden_size, _, patch_size, _ = shapes["embeddings.patch_embedding.weight"]
    patches = shapes["embeddings.position_embedding.weight"][0] - 1
    return CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.layers.")),
        num_attention_heads=num_heads or max(1, hidden_size // HEAD_DIM),
        image_size=round(patches**0.5) * patch_size,
        patch_size=patch_size,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )


def image_encoder_from_tensors(
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str | None = None,
    num_heads: int | None = None,
    source: str | Path = "state dict",
) -> ImageEncoder:
    """Build the encoder around a state dict with original, DiffSynth or transformers' names.

    Raises:
        WeightsError: not the weights of a CLIP vision tower; `source` names them.
    """
    tensors = transformers_names(tensors)
    try:
        config = detect_vision_config({key: tuple(tensor.shape) for key, tensor in tensors.items()}, num_heads)
    except KeyError as error:
        raise WeightsError(f"{source}: not the weights of a CLIP vision tower (no {error})") from error
    config.num_hidden_layers -= 1  # the features are what goes into the last block
    last_block = f"encoder.layers.{config.num_hidden_layers}."
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(last_block)}
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    positions = model.embeddings.num_positions
    model.embeddings.position_ids = torch.arange(positions, device="cpu").expand(1, -1)  # not in checkpoints
    assign_tensors(model, tensors, dtype=dtype, device=device, source=source)
    return ImageEncoder(model).eval().requires_grad_(False)


def load_image_encoder(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str | None = None,
    num_heads: int | None = None,
    hint: str = "",
) -> ImageEncoder:
    """Read CLIP's vision tower.

    Args:
        path: a weights file; a Diffusers repository or its `image_encoder` folder; or an original repository.
        dtype: of the weights and activations; upstream runs float16.
        device: None leaves the weights mapped from disk where they need no cast.
        num_heads: for head widths other than 80.
        hint: what to do about missing files; ends the message.

    Raises:
        WeightsError: missing, unreadable, several candidates, or not CLIP.
    """
    weights = part_of_release(path, *PLACE)
    return image_encoder_from_tensors(
        read_tensors(weights, hint=hint), dtype=dtype, device=device, num_heads=num_heads, source=weights
    )
