"""The VAE: seconds to encode and to decode a clip, as a stream and by diffusers, in float32 and bf16."""

import copy
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
    """The limit is the dense bf16 rate, for float32 too, whose convolutions torch lets cuDNN compute in TF32."""
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
            bench.of_limit(flops[work], median) | bench.peak()
        )

    kinds = [("bf16", torch.bfloat16), ("float32", torch.float32)]
    for work in ("decode", "encode"):
        for name, dtype in kinds:
            # Measured by others (performance.md's sources): about a twentieth of the limit.
            time = bench.expect(flops[work], 0.03 if dtype == torch.bfloat16 else 0.015)
            needs = {"seconds": time, "device": BYTES_A_PIXEL[dtype] * pixels}
            peer = bench.attempt(f"{work}, diffusers, {name}", lambda w=work, d=dtype: row(w, d, True), **needs)
            ours = bench.attempt(f"{work}, ours, {name}", lambda w=work, d=dtype: row(w, d, False), **needs)
            if peer and ours:
                ours["x diffusers"] = peer["seconds"] / ours["seconds"]
            bench.free()
    time = 4 * bench.expect(flops["decode"], 0.03)
    bench.attempt(
        "decode, ours, bf16, tiles of a quarter of the frame",
        lambda: row("decode", torch.bfloat16, False, tiled=True),
        seconds=time,
        device=2 * GIB if bench.on_gpu else 0,
    )


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
