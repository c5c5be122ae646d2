"""The VAE: seconds to encode and to decode a clip, as a stream and by diffusers, in float32 and bf16."""

import copy
import functools
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sections.bench import GIB, Bench, Row
from models.wan.vae import Tiling, WanVAE

# What a decoder takes at its peak, estimated from above: only to leave out what cannot fit.
BYTES_A_PIXEL = {torch.float32: 40_000, torch.bfloat16: 20_000}


def measure(bench: Bench) -> None:
    """The limit is the dense bf16 rate, for float32 too, whose convolutions torch lets cuDNN compute in TF32. Beside
    the memory at the peak stands what `--memory auto` reckons with.
    """
    frames, (count, height, width) = bench.sizes.num_frames, bench.sizes.latents
    exact = AutoencoderKLWan(**bench.sizes.vae).eval().requires_grad_(False)
    scale = exact.config.scale_factor_spatial
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(1, exact.config.z_dim, count, height, width, generator=generator).to(bench.device)
    video = torch.randn(1, 3, frames, scale * height, scale * width, generator=generator).clamp_(-1, 1)
    flops = count_flops(exact, latents, video)
    pixels = scale**2 * height * width

    def row(work: str, dtype: torch.dtype, theirs: bool, tiled: bool = False) -> Row:
        model = copy.deepcopy(exact).to(bench.device, dtype)
        tiling = Tiling((height // 2, width // 2), (height // 4, width // 4)) if tiled else None
        if not theirs:
            model = WanVAE(model)

        @torch.no_grad()
        def run() -> None:
            if theirs and work == "decode":
                model.decode(latents.to(dtype))
            elif theirs:
                model.encode(video.to(bench.device, dtype))
            else:
                stream = model.decode_stream if work == "decode" else model.encode_stream
                for _ in stream(latents if work == "decode" else video, tiling=tiling):
                    pass

        median = bench.median(run)
        return {"seconds": median, "ms a frame": 1000 * median / frames} | (
            bench.of_limit(flops[work], median) | bench.peak() | ({} if theirs else estimated(work, dtype, tiled))
        )

    def estimated(work: str, dtype: torch.dtype, tiled: bool) -> Row:
        needs = bench.estimate(bench.sizes.small, dtype.itemsize)
        at_work = {"encode": needs.encode + needs.encode_past, "decode": needs.decode + needs.decode_past}[work]
        at_work = needs.tile + needs.tiles_past if tiled else at_work
        return {"estimated GiB": (needs.vae + at_work) / GIB}

    def attempt(work: str, who: str, dtype: torch.dtype, tiled: bool = False) -> Row | None:
        name = "bf16" if dtype == torch.bfloat16 else "float32"
        # Others measured a twentieth of the limit in bf16. Tiles of half the sides: nine quarters.
        time = bench.expect(flops[work], 0.05 if dtype == torch.bfloat16 else 0.025) * (2.25 if tiled else 1)
        return bench.attempt(
            f"{work}, {who}, {name}" + (", tiles of a quarter of the frame" if tiled else ""),
            functools.partial(row, work, dtype, who == "diffusers", tiled),
            seconds=time,
            device=BYTES_A_PIXEL[dtype] * pixels // (4 if tiled else 1) if bench.on_gpu else 0,
        )

    for work in ("decode", "encode"):
        peer = attempt(work, "diffusers", torch.bfloat16)
        ours = attempt(work, "ours", torch.bfloat16)
        if peer and ours:
            ours["x diffusers"] = peer["seconds"] / ours["seconds"]
        attempt(work, "ours", torch.float32)
        bench.free()
    attempt("decode", "ours", torch.bfloat16, tiled=True)


def count_flops(vae: AutoencoderKLWan, latents: Tensor, video: Tensor) -> dict[str, int]:
    """Of decoding and encoding these, counted on the meta device, where nothing is computed.

    From the third latent frame on each costs the same, so three are counted.
    """
    stream = WanVAE(copy.deepcopy(vae).to("meta"))

    def counted(work: Callable, given: Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            for _ in work(given.to("meta")):
                pass
        return counter.get_total_flops()

    found = {}
    for name, work, given, group in (
        ("decode", stream.decode_stream, latents, 1),
        ("encode", stream.encode_stream, video, stream.temporal_factor),
    ):
        two, three = (counted(work, given[:, :, : 1 + count * group]) for count in (1, 2))
        found[name] = three + (latents.shape[2] - 3) * (three - two)
    return found
