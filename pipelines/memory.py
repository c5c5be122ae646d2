"""Memory as it is: what is free, checked before weights load; moving weights by the mode; and the README's table.

needs.py        what a job needs, from shapes
placement.py    which mode it gets
"""

import argparse
import contextlib
import logging
import os
from collections.abc import Iterator

import psutil
import torch
from diffusers import DiffusionPipeline
from torch import nn

from configs import load_config
from errors import ResourceError
from pipelines.needs import GIB, needs_of_config, needs_of_pipeline
from pipelines.pinned import pin_weights
from pipelines.placement import choose_mode, next_mode
from pipelines.settings import Settings

logger = logging.getLogger("selfsame")


def free_bytes(device: torch.device) -> tuple[int, int]:
    """What is free on the device, and in RAM for this process: those of one machine share it."""
    host = psutil.virtual_memory().available
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    return on_device, host // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


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
        mode = None if settings.memory == "auto" else next_mode(settings.memory)
        advice = [f"--memory {mode}"] if mode else []
        advice += [] if settings.tiled or settings.memory == "auto" else ["--tiled"]  # auto has thought of it
        raise ResourceError(
            f"--width {settings.width} --height {settings.height} --num_frames {settings.num_frames} needs about "
            f"{needed / GIB:.1f} GiB on {device} with --memory {settings.memory}, which has {total / GIB:.1f} GiB; "
            f"try {', '.join([*advice, 'a smaller size', 'fewer frames'])}"
        )
    if needed > free:
        logger.warning(
            "about %.1f GiB will be needed on %s, %.1f of %.1f GiB are free",
            *(needed / GIB, device, free / GIB, total / GIB),
        )


def check_host_memory(memory: str, needed: int) -> None:
    """Refuse a run whose waiting weights cannot fit into RAM.

    Raises:
        ResourceError: the estimate exceeds RAM and swap in total.
    """
    ram = psutil.virtual_memory()
    total = ram.total + psutil.swap_memory().total
    if needed > total:
        raise ResourceError(
            f"--memory {memory}: about {needed / GIB:.1f} GiB of RAM are needed for weights that wait there, this "
            f"machine has {total / GIB:.1f} with its swap; try --memory auto, a smaller model or more swap"
        )
    if needed > ram.available:
        logger.warning(
            "about %.1f GiB of RAM will be needed, %.1f of %.1f are free",
            *(needed / GIB, ram.available / GIB, ram.total / GIB),
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
    if streams:  # else diffusers pins copies of all weights, while the weights themselves are in RAM too
        pin_weights(module)
    module.enable_group_offload(device, offload_device=torch.device("cpu"), use_stream=streams, **options)


def place_pipeline(pipeline: DiffusionPipeline, device: torch.device, memory: str, work: int = 0) -> None:
    """Put a pipeline of diffusers where the memory mode says, by diffusers' own means.

    work: bytes that a picture takes beside the weights; `auto` chooses by it and by the sizes of the parts.
    """
    if memory == "auto":
        needs, free = needs_of_pipeline(pipeline, work), free_bytes(device)
        chosen = choose_mode(needs, *free, device=device.type, fp8=False, tiled=False)
        memory = chosen.memory
        if device.type == "cuda":
            logger.info("--memory auto: %s", chosen.describe(*free))
    if memory == "group":
        streams = device.type == "cuda"
        for name, part in pipeline.components.items():
            if streams and name != "vae" and isinstance(part, nn.Module):
                pin_weights(part)
        # Not the VAE: a stream's copies of its weights stay float16 when diffusers casts it to decode, in float32.
        pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=streams, exclude_modules="vae")
    elif memory == "resident" or device.type == "cpu":  # a CPU has nowhere to offload to
        pipeline.to(device)
    elif memory == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)


# ------------------------------------------------------------------------------------------------- the README's table

CARDS = (8, 12, 16, 24, 32, 48, 80)  # GiB of GPU memory
USABLE = 0.95  # the share of it that is left beside a desktop and the driver
TABLE = (
    "stand-in-wan2.1",
    "stand-in-wan2.2",
    "wan2.1-t2v-1.3B",
    "wan2.1-i2v-14B-480P",
    "wan2.1-i2v-14B-720P",
    "wan2.2-i2v-A14B",
    "wan2.2-ti2v-5B",
    "wan2.1-vace-1.3B",
    "wan2.1-vace-14B",
    "stableavatar-1.3B",
)


def table(ram: int = 60) -> str:
    """GPU memory x model -> the mode that `--memory auto` chooses and what it is estimated to need, as Markdown.

    ram: GiB that are free.
    """
    lines = [
        "| GPU memory | " + " | ".join(f"{card} GB" for card in CARDS) + " |",
        "|---|" + "---|" * len(CARDS),
    ]
    for name in TABLE:
        config = load_config(name)
        needs, defaults, cells = needs_of_config(config), config["defaults"], []
        for card in CARDS:
            chosen = choose_mode(needs, int(card * USABLE * GIB), ram * GIB)
            cells.append(f"{chosen.name} {chosen.device_bytes / GIB:.1f}" if chosen.fits else "–")
        size = f"{defaults['width']}x{defaults['height']}, {defaults['num_frames']}"
        lines.append(f"| `{name}` ({size}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Which memory mode `--memory auto` chooses, by GPU memory and model.")
    parser.add_argument("--ram", type=int, default=60, help="GiB of RAM that are free (60)")
    print(table(parser.parse_args().ram))
