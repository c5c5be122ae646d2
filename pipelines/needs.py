"""What a job needs in memory, part by part, from shapes: nothing is loaded for it."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import nn

from models.audio_adapter import AudioAdapter
from models.vace import VaceBranch
from models.wan.config import VARIANTS, WanConfig
from models.wan.float8 import float8_linears
from models.wan.transformer import WanTransformer
from models.wan.vae import Tiling
from pipelines.networks import family_of, has_identity, shape_of

GIB = 1024**3
# Each mode needs less device memory than the one before it.
MODES = ("resident", "model", "group", "sequential")
TEXT_ENCODER = 5_681_000_000 * 2  # bytes of umT5-xxl's encoder in bfloat16
IMAGE_ENCODER = 632_000_000 * 2  # of CLIP's in float16


@dataclass(frozen=True)
class Needs:
    """What a job needs, in bytes, part by part. Estimates from shapes.

    weights, weights_fp8: memory mode -> weights on the device while denoising, with bfloat16 and with float8 storage.
    expert, expert_fp8: all weights of one expert, with the layers that run beside it.
    call: the largest moment of one forward pass beside its weights.
    kept_text, kept_photos: keys and values kept between steps; `sequential` computes those of the prompts anew.
    encode, decode, tile: the largest moment of the VAE on one chunk; `…_past` the frames it remembers between chunks.
    """

    experts: int
    expert: int
    expert_fp8: int
    weights: Mapping[str, int]
    weights_fp8: Mapping[str, int]
    call: int
    kept_text: int
    kept_photos: int
    text_encoder: int
    image_encoder: int
    vae: int
    encode: int
    encode_past: int
    decode: int
    decode_past: int
    tile: int
    tiles_past: int


@dataclass(frozen=True)
class VaeCost:
    """Values a latent cell that a VAE keeps of the past, and that it computes with beside that, counted on its layers
    with every tensor's life (tests/test_memory.py counts again); they are linear in the width of the network.
    """

    decode_past: int
    decode: int
    encode_past: int
    encode: int
    parameters: int

    @classmethod
    def of(cls, shape: WanConfig, vae: Mapping | None = None) -> "VaeCost":
        """Of the released VAE that belongs to a transformer, or of a tiny one (arguments of `AutoencoderKLWan`)."""
        vae = vae or {}
        if shape.vae_spatial_factor == 16:
            width, decoder = vae.get("base_dim", 160), vae.get("decoder_base_dim", 256)
            decode, encode = (1784 * decoder + 96, 2048 * decoder + 3216), (932 * width + 1536, 1536 * width + 6192)
            return cls(*decode, *encode, int(705e6 * (decoder / 256) ** 2))
        width = vae.get("base_dim", 96)
        decode, encode = (1576 * width + 32, 1536 * width + 816), (932 * width + 384, 1280 * width + 784)
        return cls(*decode, *encode, int(127e6 * (width / 96) ** 2))


def module_bytes(model: nn.Module, itemsize: int, fp8: bool, blocks_at_once: int = 2) -> dict[str, int]:
    """Memory mode -> bytes of a model's weights on the device; the model may be on the meta device.

    blocks_at_once: under `group`; two where the next one is fetched ahead.
    """
    float8 = {f"{name}.weight" for name in float8_linears(model)} if fp8 else ()
    sizes = {
        name: parameter.numel()
        * (4 if any(part in name for part in model._keep_in_fp32_modules or ()) else 1 if name in float8 else itemsize)
        for name, parameter in model.named_parameters()
    }
    blocks: dict[str, int] = {}
    for name, size in sizes.items():
        if (parts := name.split("."))[0].endswith("blocks"):
            blocks[parts[1]] = blocks.get(parts[1], 0) + size
    whole, block = sum(sizes.values()), max(blocks.values(), default=0)
    return {
        "resident": whole,
        "model": whole,
        "group": whole - sum(blocks.values()) + blocks_at_once * block,
        "sequential": block,
    }


@functools.cache
def transformer_bytes(shape: WanConfig, itemsize: int, fp8: bool) -> dict[str, int]:
    """`module_bytes` of a transformer."""
    with torch.device("meta"):
        return module_bytes(WanTransformer(**shape.as_dict()), itemsize, fp8)


def part_bytes(model: nn.Module, itemsize: int, fp8: bool) -> dict[str, int]:
    """`module_bytes` of layers that run beside a transformer, between its blocks: one of theirs at a time."""
    return module_bytes(model, itemsize, fp8, blocks_at_once=1) | {"sequential": 0}


def add_bytes(*parts: Mapping[str, int]) -> dict[str, int]:
    return {memory: sum(part.get(memory, 0) for part in parts) for memory in MODES}


def estimate_needs(
    shape: WanConfig,
    height: int,
    width: int,
    num_frames: int,
    *,
    itemsize: int = 2,
    vae_itemsize: int = 4,
    experts: int = 1,
    photos: int = 0,
    encodes: bool = True,
    vae: Mapping | None = None,
    text_encoder: int = TEXT_ENCODER,
    parts: Sequence[nn.Module] = (),
    more: Mapping[str, int] | None = None,
    more_fp8: Mapping[str, int] | None = None,
) -> Needs:
    """What a video takes.

    Args:
        shape: of the transformer.
        height, width, num_frames: of the most that is computed at one time: the video, a window, a clip.
        itemsize, vae_itemsize: bytes of a value in the transformer's linears and in the VAE.
        photos: of Stand-In, whose keys and values are kept.
        encodes: the VAE reads pictures or videos of this size too.
        vae, text_encoder: of a model that has not the released ones.
        parts: the layers of parts that run beside the transformer (VACE, audio), on the meta device.
        more, more_fp8: memory mode -> bytes of further weights (live LoRAs: those of one expert, under `resident` of
            all), beside weights in `itemsize` and in float8.
    """
    wide, narrow = (
        add_bytes(transformer_bytes(shape, itemsize, fp8), *(part_bytes(layers, itemsize, fp8) for layers in parts))
        for fp8 in (False, True)
    )
    of_experts, of_experts_fp8 = ({"resident": (experts - 1) * each["resident"]} for each in (wide, narrow))
    wide, narrow = add_bytes(wide, more or {}), add_bytes(narrow, more_fp8 or {})  # all experts' if resident

    spatial = shape.vae_spatial_factor
    rows, columns = height // spatial, width // spatial
    cells = rows * columns
    tokens = ((num_frames - 1) // 4 + 1) * cells // 4
    # The float32 stream with its temporaries, and either q, k, v with their rotated forms and attention's result, or
    # the wide layer before and after its activation: counted as the VAE's is.
    attention = (18 + 5 * itemsize + (2 * itemsize if photos else 0)) * shape.dim
    feed_forward = (12 + itemsize) * shape.dim + 2 * itemsize * shape.ffn_dim
    kept = 2 * shape.num_layers * shape.dim * itemsize  # keys and values of a token, in every block
    adapter = 3 * shape.num_layers * 2 * 128 * shape.dim * itemsize if photos else 0  # Stand-In's, of rank 128
    # VACE's blocks look at the prompts too.
    branch_layers = sum(len(getattr(layers, "vace_blocks", ())) for layers in parts)
    kept_text = 2 * shape.text_len * kept * (1 + branch_layers / shape.num_layers)

    cost = VaeCost.of(shape, vae)
    encoded = cells if encodes else 64 * 64 * (64 // spatial**2 or 1) if photos else 0
    windows = Tiling().windows(rows, columns)
    of_tiles = sum((row.stop - row.start) * (column.stop - column.start) for row, column in windows)
    tile = min(rows, Tiling().tile[0]) * min(columns, Tiling().tile[1])
    blended = 2 * 4 * 3 * spatial**2  # for each chunk the frames put together, and their clamped copy
    return Needs(
        experts=experts,
        expert=wide["model"],
        expert_fp8=narrow["model"],
        weights=add_bytes(wide, of_experts),
        weights_fp8=add_bytes(narrow, of_experts_fp8),
        call=tokens * max(attention, feed_forward),
        kept_text=int(kept_text),
        kept_photos=1024 * photos * kept + adapter,
        text_encoder=text_encoder,
        image_encoder=IMAGE_ENCODER if shape.image_dim == VARIANTS["i2v-14B"].image_dim else 0,
        vae=cost.parameters * vae_itemsize,
        encode=cost.encode * encoded * vae_itemsize,
        encode_past=cost.encode_past * encoded * vae_itemsize,
        decode=cost.decode * cells * vae_itemsize,
        decode_past=cost.decode_past * cells * vae_itemsize,
        tile=(cost.decode * tile + blended * cells) * vae_itemsize,
        tiles_past=cost.decode_past * of_tiles * vae_itemsize,
    )


def needs_of_config(config: dict) -> Needs | None:
    """What one video of a config takes at its own size, in bfloat16; None for what is no Wan model."""
    if not any(key in config for key in ("variant", "transformer")):
        return None
    shape, tiny, defaults = shape_of(config), bool(config.get("tiny")), config["defaults"]
    same = {name: getattr(shape, name) for name in ("dim", "num_layers")}
    parts = []
    with torch.device("meta"):
        if "vace" in config and not tiny:
            parts = [VaceBranch(ffn_dim=shape.ffn_dim, num_heads=shape.num_heads, **same, **config["vace"])]
        elif "square" in config.get("files", {}):
            parts = [AudioAdapter(**same)]
    return estimate_needs(
        shape,
        defaults["height"],
        defaults["width"],
        defaults["num_frames"],
        experts=len(config.get("experts") or (None,)),
        photos=int(has_identity(config) and not tiny),
        encodes=bool(parts) or family_of(config) not in ("t2v", "ti2v"),
        vae=config.get("vae"),
        text_encoder=0 if tiny else TEXT_ENCODER,
        parts=parts,
    )


def needs_of_pipeline(pipeline: DiffusionPipeline, work: int) -> Needs:
    """What a loaded pipeline of diffusers takes, with the layers of its parts as groups."""
    sizes = {name: size_of(part) for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    layers = [size_of(layer) for part in pipeline.components.values() if isinstance(part, nn.Module)
              for layer in part.modules() if not any(layer.children())]  # fmt: skip
    return needs_of_parts(sizes, max(layers, default=0), work)


def needs_of_parts(sizes: Mapping[str, int], layer: int, work: int) -> Needs:
    """What a pipeline of diffusers takes, from the bytes of its parts (by name), its largest layer and its work."""
    whole, vae = sum(sizes.values()), sizes.get("vae", 0)
    # diffusers brings one part after another, and leaves those that work together: the denoiser and its controls.
    together = sum(size for name, size in sizes.items() if name in ("unet", "transformer", "controlnet"))
    weights = {"resident": whole, "model": together, "group": vae + 2 * layer, "sequential": layer}
    return Needs(
        experts=1,
        expert=whole,
        expert_fp8=whole,
        weights=weights,
        weights_fp8=weights,
        **dict.fromkeys(("kept_text", "kept_photos", "text_encoder", "image_encoder"), 0),
        **dict.fromkeys(("encode", "encode_past", "decode", "decode_past", "tile", "tiles_past"), 0),
        call=work,
        vae=0,
    )


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
