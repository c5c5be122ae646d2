"""The recipes of training, and the part of the configuration that each has for itself."""

from dataclasses import dataclass

from training.config_fields import block, option

RECIPES = ("base", "vae", "stand_in", "avatar", "vace", "error_recycling")
# recipe -> what it can train; the first is its default.
TRAINABLE = {
    "base": ("lora", "full"),
    "vae": ("full",),
    "stand_in": ("adapter",),
    "avatar": ("full", "adapter", "lora"),
    "vace": ("adapter",),
    "error_recycling": ("lora",),
}
DENOISING = ("base", "stand_in", "avatar", "vace", "error_recycling")  # recipes that train a transformer
LARGE = 10**9


@dataclass(frozen=True, kw_only=True)
class StandIn:
    reference: str = option("where the face is from", "other_clip", choices=("other_clip", "far_frame"))
    similarity: tuple[float, float] = option(
        "faces that count as one person in another shot", (0.5, 0.97), low=-1, high=1,
        only={"stand_in.reference": ("other_clip",)},
    )  # fmt: skip
    noise: tuple[float, float] | None = option(
        "mean and deviation of the reference noise's logarithm", (-3.0, 0.5), low=-20, high=20
    )
    face_loss: float = option("how often only the face counts in the loss", 0.0, low=0, high=1)
    reference_drop: float = option("how often the reference is left out", 0.0, low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class Masks:
    full: float = option("how often the whole picture counts, face and lips more", 0.4, low=0, high=1)
    face: float = option("how often the face alone counts", 0.1, low=0, high=1)
    lip: float = option("how often the lips alone count", 0.5, low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class Avatar:
    audio_drop: float = option("how often the sound is left out", 0.1, low=0, high=1)
    clip_level: float = option("how often the sound is read as one clip's", 0.3, low=0, high=1)
    clip_drop: float = option("how often CLIP's features are left out", 0.0, low=0, high=1)
    motion_loss: float = option("share of the loss on differences of neighbours", 0.25, low=0, high=1)
    motion_axis: str = option("neighbours in time, or upstream's channels", "frames", choices=("frames", "legacy"))
    masks: Masks | None = block()


@dataclass(frozen=True, kw_only=True)
class Vace:
    references: int = option("reference pictures of a sample, which come before its frames", 0, low=0, high=16)
    masked_loss: float = option("how often only what is made counts in the loss", 0.0, low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class Probabilities:
    noise: float = option("how often an error is added to the noise", 0.01, low=0, high=1)
    image: float = option("how often to the condition", 0.9, low=0, high=1)
    video: float = option("how often to the video", 0.9, low=0, high=1)
    clean: float = option("how often to none", 0.2, low=0, high=1)
    motion: float = option(
        "how often the motion frames are known, not the first alone; of pro, the clip before", 0.9, low=0, high=1,
        only={"error_recycling.variant": ("film", "pro")},
    )  # fmt: skip
    condition_drop: float = option(
        "how often the sound, or the picture, is left out", 0.1, low=0, high=1,
        only={"error_recycling.variant": ("talk", "dance")},
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ErrorRecycling:
    variant: str = option("which of SVI's models", choices=("shot", "film", "tom", "talk", "dance", "pro"))
    p: Probabilities | None = block()
    clean_update: float = option("how often a clean step's error is kept", 0.1, low=0, high=1)
    grids: int = option("noise levels that errors are kept by", 50, low=1, high=1000)
    per_grid: int = option("errors kept for each", 100, low=1, high=100_000)
    modulate: float = option("random factor on an error, 1 ± this", 0.0, low=0, high=1)
    replace: str = option("which one gives way when they are full", "l2", choices=("l2", "random", "fifo"))
    warmup: int = option("steps in which every error is kept", 50, low=0, high=LARGE)
    image_frames: int = option("latent frames of the condition that get an error", 3, low=1, high=1000)
    scope: str = option("whether processes share errors", "global", choices=("global", "per_rank"))
    storage: str = option("one bank of pairs, or upstream's two", "paired", choices=("paired", "two_banks"))
    dtype: str = option("how they are kept", "bf16", choices=("bf16", "int8"))
    pool: int = option("by how much errors are shrunk on each side", 1, low=1, high=16)
    limit_gib: float = option("what the bank may take", 64.0, low=0.001, high=1e6)


@dataclass(frozen=True, kw_only=True)
class VaeLoss:
    l1: float = option("weight of the difference", 1.0, low=0, high=1e6)
    edges: float = option("weight of the difference of neighboring pixels' differences", 0.0, low=0, high=1e6)
    kl: float = option("weight of the latents' divergence", 1e-6, low=0, high=1e6)
    lpips: float = option("weight of the perceptual distance", 0.0, low=0, high=1e6)
    compute_dtype: str = option("what convolutions compute in; weights stay float32", "fp32", choices=("fp32", "bf16"))
