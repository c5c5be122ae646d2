"""The released Wan variants, and how to tell them apart by their tensors.

Source: Wan2.1 and Wan2.2 `wan/configs/*.py`, VideoX-Fun `config/wan2.1/*.yaml`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class WanConfig:
    """The shape of one Wan transformer. Field names are those of the released config.json files."""

    in_dim: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    image_dim: int | None = None  # width of the CLIP features; None: no image cross-attention
    image_tokens: int | None = None  # 514 in FLF2V, whose img_emb has a position embedding for two pictures

    @property
    def vae_spatial_factor(self) -> int:
        """Pixels of a latent cell's side: 16 with the 48-channel Wan2.2 VAE, else 8."""
        return 16 if self.out_dim == 48 else 8

    def as_dict(self) -> dict:
        return asdict(self)


_DIM_1_3B = WanConfig(in_dim=16, dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
_DIM_14B = WanConfig(in_dim=16, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

# The transformers of the released checkpoints. An A14B checkpoint is two of these with one shape.
VARIANTS: dict[str, WanConfig] = {
    "t2v-1.3B": _DIM_1_3B,
    "t2v-14B": _DIM_14B,  # also each expert of Wan2.2-T2V-A14B
    "i2v-14B": replace(_DIM_14B, in_dim=36, image_dim=1280),  # 480P, 720P and Fun-14B-InP
    "flf2v-14B": replace(_DIM_14B, in_dim=36, image_dim=1280, image_tokens=514),
    "fun-inp-1.3B": replace(_DIM_1_3B, in_dim=36, image_dim=1280),
    "i2v-A14B": replace(_DIM_14B, in_dim=36),  # each expert
    "ti2v-5B": WanConfig(in_dim=48, dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, out_dim=48),
}

# Networks of the same family that are more than this transformer: their first key, and what they are.
_OTHER_NETWORKS = {
    "vace_": "VACE weights: a base transformer with a VACE branch",
    "ref_conv.": "Fun Control weights with a reference convolution",
    "vocal_projector.": "StableAvatar weights: a base transformer with an audio adapter, for infer_audio_avatar.py",
    "control_adapter.": "Fun Control-Camera weights with a camera adapter",
}

HEAD_DIM = 128  # every released Wan transformer has this; a checkpoint holds no trace of the number of heads


def detect_config(shapes: Mapping[str, tuple[int, ...]], num_heads: int | None = None) -> WanConfig:
    """Read the configuration off a state dict with original Wan key names.

    Args:
        shapes: key -> shape of every tensor.
        num_heads: needed only when the head width is not 128 (tiny test models).

    Raises:
        KeyError: a key that every Wan transformer has is missing; the caller names the file.
        ValueError: a network of the family that is more than a transformer.
    """
    for prefix, network in _OTHER_NETWORKS.items():
        if any(key.startswith(prefix) for key in shapes):
            raise ValueError(network)
    dim, in_dim = shapes["patch_embedding.weight"][:2]
    layers = {int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")}
    image_position = shapes.get("img_emb.emb_pos")
    image_norm = shapes.get("img_emb.proj.0.weight")
    return WanConfig(
        in_dim=in_dim,
        dim=dim,
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        num_heads=num_heads or max(1, dim // HEAD_DIM),
        num_layers=max(layers) + 1,
        out_dim=shapes["head.head.weight"][0] // 4,
        text_dim=shapes["text_embedding.0.weight"][1],
        freq_dim=shapes["time_embedding.0.weight"][1],
        image_dim=image_norm[0] if image_norm else None,
        image_tokens=image_position[1] if image_position else None,
    )


def variant_name(config: WanConfig) -> str:
    """The released variant with this shape, or a description of the shape."""
    for name, released in VARIANTS.items():
        if released == config:
            return name
    return f"unreleased Wan (dim {config.dim}, {config.num_layers} layers, {config.in_dim} input channels)"
