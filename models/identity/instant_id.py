"""InstantID: a person's face in SDXL pictures, on diffusers' own SDXL ControlNet pipelines.

Three additions to SDXL (arXiv 2401.07519): a resampler turns the ArcFace vector of one face into tokens; every
cross-attention of the UNet attends to them beside the text; and IdentityNet, a ControlNet whose picture is a drawing
of the face's five points, attends to them instead of the text.

    pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(base, controlnet=load_controlnet(folder))
    attach_face_adapter(pipeline.unet, read_face_adapter(folder / "ip-adapter.bin"))
    picture = generate(pipeline, face.embedding, draw_keypoints(face.keypoints, height, width), prompt="…").images[0]

Source: InstantX-research/InstantID `ip_adapter/`, `pipeline_stable_diffusion_xl_instantid_full.py`.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from PIL import Image
from torch import Tensor, nn

from errors import WeightsError
from models.wan.checkpoint import assign_tensors, convert_names, read_tensors

# ------------------------------------------------------------------------------------------------------- weights

# ip-adapter.bin's names of the parts of one layer of the resampler -> diffusers' names
RESAMPLER_PARTS = {
    "0.norm1": "ln0",
    "0.norm2": "ln1",
    "0.to_q": "attn.to_q",
    "0.to_k": "attn.to_k",
    "0.to_v": "attn.to_v",
    "0.to_out": "attn.to_out.0",
    "1.0": "ff.0",
    "1.1": "ff.1.net.0.proj",
    "1.3": "ff.1.net.2",
}


def read_face_adapter(path: str | Path, *, hint: str = "") -> dict[str, dict[str, Tensor]]:
    """`ip-adapter.bin`: {"image_proj": the resampler's tensors, "ip_adapter": the attentions'}. A safetensors file with
    both as prefixes of its keys is read too.

    Raises:
        WeightsError: missing, damaged, holds code, or is something else.
    """
    tensors = read_tensors(path, hint=hint, nested=("image_proj", "ip_adapter"))
    parts = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    if len(parts) != 2 or not all(parts.values()):
        raise WeightsError(
            f"{path}: not InstantID's ip-adapter.bin: found {', '.join(n for n in parts if parts[n])}, "
            f"expected image_proj and ip_adapter; {hint}"
        )
    return parts


def build_resampler(
    tensors: Mapping[str, Tensor], *, dim_head: int = 64, dtype: torch.dtype | None = None, source: str | Path = ""
) -> IPAdapterPlusImageProjection:
    """The network that turns face vectors (B, 1, 512) into face tokens (B, 16, 2048); sizes are the tensors' own.

    Raises:
        WeightsError: tensors missing, unexpected or misshapen.
    """
    try:
        hidden, embedding = tensors["proj_in.weight"].shape
        to_q, wide = tensors["layers.0.0.to_q.weight"], tensors["layers.0.1.1.weight"]
        numbers = [int(name.split(".")[1]) for name in tensors if name.startswith("layers.")]
        with torch.device("meta"):
            resampler = IPAdapterPlusImageProjection(
                embed_dims=embedding,
                output_dims=tensors["proj_out.weight"].shape[0],
                hidden_dims=hidden,
                depth=max(numbers) + 1,
                dim_head=dim_head,
                heads=to_q.shape[0] // dim_head,
                num_queries=tensors["latents"].shape[1],
                ffn_ratio=wide.shape[0] / hidden,
            )
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{source}: not the weights of InstantID's resampler: {error} is missing or odd") from error

    split = {}
    for name, tensor in tensors.items():
        if ".to_kv." in name:  # keys above, values below
            split[name.replace("to_kv", "to_k")], split[name.replace("to_kv", "to_v")] = tensor.chunk(2)
        else:
            split[name] = tensor
    assign_tensors(resampler, convert_names(split, diffusers_resampler_name), dtype=dtype, source=source)
    return resampler.eval().requires_grad_(False)


def diffusers_resampler_name(name: str) -> str:
    """`layers.0.1.3.weight` -> `layers.0.ff.1.net.2.weight`; names outside the table stay."""
    if not (match := re.fullmatch(r"(layers\.\d+)\.(\d\.\w+)\.(\w+)", name)):
        return name
    layer, part, kind = match.groups()
    return f"{layer}.{RESAMPLER_PARTS.get(part, part)}.{kind}"


class FaceAttention(IPAdapterAttnProcessor2_0):
    """Attention to the text plus attention to the face tokens: out = to_out(text + scale · region · face).

    diffusers shrinks a region mask bicubically, InstantID by the nearest pixel; everything else is diffusers'.
    """

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states=None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Tensor | None = None,  # (1, 1, H, W) in pixels; diffusers passes arguments on by this name
    ) -> Tensor:
        if ip_adapter_masks is not None:
            tokens = region_tokens(ip_adapter_masks, hidden_states.shape[1])
            ip_adapter_masks = [tokens.to(hidden_states)[None, None]]  # one row, whose bicubic step changes nothing
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, temb, scale, ip_adapter_masks
        )


def region_tokens(region: Tensor, count: int) -> Tensor:
    """Which of an attention's tokens are in the region: (1, 1, H, W) -> (1, count)."""
    height, width = region.shape[-2:]
    small = F.interpolate(region, scale_factor=1 / math.sqrt(height * width / count))  # nearest
    return small.reshape(1, -1)


class FaceAttentions(nn.ModuleDict):
    """The UNet's `FaceAttention`s by their place in `unet.attn_processors`, which is how the file numbers them."""

    @classmethod
    def of_unet(cls, unet: UNet2DConditionModel, num_tokens: int) -> "FaceAttentions":
        attentions = cls()
        for place, name in enumerate(unet.attn_processors):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            if attention.is_cross_attention:
                attentions[str(place)] = FaceAttention(
                    attention.inner_dim, attention.cross_attention_dim, num_tokens=(num_tokens,)
                )
        return attentions


def attach_face_adapter(
    unet: UNet2DConditionModel, parts: Mapping[str, Mapping[str, Tensor]], *, source: str | Path = ""
) -> None:
    """Give the UNet its resampler and its face attentions, as diffusers keeps those of an IP-Adapter.

    Raises:
        WeightsError: tensors missing, unexpected or misshapen; the latter also for a base that is not SDXL.
    """
    resampler = build_resampler(parts["image_proj"], dtype=unet.dtype, source=source)
    with torch.device("meta"):
        attentions = FaceAttentions.of_unet(unet, resampler.latents.shape[1])
    tensors = {re.sub(r"_ip\.weight$", "_ip.0.weight", name): tensor for name, tensor in parts["ip_adapter"].items()}
    assign_tensors(attentions, tensors, dtype=unet.dtype, source=source)
    processors = unet.attn_processors
    for place, name in enumerate(list(processors)):
        if str(place) in attentions:
            processors[name] = attentions[str(place)]
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([resampler])
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    unet.to(unet.device).requires_grad_(False)


def controlnet_weights(folder: str | Path) -> Path:
    """The weights in a ControlNet's folder: of several precisions the fullest."""
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
    return next((file for name in names if (file := Path(folder) / name).is_file()), Path(folder))


def load_controlnet(folder: str | Path, *, dtype: torch.dtype | None, hint: str = "") -> ControlNetModel:
    """IdentityNet (the released `ControlNetModel` folder) or another ControlNet in Diffusers layout, all or error.

    Raises:
        WeightsError: missing, damaged, or the weights of something else.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        with torch.device("meta"):
            net = ControlNetModel.from_config(config)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{folder}: no ControlNet folder with a config.json ({error}); {hint}") from error
    weights = controlnet_weights(folder)
    assign_tensors(net, read_tensors(weights, hint=hint), dtype=dtype, source=weights)
    return net.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def generate(
    pipeline: DiffusionPipeline,
    embedding: numpy.ndarray | Tensor,
    drawn: numpy.ndarray,
    *,
    ip_adapter_scale: float = 0.8,
    controls: Sequence[numpy.ndarray] = (),
    region: numpy.ndarray | Tensor | None = None,
    guidance_scale: float = 5.0,
    guess_mode: bool = False,
    **call,
):
    """One call of the pipeline with a face; returns what the pipeline returns.

    Args:
        pipeline: diffusers' SDXL ControlNet pipeline (text-to-image or image-to-image) on which the adapter was
            attached; its first or only ControlNet is IdentityNet.
        embedding: (512,) ArcFace's vector as it is: normalised, it would give a weak and wrong identity.
        drawn: (H, W, 3) uint8 from `draw_keypoints`, at the size of the picture.
        ip_adapter_scale: of the face attention; IdentityNet's is `controlnet_conditioning_scale`.
        controls: pictures (H, W, 3) uint8 of the further ControlNets.
        region: (H, W), 1 where the identity applies and 0 where it does not; None: everywhere.
        call: all other arguments of the pipeline. Several prompts and several pictures a prompt are fine.
    """
    rows = face_rows(embedding, guided=guidance_scale > 1)
    projection = pipeline.unet.encoder_hid_proj.image_projection_layers[0]
    device, dtype = pipeline._execution_device, pipeline.unet.dtype
    place = device if projection.latents.is_meta else projection.latents.device  # offloaded weights come to the device
    tokens = projection(rows[:, 0].to(place, dtype))  # (2 or 1, 16, 2048)
    if guess_mode:  # IdentityNet runs on the conditional half alone
        tokens = tokens[-1:]
    if region is not None:
        region = torch.as_tensor(region, dtype=torch.float32)[None, None]  # (1, 1, H, W)
        call["cross_attention_kwargs"] = {"ip_adapter_masks": region.to(device)}
    nets = getattr(pipeline.controlnet, "nets", [pipeline.controlnet])
    pictures = [Image.fromarray(picture) for picture in (drawn, *controls)]
    # Image-to-image calls the pictures of its ControlNets control_image, and what it starts from image.
    name = "control_image" if "image" in call else "image"
    pipeline.set_ip_adapter_scale(ip_adapter_scale)  # stays on the UNet, so it is set at every call
    with identity_conditioning(nets[0], tokens, region):
        return pipeline(
            ip_adapter_image_embeds=[rows.to(device, dtype)],
            guidance_scale=guidance_scale,
            guess_mode=guess_mode,
            **{name: pictures if len(nets) > 1 else pictures[0]},
            **call,
        )


def face_rows(embedding: numpy.ndarray | Tensor, guided: bool) -> Tensor:
    """(2, 1, 1, 512), unconditional row first, or (1, 1, 1, 512) without guidance. The unconditional row is zeros that
    go through the resampler like any face; tokens of zeros would be something else.
    """
    face = torch.as_tensor(embedding, dtype=torch.float32).reshape(1, 1, 1, -1)
    return torch.cat([torch.zeros_like(face), face]) if guided else face


@contextlib.contextmanager
def identity_conditioning(net: ControlNetModel, tokens: Tensor, region: Tensor | None = None) -> Iterator[None]:
    """Within the `with` block IdentityNet attends to `tokens` instead of the text, and acts in `region` only.

    Args:
        tokens: (1 or 2, 16, 2048), repeated to the batch: all unconditional rows first, as the pipeline has them.
        region: (1, 1, H, W) in pixels.
    """

    def put_tokens(net, args, kwargs):
        text = kwargs["encoder_hidden_states"]
        faces = tokens.to(text).repeat_interleave(len(text) // len(tokens), dim=0)
        return args, kwargs | {"encoder_hidden_states": faces}

    def keep_region(net, args, residuals):
        down, middle = residuals
        return [in_region(residual) for residual in down], in_region(middle)

    def in_region(residual: Tensor) -> Tensor:
        return residual * F.interpolate(region.to(residual), size=residual.shape[-2:], mode="bilinear")

    with contextlib.ExitStack() as hooks:
        hooks.callback(net.register_forward_pre_hook(put_tokens, with_kwargs=True).remove)
        if region is not None:
            hooks.callback(net.register_forward_hook(keep_region).remove)
        yield
