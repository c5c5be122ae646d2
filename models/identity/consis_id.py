"""ConsisID, 1.0 and 1.5: CogVideoX's image-to-video transformer, with a face in every other block.

The networks are diffusers'. What is added here is one term a block (`ConsisIDBlock`), and that the face's tokens, which
depend on the photo alone, are computed once and handed to each call, where diffusers' own ConsisID computes them anew
at every step and does not know version 1.5.

Source: ConsisID `models/transformer_consisid.py`, `models/pipeline_consisid.py` (arXiv 2411.17440).
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.models.transformers.consisid_transformer_3d import LocalFacialExtractor, PerceiverCrossAttention
from torch import Tensor, nn

from errors import WeightsError
from models.wan.checkpoint import assign_tensors, read_tensors

logger = logging.getLogger("selfsame")


@dataclass(frozen=True)
class FaceConfig:
    """The keys of the released config.json that CogVideoX does not have; names and defaults are theirs."""

    is_train_face: bool = False
    is_kps: bool = False
    cross_attn_interval: int = 2
    cross_attn_dim_head: int = 128
    cross_attn_num_heads: int = 16
    LFE_id_dim: int = 1280  # width of the identity vector
    LFE_vit_dim: int = 1024  # width of the vision tower's hidden states
    LFE_depth: int = 10
    LFE_dim_head: int = 64
    LFE_num_heads: int = 16
    LFE_num_id_token: int = 5
    LFE_num_querie: int = 32
    LFE_output_dim: int = 2048  # width of a face token
    LFE_ff_mult: int = 4
    LFE_num_scale: int = 5
    local_face_scale: float = 1.0


class ConsisIDBlock(CogVideoXBlock):
    """CogVideoX's block, and behind it what the video tokens find in the face's.

    Args:
        face_attention: None in the blocks between, which are CogVideoX's.
    """

    def __init__(self, face_attention: PerceiverCrossAttention | None, **config):
        super().__init__(**config)
        self.face_attention = face_attention

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, attention_kwargs=None):
        """`attention_kwargs` is CogVideoX's way to hand a value to every block of one call: here
        `face_tokens` (1, 32, 2048), for both branches of the guidance alike, and `face_scale`.
        """
        hidden_states, encoder_hidden_states = super().forward(  # (B, F·H·W, D), (B, text, D)
            hidden_states, encoder_hidden_states, temb, image_rotary_emb
        )
        if self.face_attention is not None:
            face = self.face_attention(attention_kwargs["face_tokens"], hidden_states)
            hidden_states = hidden_states + attention_kwargs["face_scale"] * face
        return hidden_states, encoder_hidden_states


class ConsisIDTransformer(CogVideoXTransformer3DModel):
    """The transformer of both versions.

    Args:
        face: the shape of the face's part.
        config: CogVideoXTransformer3DModel's arguments.
    """

    def __init__(self, face: FaceConfig, **config):
        super().__init__(**config)
        self.face = face
        shape = self.config
        dim = shape.num_attention_heads * shape.attention_head_dim
        for index in range(shape.num_layers):
            attention = None
            if index % face.cross_attn_interval == 0:
                attention = PerceiverCrossAttention(
                    dim, face.cross_attn_dim_head, face.cross_attn_num_heads, kv_dim=face.LFE_output_dim
                )
            self.transformer_blocks[index] = ConsisIDBlock(
                attention,
                dim=dim,
                num_attention_heads=shape.num_attention_heads,
                attention_head_dim=shape.attention_head_dim,
                time_embed_dim=shape.time_embed_dim,
                dropout=shape.dropout,
                activation_fn=shape.activation_fn,
                attention_bias=shape.attention_bias,
                norm_elementwise_affine=shape.norm_elementwise_affine,
                norm_eps=shape.norm_eps,
            )


class ConsisIDPipeline(CogVideoXImageToVideoPipeline):
    """CogVideoX's pipeline; `image` may be [face, keypoint picture], for checkpoints that were trained with one."""

    def prepare_latents(self, image, *shape):
        """Noise (1, F, C, h, w), and what it is denoised beside: the face as its first frame, the keypoints as its
        second, zeros. One generator draws for the face's latent, the keypoints', and the noise, in this order.
        """
        if len(image) == 1:
            return super().prepare_latents(image, *shape)
        *shape, generator, latents = shape
        no_noise = torch.empty(0)
        _, conditions = super().prepare_latents(image[:1], *shape, generator, no_noise)
        latents, keypoints = super().prepare_latents(image[1:], *shape, generator, latents)
        # The authors divide the face's latents by the scaling factor in 1.5, but not the keypoints'.
        undo = self.vae_scaling_factor_image**2 if self.vae.config.invert_scale_latents else 1
        conditions[:, 1] = undo * keypoints[:, 0]
        return latents, conditions


def split_config(config: Mapping[str, object], source: str | Path = "config") -> tuple[FaceConfig, dict]:
    """The released config.json -> the face's part, and CogVideoX's arguments.

    Raises:
        WeightsError: not ConsisID's.
    """
    face = FaceConfig(**{key: config[key] for key in FaceConfig.__dataclass_fields__ if key in config})
    known = CogVideoXTransformer3DModel._get_init_keys(CogVideoXTransformer3DModel)
    rest = {key: value for key, value in config.items() if key in known}
    unknown = [key for key in config if key not in rest and not hasattr(face, key) and not key.startswith("_")]
    if unknown:
        logger.warning("%s: unknown keys are ignored: %s", source, ", ".join(unknown))
    if not face.is_train_face:
        raise WeightsError(f"{source}: a CogVideoX without ConsisID's face modules (is_train_face is off)")
    layers = rest.get("num_layers", 30)
    if layers % face.cross_attn_interval:
        raise WeightsError(f"{source}: {layers} layers do not divide by cross_attn_interval {face.cross_attn_interval}")
    return face, rest


def make_extractor(face: FaceConfig) -> LocalFacialExtractor:
    return LocalFacialExtractor(
        id_dim=face.LFE_id_dim,
        vit_dim=face.LFE_vit_dim,
        depth=face.LFE_depth,
        dim_head=face.LFE_dim_head,
        heads=face.LFE_num_heads,
        num_id_token=face.LFE_num_id_token,
        num_queries=face.LFE_num_querie,
        output_dim=face.LFE_output_dim,
        ff_mult=face.LFE_ff_mult,
        num_scale=face.LFE_num_scale,
    )


def consis_id_from_tensors(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, object],
    *,
    dtype: torch.dtype | None = None,
    source: str | Path = "state dict",
) -> tuple[ConsisIDTransformer, LocalFacialExtractor]:
    """Build transformer and extractor around one released state dict; all tensors or error.

    Raises:
        WeightsError: not the weights that `config` describes.
    """
    face, rest = split_config(config, source)
    with init_empty_weights(include_buffers=False):  # a table of positions, where there is one, is computed
        transformer, extractor = ConsisIDTransformer(face, **rest), make_extractor(face)
    parts: dict[nn.Module, dict[str, Tensor]] = {transformer: {}, extractor: {}}
    for key, tensor in tensors.items():
        match key.split("."):
            case ["local_facial_extractor", *name]:
                parts[extractor][".".join(name)] = tensor
            case ["perceiver_cross_attention", number, *name]:
                block = int(number) * face.cross_attn_interval
                parts[transformer][f"transformer_blocks.{block}.face_attention.{'.'.join(name)}"] = tensor
            case _:
                parts[transformer][key] = tensor
    for module, own in parts.items():
        assign_tensors(module, own, dtype=dtype, source=source)
        module.eval().requires_grad_(False)
    return transformer, extractor


def load_consis_id(
    folder: str | Path, *, dtype: torch.dtype | None, hint: str = ""
) -> tuple[ConsisIDTransformer, LocalFacialExtractor]:
    """Read the `transformer` folder of a release: config.json and safetensors.

    Raises:
        WeightsError: missing, unreadable, or not ConsisID.
    """
    return consis_id_from_tensors(
        read_tensors(folder, hint=hint), read_json(Path(folder) / "config.json", hint), dtype=dtype, source=folder
    )


def read_json(file: Path, hint: str = "") -> dict:
    """A configuration of a release.

    Raises:
        WeightsError: missing, or no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{file}: no such file; {hint}") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file}: not a configuration ({error}); {hint}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file}: not a configuration (no JSON object); {hint}")
    return content
