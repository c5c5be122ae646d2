"""Memory: what a run will need, checked before weights load, and the modes that trade speed for it."""

import argparse
import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import psutil
import torch
from diffusers import DiffusionPipeline
from torch import nn

from configs import load_config
from errors import ResourceError
from models.audio_adapter import AudioAdapter
from models.vace import VaceBranch
from models.wan.config import VARIANTS, WanConfig
from models.wan.float8 import float8_linears
from models.wan.transformer import WanTransformer
from models.wan.vae import Tiling
from pipelines.pinned import pin_weights, pinned_bytes
from pipelines.settings import Settings, family_of, has_identity, shape_of

logger = logging.getLogger("selfsame")

GIB = 1024**3
# Each mode needs less device memory than the one before it.
MODES = ("resident", "model", "group", "sequential")
TEXT_ENCODER = 5_681_000_000 * 2  # bytes of umT5-xxl's encoder in bfloat16
IMAGE_ENCODER = 632_000_000 * 2  # of CLIP's in float16
MAPPED = 1 * GIB  # of RAM that a text encoder on the CPU takes beside its file, which stays mapped
READING = 1 * GIB  # of RAM for the tensor that is being read and cast, and the file system's share
FRAGMENTS, WORKSPACES = 1.03, GIB // 2  # what an allocator and the libraries take beside what was asked for


def next_mode(memory: str) -> str | None:
    """The mode to try when this one does not fit."""
    position = MODES.index(memory) + 1
    return MODES[position] if position < len(MODES) else None


# ----------------------------------------------------------------------------------------------- what a job needs


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


def beside_bytes(model: nn.Module, itemsize: int, fp8: bool) -> dict[str, int]:
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
    beside: Sequence[nn.Module] = (),
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
        beside: the layers of parts that run beside the transformer (VACE, audio), on the meta device.
        more, more_fp8: memory mode -> bytes of further weights (live LoRAs: those of one expert, under `resident` of
            all), beside weights in `itemsize` and in float8.
    """
    wide, narrow = (
        add_bytes(transformer_bytes(shape, itemsize, fp8), *(beside_bytes(layers, itemsize, fp8) for layers in beside))
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
    branch_layers = sum(len(getattr(layers, "vace_blocks", ())) for layers in beside)
    kept_text = 2 * shape.text_len * kept * (1 + branch_layers / shape.num_layers)

    cost = VaeCost.of(shape, vae)
    encoded = cells if encodes else 64 * 64 * (64 // spatial**2 or 1) if photos else 0
    windows = Tiling().windows(rows, columns)
    of_tiles = sum((row.stop - row.start) * (column.stop - column.start) for row, column in windows)
    tile = min(rows, Tiling().tile[0]) * min(columns, Tiling().tile[1])
    blended = 2 * 4 * 3 * spatial**2  # of a chunk: the frames put together, and their clamped copy
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
    beside = []
    with torch.device("meta"):
        if "vace" in config and not tiny:
            beside = [VaceBranch(ffn_dim=shape.ffn_dim, num_heads=shape.num_heads, **same, **config["vace"])]
        elif "square" in config.get("files", {}):
            beside = [AudioAdapter(**same)]
    return estimate_needs(
        shape,
        defaults["height"],
        defaults["width"],
        defaults["num_frames"],
        experts=len(config.get("experts") or (None,)),
        photos=int(has_identity(config) and not tiny),
        encodes=bool(beside) or family_of(config) not in ("t2v", "ti2v"),
        vae=config.get("vae"),
        text_encoder=0 if tiny else TEXT_ENCODER,
        beside=beside,
    )


# ------------------------------------------------------------------------------------------------ what is chosen


@dataclass(frozen=True)
class Placement:
    """Where the parts of a job live.

    memory: one of MODES.
    fp8: the blocks' linears are stored in float8. Changes the frames.
    tiled: frames are decoded in tiles. Changes the frames, where tiles meet.
    keeps_weights: weights that leave the device, or wait for their turn, stay in RAM; else they are read again.
    text_on_device: umT5 runs on the device, not on the CPU.
    past_on_device: the VAE's past frames wait there between chunks, not in RAM.
    fits: what was free is enough.
    passed_over: what is faster, and why it was not chosen.
    """

    memory: str
    fp8: bool
    tiled: bool
    keeps_weights: bool
    text_on_device: bool
    past_on_device: bool
    device_bytes: int
    host_bytes: int
    fits: bool = False
    passed_over: str = ""

    @property
    def name(self) -> str:
        """`group, fp8, tiles`: what can be seen in the video or in its speed."""
        return ", ".join([self.memory, *(["fp8"] if self.fp8 else []), *(["tiles"] if self.tiled else [])])

    def describe(self, free_device: int, free_host: int, on_gpu: bool = True) -> str:
        """What was chosen and why, in one line."""
        where = "" if self.text_on_device else "; prompts are encoded on the CPU"
        needed = f"about {self.device_bytes / GIB:.1f} of {free_device / GIB:.1f} GiB that are free"
        needed += f" on the GPU and {self.host_bytes / GIB:.1f} of {free_host / GIB:.1f} GiB of RAM" if on_gpu else ""
        return f"{self.name} ({needed}{self.passed_over and f'; {self.passed_over}'}){where}"


def choose_mode(
    needs: Needs,
    free_device: int,
    free_host: int,
    *,
    device: str = "cuda",
    memory: str = "auto",
    fp8: bool | None = None,
    tiled: bool | None = None,
) -> Placement:
    """The fastest placement that fits, a pure function: the same numbers give the same answer on every machine.

    From fast to slow: `resident`; `model`; `group`, whose transfers hide behind the computation. All three give the
    same frames. Only where none of them fits, because of the device or of the RAM, float8 is taken in these modes, and
    `sequential`, which is exact but many times slower, last. In each mode past frames of the VAE go to the RAM where
    the device has no room for them, and weights that the RAM does not hold are read again. Tiles, which can be seen,
    are taken only where no mode does without.

    Args:
        needs: from `estimate_needs` or `needs_of_config`.
        free_device, free_host: bytes.
        device: "cuda"; of "cpu" (and "mps") there is one memory, and nothing to move: resident, or where not all fits
            at once, part after part, each read when it is needed.
        memory: "auto", or the one mode that is asked for.
        fp8, tiled: None where `auto` may decide.

    Returns:
        a placement; where none fits, the one that needs least, with `fits` False. Never refuses.
    """
    asked, passed_over = memory != "auto", ""
    one_memory = device != "cuda"
    if memory == "auto" and one_memory:
        modes = [("resident", bool(fp8), True), ("model", bool(fp8), False)]
    elif memory == "auto":
        modes = [mode for mode in LADDER if fp8 in (None, mode[1])]
    else:
        modes = [(memory, bool(fp8), True)] + [(memory, bool(fp8), False)] * (not one_memory and memory != "resident")
    tiles = (False, True) if tiled is None and not asked else (bool(tiled),)
    room = int((free_device - WORKSPACES) / FRAGMENTS) if not one_memory else free_device
    text_on_device = not one_memory and needs.text_encoder <= room and memory not in ("group", "sequential")

    candidates = []
    for in_tiles in tiles:
        for mode, narrow, keeps in modes:
            for past_on_device in (True,) if one_memory else (False,) if in_tiles else PAST_ON_DEVICE[mode]:
                one = place(needs, mode, narrow, in_tiles, keeps, text_on_device, past_on_device)
                if one_memory:
                    one = replace(one, device_bytes=max(one.device_bytes, MAPPED * bool(needs.text_encoder)))
                of_device, of_host = one.device_bytes <= room, one_memory or one.host_bytes <= free_host
                if of_device and of_host:
                    return replace(one, fits=True, passed_over=passed_over)
                short = f"{one.host_bytes / GIB:.1f} GiB of RAM" if of_device else f"{one.device_bytes / GIB:.1f} GiB"
                passed_over = f"{one.name} would need {short}"
                candidates.append(one)
    return replace(min(candidates, key=lambda one: (one.device_bytes, one.host_bytes)), passed_over=passed_over)


# Where the VAE's past frames may wait: all tiles remember theirs until the end, so that those never wait on the device.
# To move the weights of `resident` away is faster than to move past frames each time.
PAST_ON_DEVICE = {
    "resident": (True,),
    "model": (True, False),
    "group": (True, False),
    "sequential": (False,),
}
# (memory, fp8, keeps_weights) from fast to slow
LADDER = (
    ("resident", False, True),
    ("model", False, True),
    ("model", False, False),
    ("group", False, True),
    ("group", False, False),
    ("resident", True, True),
    ("model", True, True),
    ("model", True, False),
    ("group", True, True),
    ("group", True, False),
    ("sequential", False, True),
    ("sequential", False, False),
)


def place(
    needs: Needs, memory: str, fp8: bool, tiled: bool, keeps: bool, text_on_device: bool, past_on_device: bool
) -> Placement:
    """One placement with what it takes: on the device the largest moment of a run, in RAM what waits there."""
    weights = (needs.weights_fp8 if fp8 else needs.weights)[memory]
    expert = needs.expert_fp8 if fp8 else needs.expert
    expert = pinned_bytes(expert) if memory == "group" else expert
    stays = needs.vae if memory == "resident" else 0
    work, past = (needs.tile, needs.tiles_past) if tiled else (needs.decode, needs.decode_past)
    encode_past = needs.encode_past
    # `model` moves the transformer away before the VAE works, the other modes keep what they have on the device.
    while_decoding = needs.vae + (0 if memory == "model" else weights)
    on_device = max(
        needs.text_encoder if text_on_device else 0,
        needs.image_encoder + stays,
        weights + stays + needs.call + needs.kept_photos + (0 if memory == "sequential" else needs.kept_text),
        while_decoding + work + (past if past_on_device else 0),
        while_decoding + needs.encode + (encode_past if past_on_device else 0),
    )
    waiting = {"resident": 0, "model": needs.experts if keeps else 0}.get(memory, needs.experts if keeps else 1)
    in_ram = waiting * expert + (0 if past_on_device else max(past, encode_past))
    in_ram = max(in_ram, 0 if text_on_device else MAPPED) + READING
    return Placement(memory, fp8, tiled, keeps, text_on_device, past_on_device, on_device, in_ram)


# ------------------------------------------------------------------------------------------------- before and during


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


# ------------------------------------------------------------------------------------------------- the README's table

CARDS = (8, 12, 16, 24, 32, 48, 80)  # GiB of GPU memory
USABLE = 0.95  # of it, beside a desktop and the driver's own
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
