"""Memory: what a run will need, checked before weights load, and the modes that trade speed for it."""

import contextlib
import logging
from collections.abc import Iterator

import psutil
import torch
from diffusers import DiffusionPipeline
from torch import nn

from errors import ResourceError
from models.wan.config import WanConfig
from models.wan.transformer import WanTransformer
from pipelines.settings import Settings

logger = logging.getLogger("selfsame")

GIB = 1024**3
# Each mode needs less device memory than the one before it.
MODES = ("resident", "model", "group", "sequential")


def next_mode(memory: str) -> str | None:
    """The mode to try when this one does not fit."""
    position = MODES.index(memory) + 1
    return MODES[position] if position < len(MODES) else None


def estimate_device_bytes(settings: Settings, config: WanConfig, bytes_per_value: int, num_experts: int) -> int:
    """Peak bytes on the device, from shapes: weights that the memory mode keeps there, and the larger of one
    transformer call and one decoded chunk of frames. An estimate to refuse the hopeless, not a measurement.
    """
    with torch.device("meta"):
        transformer = WanTransformer(**config.as_dict())
    whole = sum(p.numel() for p in transformer.parameters())
    blocks = sum(p.numel() for p in transformer.blocks.parameters())
    per_block = blocks // config.num_layers
    weight_bytes = 1 if settings.fp8 else bytes_per_value
    resident_values = {
        "resident": whole * num_experts,
        "model": whole,
        "group": whole - blocks + 2 * per_block,
        "sequential": per_block,
    }[settings.memory]

    frames = (settings.num_frames - 1) // 4 + 1
    spatial = config.vae_spatial_factor
    cells = (settings.height // spatial) * (settings.width // spatial)
    tokens = frames * cells // 4
    # One block: the float32 stream with two temporaries; q, k, v, attention's output; the wide feed-forward layer.
    call = tokens * (12 * config.dim + bytes_per_value * (4 * config.dim + config.ffn_dim))
    kept_keys = 2 * config.num_layers * config.dim * bytes_per_value  # per token of text or reference
    call += kept_keys * (2 * config.text_len + 1024 * len(settings.stand_in_photos))
    # The VAE decoder's past frames (specs: 2 · cells · 75,700 values) and a chunk of 4 frames at full size, float32.
    shown_cells = min(cells, 30 * 52) if settings.tiled else cells
    decode = 4 * (2 * shown_cells * 75_700 + 4 * shown_cells * spatial**2 * 96 * 4)
    return resident_values * weight_bytes + max(call, decode if config.dim >= 1024 else 0)


def check_memory(settings: Settings, needed: int, device: torch.device) -> None:
    """Refuse a run that cannot fit.

    Raises:
        ResourceError: the estimate exceeds what the device has in total.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    if needed > total:
        mode = next_mode(settings.memory)
        advice = [f"--memory {mode}"] if mode else []
        advice += [] if settings.tiled else ["--tiled"]
        raise ResourceError(
            f"--width {settings.width} --height {settings.height} --num_frames {settings.num_frames} needs about "
            f"{needed / GIB:.1f} GiB on {device} with --memory {settings.memory}, which has {total / GIB:.1f} GiB; "
            f"try {', '.join([*advice, 'a smaller size', 'fewer frames'])}"
        )
    if needed > free:
        logger.warning(
            "about %.1f GiB will be needed on %s, %.1f of %.1f GiB are free",
            needed / GIB,
            device,
            free / GIB,
            total / GIB,
        )


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def stage(name: str, advice: str) -> Iterator[None]:
    """Name the stage that ran out of memory.

    Raises:
        ResourceError: in place of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(f"out of memory while {name}; {advice}") from error


def free_cached(device: torch.device) -> None:
    """Give memory that torch holds for re-use back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def offload_groups(module: nn.Module, device: torch.device, memory: str, prefetch: bool = True) -> None:
    """Keep the weights in RAM and bring them to the device as they run.

    group: one block at a time, on CUDA with the next one prefetched on a second stream, which hides the transfer behind
    the computation at usual sizes. sequential: one layer at a time; slowest, needs least. `prefetch` learns the order
    of the blocks from the module's own forward pass; a module whose blocks run outside it goes without.
    """
    streams = device.type == "cuda" and memory == "group" and prefetch
    options = (
        {"offload_type": "block_level", "num_blocks_per_group": 1}
        if memory == "group"
        else {"offload_type": "leaf_level"}
    )
    module.enable_group_offload(device, offload_device=torch.device("cpu"), use_stream=streams, **options)


def place_pipeline(pipeline: DiffusionPipeline, device: torch.device, memory: str) -> None:
    """Put a pipeline of diffusers where the memory mode says, by diffusers' own means."""
    if memory == "group":
        streams = device.type == "cuda"
        # Not the VAE: a stream's copies of its weights stay float16 when diffusers casts it to decode, in float32.
        pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=streams, exclude_modules="vae")
    elif memory == "resident" or device.type == "cpu":  # a CPU has nowhere to offload to
        pipeline.to(device)
    elif memory == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
