"""What a ConsisID video takes in memory, from shapes."""

import torch
from accelerate import init_empty_weights

from models.identity.consis_id import ConsisIDTransformer, make_extractor, split_config
from pipelines.needs import Needs, size_of

# Bytes a pixel of the shown picture while the VAE decodes, in 16 bits: the authors measured 16 GB at 720x480.
DECODE_BYTES = 45_000
T5_VALUES, VAE_VALUES = 4_760_000_000, 216_000_000
# What decides the size of the released transformers (6.16 billion values), where their config.json is not here yet.
RELEASED = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "in_channels": 32,
    "use_rotary_positional_embeddings": True,
    "is_train_face": True,
}


def estimate_needs(config: dict, height: int, width: int, num_frames: int, dtype: torch.dtype) -> Needs:
    """What a video takes, from shapes: the text encoder, or the transformer with one call, or one decoded chunk.

    Args:
        config: the transformer's config.json, or `RELEASED`.
        height, width, num_frames: of the video.
        dtype: of the weights, where they are not in float8.
    """
    face, rest = split_config(config)
    with init_empty_weights():
        transformer, extractor = ConsisIDTransformer(face, **rest), make_extractor(face)
    size = dtype.itemsize
    dim = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    released = dim >= 1024  # figures of the VAE and of T5 are those of the released widths
    vae = VAE_VALUES * size if released else 0
    stays = vae + size_of(extractor.to(dtype))  # on the device in all modes
    wide = weights_of(transformer.to(dtype), stays)
    narrow = weights_of(to_float8(transformer, dtype), stays)  # on the meta device
    frames = (num_frames - 1) // 4 + 1
    decode = DECODE_BYTES * size // 2 * height * width
    return Needs(
        experts=1,
        expert=wide["model"] - stays,
        expert_fp8=narrow["model"] - stays,
        weights=wide,
        weights_fp8=narrow,
        # Both branches of the guidance at once; of each token its stream, q, k, v, and the wide layer (4 times).
        call=2 * frames * height * width // 256 * 12 * dim * size,
        kept_text=0,
        kept_photos=0,
        text_encoder=T5_VALUES * size if released else 0,
        image_encoder=0,
        vae=stays,
        encode=0,
        encode_past=0,
        decode=decode if released else 0,
        decode_past=0,
        tile=decode // 4 if released else 0,
        tiles_past=0,
    )


def to_float8(transformer: ConsisIDTransformer, dtype: torch.dtype) -> ConsisIDTransformer:
    """Store the weights of its layers in float8, and compute in `dtype`."""
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    return transformer


def weights_of(transformer: ConsisIDTransformer, stays: int) -> dict[str, int]:
    """Memory mode -> bytes on the device while denoising. Under `resident` what stays there anyhow, `Needs.vae`, is
    counted already.
    """
    whole, blocks = size_of(transformer), size_of(transformer.transformer_blocks)
    block = max(map(size_of, transformer.transformer_blocks))
    return {
        "resident": whole,
        "model": whole + stays,
        "group": whole - blocks + 2 * block + stays,
        "sequential": block + stays,
    }
