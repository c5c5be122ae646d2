"""Seconds to decode a clip: our stream against diffusers' `AutoencoderKLWan.decode`, with the same weights.

    python -m benchmarks.vae_speed
    python -m benchmarks.vae_speed --device cuda --dtype bfloat16 --base-dim 96 --height 480 --width 832 --chunk 2

The two take turns in one process. Beside the medians stands how much of the machine each uses: the network's floating
point operations a second, against those of a large matrix product measured in the same run.
"""

import argparse
import copy
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--base-dim", type=int, default=32, help="width of the network; the released one has 96")
    parser.add_argument("--frames", type=int, default=17, help="4·n + 1")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--chunk", type=int, nargs="+", default=[1, 2], help="latent frames at a time, in our stream")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    import torch
    from diffusers import AutoencoderKLWan
    from torch.utils.flop_counter import FlopCounterMode

    from models.wan.vae import WanVAE

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    theirs = AutoencoderKLWan(base_dim=args.base_dim).eval().to(device, dtype)
    ours = WanVAE(copy.deepcopy(theirs))
    size = (args.frames - 1) // 4 + 1, args.height // ours.spatial_factor, args.width // ours.spatial_factor
    latents = torch.randn(1, ours.latent_channels, *size).to(device)
    denormalized = (latents * ours._std.to(device) + ours._mean.to(device)).to(dtype)

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()

    def stream(chunk: int) -> None:
        for _ in ours.decode_stream(latents, chunk):
            pass

    def whole() -> None:
        with torch.no_grad():
            theirs.decode(denormalized)

    def seconds(run) -> float:
        wait()
        start = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - start

    with FlopCounterMode(display=False) as counter:
        stream(1)
    flops = counter.get_total_flops()
    side = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    limit = 2 * side**3 / min(seconds(lambda: matrix @ matrix) for _ in range(5))

    runs = {"diffusers": whole} | {f"stream, chunk {n}": lambda n=n: stream(n) for n in args.chunk}
    times = {name: [] for name in runs}
    for run in runs.values():
        run()  # warm up
    for _ in range(args.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))

    print(f"{args.frames} frames of {args.width} × {args.height}, base dim {args.base_dim}, {args.dtype}, {device}")
    print(f"{flops / 1e9:.1f} GFLOP; matrix product {limit / 1e9:.0f} GFLOP/s")
    reference = statistics.median(times["diffusers"])
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"{name:16s} median {median:7.3f} s ({min(values):.3f} to {max(values):.3f}), "
            f"{reference / median:.2f} × diffusers, {flops / median / limit:.0%} of the matrix product's rate"
        )


if __name__ == "__main__":
    main()
