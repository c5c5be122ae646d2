"""What a run will cost, from shapes alone: parameters, arithmetic, memory, disk. Nothing is loaded for it.

Arithmetic is that of the transformer's matrix products and attention; the audio adapter's and the pose embedder's come
on top. Memory is an estimate: what a block holds while it runs was counted from its tensors, not measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from configs import load_config
from models.multitalk import MultiTalk
from models.pose_embedder import PoseEmbedder
from models.vace import VaceBranch
from models.wan.config import WanConfig
from pipelines.audio_avatar.part import adapter_of
from pipelines.conditions import latent_frames
from pipelines.networks import shape_of
from pipelines.parts import meta_transformer
from pipelines.tiny import tiny_audio_adapter, tiny_multitalk
from preprocess.output import readable_bytes
from training.build import STAND_IN_RANK, is_tiny, recipe_of
from training.clips import views
from training.config import Config
from training.data import TrainingSet
from training.encodings import FACE, encodings_of
from training.error_bank import bank_bytes
from training.recipes.base import Batch
from training.sampler import Bucket

CLIP_TOKENS = 257
BLOCK_ACTIVATIONS = 1.3  # times what its tensors take: what the allocator and the kernels add
CONTEXT = 2 * 2**30  # bytes of the driver and the kernels
PER_MOMENT = {"adamw8bit": 1}  # bytes; all others keep their moments in float32
# float32 moments a parameter; Adafactor keeps rows and columns alone, Muon one for matrices, Prodigy two more.
MOMENTS = {"adamw": 2, "adamw8bit": 2, "adafactor": 0, "prodigy": 4, "schedulefree": 2, "muon": 1}
CEILING = 790e12  # arithmetic a second of an H100 or H200, as measured; the nominal figure is 989


@dataclass(frozen=True)
class Counts:
    """Parameters."""

    transformer: int
    adapters: int
    lora: int
    trained: int


@dataclass(frozen=True)
class Arithmetic:
    """Floating-point operations of one sample's forward pass."""

    linear: int
    attention: int

    def step(self, is_full: bool) -> int:
        """Of a training step: the weights' gradients of a frozen base are not computed."""
        return 3 * (self.linear + self.attention) if is_full else 2 * self.linear + 3 * self.attention

    def hardware(self, is_full: bool, checkpointing: str) -> int:
        """Of a step with what is computed twice: checkpointed blocks, and flash attention's scores in its backward."""
        again = {"none": 0, "attention": self.linear, "full": self.linear + self.attention}[checkpointing]
        return self.step(is_full) + again + self.attention // 2


def count_parameters(config: Config) -> Counts:
    """Of the networks that a run loads and trains."""
    base, recipe, train = load_config(config.model.config), recipe_of(config), config.train
    shape = shape_of(base)
    transformer = meta_transformer(shape)
    adapters, stand_in = meta_adapters(config, base, shape)
    lora = 0
    if train.trainable == "lora":
        lora = sum(
            train.lora.rank * (module.in_features + module.out_features)
            for name, module in transformer.named_modules()
            if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in train.lora.targets)
        )
    networks = {"transformer": transformer, **adapters}
    trained = lora + stand_in + sum(
        parameter.numel()
        for network, module in networks.items()
        for name, parameter in module.named_parameters()
        if recipe.trains(f"{network}.{name}", train.trainable)
    )  # fmt: skip
    of_adapters = stand_in + sum(size_of(adapter) for adapter in adapters.values())
    return Counts(size_of(transformer), of_adapters, lora, trained)


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def meta_adapters(config: Config, base: dict, shape: WanConfig) -> tuple[dict[str, nn.Module], int]:
    """The recipe's adapters without values, and the numbers in Stand-In's LoRAs."""
    tiny, variant = is_tiny(config, base), config.error_recycling and config.error_recycling.variant
    with torch.device("meta"):
        if config.avatar is not None:
            return {"audio_adapter": tiny_audio_adapter(base) if tiny else adapter_of(shape)}, 0
        if config.vace is not None:
            same = {name: getattr(shape, name) for name in ("dim", "ffn_dim", "num_heads", "num_layers")}
            return {"vace": VaceBranch(**same, vace_layers=base["vace"]["vace_layers"])}, 0
        if config.stand_in is not None:
            rank = base["stand_in"]["rank"] if tiny else STAND_IN_RANK
            return {}, 6 * rank * shape.dim * shape.num_layers
        if variant == "talk":
            layers = {"dim": shape.dim, "num_heads": shape.num_heads, "num_layers": shape.num_layers}
            return {"multitalk": tiny_multitalk(base) if tiny else MultiTalk(**layers)}, 0
        if variant == "dance":
            return {"pose_embedder": PoseEmbedder(shape.dim)}, 0
    return {}, 0


def tokens_of(bucket: Bucket, shape: WanConfig) -> int:
    cell = 2 * shape.vae_spatial_factor
    return latent_frames(bucket.frames) * (bucket.height // cell) * (bucket.width // cell)


def forward_arithmetic(shape: WanConfig, tokens: int, reference_tokens: int = 0) -> Arithmetic:
    """Of one sample.

    Args:
        tokens: of the video.
        reference_tokens: of Stand-In's photo, which goes through the blocks without text, and whose keys the video
            sees.
    """
    dim, ffn, layers = shape.dim, shape.ffn_dim, shape.num_layers
    image = CLIP_TOKENS if shape.image_dim is not None else 0
    context = shape.text_len + image
    block = 2 * (6 * dim**2 + 2 * dim * ffn) * tokens + 4 * dim**2 * context
    ends = 2 * 4 * tokens * dim * (shape.in_dim + shape.out_dim) + 2 * shape.text_len * (shape.text_dim * dim + dim**2)
    if image:
        ends += 2 * image * (shape.image_dim**2 + shape.image_dim * dim)
    attention = 4 * dim * tokens * (tokens + context)
    if reference_tokens:
        ends += 2 * 4 * reference_tokens * dim * shape.in_dim
        block += 2 * (4 * dim**2 + 2 * dim * ffn) * reference_tokens
        attention += 4 * dim * reference_tokens * (tokens + reference_tokens)
    return Arithmetic(layers * block + ends, layers * attention)


def stacks_of(config: Config, tokens: int) -> list[tuple[Arithmetic, bool]]:
    """Of one sample, of so many tokens of video: the networks that run, and whether all of their weights train."""
    base = load_config(config.model.config)
    shape, is_full = shape_of(base), config.train.trainable == "full"
    reference = (FACE // (2 * shape.vae_spatial_factor)) ** 2 if config.stand_in is not None else 0
    stacks = [(forward_arithmetic(shape, tokens, reference), is_full)]
    if config.vace is not None:  # its blocks are a base's, and all of them train
        branch = replace(shape, num_layers=len(base["vace"]["vace_layers"]))
        stacks.append((forward_arithmetic(branch, tokens), True))
    return stacks


def flop_of(config: Config) -> Callable[[Batch], int]:
    """The arithmetic of a batch's forward and backward pass, without what is computed twice."""
    known: dict[int, int] = {}

    def count(batch: Batch) -> int:
        samples, _, frames, height, width = batch.mean.shape
        tokens = frames * (height // 2) * (width // 2)
        if tokens not in known:
            known[tokens] = sum(arithmetic.step(is_full) for arithmetic, is_full in stacks_of(config, tokens))
        return samples * known[tokens]

    return count


def memory_parts(config: Config, counts: Counts, tokens: int, ranks: int = 1) -> dict[str, int]:
    """Bytes on the device of one process of `ranks`, part by part."""
    shape, train = shape_of(load_config(config.model.config)), config.train
    per_weight = {"fp32": 4, "bf16": 2, "fp8": 1}[config.model.base_dtype]
    is_full = train.trainable == "full"
    stored = counts.transformer + counts.adapters
    # A float32 master and its gradient; where the model's own is bfloat16, its copy is among the weights.
    moments = MOMENTS[config.optim.name] * PER_MOMENT.get(config.optim.name, 4)
    # Each process keeps its share of them, but has all gradients for a moment, and float32 parameters for good.
    shares = ranks if config.memory.sharding == "zero2" else 1
    whole = 2 if is_full and per_weight == 2 else 8 if shares > 1 else 0
    state = counts.trained * (8 + moments) // shares + counts.trained * whole
    samples, layers = train.micro_batch, shape.num_layers
    block = int(BLOCK_ACTIVATIONS * samples * tokens * (60 * shape.dim + 4 * shape.ffn_dim))
    values, memory = samples * layers * tokens * shape.dim, config.memory
    inputs = 0 if memory.offload == "checkpoints" else values * (2 if memory.store_bf16 else 4)
    kept = {"none": block * (layers - 1), "full": inputs, "attention": inputs + 2 * values}[memory.checkpointing]
    return {
        "weights": stored * per_weight,
        "training": state,
        "kept for the backward pass": kept,
        "one block": block,
        "driver and kernels": CONTEXT,
    }


def estimate(config: Config, data: TrainingSet, ranks: int = 1) -> list[str]:
    """What --dry_run prints, a line each."""
    if config.vae is not None:
        return [f"{len(data.samples)} samples; no estimate is made for the VAE of a tiny model"]
    shape, train, counts = shape_of(load_config(config.model.config)), config.train, count_parameters(config)
    buckets = sorted({sample.bucket for sample in data.samples}, key=lambda each: -tokens_of(each, shape))
    lines = [
        f"parameters     transformer {counts.transformer:,}, adapters {counts.adapters:,}, LoRA {counts.lora:,}; "
        f"trained {counts.trained:,}"
    ]
    for bucket in buckets:
        stacks = stacks_of(config, tokens_of(bucket, shape))
        needed = sum(each.hardware(full, config.memory.checkpointing) for each, full in stacks) * train.global_batch
        step = sum(each.step(full) for each, full in stacks) * train.global_batch
        lines.append(
            f"{bucket!s:<14} {tokens_of(bucket, shape):,} tokens; a step of {train.global_batch}: "
            f"{step / 1e15:.4g} PFLOP, {needed / 1e15:.4g} with what is computed "
            f"twice; {needed / ranks / CEILING:.3g} s or more on {ranks} H100{'s' if ranks > 1 else ''}"
        )
    parts = memory_parts(config, counts, tokens_of(buckets[0], shape), ranks)
    shown = ", ".join(f"{name} {readable_bytes(size)}" for name, size in parts.items())
    lines.append(f"device memory  about {readable_bytes(sum(parts.values()))} a process: {shown}")
    lines.append(f"cache          {readable_bytes(cache_bytes(config, data))} on disk")
    if (own := config.error_recycling) is not None:
        sizes = [latent_shape(bucket, shape) for bucket in buckets]
        settings = (own.grids, own.per_grid, own.storage, own.dtype, own.pool)
        full = sum(bank_bytes(size, *settings) for size in sizes)
        lines.append(f"error bank     up to {readable_bytes(full)} on disk (limit_gib {own.limit_gib:g})")
    return lines


def latent_shape(bucket: Bucket, shape: WanConfig) -> tuple[int, int, int, int]:
    factor = shape.vae_spatial_factor
    return shape.out_dim, latent_frames(bucket.frames), bucket.height // factor, bucket.width // factor


def cache_bytes(config: Config, data: TrainingSet) -> int:
    """What the encodings of all samples take, those that are there already included."""
    encodings: Sequence = encodings_of(config)
    samples = (*data.samples, *data.held_out)
    all_views = (view for sample in samples for view in views(sample, config.data.cache_variants, config.data.fit))
    return sum(encoding.size(view) for view in all_views for encoding in encodings)
